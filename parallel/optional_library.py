"""Libraries that are used where they are there: each has one door, a file that alone imports it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether an optional library can be used; true in a condition when it can."""

    available: bool
    reason: str
    """The version where it is there (empty if it says none), and why it is not where it is not."""

    def __bool__(self) -> bool:
        return self.available


def import_library(module: str, name: str, *, how: str, needs: str, hint: str = "") -> Availability:
    """Import a library and say what came of it.

    Args:
        module: what is imported.
        name: what people call it.
        how: to install it, said where it is not there.
        needs: an attribute that the versions in question have.
        hint: which versions have it.
    """
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return Availability(False, f"{name} is not installed ({how})")
        return Availability(False, f"{name} is installed but fails to import: {error}")
    except (ImportError, OSError) as error:
        # A build for another torch or CUDA fails to load its symbols.
        return Availability(False, f"{name} is installed but fails to import: {error}")
    if not hasattr(found, needs):
        return Availability(False, f"this {name} has no {needs}{hint and '; ' + hint}")
    return Availability(True, f"{name} {getattr(found, '__version__', 'of unknown version')}")
