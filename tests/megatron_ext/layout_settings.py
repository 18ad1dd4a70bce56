"""Settings of section `parallel` that tests put layouts together from."""

PLAIN = {"use_distributed_optimizer": False}
ZERO1 = {"use_distributed_optimizer": True}
TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
