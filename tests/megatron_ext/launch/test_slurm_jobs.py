"""Rendered job scripts under a real Slurm of two nodes on this machine, training on CPU ranks.

What a cluster does to a job is done here: both ways to start ranks, the warning before the time
limit, queueing again, scancel, a rank that is killed, a job that cannot begin. Runs that were
interrupted end with the bits of one that was not.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.megatron_ext.tiny_run import make_corpus, tiny_tree
from tests.slurm_cluster import SlurmCluster, slurm_cluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[3]
PROFILE = {
    "title": "Two nodes of one CPU rank",
    "ranks_per_node": 1,
    "gpus_per_rank": 0,
    "cpus_per_task": 1,
    "signal_seconds": 30,
    "time": "10",
    "environment": "cpu.sh",
}
# Virtual nodes have no host names of their own, and nothing to say to one another but on loopback.
ENVIRONMENT = """
export OMP_NUM_THREADS="${OMP_NUM_THREADS-1}"
export MASTER_ADDR="${MASTER_ADDR-127.0.0.1}"
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME-lo}"
export FROM_THE_SITE="${FROM_THE_SITE-site}"
"""
# An interpreter that notes what each rank was started with, and becomes the real one.
PYTHON = """#!/bin/bash
printf '%s\\n' "$SLURM_PROCID $SLURM_LOCALID $SLURMD_NODENAME $OMP_NUM_THREADS $FROM_THE_SITE" \\
    >> "{folder}/starts"
