# Modules of OLCF's page for PyTorch (July 2026). rccl-net-plugin sets RCCL's and libfabric's variables.
module load PrgEnv-gnu/8.7.0 cpe/26.03 miniforge3/23.11.0-0 rocm/7.1.1 rccl-net-plugin craype-accel-amd-gfx90a
# The programming environment is not the machine's default one: its libraries come first.
export LD_LIBRARY_PATH="${CRAY_LD_LIBRARY_PATH:-}${CRAY_LD_LIBRARY_PATH:+:}${LD_LIBRARY_PATH:-}"

# What rccl-net-plugin sets, for an environment that was built without the module. The user's own values win.
export NCCL_CROSS_NIC="${NCCL_CROSS_NIC-1}"
export NCCL_NET_GDR_LEVEL="${NCCL_NET_GDR_LEVEL-PHB}"
export HSA_FORCE_FINE_GRAIN_PCIE="${HSA_FORCE_FINE_GRAIN_PCIE-1}"
export FI_MR_CACHE_MONITOR="${FI_MR_CACHE_MONITOR-kdreg2}"
export FI_CXI_DISABLE_HOST_REGISTER="${FI_CXI_DISABLE_HOST_REGISTER-1}"
export FI_CXI_DEFAULT_CQ_SIZE="${FI_CXI_DEFAULT_CQ_SIZE-131072}"
export FI_CXI_DEFAULT_TX_SIZE="${FI_CXI_DEFAULT_TX_SIZE-2048}"
export FI_CXI_RDZV_PROTO="${FI_CXI_RDZV_PROTO-alt_read}"
export FI_CXI_RDZV_EAGER_SIZE="${FI_CXI_RDZV_EAGER_SIZE-0}"
export FI_CXI_RDZV_THRESHOLD="${FI_CXI_RDZV_THRESHOLD-0}"
export FI_CXI_RDZV_GET_MIN="${FI_CXI_RDZV_GET_MIN-0}"
export FI_CXI_RX_MATCH_MODE="${FI_CXI_RX_MATCH_MODE-hybrid}"

# Several nodes: end at once if the plugin is missing, in place of training at the speed of TCP. On one node
# the plugin does not start, and RCCL must be told to use sockets.
if (( ${num_nodes:-1} > 1 )); then
    export NCCL_NET="${NCCL_NET-OFI}"
else
    export NCCL_NET="${NCCL_NET-Socket}"
fi
# If a first collective hangs, OLCF advises hsn0 alone.
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME-hsn0,hsn1,hsn2,hsn3}"
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME-hsn0}"
export MASTER_ADDR="${MASTER_ADDR-$(hostname -i | cut -d ' ' -f 1)}"

# Caches of compiled kernels on the node: home is NFS, and thousands of ranks would write one file.
export MIOPEN_USER_DB_PATH="${MIOPEN_USER_DB_PATH-/tmp/miopen-${USER:-user}-${SLURM_JOB_ID:-0}}"
export MIOPEN_CUSTOM_CACHE_DIR="${MIOPEN_CUSTOM_CACHE_DIR-$MIOPEN_USER_DB_PATH}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR-/tmp/triton-${USER:-user}-${SLURM_JOB_ID:-0}}"
# Compute nodes see the outside only through a proxy; nothing is fetched.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS-7}"
# Kernels of communication and products on one queue in the order they were asked for: overlap needs it.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS-1}"
# The burst buffer, where an environment is unpacked (--broadcast).
export node_storage="/mnt/bb/${USER:-user}"
