from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.data.inputs import Listing, list_inputs
from megatron_ext.data.settings import PrepareSettings
from megatron_ext.errors import UserError


def listed(tmp_path: Path, *inputs: str | Path, **changes: Any) -> Listing:
    names = tuple(str(name) for name in inputs)
    return list_inputs(PrepareSettings(inputs=names, output=tmp_path / "out", **changes))


def names(listing: Listing, root: Path) -> list[str]:
    return [os.path.relpath(file.path, root.resolve()) for file in listing.files]


def fill(root: Path, *files: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text\n")
    return root


def test_a_tree_is_listed_in_one_order(tmp_path: Path) -> None:
    root = fill(tmp_path / "tree", "b.py", "a/z.txt", "a/c.md", "B.txt", "a.txt", "c/d/e/f.rst")
    listing = listed(tmp_path, root)
    assert names(listing, root) == [
        "B.txt", "a/c.md", "a/z.txt", "a.txt", "b.py", "c/d/e/f.rst"
    ]  # fmt: skip
    assert listing.num_bytes == 6 * 5


def test_hidden_links_and_devices_are_passed_over(tmp_path: Path) -> None:
    root = fill(tmp_path / "tree", "a.txt", ".git/config", ".hidden", "sub/b.txt")
    fill(tmp_path / "outside", "secret.txt")
    (root / "link.txt").symlink_to(tmp_path / "outside" / "secret.txt")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "inside.txt").symlink_to(root / "a.txt")
    (root / "broken").symlink_to("nowhere")
    os.mkfifo(root / "pipe")
    listing = listed(tmp_path, root)
    assert names(listing, root) == ["a.txt", "sub/b.txt"]
    assert listing.passed_over == {
        "hidden": 2,
        "symbolic links": 4,
        "devices, pipes and sockets": 1,
    }


def test_include_chooses_by_name_or_path(tmp_path: Path) -> None:
    root = fill(tmp_path / "tree", "a.py", "a.txt", "sub/b.py", "sub/c.md")
    listing = listed(tmp_path, root, include=("*.py",))
    assert names(listing, root) == ["a.py", "sub/b.py"]
    assert listing.passed_over == {"not included": 2}
    assert names(listed(tmp_path, root, include=("sub/*", "a.txt")), root) == [
        "a.txt", "sub/b.py", "sub/c.md"
    ]  # fmt: skip
    with pytest.raises(UserError, match="no file to read in it; passed over: 4 not included"):
        listed(tmp_path, root, include=("*.rs",))


@pytest.mark.parametrize(
    ("name", "form", "compression"),
    [
        ("a.jsonl", "jsonl", "none"),
        ("a.JSONL.GZ", "jsonl", "gzip"),
        ("a.json.zst", "jsonl", "zstd"),
        ("a.ndjson.zst", "jsonl", "zstd"),
        ("a.parquet", "parquet", "none"),
        ("a.txt.gz", "text", "gzip"),
        ("a.json", "text", "none"),
        ("a.py", "text", "none"),
        ("README", "text", "none"),
        ("a.tar.gz", "text", "none"),
    ],
)
def test_formats_follow_from_names(tmp_path: Path, name: str, form: str, compression: str) -> None:
    fill(tmp_path, name)
    (file,) = listed(tmp_path, tmp_path / name).files
    assert (file.format, file.compression) == (form, compression)


def test_the_standard_library_is_the_interpreters_own(tmp_path: Path) -> None:
    listing = listed(tmp_path, "python-stdlib")
    paths = [file.path for file in listing.files]
    assert os.path.realpath(os.__file__) in paths
    assert all(path.endswith(".py") for path in paths)
    assert not any("-packages/" in path or "__pycache__" in path for path in paths)
    assert all(file.skip_bad for file in listing.files)
    assert len(paths) > 300


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "none: no such file or folder"),
        ("*.txt", "did the shell|pattern that the shell did not expand"),
        ("empty.txt", r"empty\.txt is empty \(0 bytes\)"),
        ("empty.jsonl", r"empty\.jsonl is empty"),
        ("folder", "folder: no file to read in it"),
        ("picture.txt", "looks binary: a zero byte at offset 3"),
        ("pipe", "not a regular file"),
        ("loop", "loop"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "picture.txt").write_bytes(b"GIF\0\1\2")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=message):
        listed(tmp_path, tmp_path / name)


def test_the_same_text_twice_is_refused(tmp_path: Path) -> None:
    root = fill(tmp_path / "tree", "a/b.txt", "ab/c.txt")
    for inputs in ((root, root / "a"), (root / "a" / "b.txt", root), (root, root)):
        with pytest.raises(UserError, match="its text would be read twice"):
            listed(tmp_path, *inputs)
    assert len(listed(tmp_path, root / "a", root / "ab").files) == 2


def test_the_output_is_no_input(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "out/metadata.json")
    assert names(listed(tmp_path, tmp_path), tmp_path) == ["a.txt"]


def test_names_that_are_not_utf8_can_be_listed(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "wb") as stream:
        stream.write(b"text")
    (file,) = listed(tmp_path, tmp_path).files
    assert os.fsencode(file.path) == os.path.realpath(path)
    assert sys.getfilesystemencoding() == "utf-8"


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"validation_fraction": 1.0}, "expected 0 <= fraction < 1"),
        ({"tokenizer": "train:lots"}, "such as train:8192"),
        ({"tokenizer": "train:12"}, "at least train:257"),
        ({"num_workers": 0}, "--num-workers 0"),
        ({"unit_bytes": 10}, "--unit-bytes 10"),
        ({"bad_records": "ignore"}, "stop or skip"),
    ):
        with pytest.raises(UserError, match=message):
            listed(tmp_path, tmp_path, **changes)
