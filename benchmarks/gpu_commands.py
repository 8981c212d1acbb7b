"""The part `end-to-end` of `make gpu`: the command line on a small random checkpoint, in every dtype, on the device.

Statistics are collected, edits made, evaluated, studied and taken back, and the edit is profiled, each by a process of
its own as a user would. A row says a command's exit status and seconds, and whether what it left is as it should be: of
`revert` the bytes of the checkpoint before the edit.
"""

import contextlib
import io
import json
import math
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import uninstalled

# isort: split
from groups import run_group
from measure import Table, origin, results, yes
from random_checkpoint import drawn_texts, requests, same_bytes, save_checkpoint, sentences
from rome_fast.cli import main as rome_fast

Run = Callable[[Sequence[str]], tuple[int, str]]
"""From the arguments of `rome-fast` to its exit status and what it printed."""

_EDITS, _STUDIED, _SENTENCES = 4, 2, 8
_DETAIL = 500  # characters kept of what a command that failed has printed
_making = threading.Lock()


def end_to_end(
    device: torch.device,
    shape: str,
    tokens: int,
    seconds: float,
    dtypes: Sequence[torch.dtype],
    profiled: tuple[str, int],
    *,
    apart: bool,
) -> int:
    """A row for each command and dtype; 1 where one fails or leaves what is wrong.

    Last of all `profiled`, a shape and how many edits of it, is profiled in bfloat16. `apart`: every command is a
    process of its own, of `seconds` at most, and the dtypes run side by side, as does the shape; otherwise all are
    called here, one after the other.
    """
    table, lock = Table(results() / "gpu_commands.csv", origin(device)), threading.Lock()
    run = in_a_process(seconds) if apart else here

    def chain(dtype: torch.dtype | None) -> bool:
        """Whether all commands of a dtype (None: of the shape) are right; those behind one that is not are left out."""
        with tempfile.TemporaryDirectory(prefix="rome-fast-commands-") as name:
            folder = Path(name)
            found = (
                profile_of_shape(folder, device, *profiled, run)
                if dtype is None
                else rows(folder, dtype, device, shape, tokens, run)
            )
            for row in found:
                with lock:
                    table.add(row)
                print(f"{row['dtype']}: {row['command']}: {row['seconds']:.1f} s {row['detail']}", flush=True)
                if row["correct"] != "yes":
                    return False
        return True

    chains = [*dtypes, None]
    if apart:
        with ThreadPoolExecutor(len(chains)) as pool:
            right = list(pool.map(chain, chains))
    else:
        right = [chain(dtype) for dtype in chains]
    return int(not all(right))


def profile_of_shape(folder: Path, device: torch.device, shape: str, count: int, run: Run) -> Iterator[dict[str, Any]]:
    """The row of a profile of a whole model's edits, which has to end in the time that a command may take."""
    out = folder / "profile"
    arguments = ["--shape", shape, "--dtype", "bfloat16", "--count", str(count), "--threads", "1", "--out", str(out)]
    yield _row(folder, "profile", arguments, lambda report: _profiled(report, out), torch.bfloat16, device, shape, run)


def rows(
    folder: Path, dtype: torch.dtype, device: torch.device, shape: str, tokens: int, run: Run
) -> Iterator[dict[str, Any]]:
    """The commands in their order, each when it is asked for."""
    with _making:
        save_checkpoint(folder / "model", shape, torch.device("cpu"), dtype)
    (folder / "corpus.txt").write_text("\n\n".join(drawn_texts(tokens)), encoding="utf-8")
    (folder / "sentences.txt").write_text("\n".join(sentences()[:_SENTENCES]) + "\n", encoding="utf-8")
    edits = [{k: v for k, v in _record(edit).items() if v} for edit in requests(_EDITS)]
    (folder / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits), encoding="utf-8")
    for name, arguments, check in _commands(folder, tokens):
        yield _row(folder, name, arguments, check, dtype, device, shape, run)


