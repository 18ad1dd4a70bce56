#!/bin/bash

# Written by megatron-ext launch for This machine: 2 ranks.
set -euo pipefail

ranks_per_node=2
python=python
words=(quickstart log.run_dir=/tmp/runs/quickstart)

rank=("$python" -u -m torch.distributed.run --standalone 
    --nproc-per-node="$ranks_per_node" -m megatron_ext train "${words[@]}")
exec "${rank[@]}"
