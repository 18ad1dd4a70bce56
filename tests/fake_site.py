"""Programs of a Slurm site that only note how they were called: for dry runs of job scripts.

Each program appends one line of JSON to `calls.jsonl`: its name, arguments, and the environment it
saw. `srun` then runs its task once, as the rank that FAKE_LOCALID says, and leaves with the next
code of `codes.json`; before that it saves a step, if that says so. A rank (`python`) notes what
`rocm-smi` shows it, which is what srun's options gave it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PROGRAM = """#!{python} -IS
import json, os, signal, subprocess, sys, time
folder = {folder!r}
name = os.path.basename(sys.argv[0])
seen = dict(os.environ)
if name == "python":
    found = subprocess.run(["rocm-smi", "--showproductname"], capture_output=True, text=True)
    seen["FAKE_GPUS"] = found.stdout
with open(os.path.join(folder, "calls.jsonl"), "a") as stream:
    stream.write(json.dumps([name, sys.argv[1:], seen]) + "\\n")
if name == "hostname":
    print("10.1.2.3 10.1.2.4")
elif name == "scontrol" and sys.argv[1] == "show":
    print("node0001\\nnode0002")
elif name == "rocm-smi":
    for device in os.environ.get("ROCR_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(","):
        print(f"GPU[{{device}}]: AMD Instinct MI250X")
elif name == "numactl":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    sys.exit(subprocess.call(words))
elif name == "srun":
    position = 1
    while sys.argv[position].startswith("-"):
        position += 1
    local = os.environ.get("FAKE_LOCALID", "0")
    variables = dict(os.environ) | {{"SLURM_LOCALID": local}}
    if {{"--gpus-per-task=1", "--gpu-bind=closest"}} <= set(sys.argv[1:position]):
        # Frontier's node: which GCD hangs on the cores of its tasks 0, 1, ...
        variables["ROCR_VISIBLE_DEVICES"] = "45236701"[int(local)]
    try:
        subprocess.call(sys.argv[position:], env=variables)
    except OSError:
        # A program of the nodes, such as apptainer.
        pass
    with open(os.path.join(folder, "codes.json")) as stream:
        codes = json.load(stream)
    code, saves, obeys = codes.pop(0)
    with open(os.path.join(folder, "codes.json"), "w") as stream:
        json.dump(codes, stream)
    if obeys:
        # As Slurm does before the time limit: the batch shell alone is told.
        os.kill(os.getppid(), signal.SIGUSR1)
        while not os.path.exists(os.path.join(obeys, "STOP")):
            time.sleep(0.01)
        os.remove(os.path.join(obeys, "STOP"))
    if saves:
        with open(saves[0], "w") as stream:
            stream.write(str(saves[1]))
    sys.exit(code)
"""
_NAMES = ("srun", "scontrol", "sbatch", "sbcast", "hostname", "module", "numactl", "rocm-smi")


@dataclass(frozen=True, slots=True)
class Call:
    """How a program was called."""

    name: str
    arguments: list[str]
    environment: dict[str, str]


class FakeSite:
    """A site in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        text = _PROGRAM.format(python=sys.executable, folder=str(folder))
        for name in (*_NAMES, "python"):
            program = self.bin / name
            program.write_text(text)
            program.chmod(0o755)

    def run(
        self,
        script: str,
        *,
        ends: Sequence[tuple[int, tuple[str, int] | None, str | None]] = ((0, None, None),),
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a job script.

        Args:
            ends: of each srun: exit code; file to which a saved step is written, and the step;
                run folder whose STOP file is waited for after the warning has been sent.
        """
        (self.folder / "codes.json").write_text(json.dumps(list(ends)))
        (self.folder / "calls.jsonl").unlink(missing_ok=True)
        path = self.folder / "job.sh"
        path.write_text(script)
        environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "USER": "somebody",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[0001-0002]",
        }
        return subprocess.run(
            ["bash", str(path)],
            env=environment | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self, name: str) -> list[Call]:
        """Those of one program, in order."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found: list[Any] = [json.loads(line) for line in lines]
        return [Call(*each) for each in found if each[0] == name]