export PYTHONPATH={root}
exec {python} "$@"
"""
_PATIENCE_SECONDS = 240.0


class Site:
    """A cluster, and jobs on it."""

    def __init__(self, cluster: SlurmCluster, folder: Path, corpus: Path) -> None:
        self.cluster, self.folder, self.corpus = cluster, folder, corpus
        (folder / "cpu.yaml").write_text(yaml.safe_dump(PROFILE))
        (folder / "cpu.sh").write_text(ENVIRONMENT)
        self.python = folder / "python"
        self.python.write_text(PYTHON.format(folder=folder, root=ROOT, python=sys.executable))
        self.python.chmod(0o755)

    def configuration(self, run_dir: Path, *, steps: int, **checkpoint: int) -> Path:
        tree = tiny_tree(
            self.corpus,
            run_dir,
            train={"train_iters": steps, "global_batch_tokens": 512},
            optim={"lr_decay_style": "constant", "lr_warmup_iters": 2},
            checkpoint=checkpoint,
        )
        path = self.folder / f"{run_dir.name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def submit(self, config: Path, *words: str, **variables: str) -> str:
        """By `megatron-ext launch`; the job's number."""
        command = [sys.executable, "-m", "megatron_ext", "launch", str(config), "--nodes", "2"]
        command += ["--cluster", str(self.folder / "cpu.yaml"), "--python", str(self.python)]
        done = subprocess.run(
            [*command, *words],
            cwd=self.folder,
            env=self.cluster.environment | {"PYTHONPATH": str(ROOT)} | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = re.search(r"Submitted batch job ([0-9]+)", done.stdout)
        assert found is not None
        return found[1]

    def show(self, job: str) -> dict[str, str]:
        done = self.cluster.run(["scontrol", "show", "job", "-o", job])
        return dict(word.partition("=")[::2] for word in done.stdout.split() if "=" in word)

    def wait(self, job: str, *states: str) -> dict[str, str]:
        """Until the job is in one of these states; one that was queued again begins at once."""

        def is_there() -> bool:
            seen = self.show(job)
            if seen["JobState"] == "PENDING" and seen.get("Reason") == "BeginTime":
                # Slurm lets two minutes pass.
                self.cluster.run(["scontrol", "update", f"JobId={job}", "StartTime=now"])
            return seen["JobState"] in states

        wait_for(is_there, lambda: f"{self.show(job)}\n{self.output()}")
        return self.show(job)

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.out")))


def wait_for(is_there: Callable[[], bool], explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not is_there():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def site(cluster: SlurmCluster, tmp_path: Path) -> Site:
    return Site(cluster, tmp_path, make_corpus(tmp_path))


def records(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(each["step"], each["loss"], each["grad_norm"]) for each in records(run_dir)]


def uninterrupted(config: Path, run_dir: Path) -> subprocess.Popen[str]:
    """The same run with ranks of the local launcher, beside the job."""
    command = [sys.executable, "-m", "megatron_ext", "train", str(config), "--ranks", "2"]
    return subprocess.Popen(
        [*command, f"log.run_dir={run_dir}"],
        env=dict(os.environ) | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=_PATIENCE_SECONDS)
    assert process.returncode == 0, output


def test_srun_and_torchrun_train_alike(site: Site) -> None:
    found = {}
    for launcher in ("srun", "torchrun"):
        run_dir = site.folder / launcher
        config = site.configuration(run_dir, steps=6)
        job = site.submit(config, "--launcher", launcher, FROM_THE_SITE="mine")
        seen = site.wait(job, "COMPLETED", "FAILED")
        assert seen["JobState"] == "COMPLETED", site.output()
        assert seen["NumNodes"] == "2"
        assert seen["Restarts"] == "0"
        found[launcher] = losses(run_dir)
        assert [step for step, *_ in found[launcher]] == [1, 2, 3, 4, 5, 6]
    # Before the first step all ranks were compared, host by host.
    assert site.output().count("preflight: 2 ranks") == 2
    # torchrun's agents are numbered as they arrive.
    assert len(re.findall(r"^  n1 +[01] CPU", site.output(), re.MULTILINE)) == 2
    assert "syntax error" not in site.output()
    # Ranks, the nodes they were on, the site's environment, and the user's own before it.
    starts = sorted((site.folder / "starts").read_text().splitlines())
    ranks = ["0 0 n0 1 mine", "1 0 n1 1 mine"]
    # Under torchrun the same line tells of a node's agent.
    assert starts == sorted(ranks * 2)
    assert found["srun"] == found["torchrun"]


def test_the_warning_saves_queues_again_and_goes_on_exactly(site: Site) -> None:
    run_dir, whole = site.folder / "run", site.folder / "whole"
    config = site.configuration(run_dir, steps=100_000)
    job = site.submit(config, "--time", "1")
    wait_for(
        lambda: "queued again" in site.output() or site.show(job)["JobState"] == "FAILED",
        lambda: f"{site.show(job)}\n{site.output()}",
    )
    assert "asking the run to save and stop" in site.output()
    stopped = len(records(run_dir))
    assert 0 < stopped < 100_000
    assert (run_dir / "latest_checkpointed_iteration.txt").read_text().strip() == str(stopped)
    # The rest shall be short: rates are constant, so the number of steps changes none.
    site.configuration(run_dir, steps=stopped + 20)
    site.cluster.run(["scontrol", "update", f"JobId={job}", "TimeLimit=10"])
    beside = uninterrupted(config, whole)
    seen = site.wait(job, "COMPLETED", "FAILED")
    assert seen["JobState"] == "COMPLETED", site.output()
    assert seen["Restarts"] == "1"
    finish(beside)
    assert losses(run_dir) == losses(whole)
    assert len(losses(whole)) == stopped + 20


def test_scancel_saves_and_ends_the_job(site: Site) -> None:
    run_dir = site.folder / "run"
    job = site.submit(site.configuration(run_dir, steps=100_000))
    wait_for(lambda: len(records(run_dir)) > 3, site.output)
    assert site.cluster.run(["scancel", job]).returncode == 0
    site.wait(job, "CANCELLED")
    wait_for(
        lambda: (run_dir / "latest_checkpointed_iteration.txt").exists(),
        lambda: "no checkpoint\n" + site.output(),
    )
    saved = int((run_dir / "latest_checkpointed_iteration.txt").read_text())
    assert saved == len(records(run_dir))
    assert "queued again" not in site.output()


def test_a_killed_rank_starts_again_and_goes_on_exactly(site: Site) -> None:
    run_dir, whole = site.folder / "run", site.folder / "whole"
    config = site.configuration(run_dir, steps=120, save_interval=20)
    job = site.submit(config)
    beside = uninterrupted(config, whole)
    wait_for(lambda: len(records(run_dir)) > 45, site.output)
    ranks = [
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if "megatron_ext" in (process.info["cmdline"] or [])
        and (process.info["environ"] or {}).get("SLURM_JOB_ID") == job
        and (process.info["environ"] or {}).get("SLURM_PROCID") == "1"
        and "python" in process.info["cmdline"][0]
    ]
    assert len(ranks) == 1
    ranks[0].send_signal(signal.SIGKILL)
    seen = site.wait(job, "COMPLETED", "FAILED")
    assert seen["JobState"] == "COMPLETED", site.output()
    assert "started again, 1 of 3 times" in site.output()
    assert seen["Restarts"] == "0"
    finish(beside)
    # Steps after the last checkpoint were done twice; the file has each once.
    assert losses(run_dir) == losses(whole)


def test_a_job_that_cannot_begin_is_not_queued_for_ever(site: Site) -> None:
    run_dir = site.folder / "run"
    config = site.configuration(run_dir, steps=6)
    tree = yaml.safe_load(config.read_text())
    tree["data"]["corpora"] = [{"path": str(site.folder / "nowhere")}]
    config.write_text(yaml.safe_dump(tree))
    job = site.submit(config)
    seen = site.wait(job, "COMPLETED", "FAILED")
    assert seen["JobState"] == "FAILED"
    assert seen["Restarts"] == "0"
    starts = (site.folder / "starts").read_text().splitlines()
    assert len(starts) == 2
    assert "nowhere: no such folder" in site.output()
