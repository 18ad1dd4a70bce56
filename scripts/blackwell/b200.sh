#!/bin/bash
#SBATCH --job-name=7b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --exclusive
#SBATCH --gpus-per-node=8

# Written by megatron-ext launch for NVIDIA B200, 8 a node: 32 ranks.
set -euo pipefail

num_nodes=4
ranks_per_node=8
python=python
words=(7b log.run_dir=/scratch/runs/7b)
run_dir=/scratch/runs/7b
max_restarts=3
max_requeues=100

mkdir -p -- "$run_dir"
# Left from a job that ended before it could obey.
rm -f -- "$run_dir/STOP"

# The site's environment (blackwell).
set +u
# More than one queue of kernels, so that the experts' exchanges run beside products. (1 is the rule of Hopper.)
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS-32}"
# NVLink SHARP reserves memory on each GPU; it pays only with registered buffers.
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE-0}"
# Tensors of collectives are kept alive by us, not by recording streams: memory returns sooner.
export TORCH_NCCL_AVOID_RECORD_STREAMS="${TORCH_NCCL_AVOID_RECORD_STREAMS-1}"
# Segments that grow fragment less; graphs must then not register buffers.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF-expandable_segments:True}"
export NCCL_GRAPH_REGISTER="${NCCL_GRAPH_REGISTER-0}"
# HybridEP: how many GPUs share NVLink, and that they lie in one node.
export NVLINK_DOMAIN_SIZE="${NVLINK_DOMAIN_SIZE-8}"
export USE_MNNVL="${USE_MNNVL-0}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS-8}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR-/tmp/triton-${USER:-user}-${SLURM_JOB_ID:-0}}"
set -u

rank=("$python" -u -m megatron_ext train "${words[@]}")
# Each rank on the cores and the memory of the processor that its GPU hangs on.
# shellcheck disable=SC2016
rank=(bash -c 'command -v numactl >/dev/null || exec "$@"; node=$((SLURM_LOCALID / 4)); exec numactl --cpunodebind="$node" --membind="$node" "$@"' numa "${rank[@]}")
step=(srun --nodes="$num_nodes" --ntasks="$((num_nodes * ranks_per_node))" --ntasks-per-node="$ranks_per_node" --cpus-per-task=14 --gpus-per-node=8 --mpi=none --kill-on-bad-exit=1 --unbuffered)

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
