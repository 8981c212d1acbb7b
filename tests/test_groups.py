"""Commands of the GPU benchmark end with all that they started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import groups

ROOT = Path(__file__).parents[1]


def test_a_command_that_takes_too_long_is_killed_with_all_that_it_started(tmp_path):
    assert groups.run_group(["sh", "-c", "echo $WORD; echo error >&2; exit 9"], 60, WORD="said") == (9, "said\nerror\n")
    number = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 300 & echo $! > {number}; wait"]
    code, text = groups.run_group(command, 1)
    assert (code, text) == (124, "stopped after 1 s")
    assert ends(int(number.read_text()))


ENDED = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from groups import ending_in_order, run_group
with ending_in_order():
    command = ["sh", "-c", f"sleep 300 & echo $! > {sys.argv[2]}; wait"]
    threads = [threading.Thread(target=run_group, args=(command, 250))]
    threads[0].start()
    print("started", flush=True)
    threads[0].join()
"""


def test_what_threads_have_started_ends_with_a_part_that_is_asked_to_end(tmp_path):
    number = tmp_path / "pid"
    command = [sys.executable, "-c", ENDED, str(ROOT / "benchmarks"), str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        end = time.monotonic() + 20
        while not (number.exists() and number.read_text().strip()) and time.monotonic() < end:
            time.sleep(0.02)
        process.terminate()
        assert process.wait(20) == 1
    assert ends(int(number.read_text()))


def ends(pid):
    """Whether a process ends within ten seconds; it is killed if it does not."""
    end = time.monotonic() + 10
    while running(pid):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


def running(pid):
    """Whether a process runs; one that has ended may not have been collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
