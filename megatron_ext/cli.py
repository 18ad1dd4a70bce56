"""The command line: parse, call, turn errors into a message and an exit code.

Nothing heavy is imported before a command needs it, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from megatron_ext import exit_codes
from megatron_ext.data import cli as data_cli
from megatron_ext.errors import UserError
from megatron_ext.launch.rank_flags import add_rank_flags, explicit_rank

# A disk that is full or may not be written to is the user's to mend, whoever meets it first.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_DESCRIPTION = "Pretrain language models on text of any length, from a laptop's CPU to a cluster."
_OVERRIDES_HELP = "settings to change, e.g. optim.lr=3e-4 data.corpora.0.path=corpus"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-ext", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    data_cli.add_arguments(commands)
    commands.choices["data"].set_defaults(run=data_cli.run)

    train = commands.add_parser(
        "train",
        help="train a recipe or a YAML file; goes on where the run folder stands",
        description="Train. Under torchrun or srun the rank comes from the environment; otherwise "
        "local ranks are started. Exit code 75: saved and stopped on request; run it again.",
    )
    _add_config_arguments(train)
    train.add_argument("--ranks", type=int, metavar="N", help="local ranks to start")
    train.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="same as launch.device=..."
    )
    add_rank_flags(train)
    train.set_defaults(run=_train)

    profile = commands.add_parser(
        "profile",
        help="measure what a configuration costs on this machine, for the planners",
        description="Measure seconds per token and the speed of the link between ranks, and write "
        "cost_profile.json into the run folder.",
    )
    _add_config_arguments(profile)
    profile.add_argument("--ranks", type=int, metavar="N", help="local ranks to start")
    profile.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="same as launch.device=..."
    )
    add_rank_flags(profile)
    profile.set_defaults(run=_profile)

    _add_plan(commands)
    _add_plan_step(commands)
    _add_launch(commands)

    generate = commands.add_parser("generate", help="sample text from a checkpoint")
    generate.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder or iter_ folder")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--tokens", type=int, default=200, metavar="N", help="at most (200)")
    generate.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)"
    )
    generate.add_argument("--top-k", type=int, default=50, metavar="K", help="0 takes all (50)")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    generate.set_defaults(run=_generate)

    doctor = commands.add_parser("doctor", help="what is installed, what is missing, what it costs")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser(
        "plan",
        help="check a configuration without starting a rank; predict memory and speed",
        description="Check a configuration and predict what it needs and attains on a device.",
    )
    _add_config_arguments(plan)
    plan.add_argument("--ranks", type=int, metavar="N", help="ranks it shall run on")
    plan.add_argument("--nodes", type=int, metavar="N", help="the same in nodes of the device")
    plan.add_argument("--device", metavar="NAME|FILE", help="same as launch.device_profile=...")
    plan.add_argument("--lengths", metavar="FILE", help="of documents: tokens, one a line")
    plan.add_argument("--tokens", metavar="N", help="budget, e.g. 300B; by default all steps")
    plan.add_argument("--search", action="store_true", help="find the fastest layout that fits")
    plan.add_argument("--json", action="store_true", help="machine-readable output")
    plan.set_defaults(run=_plan)


def _add_launch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "launch",
        help="write and submit the job script of a configuration on a cluster",
        description="Write the job script into the run folder and submit it.",
    )
    _add_config_arguments(parser)
    parser.add_argument(
        "--cluster",
        required=True,
        metavar="NAME|FILE",
        help="frontier, blackwell, slurm, local ...",
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--print", action="store_true", help="print the script, submit nothing")
    parser.add_argument("--ranks", type=int, metavar="N", help="with --cluster local")
    parser.add_argument("--python", metavar="FILE", help="interpreter on the nodes (this one)")
    for name in ("job-name", "account", "partition", "qos", "reservation"):
        parser.add_argument(f"--{name}", metavar="NAME")
    parser.add_argument("--time", metavar="LIMIT", help="as Slurm writes it, e.g. 2:00:00")
    parser.add_argument("--launcher", choices=("srun", "torchrun"))
    parser.add_argument("--segment", type=int, metavar="N", help="nodes behind one NVLink switch")
    parser.add_argument("--container", metavar="IMAGE", help="run in this image")
    parser.add_argument(
        "--mount", action="append", default=[], metavar="PATH", help="into the image, repeatable"
    )
    parser.add_argument(
        "--broadcast", metavar="TAR", help="packed environment for the nodes' disks"
    )
    parser.add_argument("--max-restarts", type=int, default=3, metavar="N", help="in one job (3)")
    parser.add_argument("--max-requeues", type=int, default=100, metavar="N", help="of it (100)")
    parser.set_defaults(run=_launch)


def _add_plan_step(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan-step",
        help="plan one step for a file of sequence lengths",
        description="Which rank computes which piece of which sequence, and how long the step "
        "takes; nothing is run.",
    )
    parser.add_argument("--lengths", required=True, metavar="FILE", help="tokens, one a line")
    parser.add_argument("--ranks", required=True, type=int, metavar="R", help="data-parallel ranks")
    parser.add_argument(
        "--tokens-per-rank", required=True, type=int, metavar="C", help="of one micro-batch"
    )
    parser.add_argument("--model", default="7b", metavar="NAME", help="recipe or YAML file (7b)")
    parser.add_argument("--planner", choices=("hdp", "static_cp", "megatron"), default="hdp")
    parser.add_argument("--pipeline", type=int, default=1, metavar="P", help="stages (1)")
    parser.add_argument(
        "--teraflops", type=float, default=400.0, help="attained by one rank, TFLOP/s (400)"
    )
    parser.add_argument(
        "--link-gigabytes", type=float, default=50.0, help="of one rank, one way, GB/s (50)"
    )
    parser.add_argument(
        "--cost-profile", metavar="FILE", help="measured by `profile`, in place of the three above"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the plan as a timeline")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.set_defaults(run=_plan_step)


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RECIPE|FILE.yaml", help="e.g. quickstart")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=_OVERRIDES_HELP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parse(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `megatron-ext ... | head`: nobody reads on. Keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.FAILED
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse stops collecting section.key=value words at the first option between them.
    stray = [word for word in rest if word.startswith("-") or "=" not in word]
    if stray or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(stray or rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _train(arguments: argparse.Namespace) -> int:
    return _run_job("train", arguments)


def _profile(arguments: argparse.Namespace) -> int:
    return _run_job("profile", arguments)


def _run_job(job: Literal["train", "profile"], arguments: argparse.Namespace) -> int:
    from megatron_ext.job_command import run_job

    return run_job(
        job,
        arguments.source,
        _with_options(arguments.overrides, arguments.device, arguments.ranks),
        num_ranks=arguments.ranks,
        explicit=explicit_rank(arguments),
    )


def _plan(arguments: argparse.Namespace) -> int:
    from megatron_ext.plan_command import PlanRequest, plan

    return plan(
        PlanRequest(
            source=arguments.source,
            overrides=arguments.overrides,
            ranks=arguments.ranks,
            nodes=arguments.nodes,
            device=arguments.device,
            lengths=Path(arguments.lengths) if arguments.lengths else None,
            tokens=arguments.tokens,
            is_search=arguments.search,
            as_json=arguments.json,
        )
    )


def _launch(arguments: argparse.Namespace) -> int:
    from megatron_ext.launch_command import LaunchRequest, launch

    return launch(
        LaunchRequest(
            source=arguments.source,
            overrides=arguments.overrides,
            cluster=arguments.cluster,
            nodes=arguments.nodes,
            is_print=arguments.print,
            ranks=arguments.ranks,
            python=arguments.python,
            job_name=arguments.job_name,
            account=arguments.account,
            partition=arguments.partition,
            qos=arguments.qos,
            reservation=arguments.reservation,
            time=arguments.time,
            launcher=arguments.launcher,
            segment=arguments.segment,
            container=arguments.container,
            mounts=arguments.mount,
            broadcast=arguments.broadcast,
            max_restarts=arguments.max_restarts,
            max_requeues=arguments.max_requeues,
        )
    )


def _plan_step(arguments: argparse.Namespace) -> int:
    from megatron_ext.plan_step_command import StepRequest, plan_step

    request = StepRequest(
        lengths=Path(arguments.lengths),
        num_ranks=arguments.ranks,
        tokens_per_rank=arguments.tokens_per_rank,
        model=arguments.model,
        planner=arguments.planner,
        num_pipeline_stages=arguments.pipeline,
        teraflops=arguments.teraflops,
        link_gigabytes=arguments.link_gigabytes,
        cost_profile=Path(arguments.cost_profile) if arguments.cost_profile else None,
    )
    plot = Path(arguments.plot) if arguments.plot else None
    return plan_step(request, as_json=arguments.json, plot=plot)


def _generate(arguments: argparse.Namespace) -> int:
    from megatron_ext.generate import generate

    return generate(
        arguments.checkpoint,
        prompt=arguments.prompt,
        num_tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
        device=arguments.device,
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from megatron_ext.doctor import doctor

    return doctor()


def _with_options(overrides: list[str], device: str | None, num_ranks: int | None) -> list[str]:
    """Options that stand for a setting, as that setting: so they are printed and saved too."""
    words = list(overrides)
    if device is not None:
        words.append(f"launch.device={device}")
    if num_ranks is not None and num_ranks > 0:
        words.append(f"launch.num_ranks={num_ranks}")
    return words
