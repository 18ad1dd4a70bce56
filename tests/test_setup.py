"""setup.py: kernels only for those who ask, and a reason for those who cannot have them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_ext.cuda_compiler import cuda_root, find_nvcc, nvcc_version
from tests.source_tree import ROOT


@pytest.fixture(scope="module")
def setup_file() -> ModuleType:
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks itself up by the name of its module.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nvcc(tmp_path: Path) -> Path:
    """A program of that name, of CUDA 13.0."""
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        '  --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;\n'
        f'  *) echo "#\\$ TOP={tmp_path}" >&2 ;;\n'
        "esac\n"
    )
    path.chmod(0o755)
    return path


def test_nobody_asks_nobody_compiles(setup_file: ModuleType) -> None:
    for value in ("", "0", "no", "OFF"):
        assert setup_file.cuda_arguments({"MEGATRON_EXT_BUILD_CUDA": value, "PATH": ""}) == {}
    assert setup_file.cuda_arguments({}) == {}
    assert setup_file.is_asked_for({"MEGATRON_EXT_BUILD_CUDA": "1"})
    with pytest.raises(SystemExit, match="'please': 1 builds"):
        setup_file.cuda_arguments({"MEGATRON_EXT_BUILD_CUDA": "please"})


def test_what_is_missing_is_named_with_its_cure(setup_file: ModuleType, nvcc: Path) -> None:
    missing = setup_file.what_is_missing
    assert missing(nvcc, "13.0", True) is None
    assert "pip install --no-build-isolation" in missing(nvcc, None, False)
    assert "without CUDA" in missing(nvcc, None, True)
    assert "megatron-ext[cuda-compiler]" in missing(None, "13.0", True)
    assert "CUDA 13.0, torch of 12.8" in missing(nvcc, "12.8", True)
    if torch.version.cuda is None:
        with pytest.raises(SystemExit, match="asks for the CUDA kernels, but this torch was built"):
            setup_file.cuda_arguments({"MEGATRON_EXT_BUILD_CUDA": "1"})


def test_architectures(setup_file: ModuleType) -> None:
    def asked(text: str) -> list[str]:
        archs: list[str] = setup_file.asked_archs({"MEGATRON_EXT_CUDA_ARCHS": text})
        return archs

    assert asked("") == ["90a", "100a", "120a"]
    assert asked("sm_90a, 103a") == ["90a", "103a"]
    for wrong in ("hopper", "90a;", "90aa", "9.0"):
        with pytest.raises(SystemExit, match="write for example 90a;100a;120a"):
            asked(wrong)
    source = setup_file.Source("csrc/some.cu", ("90a", "100a"), ())
    assert setup_file.chosen_archs(source, ["90a", "103a", "120a"]) == ["90a", "103a"]
    assert setup_file.chosen_archs(source, ["120a"]) == ["90a"]


def test_commands_follow_the_table(setup_file: ModuleType, tmp_path: Path) -> None:
    sources = {source.file: source for source in setup_file.cuda_sources()}
    source = sources["csrc/quantize/quantize.cu"]
    command = setup_file.nvcc_command(
        Path("nvcc"), source, ["90a"], tmp_path / "out.o", [Path("headers")]
    )
    assert "-gencode=arch=compute_90a,code=sm_90a" in command
    # The definition rounds each operation once.
    assert "-fmad=false" in command
    assert "-Iheaders" in command
    for file in sources:
        assert (ROOT / file).is_file(), file


def test_the_compiler_is_found(nvcc: Path, tmp_path: Path) -> None:
    assert find_nvcc({"PATH": str(nvcc.parent)}) == nvcc
    assert find_nvcc({"PATH": "", "CUDA_HOME": str(tmp_path)}) == nvcc
    assert nvcc_version(nvcc) == "13.0"
    assert nvcc_version(tmp_path / "none") is None
    assert cuda_root(nvcc) == tmp_path


def test_the_runtime_library_is_found(setup_file: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no libcudart\.so below"):
        setup_file.cuda_runtime(tmp_path)
    library = tmp_path / "lib" / "libcudart.so.13"
    library.parent.mkdir()
    library.touch()
    assert setup_file.cuda_runtime(tmp_path) == library


def test_compilers_run_side_by_side(setup_file: ModuleType, tmp_path: Path) -> None:
    assert setup_file.num_jobs({"MAX_JOBS": "3"}) == 3
    assert setup_file.num_jobs({}) >= 1
    with pytest.raises(SystemExit, match="MAX_JOBS='many'"):
        setup_file.num_jobs({"MAX_JOBS": "many"})
    compiler = tmp_path / "nvcc"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last"\n')
    compiler.chmod(0o755)
    objects = setup_file.compile_all(compiler, ["90a"], tmp_path / "objects")
    assert len(objects) == len(setup_file.cuda_sources())
    for source, made in zip(setup_file.cuda_sources(), objects, strict=True):
        assert source.file in Path(made).read_text()
    compiler.write_text('#!/bin/sh\ncase "$*" in *amax*) echo "no such thing" >&2; exit 1;; esac\n')
    with pytest.raises(SystemExit, match=r"nvcc failed on csrc/quantize/amax\.cu:\nno such thing"):
        setup_file.compile_all(compiler, ["90a"], tmp_path / "objects")
