#!/bin/bash
#SBATCH --job-name=175b
#SBATCH --account=PROJECT
#SBATCH --partition=batch
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --network=disable_rdzv_get
#SBATCH --exclusive

# Written by megatron-ext launch for OLCF Frontier (AMD MI250X): 128 ranks.
set -euo pipefail

num_nodes=16
ranks_per_node=8
python=python
words=(frontier-175b log.run_dir=/lustre/orion/PROJECT/scratch/runs/175b)
run_dir=/lustre/orion/PROJECT/scratch/runs/175b
max_restarts=3
max_requeues=100

mkdir -p -- "$run_dir"
# Left from a job that ended before it could obey.
rm -f -- "$run_dir/STOP"

# The site's environment (frontier).
set +u
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
set -u

rank=("$python" -u -m megatron_ext train "${words[@]}")
step=(srun --nodes="$num_nodes" --ntasks="$((num_nodes * ranks_per_node))" --ntasks-per-node="$ranks_per_node" --cpus-per-task=7 --gpus-per-task=1 --gpu-bind=closest --kill-on-bad-exit=1 --unbuffered)

last_saved() { cat -- "$run_dir/latest_checkpointed_iteration.txt" 2>/dev/null || true; }

is_time_up=0
was_interrupted=0
on_warning() {
    echo "job script: the time limit is near; asking the run to save and stop"
    is_time_up=1
    was_interrupted=1
    touch -- "$run_dir/STOP"
}
trap on_warning USR1
is_cancelled=0
on_cancel() {
    is_cancelled=1
    was_interrupted=1
}
trap on_cancel TERM

run_step() {
    local code step_pid
    "${step[@]}" "${rank[@]}" &
    step_pid=$!
    while true; do
        code=0
        wait "$step_pid" || code=$?
        # A signal ends the waiting, not the step.
        (( was_interrupted )) || return "$code"
        was_interrupted=0
        kill -0 "$step_pid" 2>/dev/null || (( code > 128 )) || return "$code"
    done
}

at_begin=$(last_saved)
# Slurm queues a job again when it loses a node, as often as that happens.
starts="$run_dir/.starts-$SLURM_JOB_ID"
num_requeues=${SLURM_RESTART_COUNT:-0}
# Nothing where the file is not there yet.
num_same=$(grep -cxs -- "${at_begin:-none}" "$starts" || true)
if (( num_requeues > max_requeues )); then
    echo "job script: queued again $num_requeues times, $max_requeues are allowed" >&2
    exit 1
elif (( num_requeues > 0 && ${num_same:-0} > 1 )); then
    echo "job script: the last two starts saved no step (${at_begin:-none}); not a third" >&2
    exit 1
fi
echo "${at_begin:-none}" >>"$starts"
num_restarts=0
while true; do
    at_start=$(last_saved)
    code=0
    run_step || code=$?
    saved=$(last_saved)
    # A run that obeys removes the file; one that came to its end leaves it.
    if (( is_time_up && code == 0 )) && [[ ! -e "$run_dir/STOP" ]]; then
        if [[ "$saved" == "$at_begin" ]]; then
            echo "job script: no step was saved since this job began; not queued again" >&2
            exit 1
        elif (( num_requeues >= max_requeues )); then
            echo "job script: queued again $max_requeues times already; not again" >&2
            exit 1
        fi
        echo "job script: saved step $saved; queued again"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    case $code in
        0) rm -f -- "$run_dir/STOP"; exit 0 ;;
        2 | 130) exit "$code" ;;
    esac
    (( ! is_cancelled )) || exit "$code"
    if [[ "$saved" == "$at_start" ]] || (( num_restarts >= max_restarts )); then
        echo "job script: the ranks ended with code $code; not started again" \
            "(saved step: ${saved:-none}, $num_restarts restarts)" >&2
        exit "$code"
    fi
    num_restarts=$(( num_restarts + 1 ))
    echo "job script: the ranks ended with code $code after saving step $saved;" \
        "started again, $num_restarts of $max_restarts times"
done
