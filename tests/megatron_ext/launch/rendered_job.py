"""Job scripts for tests: a request with plain values, and what it becomes on a cluster."""

from __future__ import annotations

import subprocess
from pathlib import Path

from megatron_ext.launch.cluster_profile import load_cluster
from megatron_ext.launch.job import JobRequest, make_job
from megatron_ext.launch.job_script import render


def request(run_dir: Path, **changed: object) -> JobRequest:
    fields: dict[str, object] = {
        "words": ("7b", f"log.run_dir={run_dir}"),
        "run_dir": run_dir,
        "python": "python",
        "num_nodes": 2,
        "job_name": "run",
        "account": "ABC123",
    }
    return JobRequest(**(fields | changed))  # type: ignore[arg-type]


def rendered(cluster: str, run_dir: Path, **changed: object) -> str:
    return render(make_job(request(run_dir, **changed), load_cluster(cluster)))


def lint(text: str) -> None:
    done = subprocess.run(
        ["shellcheck", "--shell=bash", "-"], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
