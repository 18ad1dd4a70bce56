"""Dockerfiles as data: what is understood, what is refused, what the project's own files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.images.context import context_files
from scripts.images.dockerfile import exec_form, expand, pairs, parse

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def test_stages_and_steps() -> None:
    first, second = parse(
        "# a comment\n"
        "FROM debian:bookworm AS build\n"
        "RUN apt-get update \\\n    # within\n    && apt-get install x\n"
        "from debian:bookworm\n"
        'CMD ["doctor"]\n'
    )
    assert (first.base, first.name, second.name) == ("debian:bookworm", "build", "1")
    (run,) = first.steps
    assert (run.line, run.instruction) == (3, "RUN")
    assert run.arguments == "apt-get update && apt-get install x"
    assert exec_form(second.steps[0]) == ["doctor"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("FROM a\nONBUILD RUN x\n", "line 2: ONBUILD is not understood"),
        ("RUN x\n", "line 1: RUN before the first FROM"),
        ("FROM a b\n", "line 1: FROM a b"),
        ("FROM a\nRUN x \\\n", "line 2: the file ends inside"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse(text)


def test_variables() -> None:
    (stage,) = parse('FROM a\nENV PATH=/opt/bin:$PATH \\\n    NAME="a b ${OTHER}"\nCMD doctor\n')
    environment, command = stage.steps
    found = pairs(environment, {"PATH": "/bin", "OTHER": "c"})
    assert found == {"PATH": "/opt/bin:/bin", "NAME": "a b c"}
    assert expand("$NOBODY", {}) == ""
    with pytest.raises(ValueError, match="line 4: CMD"):
        exec_form(command)


def test_a_build_is_sent_what_dockerignore_leaves(tmp_path: Path) -> None:
    names = ["a/x.py", "a/x.so", "a/__pycache__/x.pyc", "b/y.py", "README.md", ".git/config"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".dockerignore").write_text("**\n!a\n!README.md\n**/__pycache__\n**/*.so\n")
    assert list(map(str, context_files(tmp_path))) == ["README.md", "a/x.py"]


def test_the_images_are_sent_the_packages_and_nothing_private() -> None:
    sent = set(map(str, context_files(ROOT)))
    assert {"setup.py", "pyproject.toml", "README.md", "megatron_ext/cli.py"} <= sent
    assert "megatron_ext/planning/profiles/h100.yaml" in sent
    assert not {name for name in sent if name.startswith(("tests/", "runs/", ".", "docs/"))}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix[1:])
def test_images_are_pinned_and_run_as_nobody(path: Path) -> None:
    stages = parse(path.read_text(encoding="utf-8"))
    for stage in stages:
        tag = stage.base.partition("@")[0].rpartition(":")[2]
        assert tag != stage.base, stage.base
        assert "latest" not in tag, stage.base
        assert any(character.isdigit() for character in tag), stage.base
    last = {step.instruction: step for step in stages[-1].steps}
    assert last["USER"].arguments == "10001:10001"
    assert exec_form(last["ENTRYPOINT"]) == ["/usr/bin/tini", "--", "megatron-ext"]
    assert "HEALTHCHECK" in last
    # Whatever changes seldom comes before the source.
    build = next(stage for stage in stages if any(s.instruction == "COPY" for s in stage.steps))
    steps = [(step.instruction, step.arguments) for step in build.steps]
    torch = next(i for i, (_, text) in enumerate(steps) if "torch==" in text)
    source = steps.index(("COPY", ". /source"))
    assert torch < source
