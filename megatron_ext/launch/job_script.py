"""The job script as text: what Slurm is asked for, the site's environment, the step, what follows.

Every value that a user gave stands in quotes or has been checked (`job`). The script waits for its
step in the background, so that Slurm's warning before the time limit reaches the script: it then
asks the run by its trigger file to save and stop. What follows the step's end:

    0, and the run obeyed   queue the job again, if a checkpoint was written since it began and not
       the script's STOP    more than max_requeues times
    0 otherwise             the run is finished, or the user asked it to stop: nothing follows
    2, 130; or after        a mistake in the configuration, Ctrl-C; scancel, of which the script is
       SIGTERM              told too: nothing follows
    else                    a rank was lost: start again on the same nodes, if a checkpoint was
                            written since the last start and not more than max_restarts times
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from megatron_ext import exit_codes
from megatron_ext.launch.job import Job

_TEXT_AFTER_STEP = """
last_saved() {{ cat -- "$run_dir/latest_checkpointed_iteration.txt" 2>/dev/null || true; }}

is_time_up=0
was_interrupted=0
on_warning() {{
    echo "job script: the time limit is near; asking the run to save and stop"
    is_time_up=1
    was_interrupted=1
    touch -- "$run_dir/STOP"
}}
trap on_warning USR1
is_cancelled=0
on_cancel() {{
    is_cancelled=1
    was_interrupted=1
}}
trap on_cancel TERM

run_step() {{
    local code step_pid
    "${{step[@]}}" "${{rank[@]}}" &
    step_pid=$!
    while true; do
        code=0
        wait "$step_pid" || code=$?
        # A signal ends the waiting, not the step.
        (( was_interrupted )) || return "$code"
        was_interrupted=0
        kill -0 "$step_pid" 2>/dev/null || (( code > 128 )) || return "$code"
    done
}}

at_begin=$(last_saved)
# Slurm queues a job again when it loses a node, as often as that happens.
starts="$run_dir/.starts-$SLURM_JOB_ID"
num_requeues=${{SLURM_RESTART_COUNT:-0}}
# Nothing where the file is not there yet.
num_same=$(grep -cxs -- "${{at_begin:-none}}" "$starts" || true)
if (( num_requeues > max_requeues )); then
    echo "job script: queued again $num_requeues times, $max_requeues are allowed" >&2
    exit {failed}
elif (( num_requeues > 0 && ${{num_same:-0}} > 1 )); then
    echo "job script: the last two starts saved no step (${{at_begin:-none}}); not a third" >&2
    exit {failed}
fi
echo "${{at_begin:-none}}" >>"$starts"
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
            exit {failed}
        elif (( num_requeues >= max_requeues )); then
            echo "job script: queued again $max_requeues times already; not again" >&2
            exit {failed}
        fi
        echo "job script: saved step $saved; queued again"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    case $code in
        0) rm -f -- "$run_dir/STOP"; exit 0 ;;
        {bad_input} | 130) exit "$code" ;;
    esac
    (( ! is_cancelled )) || exit "$code"
    if [[ "$saved" == "$at_start" ]] || (( num_restarts >= max_restarts )); then
        echo "job script: the ranks ended with code $code; not started again" \\
            "(saved step: ${{saved:-none}}, $num_restarts restarts)" >&2
        exit "$code"
    fi
    num_restarts=$(( num_restarts + 1 ))
    echo "job script: the ranks ended with code $code after saving step $saved;" \\
        "started again, $num_restarts of $max_restarts times"
