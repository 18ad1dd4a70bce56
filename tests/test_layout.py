"""The rules of the tree that a program can check; CONTRIBUTING.md says why they are so."""

import ast
import importlib.util
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.source_tree import (
    PACKAGES,
    ROOT,
    Module,
    find_circle,
    imported_modules,
    is_under,
    project_modules,
    reachable_at_load,
)

MODULES = project_modules([*PACKAGES, "scripts"])
TESTS = project_modules(["tests"])

# Each imports itself and what stands to its right.
ORDER = ("scripts", "megatron_ext", "moe", "parallel")

# Benchmarks beside megatron's own parts.
PEER_BENCHES = {"scripts.bench.moe_peer"}
# Parts of megatron_ext that answer before megatron is there.
WITHOUT_MEGATRON = (
    "megatron_ext.__main__",
    "megatron_ext.cli",
    "megatron_ext.config",
    "megatron_ext.config_file",
    "megatron_ext.data",
    "megatron_ext.launch",
    "megatron_ext.recipes",
)

# The one file that may import an optional library.
DOORS = {
    "flash_attn": "parallel.attention.flash_attn_door",
    "deep_ep": "moe.dispatch.deepep",
    "transformer_engine": "megatron_ext.precision.transformer_engine_door",
}
# For these any one file, as long as it is one.
SINGLE_DOOR = ("deepspeed", "wandb", "tensorboard", "torch.utils.tensorboard", "transformers")

# Who am I is asked in one place.
RANK_VARIABLES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "MEGATRON_EXT_RANK"),
}

HEAVY = {"torch", "megatron", "numpy", "matplotlib", "tokenizers", "pyarrow", "transformers"}

MAX_LINES = 400
VAGUE_NAMES = {"utils", "util", "helpers", "common", "core", "misc"}


def test_imports_run_down() -> None:
    wrong = []
    for module in MODULES.values():
        allowed = ORDER[ORDER.index(module.package) :]
        for imported in module.imports:
            package = imported.name.partition(".")[0]
            if package == "tests" or (package in ORDER and package not in allowed):
                wrong.append(f"{module.path}:{imported.line} imports up: {imported.name}")
    assert wrong == []


def test_no_module_imports_itself_in_a_circle() -> None:
    edges = {
        name: set(imported_modules(module, MODULES, at_load_only=False))
        for name, module in MODULES.items()
    }
    assert find_circle(edges) == []


def test_imports_are_absolute_and_named() -> None:
    assert [
        f"{module.path}:{imported.line}"
        for module in MODULES.values()
        for imported in module.imports
        if imported.is_relative or imported.is_star
    ] == []


def test_libraries_are_imported_where_they_belong() -> None:
    wrong = []
    for module in MODULES.values():
        has_megatron = module.name in PEER_BENCHES or (
            module.package == "megatron_ext" and not is_under(module.name, *WITHOUT_MEGATRON)
        )
        is_at_home = {
            "megatron": has_megatron,
            "triton": module.path.stem.endswith("_triton"),
            **{library: module.name == door for library, door in DOORS.items()},
        }
        wrong += [
            f"{module.path}:{imported.line} imports {imported.name}"
            for imported in module.imports
            if not is_at_home.get(imported.name.partition(".")[0], True)
        ]
    assert wrong == []


@pytest.mark.parametrize("library", SINGLE_DOOR)
def test_optional_libraries_have_one_door(library: str) -> None:
    users = [
        str(module.path)
        for module in MODULES.values()
        if any(is_under(imported.name, library) for imported in module.imports)
    ]
    assert len(users) <= 1, f"{library} is imported in {users}"


@pytest.mark.parametrize(
    ("parts", "library"), [(WITHOUT_MEGATRON, "megatron"), (("parallel.plan",), "torch")]
)
def test_what_must_be_light_loads_nothing_heavy(parts: tuple[str, ...], library: str) -> None:
    wrong = []
    for module in MODULES.values():
        if is_under(module.name, *parts):
            wrong += [
                f"{' -> '.join(way)} -> {name}"
                for name, way in reachable_at_load(module, MODULES).items()
                if is_under(name, library)
            ]
    assert wrong == []


