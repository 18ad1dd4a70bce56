"""Run the steps of a Dockerfile in plain folders: one tree for each stage, no Docker daemon.

    python -m scripts.images.build docker/Dockerfile.cpu --output DIR [--build-arg NAME=VALUE]
        [--base DIR] [--run ARGUMENT...]

Needs root and Debian's debootstrap, which makes the base: `FROM debian:SUITE-...` becomes that
suite's smallest system from the machine's mirror (the digest cannot be honoured: layers are not
fetched). RUN, COPY, ENV, ARG, WORKDIR, USER, SHELL, ENTRYPOINT, CMD and HEALTHCHECK do what they
do in a build. With --run the finished image's entrypoint is started with these arguments. What
belongs to the machine and not to the image (name servers, certificates, pip's and apt's settings)
is mounted for RUN steps only.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.images import tree
from scripts.images.context import context_files
from scripts.images.dockerfile import Stage, Step, exec_form, expand, pairs, parse

MIRROR = "http://deb.debian.org"
STEP_TIMEOUT_SECONDS = 1200.0


@dataclass(frozen=True, slots=True)
class Image:
    """A tree and how its process starts."""

    root: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str = "0:0"
    folder: str = "/"
    shell: tuple[str, ...] = ("/bin/sh", "-c")
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    healthcheck: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> tree.Settings:
        return tree.Settings(environment=self.environment, user=self.user, folder=self.folder)


def build(
    dockerfile: Path,
    *,
    context: Path,
    output: Path,
    build_arguments: Mapping[str, str],
    base: Path | None = None,
) -> Image:
    """Run all stages below `output`; the last one's image.

    Args:
        base: a system that debootstrap made before, to save the time.

    Raises:
        ValueError: a step is not understood. RuntimeError: a step failed, with its output.
    """
    images: dict[str, Image] = {}
    for number, stage in enumerate(parse(dockerfile.read_text(encoding="utf-8"))):
        root = output / f"{number}-{stage.name}"
        base = base or make_base(stage.base, output / "base")
        subprocess.run(["cp", "--archive", str(base), str(root)], check=True)
        images[stage.name] = run_stage(
            stage, root, context=context, images=images, build_arguments=build_arguments
        )
    return images[stage.name]


def make_base(name: str, folder: Path) -> Path:
    """Debian's smallest system for `debian:SUITE-...`."""
    if not name.startswith("debian:"):
        raise ValueError(f"FROM {name}: only Debian's own images can be made without fetching them")
    suite = name.removeprefix("debian:").partition("-")[0]
    command = ["debootstrap", "--variant=minbase", suite, str(folder), f"{MIRROR}/debian"]
    print(f"FROM {name}: {' '.join(command)}", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"debootstrap failed:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    # The image has the same three.
    (folder / "etc/apt/sources.list").write_text(
        f"deb {MIRROR}/debian {suite} main\n"
        f"deb {MIRROR}/debian {suite}-updates main\n"
        f"deb {MIRROR}/debian-security {suite}-security main\n"
    )
    return folder


def run_stage(
    stage: Stage,
    root: Path,
    *,
    context: Path,
    images: Mapping[str, Image],
    build_arguments: Mapping[str, str],
) -> Image:
    image, arguments = Image(root), dict[str, str]()
    for step in stage.steps:
        print(f"{stage.name}: {step.instruction} {step.arguments}", flush=True)
        variables = arguments | dict(image.environment)
        match step.instruction:
            case "ARG":
                for name, default in pairs(step, variables).items():
                    arguments[name] = build_arguments.get(name, default)
            case "ENV":
                known = {"PATH": tree.DEFAULT_PATH} | variables
                image = replace(image, environment=dict(image.environment) | pairs(step, known))
            case "LABEL":
                image = replace(image, labels=dict(image.labels) | pairs(step, variables))
            case "ADD":
                raise ValueError(f"line {step.line}: ADD: nothing is fetched here")
            case "RUN":
                run_shell(image, step, arguments)
            case "COPY":
                copy(image, step, context=context, images=images)
            case "WORKDIR":
                image = replace(image, folder=expand(step.arguments, variables))
                (root / image.folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case _:
                image = with_setting(image, step)
    return image


def with_setting(image: Image, step: Step) -> Image:
    """USER, SHELL, ENTRYPOINT, CMD, HEALTHCHECK."""
    if step.instruction == "USER":
        if not step.arguments.replace(":", "").isdigit():
            raise ValueError(f"line {step.line}: USER {step.arguments}: write UID:GID")
        return replace(image, user=step.arguments)
    if step.instruction == "HEALTHCHECK":
        options, _, command = step.arguments.partition("CMD ")
        if not all(word.startswith("--") for word in options.split()):
            raise ValueError(f"line {step.line}: HEALTHCHECK {options}: is no option")
        return replace(image, healthcheck=tuple(exec_form(replace(step, arguments=command))))
    words = tuple(exec_form(step))
    if step.instruction == "SHELL":
        return replace(image, shell=words)
    if step.instruction == "ENTRYPOINT":
        return replace(image, entrypoint=words)
    assert step.instruction == "CMD", step
    return replace(image, command=words)


def run_shell(image: Image, step: Step, arguments: Mapping[str, str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        mounts, environment = machine_settings(Path(name))
        settings = tree.Settings(
            environment=environment | dict(arguments) | dict(image.environment),
            user=image.user,
            folder=image.folder,
            mounts=mounts,
        )
        code, output = tree.run(
            image.root,
            [*image.shell, step.arguments],
            settings,
            timeout_seconds=STEP_TIMEOUT_SECONDS,
        )
    if code:
        raise RuntimeError(f"line {step.line}: RUN ended with {code}:\n{output[-4000:]}")


def copy(image: Image, step: Step, *, context: Path, images: Mapping[str, Image]) -> None:
    """`COPY . FOLDER`, or `COPY --from=STAGE FOLDER FOLDER`."""
    *options, source, target = step.arguments.split()
    destination = image.root / target.lstrip("/")
    destination.mkdir(parents=True, exist_ok=True)
    if options:
        stage = options[0].removeprefix("--from=")
        if len(options) > 1 or stage not in images:
            raise ValueError(f"line {step.line}: COPY {' '.join(options)}: know {list(images)}")
        found = images[stage].root / source.lstrip("/")
        subprocess.run(["cp", "--archive", f"{found}/.", str(destination)], check=True)
        return
    if source != ".":
        raise ValueError(f"line {step.line}: COPY {source}: only '.' is understood")
    for path in context_files(context):
        (destination / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(context / path, destination / path)


def machine_settings(folder: Path) -> tuple[dict[Path, str], dict[str, str]]:
    """What a RUN step needs of this machine: mounts and environment.

    Args:
        folder: for the files that are written for the purpose.
    """
    mounts = {Path("/etc/resolv.conf"): "/etc/resolv.conf", Path("/etc/hosts"): "/etc/hosts"}
    options, environment = pip_options(), {}
    if certificates := options.pop("cert", None):
        mounts[Path(certificates)] = "/run/machine/certificates.crt"
        environment["PIP_CERT"] = "/run/machine/certificates.crt"
    if options:
        lines = [f"{name} = {value}" for name, value in options.items()]
        (folder / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
        mounts[folder / "pip.conf"] = "/run/machine/pip.conf"
        environment["PIP_CONFIG_FILE"] = "/run/machine/pip.conf"
        for word in " ".join(options.values()).split():
            path = Path(word.removeprefix("file://"))
            # An index's pages link to files beside them.
            path = path.parent if path.name == "simple" else path
            if path.is_absolute() and path.exists():
                mounts[path] = str(path)
    done = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=False)
    wanted = ("Acquire::http", "Acquire::https", "Acquire::Check-", "Acquire::Retries")
    lines = [line for line in done.stdout.splitlines() if line.startswith(wanted)]
    (folder / "apt.conf").write_text("\n".join([*lines, ""]))
    mounts[folder / "apt.conf"] = "/run/machine/apt.conf"
    environment["APT_CONFIG"] = "/run/machine/apt.conf"
    return mounts, environment


def pip_options() -> dict[str, str]:
    """Where this machine's pip finds packages."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    options = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        name = name.rpartition(".")[2]
        if name in ("cert", "extra-index-url", "find-links", "index-url", "timeout", "proxy"):
            options[name] = str(ast.literal_eval(value))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="an empty folder; keeps a GiB")
    parser.add_argument("--base", type=Path, help="a folder that debootstrap made before")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="arguments of the entrypoint")
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        parser.error("chroot and mounts need root")
    options.output.mkdir(parents=True, exist_ok=True)
    image = build(
        options.dockerfile,
        context=Path(__file__).resolve().parents[2],
        output=options.output.resolve(),
        build_arguments=dict(word.partition("=")[::2] for word in options.build_arg),
        base=options.base,
    )
    print(f"built {image.root}", flush=True)
    if options.run is None:
        return 0
    command = [*image.entrypoint, *(options.run or image.command)]
    code, output = tree.run(
        image.root, command, image.settings, timeout_seconds=STEP_TIMEOUT_SECONDS
    )
    print(output, end="")
    return code


if __name__ == "__main__":
    sys.exit(main())