done
"""


def render(job: Job) -> str:
    """The whole script, for bash."""
    sections = ["\n".join(_header(job)), "\n".join(_values(job))]
    if job.cluster.environment:
        # What modules run may ask for variables that nobody has set.
        sections.append(
            f"# The site's environment ({job.cluster.name}).\nset +u\n"
            f"{job.cluster.environment}\nset -u"
        )
    if job.request.broadcast:
        sections.append("\n".join(_broadcast(job)))
    sections.append("\n".join(_commands(job)))
    after = _TEXT_AFTER_STEP.format(
        failed=exit_codes.FAILED,
        bad_input=exit_codes.BAD_INPUT,
    )
    if job.cluster.profile.batch_system == "none":
        return "\n\n".join(sections) + '\nexec "${rank[@]}"\n'
    return "\n\n".join(sections) + "\n" + after


def sbatch_options(job: Job) -> Iterator[str]:
    """What Slurm is asked for."""
    request, profile = job.request, job.cluster.profile
    yield f"--job-name={request.job_name}"
    for name, value in (
        ("account", request.account),
        ("partition", request.partition or profile.partition),
        ("qos", request.qos),
        ("reservation", request.reservation),
    ):
        if value:
            yield f"--{name}={value}"
    yield f"--nodes={request.num_nodes}"
    if job.segment:
        yield f"--segment={job.segment}"
    if job.launcher == "srun":
        yield f"--ntasks-per-node={profile.ranks_per_node}"
    else:
        yield "--ntasks-per-node=1"
    yield f"--time={job.time}"
    yield f"--signal=B:USR1@{profile.signal_seconds}"
    yield "--requeue"
    yield "--open-mode=append"
    yield "--output=%x-%j.out"
    yield from profile.sbatch_options
    if request.broadcast:
        yield from profile.broadcast_options


def _header(job: Job) -> Iterator[str]:
    yield "#!/bin/bash"
    if job.cluster.profile.batch_system == "slurm":
        yield from (f"#SBATCH {option}" for option in sbatch_options(job))
    yield ""
    title = job.cluster.profile.title
    yield f"# Written by megatron-ext launch for {title}: {job.num_ranks} ranks."
    yield "set -euo pipefail"


def _values(job: Job) -> Iterator[str]:
    request, profile = job.request, job.cluster.profile
    is_batch = profile.batch_system == "slurm"
    if is_batch:
        yield f"num_nodes={request.num_nodes}"
    yield f"ranks_per_node={profile.ranks_per_node}"
    yield f"python={shlex.quote(request.python)}"
    yield f"words=({shlex.join(request.words)})"
    if is_batch:
        yield f"run_dir={shlex.quote(str(request.run_dir))}"
        yield f"max_restarts={request.max_restarts}"
        yield f"max_requeues={request.max_requeues}"
        yield ""
        yield 'mkdir -p -- "$run_dir"'
        yield "# Left from a job that ended before it could obey."
        yield 'rm -f -- "$run_dir/STOP"'


def _broadcast(job: Job) -> Iterator[str]:
    assert job.request.broadcast is not None
    yield "# The environment on the nodes' own disks: thousands of ranks import from there at once."
    yield f"archive={shlex.quote(job.request.broadcast)}"
    yield "# shellcheck disable=SC2016"
    yield 'unpack=\'set -e; mkdir -p "$1/env"; tar -xf "$1/megatron-ext.tar" -C "$1/env"'
    yield "# What conda-pack left of the old place."
    yield 'if [[ -e "$1/env/bin/conda-unpack" ]]; then "$1/env/bin/conda-unpack"; fi\''
    yield 'sbcast -pf "$archive" "$node_storage/megatron-ext.tar"'
    yield (
        'srun --nodes="$num_nodes" --ntasks="$num_nodes" --ntasks-per-node=1 '
        'bash -c "$unpack" unpack "$node_storage"'
    )
    yield 'python="$node_storage/env/bin/python"'


def _commands(job: Job) -> Iterator[str]:
    if job.cluster.profile.batch_system == "none":
        yield from _torchrun_here()
        return
    yield from _srun_step(job) if job.launcher == "srun" else _torchrun_step(job)
    yield from _container(job)


def _srun_step(job: Job) -> Iterator[str]:
    profile = job.cluster.profile
    yield 'rank=("$python" -u -m megatron_ext train "${words[@]}")'
    if profile.ranks_per_numa_node:
        yield from _numa(profile.ranks_per_numa_node)
    options = [
        '--nodes="$num_nodes"',
        '--ntasks="$((num_nodes * ranks_per_node))"',
        '--ntasks-per-node="$ranks_per_node"',
    ]
    if profile.cpus_per_task:
        options.append(f"--cpus-per-task={profile.cpus_per_task}")
    gpu_options = profile.gpu_options if profile.gpus_per_rank else []
    options += [shlex.quote(each) for each in (*gpu_options, *profile.srun_options)]
    # One rank that ends badly ends all: the others would wait for it for ever.
    options += ["--kill-on-bad-exit=1", "--unbuffered"]
    yield f"step=(srun {' '.join(options)})"


def _torchrun_step(job: Job) -> Iterator[str]:
    profile = job.cluster.profile
    yield "# The first node keeps the ranks' meeting place; its port differs from job to job."
    yield 'head_node="${MASTER_ADDR-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"'
    yield "port=$((15000 + SLURM_JOB_ID % 15000))"
    yield 'rank=("$python" -u -m torch.distributed.run --nnodes="$num_nodes" '
    yield '    --nproc-per-node="$ranks_per_node" --max-restarts="$max_restarts" '
    yield '    --rdzv-backend=c10d --rdzv-endpoint="$head_node:$port" '
    yield '    --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" '
    yield '    -m megatron_ext train "${words[@]}")'
    options = ['--nodes="$num_nodes"', '--ntasks="$num_nodes"', "--ntasks-per-node=1"]
    if profile.cpus_per_task:
        options.append(f"--cpus-per-task={profile.cpus_per_task * profile.ranks_per_node}")
    if profile.gpus_per_rank:
        options.append('--gpus-per-node="$ranks_per_node"')
    options += [shlex.quote(each) for each in profile.srun_options]
    options += ["--kill-on-bad-exit=1", "--unbuffered"]
    yield f"step=(srun {' '.join(options)})"


def _torchrun_here() -> Iterator[str]:
    yield 'rank=("$python" -u -m torch.distributed.run --standalone '
    yield '    --nproc-per-node="$ranks_per_node" -m megatron_ext train "${words[@]}")'


def _numa(ranks_per_numa_node: int) -> Iterator[str]:
    yield "# Each rank on the cores and the memory of the processor that its GPU hangs on."
    yield "# shellcheck disable=SC2016"
    yield (
        'rank=(bash -c \'command -v numactl >/dev/null || exec "$@"; '
        f"node=$((SLURM_LOCALID / {ranks_per_numa_node})); "
        'exec numactl --cpunodebind="$node" --membind="$node" "$@"\' numa "${rank[@]}")'
    )


def _container(job: Job) -> Iterator[str]:
    request, profile = job.request, job.cluster.profile
    if request.container is None:
        return
    image = shlex.quote(request.container)
    options = " ".join(shlex.quote(each) for each in profile.container_options)
    # Paths of the configuration count from the folder of the submission.
    mounts = [str(request.run_dir), *request.mounts]
    if profile.container == "apptainer":
        binds = " ".join(f"--bind {shlex.quote(mount)}" for mount in mounts)
        yield (
            f'rank=(apptainer exec {options} --bind "$PWD" {binds} --pwd "$PWD" {image} '
            '"${rank[@]}")'
        )
        return
    pairs = [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
    yield f'mounts="$PWD:$PWD,"{shlex.quote(",".join(pairs))}'
    yield f'step+=(--container-image={image} --container-mounts="$mounts" {options}'
    yield '    --container-workdir="$PWD")'
    if names := exported_names(job.cluster.environment):
        yield "# For these the image's own values would win otherwise."
        yield f'names="{",".join(names)}"'
        yield 'step+=(--container-env="$names")'


def exported_names(environment: str) -> list[str]:
    """Variables that a site's shell file exports, but for paths of the machine outside."""
    names = re.findall(r"^\s*export ([A-Za-z_][A-Za-z0-9_]*)=", environment, re.MULTILINE)
    return [name for name in dict.fromkeys(names) if not name.endswith("PATH")]
