"""Processes that share tasks: every task once, and none outlives the process that started it."""

import os
import subprocess
import sys
import time
from pathlib import Path

from rome_fast.runs.workers import Turns, helped


def write_turns(turns, folder):
    for turn in iter(turns, None):
        if turn >= 200:
            return
        with (folder / str(os.getpid())).open("a") as file:
            file.write(f"{turn}\n")


def test_every_turn_is_taken_once(tmp_path):
    turns = Turns()
    with helped(2, write_turns, turns, tmp_path) as failed:
        write_turns(turns, tmp_path)
    assert failed == []
    taken = [int(line) for file in tmp_path.iterdir() for line in file.read_text().split()]
    assert sorted(taken) == list(range(200))


def test_a_process_that_fails_is_told():
    with helped(2, os._exit, 3) as failed:
        pass
    assert failed == [3, 3]


def test_an_error_ends_the_others():
    start = time.monotonic()
    try:
        with helped(1, time.sleep, 600):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert time.monotonic() - start < 60


def test_kill_9_ends_the_others():
    code = """
import multiprocessing, os, time
from rome_fast.runs.workers import helped
with helped(1, time.sleep, 600):
    print(multiprocessing.active_children()[0].pid, flush=True)
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -9
    stat = Path("/proc", done.stdout.strip(), "stat")
    limit = time.monotonic() + 60
    # Whoever takes in orphans may leave it a zombie.
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < limit
        time.sleep(0.05)
