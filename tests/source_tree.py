"""The project's Python files as data: which module imports which, without running any of them."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("parallel", "moe", "megatron_ext")


@dataclass(frozen=True, slots=True)
class Import:
    """`name` is the dotted name as far as it is certain, `line` where it stands.

    `is_at_load` says that importing the file runs it: it stands outside of functions, and not
    under `if TYPE_CHECKING`.
    """

    name: str
    line: int
    is_at_load: bool
    is_relative: bool = False
    is_star: bool = False


@dataclass(frozen=True)
class Module:
    """One file, by its path from the root and its dotted name."""

    path: Path
    name: str

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    @cached_property
    def text(self) -> str:
        return (ROOT / self.path).read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @cached_property
    def imports(self) -> Sequence[Import]:
        return tuple(_imports_below(self.tree, is_at_load=True))


def project_modules(folders: Sequence[str], *, root: Path = ROOT) -> dict[str, Module]:
    """All Python files under `folders` of `root`, by dotted name (a package by its own)."""
    modules = {}
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root)
            parts = relative.with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules[name] = Module(path=relative, name=name)
    return modules


def imported_modules(
    module: Module, modules: dict[str, Module], *, at_load_only: bool
) -> dict[str, int]:
    """The modules among `modules` that `module` imports, each with its first line."""
    found: dict[str, int] = {}
    for imported in module.imports:
        if at_load_only and not imported.is_at_load:
            continue
        # `from a.b import c` may mean the module a.b.c or the name c in a.b.
        name = imported.name
        while name and name not in modules:
            name = name.rpartition(".")[0]
        if name and name != module.name:
            found.setdefault(name, imported.line)
    return found


def reachable_at_load(module: Module, modules: dict[str, Module]) -> dict[str, list[str]]:
    """Every dotted name outside `modules` that importing `module` imports, with the way there."""
    ways: dict[str, list[str]] = {}
    seen: set[str] = set()
    pending: list[tuple[str, list[str]]] = [(module.name, [module.name])]
    while pending:
        name, way = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for imported in modules[name].imports:
            if imported.is_at_load:
                ways.setdefault(imported.name, way)
        for inner in imported_modules(modules[name], modules, at_load_only=True):
            pending.append((inner, [*way, inner]))
    return ways


def find_circle(edges: dict[str, set[str]]) -> list[str]:
    """Names that lead back to the first, which is repeated at the end; empty where none do."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for inner in sorted(edges.get(name, ())):
            if circle := walk(inner, [*way, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(edges) if (circle := walk(name, []))), [])


def is_under(name: str, *prefixes: str) -> bool:
    """`a.b.c` is under `a.b` and `a`, not under `a.bc`."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _imports_below(node: ast.AST, *, is_at_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, is_at_load)
        elif isinstance(child, ast.ImportFrom):
            yield from _from_import(child, is_at_load=is_at_load)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports_below(child, is_at_load=False)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports_below(child, is_at_load=is_at_load and not is_function)


def _from_import(node: ast.ImportFrom, *, is_at_load: bool) -> Iterator[Import]:
    for alias in node.names:
        is_star = alias.name == "*"
        base = node.module or ""
        yield Import(
            name=base if is_star else f"{base}.{alias.name}",
            line=node.lineno,
            is_at_load=is_at_load,
            is_relative=node.level > 0,
            is_star=is_star,
        )
