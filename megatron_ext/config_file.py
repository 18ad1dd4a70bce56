"""From a recipe name, a YAML file and `section.key=value` words to a checked `Config`.

YAML is loaded with the safe loader, in which `3e-4` is a number (YAML 1.1 calls it text). All
wrong keys and values are reported together, each with its path and, for a key, the nearest one
that exists.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megatron_ext.config import Config
from megatron_ext.errors import UserError

# A configuration is a few KiB; more is a mistake or an attack (nested aliases).
_LARGEST_FILE_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 3e-4 as a number and refuses keys given twice and aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(
                None, None, "aliases (*name) are not allowed in a configuration", mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands here twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: a text such as 1e3 gets quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+0123456789."),
    )


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("megatron_ext") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe or YAML file, apply `section.key=value` words, check every field.

    Args:
        source: recipe name or path of a YAML file.
        overrides: words such as `model.num_layers=24`; the value is YAML.

    Raises:
        UserError: naming every wrong key or value.
    """
    name, text = _read_source(source)
    tree = _parse_yaml(text, where=source)
    if not isinstance(tree, dict):
        raise UserError(
            f"{source}: expected sections such as `model:`, found {type(tree).__name__}"
        )
    for word in overrides:
        _apply_override(tree, word)
    config = check_tree(tree, where=source)
    if config.log.run_dir is None:
        log = config.log.model_copy(update={"run_dir": str(Path("runs") / name)})
        config = config.model_copy(update={"log": log})
    return config


def check_tree(tree: Mapping[str, Any], *, where: str) -> Config:
    """Check types and keys of a whole tree."""
    try:
        return Config.model_validate(_whole_floats(tree, Config))
    except ValidationError as error:
        raise UserError(f"{where}:\n" + "\n".join(_messages(error))) from None


def dump_config(config: Config) -> str:
    """The resolved tree as YAML, every field present; `load_config` reads it back."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def _read_source(source: str) -> tuple[str, str]:
    if source.endswith((".yaml", ".yml")) or "/" in source:
        path = Path(source)
        try:
            if path.stat().st_size > _LARGEST_FILE_BYTES:
                raise UserError(f"{source}: larger than a configuration can be (1 MiB)")
            return path.stem, path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"{source}: no such file{_recipe_hint()}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{source}: cannot be read as a UTF-8 file: {error}") from None
    if source not in recipe_names():
        close = difflib.get_close_matches(source, recipe_names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"no recipe is called {source!r}{hint}{_recipe_hint()}")
    folder = resources.files("megatron_ext") / "recipes"
    return source, (folder / f"{source}.yaml").read_text(encoding="utf-8")


def _recipe_hint() -> str:
    return f"\n  recipes: {', '.join(recipe_names())}; or give the path of a .yaml file"


def _parse_yaml(text: str, *, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {error}") from None


def _apply_override(tree: dict[str, Any], word: str) -> None:
    path, separator, value = word.partition("=")
    if not separator or not path:
        raise UserError(f"{word!r}: an override is section.key=value, e.g. model.num_layers=24")
    *parents, last = path.split(".")
    node: Any = tree
    for key in parents:
        node = _child(node, key, word)
    parsed = _parse_yaml(value, where=word)
    if isinstance(node, list):
        node[_list_index(node, last, word)] = parsed
    elif isinstance(node, dict):
        node[last] = parsed
    else:
        raise UserError(f"{word!r}: {'.'.join(parents)} is a value, not a section")


def _child(node: Any, key: str, word: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, key, word)]
    if isinstance(node, dict):
        if node.get(key) is None:
            node[key] = {}
        return node[key]
    raise UserError(f"{word!r}: {key!r} cannot be set inside a value")


def _list_index(node: list[Any], key: str, word: str) -> int:
    if not (key.isascii() and key.isdigit()) or int(key) >= len(node):
        known = ", ".join(str(index) for index in range(len(node)))
        cure = f"use {known}, or give the whole list" if known else "give the whole list"
        raise UserError(f"{word!r}: {key!r} is not an entry of a list of {len(node)}; {cure}")
    return int(key)


def _whole_floats(value: Any, model: Any) -> Any:
    """Let `lr: 1` and `train_iters: 1e3` through where strict types would refuse them.

    An integer is a float; a float without a fraction is an integer where one is asked for.
    """
    if isinstance(value, dict) and isinstance(model, type) and issubclass(model, BaseModel):
        return {
            key: _whole_floats(entry, _field_type(model, key)) if isinstance(key, str) else entry
            for key, entry in value.items()
        }
    if isinstance(value, list):
        (item_type, *_) = [*get_args(_without_none(model)), None]
        return [_whole_floats(entry, item_type) for entry in value]
    wanted = _without_none(model)
    if wanted is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        # One of more than 308 digits stays what it is, and is refused.
        with contextlib.suppress(OverflowError):
            return float(value)
    return value


def _field_type(model: type[BaseModel], key: str) -> Any:
    field = model.model_fields.get(key)
    return _without_none(field.annotation) if field else None


def _without_none(annotation: Any) -> Any:
    options = [option for option in get_args(annotation) if option is not type(None)]
    has_none = type(None) in get_args(annotation)
    return options[0] if has_none and len(options) == 1 else annotation


def _messages(error: ValidationError) -> Iterator[str]:
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"]) or "(top level)"
        if item["type"] == "extra_forbidden":
            yield f"  {path}: unknown key{_nearest(item['loc'])}"
        elif item["type"] == "missing":
            yield f"  {path}: missing, and it has no default"
        elif item["type"] == "model_type":
            yield f"  {path}: expected a section of `key: value` lines, found {item['input']!r}"
        else:
            yield f"  {path}: {item['msg']}, found {item['input']!r}"


def _nearest(loc: tuple[int | str, ...]) -> str:
    model: Any = Config
    for part in loc[:-1]:
        if isinstance(part, int):
            (model, *_) = [*get_args(model), None]
        elif isinstance(model, type) and issubclass(model, BaseModel):
            model = _field_type(model, part)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return ""
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; keys here are {', '.join(known)}"
