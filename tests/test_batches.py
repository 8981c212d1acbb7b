"""How many edits go together: never more than fit, and the same result when fewer did."""

import itertools
import random
from dataclasses import dataclass, field

import pytest
import torch

from helpers import END, LAYER, MIDDLE, START, all_bits, changed, delta_w, edited, relative_error, rounding_of_edit
from rome_fast.errors import ModelError
from rome_fast.models import batches
from rome_fast.models.batches import BatchSizer, free_memory, in_batches
from rome_fast.models.runner import Runner
from rome_fast.search import search
from toys import toy_model


@dataclass
class Shape:
    suffix: int
    before: int = 10
    middle: int = 4
    rows: list[int] = field(default_factory=lambda: [0] * 5)
    scored: int = 5


@pytest.fixture
def sizer():
    return BatchSizer(Runner(toy_model("gpt2")), LAYER)


def test_a_batch_is_as_large_as_the_memory_at_hand(sizer, monkeypatch):
    sizes = []
    for free in (1 << 40, 1 << 25, 1 << 24, 0):
        monkeypatch.setattr("rome_fast.models.batches.free_memory", lambda _device, free=free: free)
        sizes.append(sizer.choose([Shape(suffix=8)] * 40))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2
    # One edit is always tried.
    assert sizes[-1] == 1


def test_the_longest_edit_of_a_batch_counts(sizer, monkeypatch):
    monkeypatch.setattr("rome_fast.models.batches.free_memory", lambda _device: 1 << 24)
    short = sizer.choose([Shape(suffix=4)] * 40)
    long = sizer.choose([Shape(suffix=40)] * 40)
    assert 1 <= long < short <= 40
    # A long one that comes first takes the room of the short ones behind it.
    assert sizer.choose([Shape(suffix=40), *[Shape(suffix=4)] * 40]) <= long


def test_only_edits_that_are_waiting_are_taken(sizer):
    assert sizer.choose([Shape(suffix=2)] * 3) == 3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        MemoryError(),
        RuntimeError("can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_running_out_of_memory_halves_the_batch(error, sizer):
    for size, left in ((8, 4), (5, 2), (2, 1)):
        with sizer.halving(size):
            raise error
        assert sizer.choose([Shape(suffix=2)] * 8) == left
    with (
        pytest.raises(
            ModelError,
            match=r"one edit does not fit: it wants about 0\.\d\d GiB, and \d+\.\d\d GiB are free \(.+\); "
            "free memory on cpu, use fewer contexts, or load",
        ),
        sizer.halving(1),
    ):
        raise error


def test_other_errors_pass(sizer):
    with pytest.raises(RuntimeError, match="something else"), sizer.halving(8):
        raise RuntimeError("something else")


@pytest.fixture
def small_memory(monkeypatch):
    """A machine whose memory holds `limit` edits, found out when it is too late."""
    sizes = []

    def install(limit):
        original = search.optimise_values

        def scarce(runner, chunks, layer, settings, edits, **options):
            sizes.append(options["room"])
            if options["room"] > limit:
                raise torch.OutOfMemoryError("out of memory")
            return original(runner, chunks, layer, settings, edits, **options)

        monkeypatch.setattr(search, "optimise_values", scarce)
        return sizes

    return install


def test_an_edit_that_ran_out_of_memory_ends_the_same(small_memory, toy_tokenizers, monkeypatch):
    monkeypatch.setitem(batches._FIXED_POSITIONS, "cpu", 1e6)
    model, tokenizer = toy_model("llama", dtype=torch.float64), toy_tokenizers[True]
    wanted = edited(model, tokenizer, [START, MIDDLE, END])
    wanted.revert()
    sizes, progress = small_memory(1), []
    got = edited(model, tokenizer, [START, MIDDLE, END], progress=lambda *now: progress.append(now))
    assert sizes == [3, 1, 1, 1]
    assert relative_error(delta_w(got), delta_w(wanted)) < rounding_of_edit(torch.float64, wanted.condition)
    assert [record.subject for record in got.records] == ["Chicago", "Istanbul", "Paris"]
    assert progress[-1] == (3, 3)
    assert all(done <= total for done, total in progress)


def test_an_edit_that_fits_nowhere_is_an_error(small_memory, toy_tokenizers):
    model = toy_model("llama")
    before = all_bits(model)
    small_memory(0)
    with pytest.raises(ModelError, match="one edit does not fit"):
        edited(model, toy_tokenizers[True], [START, MIDDLE])
    assert changed(model, before) == []
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_free_memory_is_a_plausible_number():
    assert 1 << 20 < free_memory(torch.device("cpu")) < 1 << 50


def test_other_numbers_of_rows_with_a_target_are_another_batch(sizer):
    assert sizer.choose([Shape(suffix=2)] * 2 + [Shape(suffix=2, scored=4)] * 3) == 2
    assert list(in_batches(sizer, [Shape(2), Shape(2, scored=4), Shape(2)])) == [[1], [0, 2]]
    # An essence row is none of these.
    assert list(in_batches(sizer, [Shape(2, rows=[0] * 6), Shape(2)])) == [[0, 1]]


def test_the_batches_are_those_that_cost_least(sizer, monkeypatch):
    """Against all ways of parting the requests, for a step that costs nothing, little and much by itself."""
    monkeypatch.setattr("rome_fast.models.batches.free_memory", lambda _device: 1 << 40)
    random_lengths = random.Random(0)
    for fixed in (0.0, 5.0, 20.0, 1e6):
        monkeypatch.setitem(batches._FIXED_POSITIONS, "cpu", fixed)
        group = [Shape(suffix=random_lengths.randint(2, 7)) for _ in range(9)]
        suffixes = sorted(request.suffix for request in group)

        def cost(sizes, fixed=fixed, suffixes=suffixes):
            ends = list(itertools.accumulate(sizes))
            return sum(fixed + 0.5 * 5 * size * suffixes[end - 1] for size, end in zip(sizes, ends, strict=True))

        found = [len(batch) for batch in in_batches(sizer, group)]
        ways = (
            [b - a for a, b in itertools.pairwise((0, *cuts, 9))]
            for count in range(9)
            for cuts in itertools.combinations(range(1, 9), count)
        )
        assert cost(found) == pytest.approx(min(map(cost, ways)))
        assert (fixed < 1e6) == (len(found) > 1)
