"""The command line: `rome-fast VERB …`. Every verb takes --json FILE for its report."""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .errors import ArgumentError, RomeFastError

_DTYPES = ("float32", "bfloat16", "float16")

_EXAMPLES = """examples:
  rome-fast demo
  rome-fast statistics ./model --corpus text.txt --layers 9
  rome-fast edit ./model --edits edits.jsonl --out ./edited
  rome-fast evaluate ./edited --edits edits.jsonl --json scores.json
  rome-fast revert ./edited
"""

_EVALUATED_TOGETHER = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; errors of rome_fast print as one message and exit with status 2."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
            raise ArgumentError(f"json: the folder {arguments.json.parent} does not exist; make it first")
        report = arguments.run(arguments)
        # None: this is not the first of several processes.
        if arguments.json is not None and report is not None:
            _write_json(arguments.json, report)
    except RomeFastError as error:
        print(f"rome-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rome-fast: interrupted; nothing half-written is left behind", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rome-fast",
        description="Edit facts in language models without collapsing them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Any, summary: str, example: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}\n",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
        return sub

    demo = verb(
        "demo",
        _demo,
        "show a fact change, ROME's collapse and its cure in a small real model",
        "rome-fast demo",
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results (default: demo)")

    stats = verb(
        "statistics",
        _statistics,
        "collect the second moments of a model's keys",
        "rome-fast statistics ./model --corpus text.txt --layers 9 --tokens 100000",
    )
    stats.add_argument("model", nargs="?", help="directory or hub id of the model")
    stats.add_argument(
        "--corpus", type=Path, nargs="+", help="text (blank lines part documents) or .jsonl files, or folders of them"
    )
    stats.add_argument("--dataset", metavar="NAME[:CONFIG]", help="a data set of the hub in place of --corpus")
    stats.add_argument("--split", default="train", help="of the data set (default: train)")
    stats.add_argument("--field", default="text", help="where JSON lines or the data set have the text (default: text)")
    stats.add_argument("--layers", type=int, nargs="+", help="layers to collect (default: the model's edit layer)")
    stats.add_argument("--tokens", type=int, help="tokens to read (default: 10 per dimension of the keys)")
    stats.add_argument("--max-length", type=int, default=128, help="tokens of a row at most (default: 128)")
    stats.add_argument("--ridge", type=float, default=0.0, help="solve with C + RIDGE · mean(diag C) · I (default: 0)")
    stats.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    stats.add_argument("--memory", metavar="BYTES", help="keep within e.g. 8GiB: layers are read while they are needed")
    stats.add_argument("--out", type=Path, help="folder for the files (default: the cache)")
    stats.add_argument("--list", action="store_true", help="list the cache")
    stats.add_argument("--prune", action="store_true", help="clear the cache of damaged files and interrupted runs, or "
                       "of the folder named in place of the model")  # fmt: skip
    stats.add_argument("--merge", type=Path, nargs="+", metavar="DIR", help="join statistics of parts of a corpus")
    stats.add_argument("--import", type=Path, dest="import_npz", metavar="NPZ", help="take a released .npz file")
    stats.add_argument("--export", type=Path, dest="export_npz", metavar="DIR", help="write released .npz files there")
    stats.add_argument("--sample-size", type=int, default=100_000, help="named in exported files (default: 100000)")

    edit = verb(
        "edit",
        _edit,
        "edit facts into a new copy of a checkpoint, or in place",
        "rome-fast edit ./model --edits edits.jsonl --method c-rome --out ./edited",
    )
    edit.add_argument("model", help="directory or hub id of the model; only read, unless --in-place")
    edit.add_argument("--edits", type=Path, required=True, help="JSON lines of prompt, subject, target_new")
    target = edit.add_mutually_exclusive_group()
    target.add_argument("--out", type=Path, help="new directory for the edited checkpoint")
    target.add_argument("--in-place", action="store_true", help="change MODEL itself; a kill leaves it old or new")
    edit.add_argument("--link", choices=("copy", "hard"), default="copy", help="shards that stay as they are")
    edit.add_argument("--statistics", type=Path, help="folder of statistics (default: the cache)")
    edit.add_argument("--identity", action="store_true", help="edit with C = I instead of statistics")
    edit.add_argument("--method", default="c-rome", help="c-rome (default), dual, rome, c-rome-released, p-rome")
    edit.add_argument("--layer", type=int, help="edit layer (default: by model)")
    edit.add_argument("--schedule", choices=("joint", "sequential"), default="joint")
    edit.add_argument("--guard", choices=("raise", "warn", "skip", "off"), default="raise")
    edit.add_argument("--unconverged", choices=("skip", "write", "raise"), default="skip")
    edit.add_argument("--seed", type=int, default=0, help="seed of the prefix contexts")
    edit.add_argument("--memory", help="how much of the model may be in memory, as 8GiB (default: what is free)")
    edit.add_argument("--plan", action="store_true", help="say what would be kept in memory and read, and stop")
    edit.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    edit.add_argument("--trust-remote-code", action="store_true", help="let code in the model's directory run")

    evaluate = verb(
        "evaluate",
        _evaluate,
        "measure requests on a model",
        "rome-fast evaluate ./edited --edits edits.jsonl --perplexity sentences.txt",
    )
    evaluate.add_argument("model", help="directory or hub id of the model")
    evaluate.add_argument("--edits", type=Path, required=True)
    evaluate.add_argument("--delta", type=Path, help="apply this delta in memory first")
    evaluate.add_argument("--perplexity", type=Path, metavar="FILE", help="sentences, one a line")

    bench = verb(
        "bench",
        _bench,
        "measure edit throughput, and against an editor written the usual way",
        "rome-fast bench --baseline --count 8 --threads 1 --json bench.json",
    )
    _measured(bench, count=None)
    bench.add_argument(
        "--dtype", choices=_DTYPES, nargs="+", help="of the weights; several in turn (default: as stored)"
    )
    bench.add_argument(
        "--batch", type=int, nargs="+", default=[16], help="edits per call; several in turn (default: 16)"
    )
    bench.add_argument("--baseline", action="store_true", help="also make the edits as the released editors do")
    bench.add_argument("--sentences", type=Path, help="sentences for perplexity, one a line (default: the demo's)")
    bench.add_argument("--no-quality", action="store_true", help="leave quality figures out")
    bench.add_argument(
        "--keep", type=Path, help="keep each batch's figures in this file; a batch in it is not run again"
    )
    bench.add_argument("--csv", type=Path, help="append a row for each batch size and dtype to this CSV file")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw where the time goes, as .png, .svg or .pdf")

    study = verb(
        "study",
        _study,
        "which edits would collapse this model, why, and what cures it",
        "rome-fast study ./model --edits edits.jsonl --sample 100 --out study",
    )
    study.add_argument("model", nargs="?", help="directory or hub id of the model (default: the demo's)")
    study.add_argument("--edits", type=Path, required=True, help="JSON lines of prompt, subject, target_new")
    study.add_argument("--out", type=Path, required=True, help="folder of the study; an interrupted one goes on")
    study.add_argument("--statistics", type=Path, help="folder of statistics (default: the demo's, or the cache)")
    study.add_argument("--methods", nargs="+", help="default: rome c-rome-released c-rome p-rome")
    study.add_argument("--sample", type=int, help="requests besides the first-token ones (default: all)")
    study.add_argument("--layer", type=int, help="default: the model's edit layer")
    study.add_argument("--sentences", type=Path, help="sentences for perplexity, one a line (default: the demo's)")
    study.add_argument("--batch", type=int, default=8, help="requests measured, and kept, at a time (default: 8)")
    study.add_argument("--processes", type=int, help="to share the requests (default: on a CPU one a core)")
    study.add_argument("--threads", type=int, help="CPU threads of each process (default: the cores, shared out)")

    profile = verb(
        "profile",
        _profile,
        "trace a few edits and set every stage and operator against what the device does at best",
        "rome-fast profile ./model --edits edits.jsonl --count 4 --out profile",
    )
    _measured(profile, count=4)
    profile.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: as stored)")
    profile.add_argument("--out", type=Path, default=Path("profile"), help="folder for the files (default: profile)")
    profile.set_defaults(sentences=None, no_quality=True)

    revert = verb("revert", _revert, "restore an edited checkpoint to its original bytes", "rome-fast revert ./edited")
    revert.add_argument("directory", type=Path)

    verify = verb(
        "verify",
        _verify,
        "read a checkpoint to the last byte and check it, and what rome-fast needs to undo its edit",
        "rome-fast verify ./edited",
    )
    verify.add_argument("directory", type=Path)
    return parser


def _measured(sub: argparse.ArgumentParser, count: int | None) -> None:
    """What to measure, for the verbs that do."""
    sub.add_argument("model", nargs="?", help="directory or hub id of the model (default: the demo's)")
    sub.add_argument("--shape", help="random weights of a real model's sizes instead, as llama-2-7b; never stops early")
    sub.add_argument("--edits", type=Path, help="requests (default: a small built-in set)")
    how_many = f"how many of them (default: {count or 'all, or one batch for a shape'}; a shape repeats them)"
    sub.add_argument("--count", type=int, default=count, help=how_many)
    sub.add_argument("--statistics", type=Path, help="folder of statistics (default: the demo's, or the cache)")
    sub.add_argument("--identity", action="store_true", help="edit with C = I instead of statistics")
    sub.add_argument("--method", default="c-rome")
    sub.add_argument("--layer", type=int)
    compute = "of products while values are searched (default: auto)"
    sub.add_argument("--compute-dtype", choices=("auto", *_DTYPES), default="auto", help=compute)
    sub.add_argument("--device", default="cpu")
    sub.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")


def _demo(arguments: argparse.Namespace) -> dict[str, Any]:
    from .demo import run_demo

    return run_demo(arguments.out)


def _statistics(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from .statistics.command import run_statistics

    return run_statistics(arguments, _progress)


def _edit(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from .editor import RESUME, apply_edits
    from .edits import load_edits
    from .processes import joined, launched_together, own_device
    from .report import edit_table, print_table
    from .statistics import Statistics

    if arguments.plan:
        return _plan(arguments)
    edits = load_edits(arguments.edits)
    if arguments.identity and arguments.statistics:
        raise ArgumentError("statistics: got both --statistics and --identity, wanted one of them")
    statistics = Statistics.load(arguments.statistics) if arguments.statistics else None
    device, together = own_device(arguments.device), launched_together()
    with ExitStack() as stack:
        first = not together or stack.enter_context(joined(device, RESUME)).rank == 0
        advance, reading = stack.enter_context(_progress("values", "edits")) if first else (None, None)
        result = apply_edits(
            arguments.model,
            edits,
            statistics="identity" if arguments.identity else statistics,
            method=arguments.method,
            layer=arguments.layer,
            schedule=arguments.schedule,
            guard=arguments.guard,
            unconverged=arguments.unconverged,
            seed=arguments.seed,
            out=arguments.out,
            in_place=arguments.in_place,
            link=arguments.link,
            memory=arguments.memory,
            device=device,
            trust_remote_code=arguments.trust_remote_code,
            distributed=together,
            progress=advance,
            on_read=reading,
        )
    if not first:
        return None
    print_table(edit_table(result.records))
    edited = arguments.model if arguments.in_place else arguments.out
    print(f"edited checkpoint: {edited} (undo with: rome-fast revert {edited})")
    return result.report()


def _plan(arguments: argparse.Namespace) -> dict[str, Any]:
    from .edits import load_edits
    from .planning import plan

    made = plan(
        arguments.model,
        load_edits(arguments.edits),
        statistics="identity" if arguments.identity else None,
        method=arguments.method,
        layer=arguments.layer,
        schedule=arguments.schedule,
        memory=arguments.memory,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(made)
    return made.to_json()


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    from . import checkpoints
    from .delta import Delta
    from .edits import load_edits
    from .evaluation import evaluate, sentence_perplexity, summarise
    from .report import metrics_table, print_table
    from .runner import Runner

    edits = load_edits(arguments.edits)
    sentences = [s for s in _text(arguments.perplexity).splitlines() if s.strip()] if arguments.perplexity else []
    model, tokenizer, directory = checkpoints.load(arguments.model)
    record = directory / checkpoints.RECORD_FILE
    contexts = checkpoints.read_record(directory).get("contexts", []) if record.exists() else []
    if arguments.delta:
        delta = Delta.load(arguments.delta)
        delta.apply(model)
        contexts = json.loads(delta.metadata.get("contexts", "[]"))
    metrics = []
    with _progress("evaluating", "edits") as (advance, _):
        for start in range(0, len(edits), _EVALUATED_TOGETHER):
            metrics += evaluate(model, tokenizer, edits[start : start + _EVALUATED_TOGETHER], contexts)
            advance(len(metrics), len(edits))
    report: dict[str, Any] = {
        "model": arguments.model,
        "edits": [m.to_json() for m in metrics],
        "summary": summarise(metrics),
    }
    if arguments.perplexity:
        report["perplexity"] = sentence_perplexity(Runner(model), tokenizer, sentences)
    print_table(metrics_table(metrics))
    print("  ".join(f"{name} {value:.3f}" for name, value in report["summary"].items()))
    if "perplexity" in report:
        print(f"perplexity {report['perplexity']:.2f}")
    return report


def _bench(arguments: argparse.Namespace) -> dict[str, Any]:
    from .bench.command import run_bench

    return run_bench(arguments)


def _study(arguments: argparse.Namespace) -> dict[str, Any]:
    from .study import run_study

    with _progress("studying", "requests") as (advance, _):
        return run_study(arguments, advance, lambda line: print(line, flush=True))


def _profile(arguments: argparse.Namespace) -> dict[str, Any]:
    from .bench.profile import run_profile

    return run_profile(arguments)


def _revert(arguments: argparse.Namespace) -> dict[str, Any]:
    from . import checkpoints

    with _progress("restoring", "checkpoint") as (advance, _):
        names = checkpoints.revert(arguments.directory)
        advance(1, 1)
    print(f"{arguments.directory}: restored {', '.join(names) or 'by the revert that was cut short'}")
    return {"directory": str(arguments.directory), "restored": names}


def _verify(arguments: argparse.Namespace) -> dict[str, Any]:
    from . import checkpoints

    report = checkpoints.verify(arguments.directory)
    print(f"{arguments.directory}: {report['tensors']} tensors, {report['bytes']:,} bytes, all in order")
    if report["edited"]:
        print(f"edited: {', '.join(report['edited'])}; the original bytes are there")
    return report


@contextmanager
def _progress(stage: str, unit: str) -> Iterator[tuple[Callable[[int, int], None], Callable[[int, float], None]]]:
    """A bar on standard error: a function to say what is done of how much, and one for (bytes read, bytes a second)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """How many a second, measured over the last of them."""

        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f}/s" if task.speed and task.speed >= 10 else "")

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[reading]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(stage, total=None, reading="")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        def reading(count: int, rate: float) -> None:
            bar.update(task, reading=f"{count / 1e9:.1f} GB read, {rate / 1e9:.2f} GB/s")

        with warnings.catch_warnings():
            # A warning is one line for the reader, not a line of our source.
            warnings.showwarning = lambda message, *_args, **_kwargs: console.print(f"warning: {message}")
            yield advance, reading


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{file}: is not UTF-8 text (byte {error.start}); convert it") from error


def _write_json(file: Path, report: dict[str, Any]) -> None:
    from .weights.files import atomic_write

    atomic_write(file, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
