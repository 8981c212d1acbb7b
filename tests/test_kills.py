"""Whole edits killed at 400 random moments, half of them in place. Slow: `make acceptance`, a few minutes."""

import os
import random
import shutil
import statistics
import time

import pytest

from helpers import CONTEXTS, END, LAYER, SETTINGS
from on_disk import digests, forks, in_child, killed_after
from rome_fast import apply_edits
from rome_fast.updates import chains
from rome_fast.weights.checkpoint import JOURNAL
from toys import save_toy, toy_model, toy_tokenizer

MOMENTS = 200

pytestmark = [pytest.mark.slow, forks]


def edit(source, **where):
    apply_edits(
        str(source),
        END,
        statistics="identity",
        layer=LAYER,
        contexts=CONTEXTS,
        settings=SETTINGS,
        guard="off",
        unconverged="write",
        memory="1MiB",
        **where,
    )


def weights(directory):
    """Digests of the tensors' files alone: the record beside them has times in it."""
    return {name: d for name, d in digests(directory).items() if name.startswith("model")}


def seconds_of(run, undo):
    """How long a whole edit takes in a child; the first one is for the caches of the system."""
    found = []
    for _ in range(4):
        start = time.perf_counter()
        assert in_child(run) == 0
        found.append(time.perf_counter() - start)
        undo()
    return statistics.median(found[1:])


def moments(duration):
    """Spread over the whole run and beyond; half of them over its last third, where files are written, and after."""
    rng = random.Random(0)
    late = [rng.uniform(0.66, 1.4) * duration for _ in range(MOMENTS // 2)]
    return [rng.uniform(0, 1.1) * duration for _ in range(MOMENTS - len(late))] + late


@pytest.fixture
def source(tmp_path):
    edit(save_toy(tmp_path / "warm", toy_model("llama"), toy_tokenizer(False)), out=tmp_path / "warmed")
    shutil.rmtree(tmp_path / "warm")
    shutil.rmtree(tmp_path / "warmed")
    return save_toy(tmp_path / "source", toy_model("llama"), toy_tokenizer(False))


def test_a_killed_edit(source, tmp_path):
    """The source is as it was, the target absent or valid, and the same command then succeeds and leaves no strays."""
    out, before = tmp_path / "out", digests(source)

    def run():
        edit(source, out=out)

    assert in_child(run) == 0
    wanted = weights(out)
    shutil.rmtree(out)
    found = {"absent": 0, "new": 0}
    for moment in moments(seconds_of(run, lambda: shutil.rmtree(out))):
        killed_after(run, moment)
        assert digests(source) == before
        found["new" if out.exists() else "absent"] += 1
        if out.exists():
            chains.verify(out)
            assert weights(out) == wanted
            shutil.rmtree(out)
        assert in_child(run) == 0
        assert weights(out) == wanted
        assert sorted(os.listdir(tmp_path)) == ["out", "source"]
        shutil.rmtree(out)
    print(found)
    assert min(found.values()) > 0


def test_a_killed_edit_in_place(source, tmp_path):
    """The checkpoint is old or new once the next command has looked at it, and the original bytes can be had."""
    kept, before, old = tmp_path / "kept", digests(source), weights(source)
    shutil.copytree(source, kept)

    def run():
        edit(source, in_place=True)

    def restore():
        shutil.rmtree(source)
        shutil.copytree(kept, source)

    assert in_child(run) == 0
    new = weights(source)
    assert new != old
    restore()
    found = {"old": 0, "new": 0, "between": 0}
    for moment in moments(seconds_of(run, restore)):
        killed_after(run, moment)
        for name, digest in weights(source).items():
            assert digest in (old[name], new[name])
        journalled = (source / JOURNAL).exists()
        edited = in_child(lambda: chains.revert(source)) == 0
        assert weights(source) == old
        found["between" if journalled and edited else "new" if edited else "old"] += 1
        assert in_child(run) == 0
        assert weights(source) == new
        chains.verify(source)
        assert sorted(os.listdir(tmp_path)) == ["kept", "source"]
        assert in_child(lambda: chains.revert(source)) == 0
        assert digests(source) == before
    print(found)
    assert min(found["old"], found["new"]) > 0
