"""Text for benchmarks, of which every machine has some: the source of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from megatron_ext.data.prepare import prepare
from megatron_ext.data.settings import PrepareSettings


def make_text(folder: Path, num_bytes: int) -> Path:
    """One long document of library source."""
    text = folder / "text.txt"
    with text.open("w", encoding="utf-8") as stream:
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            if stream.tell() < num_bytes:
                stream.write(path.read_text(encoding="utf-8"))
    return text


def prepare_text(folder: Path, *, num_bytes: int = 4_000_000) -> None:
    """The standard library's source as one document; once."""
    if (folder / "corpus").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    prepare(
        PrepareSettings(
            inputs=(str(make_text(folder, num_bytes)),),
            output=folder / "corpus",
            tokenizer="bytes",
            validation_fraction=0.0,
        ),
        show_progress=False,
    )
