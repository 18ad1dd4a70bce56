"""What the tests of runs share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus (`tiny_run.make_corpus`), new for each file: runs are put beside it."""
    # Not above: tests of what must not import torch are collected with these.
    from tests.megatron_ext.tiny_run import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))
