"""Collect second moments, and manage what was collected."""

import argparse
from pathlib import Path
from typing import Any

from .shared import device_argument, dtype_argument, layers_argument, progress, trust_argument

NAME = "statistics"
SUMMARY = "collect the second moments of a model's keys"
EXAMPLE = "rome-fast statistics ./model --corpus text.txt --tokens 100000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="directory or hub id of the model")
    parser.add_argument(
        "--corpus", type=Path, nargs="+", help="text (blank lines part documents) or .jsonl files, or folders of them"
    )
    parser.add_argument("--dataset", metavar="NAME[:CONFIG]", help="a data set of the hub in place of --corpus")
    parser.add_argument("--split", default="train", help="of the data set (default: train)")
    parser.add_argument(
        "--field", default="text", help="where JSON lines or the data set have the text (default: text)"
    )
    layers_argument(parser, "layers to collect (default: those that an edit of this model takes)")
    parser.add_argument("--tokens", type=int, help="tokens to read (default: 10 per dimension of the keys)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a row at most (default: 128)")
    parser.add_argument("--ridge", type=float, default=0.0, help="solve with C + RIDGE · mean(diag C) · I (default: 0)")
    device_argument(parser)
    dtype_argument(parser)
    trust_argument(parser)
    parser.add_argument(
        "--memory", metavar="BYTES", help="keep within e.g. 8GiB: layers are read while they are needed"
    )
    parser.add_argument("--out", type=Path, help="folder for the files (default: the cache)")
    parser.add_argument("--list", action="store_true", help="list the cache")
    parser.add_argument(
        "--prune",
        action="store_true",
        help="clear the cache of damaged files and interrupted runs, or of the folder named in place of the model",
    )
    parser.add_argument("--merge", type=Path, nargs="+", metavar="DIR", help="join statistics of parts of a corpus")
    parser.add_argument("--import", type=Path, dest="import_npz", metavar="NPZ", help="take a released .npz file")
    parser.add_argument("--export", type=Path, dest="export_npz", metavar="DIR", help="write released .npz files there")
    parser.add_argument("--sample-size", type=int, default=100_000, help="named in exported files (default: 100000)")


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from ..statistics.command import run_statistics

    return run_statistics(arguments, progress)
