"""`megatron-ext data prepare` and `data stats`: parse, call, print."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ext.data.prepare import PrepareReport

_PREPARE = """\
Turn text into a corpus to train on: token ids in megatron's .bin/.idx format, the length of every
document, the tokenizer, and a part that is held out for validation.

An input is a folder (every text file below it is a document; .jsonl and .parquet in it are read as
such), a text file (one document), .jsonl, .jsonl.gz, .jsonl.zst or .parquet (a document a record),
or python-stdlib: the source of this Python's own standard library, for a first try without any
download. Killed or out of disk, the same command goes on where it was."""
_STATS = """\
Count documents and tokens of a prepared corpus and show how long its documents are."""


def add_arguments(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `data` with its subcommands to the command line."""
    data = subparsers.add_parser("data", help="prepare text for training, look at a corpus")
    commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_prepare(commands)
    stats = commands.add_parser(
        "stats",
        help="documents, tokens and lengths of a corpus",
        description=_STATS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stats.add_argument("corpus", metavar="DIR", type=Path, help="a prepared corpus")
    stats.add_argument("--json", action="store_true", help="print JSON instead of a table")
    stats.add_argument("--plot", metavar="FILE", type=Path, help="also draw a histogram (.png)")


def _add_prepare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "prepare",
        help="turn text into a corpus",
        description=_PREPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: megatron-ext data prepare --input books/ web.jsonl.zst --output corpus",
    )
    add = parser.add_argument
    add(
        "--input",
        dest="inputs",
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="files, folders, or python-stdlib",
    )
    add("--output", required=True, metavar="DIR", type=Path, help="the folder to make")
    add(
        "--tokenizer",
        default="train:8192",
        metavar="FILE|bytes|train:N",
        help="a tokenizer.json; bytes (257 ids, nothing to train); or byte-level BPE of N ids "
        "trained on a sample of the text (default: train:8192)",
    )
    add(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="in folders read only files whose name matches, such as '*.py'; a pattern with / is "
        "matched with the path below the folder; may be repeated",
    )
    add(
        "--text-key",
        default="text",
        metavar="KEY",
        help="key of .jsonl records and column of .parquet that holds the text (default: text)",
    )
    add(
        "--validation-fraction",
        type=float,
        default=0.01,
        metavar="X",
        help="share of the documents that is held out, by a hash of their text (default: 0.01)",
    )
    add(
        "--bad-records",
        choices=("stop", "skip"),
        default="stop",
        help="at invalid UTF-8, invalid JSON or a missing text: stop and say where, or leave the "
        "record out and count it; either way all are listed in DIR/bad_records.jsonl "
        "(default: stop)",
    )
    add(
        "--num-workers",
        type=int,
        metavar="N",
        help="processes (default: one for each core); the result does not depend on it",
    )
    add("--eod-token", metavar="TOKEN", help="the end-of-document token of a given tokenizer")
    add(
        "--overwrite",
        action="store_true",
        help="throw away what another preparation left in DIR",
    )
    _add_limits(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--training-sample-bytes",
        type=int,
        metavar="N",
        help="text to train the tokenizer on (default: 2 KiB for each id, at least 8 MiB)",
    )
    limits.add_argument(
        "--max-record-bytes",
        type=int,
        default=64 * 1024**2,
        metavar="N",
        help="a longer line of .jsonl is a bad record; text files have no limit (default: 64 MiB)",
    )
    limits.add_argument(
        "--unit-bytes",
        type=int,
        metavar="N",
        help="input between two restart points (default: 1/4096 of it, 2 to 256 MiB)",
    )


def run(args: argparse.Namespace) -> int:
    """Do what `args` ask for; the exit code.

    Raises:
        UserError: what the user can mend.
    """
    return _prepare(args) if args.data_command == "prepare" else _stats(args)


def _prepare(args: argparse.Namespace) -> int:
    from megatron_ext.data.prepare import PrepareSettings, prepare

    given = {field.name: getattr(args, field.name) for field in fields(PrepareSettings)}
    given["inputs"], given["include"] = tuple(args.inputs), tuple(args.include)
    try:
        report = prepare(PrepareSettings(**given))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        raise
    print(_describe(report))
    return 0


def _describe(report: PrepareReport) -> str:
    if report.already_prepared:
        head = f"{report.output} was prepared before from the same inputs; nothing was done"
    else:
        head = (
            f"prepared {report.num_input_bytes / 1e6:.1f} MB in {report.seconds:.1f} s "
            f"({report.bytes_per_second / 1e6:.1f} MB/s, at most "
            f"{report.peak_worker_bytes / 2**20:.0f} MiB a worker) into {report.output}"
        )
    lines = [head]
    for name, split in (("train", report.train), ("validation", report.validation)):
        lines.append(
            f"  {name:<11}{split.num_documents:>12,} documents {split.num_tokens:>16,} tokens "
            f"{split.num_bytes:>18,} bytes"
        )
    lines.append(f"  vocabulary {report.vocab_size:>12,} ids")
    counts = ", ".join(
        f"{count} {name.replace('_', ' ')}" for name, count in report.counts.items() if count
    )
    if counts:
        lines.append(f"  left out: {counts}")
    if report.counts.get("bad_records"):
        lines.append(f"  bad records are listed in {report.output / 'bad_records.jsonl'}")
    return "\n".join(lines + [f"note: {note}" for note in report.notes])


def _stats(args: argparse.Namespace) -> int:
    from megatron_ext.data.stats import describe_stats, measure, plot_lengths

    stats = measure(args.corpus)
    print(json.dumps(stats.to_dict(), indent=2) if args.json else describe_stats(stats))
    if args.plot is not None:
        plot_lengths(args.corpus, args.plot)
        print(f"histogram: {args.plot}", file=sys.stderr)
    return 0