def test_plans_import_no_torch_in_functions_either() -> None:
    assert [
        f"{module.path}:{imported.line}"
        for module in MODULES.values()
        for imported in module.imports
        if is_under(module.name, "parallel.plan") and is_under(imported.name, "torch")
    ] == []


def test_package_files_are_empty() -> None:
    assert [str(m.path) for m in MODULES.values() if m.path.name == "__init__.py" and m.text] == []


def test_files_are_small_ascii_and_introduced() -> None:
    wrong = []
    for module in MODULES.values():
        checks = {
            "not ASCII": module.text.isascii(),
            f"over {MAX_LINES} lines": module.text.count("\n") <= MAX_LINES,
            "no docstring at its top": not module.text or ast.get_docstring(module.tree),
            "vague name": not VAGUE_NAMES & set(module.path.with_suffix("").parts),
        }
        wrong += [f"{module.path}: {problem}" for problem, is_good in checks.items() if not is_good]
    assert wrong == []


def test_rank_variables_are_read_in_one_file() -> None:
    wrong = []
    for module in MODULES.values():
        if module.name != "megatron_ext.launch.ranks":
            wrong += [
                f"{module.path}:{line} reads {name}: ask megatron_ext.launch.ranks"
                for line, name in _constant_keys(module.tree)
                if name in RANK_VARIABLES
            ]
    assert wrong == []


def test_tests_have_unique_names_and_are_no_packages() -> None:
    counts = Counter(module.path.name for module in TESTS.values())
    del counts["conftest.py"]
    assert [name for name, count in counts.items() if count > 1] == []
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_with_code_is_a_package(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} is left out of the wheel"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_come_from_this_tree(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    found = Path(spec.origin).resolve().parent
    assert found == ROOT / package, f"another distribution's {package} hides ours: {found}"


def test_help_is_quick_and_light() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "megatron_ext", "--help"]
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "train" in done.stdout
    loaded = {name.partition(".")[0] for name in re.findall(r"\|\s+([\w.]+)$", done.stderr, re.M)}
    assert "megatron_ext" in loaded
    assert not loaded & HEAVY
    assert min(seconds) < 1.0


def test_the_rules_find_what_breaks_them(tmp_path: Path) -> None:
    (tmp_path / "parallel").mkdir()
    (tmp_path / "parallel" / "a.py").write_text("from parallel import b\nimport torch.nn as n\n")
    (tmp_path / "parallel" / "b.py").write_text(
        "if TYPE_CHECKING:\n    import early\n"
        "def f():\n    from parallel.a import x\n    from . import c\n    from d.e import *\n"
    )
    modules = {
        name: Module(path=tmp_path / module.path, name=name)
        for name, module in project_modules(["parallel"], root=tmp_path).items()
    }
    edges = {
        name: set(imported_modules(module, modules, at_load_only=False))
        for name, module in modules.items()
    }
    assert find_circle(edges) == ["parallel.a", "parallel.b", "parallel.a"]
    assert imported_modules(modules["parallel.b"], modules, at_load_only=True) == {}
    assert reachable_at_load(modules["parallel.a"], modules)["torch.nn"] == ["parallel.a"]
    assert "early" not in reachable_at_load(modules["parallel.a"], modules)
    late = modules["parallel.b"].imports
    assert [i.is_relative for i in late] == [False, False, True, False]
    assert [i.is_star for i in late] == [False, False, False, True]


def _constant_keys(tree: ast.AST) -> list[tuple[int, object]]:
    """The constants in `x[...]`, `os.environ.get(...)` and `os.getenv(...)`, with their lines."""
    keys: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            keys.append(node.slice)
        elif isinstance(node, ast.Call) and re.search(r"environ|getenv", ast.unparse(node.func)):
            keys += node.args[:1]
    return [(key.lineno, key.value) for key in keys if isinstance(key, ast.Constant)]
