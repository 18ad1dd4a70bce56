# More than one queue of kernels, so that the experts' exchanges run beside products. (1 is the rule of Hopper.)
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS-32}"
# NVLink SHARP reserves memory on each GPU; it pays only with registered buffers.
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE-0}"
# Tensors of collectives are kept alive by us, not by recording streams: memory returns sooner.
export TORCH_NCCL_AVOID_RECORD_STREAMS="${TORCH_NCCL_AVOID_RECORD_STREAMS-1}"
# Segments that grow fragment less; graphs must then not register buffers.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF-expandable_segments:True}"
export NCCL_GRAPH_REGISTER="${NCCL_GRAPH_REGISTER-0}"
# HybridEP: how many GPUs share NVLink, over several nodes.
export NVLINK_DOMAIN_SIZE="${NVLINK_DOMAIN_SIZE-72}"
export USE_MNNVL="${USE_MNNVL-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS-8}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR-/tmp/triton-${USER:-user}-${SLURM_JOB_ID:-0}}"
# NVLink between nodes needs memory that CUDA maps itself; with 0 it is turned off without a word.
export NCCL_CUMEM_ENABLE="${NCCL_CUMEM_ENABLE-1}"
# Network cards read the GPU's memory through Grace.
export NCCL_NET_GDR_C2C="${NCCL_NET_GDR_C2C-1}"
