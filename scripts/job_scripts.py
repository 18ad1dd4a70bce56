"""Write the job scripts of scripts/: what `megatron-ext launch` makes of recipes, to read and edit.

    python -m scripts.job_scripts

A test checks that they are what `launch` writes. PROJECT, paths and interpreter are yours to set.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from megatron_ext.cli import main

_FOLDER = Path(__file__).parent
_SCRATCH = "/lustre/orion/PROJECT/scratch/runs"
_FRONTIER = "--cluster frontier --account PROJECT"

# File, and the words of `megatron-ext launch`.
SCRIPTS: tuple[tuple[str, str], ...] = (
    (
        "frontier/22b.sh",
        f"frontier-22b --nodes 2 {_FRONTIER} log.run_dir={_SCRATCH}/22b",
    ),
    (
        "frontier/175b.sh",
        f"frontier-175b --nodes 16 {_FRONTIER} log.run_dir={_SCRATCH}/175b",
    ),
    (
        "frontier/1t.sh",
        f"frontier-1t --nodes 128 {_FRONTIER} log.run_dir={_SCRATCH}/1t "
        "--broadcast /lustre/orion/PROJECT/scratch/megatron-ext.tar",
    ),
    (
        "blackwell/b200.sh",
        "7b --cluster blackwell --nodes 4 log.run_dir=/scratch/runs/7b",
    ),
    (
        "blackwell/b200_torchrun_container.sh",
        "7b --cluster blackwell --nodes 4 --launcher torchrun --container /images/cuda.sqsh "
        "log.run_dir=/scratch/runs/7b",
    ),
    (
        "blackwell/nvl72.sh",
        "mixtral-8x7b --cluster blackwell-nvl72 --nodes 32 --segment 16 "
        "log.run_dir=/scratch/runs/mixtral",
    ),
    (
        "local/quickstart.sh",
        "quickstart --cluster local --ranks 2 log.run_dir=/tmp/runs/quickstart",
    ),
)


def script(words: str) -> str:
    """What `launch --print` answers."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main(["launch", *words.split(), "--print", "--python", "python"])
    if code:
        raise SystemExit(code)
    return output.getvalue()


if __name__ == "__main__":
    for name, words in SCRIPTS:
        path = _FOLDER / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(script(words), encoding="utf-8")
        path.chmod(0o755)
        print(path)
