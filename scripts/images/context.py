"""The files that a build is sent: all below the root, less what .dockerignore says.

A pattern matches a path or a folder above it; of several that match, the last decides; `!` takes
back. `*` stays inside a name, `**` is any number of folders. (Docker's documentation, "Dockerignore
files".)
"""

from __future__ import annotations

import os
import re
from pathlib import Path


def context_files(root: Path) -> list[Path]:
    """Relative to `root`, sorted."""
    ignore = root / ".dockerignore"
    rules = _rules(ignore.read_text(encoding="utf-8")) if ignore.exists() else []
    found = []
    for folder, names, files in os.walk(root):
        below = Path(folder).relative_to(root)
        # Nothing can be taken back from these, and they are large.
        names[:] = [name for name in names if name != ".git" and not name.startswith(".venv")]
        found += [below / name for name in files if not _is_ignored(below / name, rules)]
    return sorted(found)


def _rules(text: str) -> list[tuple[bool, re.Pattern[str]]]:
    rules = []
    for line in text.splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            takes_back = pattern.startswith("!")
            rules.append((takes_back, _expression(pattern.removeprefix("!").strip("/"))))
    return rules


def _expression(pattern: str) -> re.Pattern[str]:
    marks = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(marks.get(part, re.escape(part)) for part in parts))


def _is_ignored(path: Path, rules: list[tuple[bool, re.Pattern[str]]]) -> bool:
    # The path itself and the folders above it, but not the root.
    names = [str(part) for part in (path, *path.parents) if part != Path()]
    is_ignored = False
    for takes_back, expression in rules:
        if any(expression.fullmatch(name) for name in names):
            is_ignored = not takes_back
    return is_ignored
