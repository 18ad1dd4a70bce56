"""Profiles: typed YAML files that ship by name; a site copies one, changes it, names its path."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_ext.errors import UserError

# A profile is a few KiB; more is a mistake.
_LARGEST_FILE_BYTES = 1 << 18

Profile = TypeVar("Profile", bound=BaseModel)


def profile_names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def profile_path(name: str, folder: Path, *, kind: str) -> Path:
    """Where a profile stands: a name that ships, or a path that ends in .yaml or .yml.

    Raises:
        UserError: no profile of that name, with the nearest and all there are.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = profile_names(folder)
    if name in known:
        return folder / f"{name}.yaml"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(
        f"no {kind} {name!r}{hint}; there are {', '.join(known)}, or name a YAML file like those "
        f"in {'/'.join(folder.parts[-3:])}"
    )


def read_profile(path: Path, schema: type[Profile], *, kind: str) -> Profile:
    """The content of a file.

    Raises:
        UserError: it cannot be read, or says something that cannot be; names file and key.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise UserError(f"{kind} {path}: {path.stat().st_size:,} bytes; a profile is smaller")
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{kind} {path}: cannot be read ({error})") from None
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        known = list(schema.model_fields)
        found = "; ".join(_problem(each["loc"], each["msg"], known) for each in error.errors())
        raise UserError(f"{kind} {path}: {found}") from None


def _problem(location: tuple[int | str, ...], message: str, known: list[str]) -> str:
    where = ".".join(map(str, location)) or "file"
    near = difflib.get_close_matches(where, known, n=1) if where not in known else []
    return f"{where}: {message}" + (f" (did you mean {near[0]}?)" if near else "")