def _row(
    folder: Path,
    name: str,
    arguments: Sequence[str],
    check: Callable[[dict[str, Any]], bool],
    dtype: torch.dtype,
    device: torch.device,
    shape: str,
    run: Run,
) -> dict[str, Any]:
    """What a command did; its report goes to `folder`."""
    report = folder / f"{name}.json"
    start = time.perf_counter()
    status, text = run([name, *arguments, *_device_of(name, device), "--json", str(report)])
    seconds = time.perf_counter() - start
    fault = f"status {status}" if status else _fault(check, report)
    return {
        "command": name,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": shape,
        "status": status,
        "seconds": seconds,
        "correct": yes(not fault),
        "detail": fault and f"{fault}: {text.strip()[-_DETAIL:]}",
    }


def _profiled(report: dict[str, Any], out: Path) -> bool:
    """Whether a profile has tables and a trace."""
    timed = min(row["seconds"] for row in report["stages"].values()) > 0
    return bool(report["operators"]) and timed and (out / "trace.json.gz").exists()


def _record(edit: Any) -> dict[str, Any]:
    known = asdict(edit)
    names = {"target": "target_new"}
    wanted = ("prompt", "subject", "target", "target_true", "paraphrase_prompts", "neighborhood_prompts")
    return {names.get(name, name): known[name] for name in wanted if name in known}


def _commands(folder: Path, tokens: int) -> list[tuple[str, list[str], Callable[[dict[str, Any]], bool]]]:
    """Verb, arguments, and whether its report, and what it left, are right."""
    model, edited = str(folder / "model"), str(folder / "edited")
    edits, statistics = str(folder / "edits.jsonl"), str(folder / "statistics")

    def reverted(_report: dict[str, Any]) -> bool:
        return same_bytes(folder / "model", folder / "edited")

    def changed(report: dict[str, Any]) -> bool:
        return len(report["edits"]) == _EDITS and not same_bytes(folder / "model", folder / "edited")

    sampled = ["--corpus", str(folder / "corpus.txt"), "--tokens", str(tokens), "--ridge", "0.01"]
    asked = ["--edits", edits]
    read = ["--sentences", str(folder / "sentences.txt")]
    written = ["--guard", "off", "--unconverged", "write", "--out", edited]
    # What is measured is the device; threads that share processors with others would wait for each other.
    one = ["--threads", "1"]
    studied = ["--sample", str(_STUDIED), "--processes", "1", *one, "--out", str(folder / "study")]
    profiling = [*one, "--layer", "1", "--count", str(_STUDIED), "--out", str(folder / "profile")]
    return [
        ("statistics", [model, *sampled, "--out", statistics], lambda report: report["tokens"] == tokens),
        ("edit", [model, *asked, "--statistics", statistics, *written], changed),
        (
            "evaluate",
            [edited, *asked, "--perplexity", str(folder / "sentences.txt")],
            lambda report: all(map(math.isfinite, [report["perplexity"], *report["summary"].values()])),
        ),
        (
            "study",
            [model, *asked, "--statistics", statistics, *read, *studied],
            lambda report: len(report["edits"]) > 0 and math.isfinite(report["perplexity_before"]),
        ),
        ("revert", [edited], reverted),
        (
            "profile",
            [model, *asked, "--statistics", statistics, *profiling],
            lambda report: _profiled(report, folder / "profile"),
        ),
    ]


def _device_of(verb: str, device: torch.device) -> list[str]:
    return [] if verb == "revert" else ["--device", str(device)]


def _fault(check: Callable[[dict[str, Any]], bool], report: Path) -> str:
    """What is wrong with what a command left; nothing if it is right."""
    try:
        return "" if check(json.loads(report.read_text(encoding="utf-8"))) else "what it left is wrong"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"what it left is wrong ({error!r})"


def in_a_process(seconds: float) -> Run:
    """Each command in a process of its own, which is killed after so many seconds."""
    return lambda arguments: run_group([sys.executable, uninstalled.__file__, *arguments], seconds)


def here(arguments: Sequence[str]) -> tuple[int, str]:
    """The command in this process."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            return rome_fast(arguments), text.getvalue()
        except SystemExit as error:
            return int(error.code or 0), text.getvalue()
