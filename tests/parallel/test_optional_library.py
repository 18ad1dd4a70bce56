"""What is said of a library that is there, is not, is broken, or is another version."""

import re
from pathlib import Path

import pytest

from parallel.optional_library import import_library


@pytest.mark.parametrize(
    ("text", "is_there", "said"),
    [
        ("__version__ = '1.2'\ndef run(): ...", True, "^Thing 1.2$"),
        ("def run(): ...", True, "of unknown version"),
        ("x = 1", False, "this Thing has no run; version 1 has"),
        ("import not_there_at_all", False, "fails to import: No module named 'not_there_at_all'"),
        ("raise OSError('undefined symbol')", False, "fails to import: undefined symbol"),
        (None, False, r"Thing is not installed \(pip install thing\)"),
    ],
)
def test_what_came_of_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, is_there: bool, said: str
) -> None:
    module = f"optional_thing_{abs(hash(text))}"
    monkeypatch.syspath_prepend(str(tmp_path))
    if text is not None:
        (tmp_path / f"{module}.py").write_text(text)
    found = import_library(
        module, "Thing", how="pip install thing", needs="run", hint="version 1 has"
    )
    assert bool(found) is is_there
    assert re.search(said, found.reason)
