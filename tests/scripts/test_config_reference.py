"""docs/configuration.md says what the configuration tree is now."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from megatron_ext.config import Config
from scripts.config_reference import BEGIN, END, PAGE, section_table, sections, with_tables


class Inner(BaseModel):
    """A part of it."""

    weight: float = Field(3e-4, gt=0, lt=1)


class Outer(BaseModel):
    """A sample."""

    name: str
    """Two lines
    become one."""
    choice: Literal["one", "two"] | None = None
    numbers: list[int] = Field(default_factory=lambda: [1, 2], min_length=1)
    inner: Inner = Inner()
    parts: list[Inner] = Field(default_factory=list)


def test_the_page_shows_the_tree() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert page == with_tables(page), "run: python -m scripts.config_reference"


def test_the_rest_of_the_page_is_kept() -> None:
    page = with_tables(f"before\n{BEGIN}what stood here\n{END}after\n")
    assert page.startswith(f"before\n{BEGIN}")
    assert page.endswith(f"{END}after\n")
    assert "what stood here" not in page
    assert with_tables(page) == page


def test_every_section_has_a_table() -> None:
    paths = [path for path, _ in sections("", Config)]
    assert set(Config.model_fields) <= set(paths)
    assert "data.corpora.0.prepare" in paths


def test_a_table_shows_types_limits_defaults_and_texts() -> None:
    assert section_table("outer", Outer).splitlines() == [
        "### outer",
        "A sample.",
        "",
        "| key | type | default | |",
        "|---|---|---|---|",
        "| `name` | text | required | Two lines become one. |",
        "| `choice` | `one` or `two` or null | null |  |",
        "| `numbers` | list of int, entries >= 1 | [1, 2] |  |",
        "| `inner` | section |  |  |",
        "| `parts` | list of section | [] |  |",
    ]
    assert [path for path, _ in sections("outer", Outer)] == [
        "outer",
        "outer.inner",
        "outer.parts.0",
    ]
    assert "| `weight` | float, > 0, < 1 | 0.0003 |  |" in section_table("inner", Inner)
