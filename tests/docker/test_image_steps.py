"""The steps of Dockerfile.cpu in plain folders, and the image at work; no Docker daemon."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.images import tree
from scripts.images.build import Image, build

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [
    "data.corpora.0.prepare.tokenizer=bytes",
    "train.eval_interval=0",
    "optim.lr_warmup_iters=1",
]


def lack() -> str:
    missing = [name for name in ("debootstrap", "unshare", "chroot") if not shutil.which(name)]
    if os.geteuid() != 0:
        return "needs root: chroot and mounts"
    if missing:
        return f"needs {', '.join(missing)}"
    done = subprocess.run(["unshare", "--mount", "true"], check=False)
    return "" if done.returncode == 0 else "this machine allows no mount namespaces"


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(lack()), reason=lack() or "-")]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    output = tmp_path_factory.mktemp("image")
    # Not readable by all, as pytest makes it: the image's user must reach its root.
    for folder in (output, *output.parents[:2]):
        folder.chmod(0o755)
    yield build(
        ROOT / "docker" / "Dockerfile.cpu",
        context=ROOT,
        output=output,
        build_arguments={},
    )
    # Two trees of a GiB.
    shutil.rmtree(output, ignore_errors=True)


def run(image: Image, *words: str) -> tuple[int, str]:
    return tree.run(image.root, [*image.entrypoint, *words], image.settings, timeout_seconds=300.0)


def test_the_image_answers_trains_and_stops(image: Image) -> None:
    """One test: making the image takes minutes."""
    assert image.user == "10001:10001"
    code, output = run(image, *image.command)
    assert code == 0, output
    assert "megatron-core" in output
    code, output = tree.run(image.root, image.healthcheck, image.settings, timeout_seconds=60.0)
    assert code == 0, output
    code, output = run(image, "train", "quickstart", "--ranks", "2", "train.train_iters=2", *TRAIN)
    assert code == 0, output
    assert (image.root / "workspace/runs/quickstart/metrics.jsonl").stat().st_uid == 10001
    # As `docker stop` does: SIGTERM to process 1, which passes it on; the run saves and stops.
    words = ["train", "quickstart", "train.train_iters=100000", "log.run_dir=runs/stopped", *TRAIN]
    process = tree.start(image.root, [*image.entrypoint, *words], image.settings)
    metrics = image.root / "workspace/runs/stopped/metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    tree.send_signal(process, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert (image.root / "workspace/runs/stopped/latest_checkpointed_iteration.txt").exists()


def test_nothing_of_the_build_is_left(image: Image) -> None:
    for name in ("source", "var/lib/apt/lists", "root/.cache/pip"):
        folder = image.root / name
        assert not folder.exists() or not list(folder.iterdir()), name
    assert not shutil.which("gcc", path=str(image.root / "usr/bin"))
