"""A Dockerfile as data: stages of steps, and what a step's words mean.

Only what the project's files use is understood; anything else is refused by name, so that a step
is never left out silently. Heredocs, ONBUILD, escapes other than the backslash: refused.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

INSTRUCTIONS = {
    *("FROM", "ARG", "ENV", "LABEL", "SHELL", "USER", "WORKDIR"),
    *("ADD", "COPY", "RUN", "ENTRYPOINT", "CMD", "HEALTHCHECK"),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction, its continued lines joined."""

    line: int
    instruction: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Stage:
    """What follows a FROM."""

    base: str
    name: str
    """After AS; the stage's number where it has none."""
    steps: tuple[Step, ...]


def parse(text: str) -> list[Stage]:
    """The stages of a Dockerfile. ValueError names the line that is not understood."""
    stages: list[Stage] = []
    for step in _steps(text):
        if step.instruction not in INSTRUCTIONS:
            raise ValueError(f"line {step.line}: {step.instruction} is not understood")
        if step.instruction == "FROM":
            words = step.arguments.split()
            if len(words) not in (1, 3) or (len(words) == 3 and words[1].upper() != "AS"):
                raise ValueError(f"line {step.line}: FROM {step.arguments}: write BASE [AS NAME]")
            stages.append(Stage(words[0], words[2] if len(words) == 3 else str(len(stages)), ()))
        elif stages:
            last = stages[-1]
            stages[-1] = Stage(last.base, last.name, (*last.steps, step))
        else:
            raise ValueError(f"line {step.line}: {step.instruction} before the first FROM")
    return stages


def _steps(text: str) -> Iterator[Step]:
    begun = 0
    parts: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        begun = begun if parts else number
        parts.append(stripped.removesuffix("\\").strip())
        if not stripped.endswith("\\"):
            instruction, _, arguments = " ".join(parts).partition(" ")
            yield Step(begun, instruction.upper(), arguments.strip())
            parts = []
    if parts:
        raise ValueError(f"line {begun}: the file ends inside an instruction")


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$NAME` and `${NAME}` replaced; a name nobody set is empty, as in a build."""
    return re.sub(
        r"\$(?:\{(\w+)\}|(\w+))", lambda found: variables.get(found[1] or found[2], ""), text
    )


def pairs(step: Step, variables: Mapping[str, str]) -> dict[str, str]:
    """`NAME=VALUE ...` of ENV, LABEL and ARG."""
    found = {}
    for word in shlex.split(step.arguments):
        name, equals, value = word.partition("=")
        if not equals and step.instruction != "ARG":
            raise ValueError(f"line {step.line}: {word!r}: write NAME=VALUE")
        found[name] = expand(value, variables)
    return found


def exec_form(step: Step) -> list[str]:
    """The words of `["a", "b"]`. ValueError for the shell form, whose shell eats signals."""
    try:
        words = json.loads(step.arguments)
    except json.JSONDecodeError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f'line {step.line}: {step.instruction}: write ["program", "argument"]')
    return words
