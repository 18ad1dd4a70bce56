from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.data import cli
from megatron_ext.errors import UserError


def run(*words: str) -> int:
    parser = argparse.ArgumentParser(prog="megatron-ext")
    cli.add_arguments(parser.add_subparsers(required=True))
    return cli.run(parser.parse_args(words))


def test_prepare_and_stats_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for i in range(12):
        (tmp_path / "in" / "sub" / f"{i}.py").write_text(f"def f{i}(): return {i}\n")
    (tmp_path / "in" / "notes.md").write_text("not code")
    (tmp_path / "more.txt").write_text("more text")
    output = str(tmp_path / "corpus")
    words = [
        *("data", "prepare", "--input", str(tmp_path / "in"), str(tmp_path / "more.txt")),
        *("--output", output, "--tokenizer", "bytes", "--include", "*.py"),
        *("--validation-fraction", "0.2", "--num-workers", "1"),
    ]
    assert run(*words) == 0
    printed = capsys.readouterr().out
    assert f"into {output}" in printed
    assert "257 ids" in printed
    assert "1 not included" in printed
    assert run(*words) == 0
    assert "was prepared before" in capsys.readouterr().out
    assert run("data", "stats", output) == 0
    assert "bytes a token" in capsys.readouterr().out
    picture = tmp_path / "lengths.png"
    assert run("data", "stats", output, "--json", "--plot", str(picture)) == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    assert splits["train"]["num_documents"] + splits["validation"]["num_documents"] == 13
    assert picture.exists()


def test_a_wrong_input_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        run("data", "prepare", "--input", str(tmp_path / "none"), "--output", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["data"],
        ["data", "prepare", "--input", "x"],
        ["data", "prepare", "--output", "x"],
        ["data", "prepare", "--input", "x", "--output", "y", "--bad-records", "ignore"],
        ["data", "stats"],
    ],
)
def test_missing_or_unknown_words_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        run(*words)
    assert leaving.value.code == 2


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("data", "prepare", "--help")
    printed = capsys.readouterr().out
    for option in (
        *("--input", "--output", "--tokenizer", "--include", "--bad-records", "--eod-token"),
        *("--validation-fraction", "--text-key", "--overwrite", "python-stdlib"),
    ):
        assert option in printed


def test_the_command_line_loads_nothing_heavy() -> None:
    program = (
        "import sys, megatron_ext.data.cli\n"
        "heavy = {'numpy', 'tokenizers', 'rich', 'zstandard', 'pyarrow', 'torch', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_preparing_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    program = (
        "import sys\n"
        "from tests.megatron_ext.data.corpora import prepare_quietly\n"
        "import megatron_ext.data.order, megatron_ext.data.stats, pathlib\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "prepare_quietly(here / 'corpus', here / 'a.txt')\n"
        "print(sorted({'torch', 'megatron', 'pyarrow', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
