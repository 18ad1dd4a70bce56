"""Triton's kernels on the CPU: it decides when it is imported whether it interprets, so that part
of a test file runs in a process of its own, the file as a program."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run_interpreted(file: str, *arguments: str) -> str:
    """Run a file under Triton's interpreter; what it printed. Fails with all its output.

    Args:
        file: `__file__` of a test, which checks something where it is run as a program.
    """
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, file, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
