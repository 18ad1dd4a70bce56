"""The tables of docs/configuration.md, made from the configuration tree itself.

    python -m scripts.config_reference

puts them into the page again. Type, limits and default are what pydantic checks; the explanation is
the text that stands below a field in `megatron_ext/config.py`.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_ext.config import Config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
BEGIN = "<!-- tables: python -m scripts.config_reference -->\n"
END = "<!-- end of tables -->\n"

_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "entries >="}


def with_tables(page: str) -> str:
    """The page with the tables of the tree as it is now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = "\n".join(section_table(path, section) for path, section in sections("", Config))
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def sections(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section with its dotted path; of a list entry 0 stands for all."""
    if path:
        yield path, model
    for name, field in model.model_fields.items():
        is_list, inner = _inner_section(field.annotation)
        if inner is not None:
            parts = [path] * bool(path) + [name] + ["0"] * is_list
            yield from sections(".".join(parts), inner)


def section_table(path: str, model: type[BaseModel]) -> str:
    """One section as a heading, its first words and a table of its fields."""
    lines = [
        f"### {path}",
        inspect.cleandoc(model.__doc__ or ""),
        "",
        "| key | type | default | |",
        "|---|---|---|---|",
    ]
    texts = _texts_below_fields(model)
    for name, field in model.model_fields.items():
        kind = ", ".join([_type_text(field.annotation), *_limits(field)])
        # A bar inside a table's cell must be escaped.
        cells = (f"`{name}`", kind, _default_text(field), texts.get(name, ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _inner_section(annotation: Any) -> tuple[bool, type[BaseModel] | None]:
    """(whether it is a list of them, the section class in an annotation or None)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return False, annotation
    for part in get_args(annotation):
        is_list, inner = _inner_section(part)
        if inner is not None:
            return is_list or get_origin(annotation) is list, inner
    return False, None


def _type_text(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is Annotated:
        inner, *limits = get_args(annotation)
        found = [text for limit in limits for text in _limits(limit)]
        return " ".join([_type_text(inner), *found])
    if get_origin(annotation) is list:
        return f"list of {_type_text(get_args(annotation)[0])}"
    if get_args(annotation):
        return " or ".join(map(_type_text, get_args(annotation)))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    name: str = annotation.__name__
    return {"str": "text", "bool": "true or false"}.get(name, name)


def _limits(field: FieldInfo) -> list[str]:
    return [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in _LIMITS.items()
        if hasattr(limit, name)
    ]


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return ""
    if isinstance(default, float):
        return f"{default:g}"
    return default if isinstance(default, str) else json.dumps(default)


def _texts_below_fields(model: type[BaseModel]) -> dict[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match text:
                case ast.Expr(value=ast.Constant(value=str(words))):
                    texts[field.target.id] = " ".join(words.split())
    return texts


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
