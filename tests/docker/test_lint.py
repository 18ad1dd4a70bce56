"""Dockerfiles by hadolint, shell scripts by shellcheck: all that the repository holds."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def shell_scripts() -> list[Path]:
    """By name or by first line, in the folders that the project keeps."""
    folders = ("scripts", "docker", "megatron_ext", ".ci")
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and (path.suffix == ".sh" or _begins_as_shell(path)):
                found.append(path)
    return found


def _begins_as_shell(path: Path) -> bool:
    with path.open("rb") as stream:
        first = stream.readline(80)
    return first.startswith(b"#!") and first.rstrip().endswith((b"bash", b"/sh", b"env sh"))


def lint(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles(path: Path) -> None:
    lint("hadolint", str(path.relative_to(ROOT)))


@pytest.mark.parametrize("path", shell_scripts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_scripts(path: Path) -> None:
    lint("shellcheck", "--shell=bash", str(path.relative_to(ROOT)))


def test_all_are_found() -> None:
    names = {str(path.relative_to(ROOT)) for path in shell_scripts()}
    assert {".ci/run", "scripts/frontier/1t.sh"} <= names
    assert "megatron_ext/launch/clusters/frontier.sh" in names
    assert [path.name for path in DOCKERFILES] == [
        "Dockerfile.cpu",
        "Dockerfile.cuda",
        "Dockerfile.rocm",
    ]


def test_the_linters_find_something(tmp_path: Path) -> None:
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm $1\n")
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp\n")
    for command in (["shellcheck", "bad.sh"], ["hadolint", "Dockerfile"]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode != 0
