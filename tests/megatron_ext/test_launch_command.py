"""`megatron-ext launch`: prints at once, submits by an argument list, refuses what cannot run."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_ext.cli import main
from tests.fake_site import FakeSite

FRONTIER = ["--cluster", "frontier", "--account", "ABC123"]


def test_prints_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "frontier-22b", *FRONTIER, "--nodes", "2", "--print"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("#!/bin/bash\n#SBATCH --job-name=frontier-22b\n")
    assert "16 ranks" in printed.out
    assert printed.err == ""


def test_writes_and_submits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = FakeSite(tmp_path / "site")
    monkeypatch.setenv("PATH", f"{site.bin}:/usr/bin:/bin")
    run_dir = tmp_path / "my run"
    words = ["launch", "7b", f"log.run_dir={run_dir}", "--cluster", "slurm", "--nodes", "2"]
    assert main(words) == 0
    (submitted,) = site.calls("sbatch")
    assert submitted.arguments == [str(run_dir / "job.sh")]
    text = (run_dir / "job.sh").read_text()
    assert "#SBATCH --job-name=my-run\n" in text
    assert f"words=(7b 'log.run_dir={run_dir}')" in text


def test_a_login_node_without_sbatch_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "7b", f"log.run_dir={tmp_path}", "--cluster", "slurm"]) == 2
    assert "sbatch is not here" in capsys.readouterr().err


def test_a_site_brings_its_own_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {"title": "Ours", "ranks_per_node": 2, "environment": "ours.sh", "gpus_per_rank": 0}
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "ours.sh").write_text("export OURS=1\n")
    words = ["launch", "quickstart", "--cluster", str(tmp_path / "ours.yaml"), "--print"]
    assert main(words) == 0
    assert "export OURS=1\n" in capsys.readouterr().out
    assert main([*words, "launch.device=cuda"]) == 2
    assert "have no GPU (gpus_per_rank: 0)" in capsys.readouterr().err
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(tree | {"rank_per_node": 2}))
    assert main(words) == 2
    assert "did you mean ranks_per_node?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["7b", "--cluster", "frontir"], "no cluster 'frontir' (did you mean frontier?)"),
        (["7b", *FRONTIER, "--nodes", "0"], "--nodes 0: expected 1 to"),
        (["7b", "--cluster", "frontier"], "wants an account: --account PROJECT"),
        (
            ["7b", *FRONTIER, "--nodes", "2", "parallel.tensor_model_parallel_size=16"],
            "parallel.tensor_model_parallel_size=16 is more than the 8 ranks of a node of frontier",
        ),
        (["frontier-22b", *FRONTIER, "parallel.pipeline_model_parallel_size=3"], "multiple of 3"),
        (["7b", "--cluster", "slurm", "--ranks", "2"], "give --nodes"),
        (["quickstart", "--cluster", "local", "--nodes", "2"], "is one machine"),
        (["nothing", "--cluster", "slurm"], "nothing"),
    ],
)
def test_mistakes_are_refused(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *words, "--print"]) == 2
    assert named in capsys.readouterr().err


def test_what_will_not_fit_is_said_before_the_queue(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["parallel.pipeline_model_parallel_size=4", "parallel.use_distributed_optimizer=false"]
    assert main(["launch", "frontier-22b", *FRONTIER, "--nodes", "2", "--print", *words]) == 0
    assert "it will not fit" in capsys.readouterr().err


def test_answers_within_a_second_without_torch() -> None:
    words = ["launch", "frontier-1t", *FRONTIER, "--nodes", "1024", "--print"]
    program = (
        "import sys\nfrom megatron_ext.cli import main\n"
        f"assert main({words!r}) == 0\nassert 'torch' not in sys.modules\n"
    )
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    # 0.5 s on an idle core of 2024.
    assert min(seconds) < 1.0


def test_this_machine_needs_no_batch_system(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["launch", "quickstart", f"log.run_dir={tmp_path}", "--cluster", "local"]
    assert main([*words, "--ranks", "2", "--print"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH" not in text
    assert "--standalone" in text
    assert "ranks_per_node=2\n" in text
