"""What tests of checkpoints on disk share: two small edits, digests, and processes that die."""

import json
import os
import resource
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rome_fast.weights import Checkpoint
from rome_fast.weights import files as files_module
from rome_fast.weights.files import sha256_file

NAMES = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
INDEX = "model.safetensors.index.json"


def edits_for(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(directory)
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(checkpoint.entry(n).shape, generator=generator) for n in NAMES}


def digests(directory: Path) -> dict[str, str]:
    """Every entry by its path, hidden ones too; a directory counts by its name."""
    return {str(p.relative_to(directory)): sha256_file(p) if p.is_file() else "directory" for p in directory.rglob("*")}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def header_json(path: Path) -> tuple[int, dict]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return 8 + length, json.loads(raw[8 : 8 + length])


def in_child(function: Callable[[], object]) -> int:
    """Exit status of `function` in a forked process; a negative one is the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def line_counter(act: Callable[[int], None]):
    """A trace function that calls `act(n)` at the n-th line executed in the room under test."""
    room, count = str(Path(files_module.__file__).parent), 0

    def trace(frame, event, _):
        nonlocal count
        if not frame.f_code.co_filename.startswith(room):
            return None
        if event == "line":
            count += 1
            act(count)
        return trace

    return trace


def lines_executed(function: Callable[[], object]) -> int:
    seen, before = [0], sys.gettrace()
    sys.settrace(line_counter(lambda n: seen.__setitem__(0, n)))
    try:
        function()
    finally:
        sys.settrace(before)
    return seen[0]


def killed_at_line(function: Callable[[], object], line: int) -> int:
    def child():
        sys.settrace(line_counter(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == line else None))
        function()

    return in_child(child)


def killed_after(function: Callable[[], object], seconds: float) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns; the child only does I/O


def limit_file_size(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
