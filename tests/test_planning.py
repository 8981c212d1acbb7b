"""The plan of an edit against what the edit then reads."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from helpers import CONTEXTS, END, LAYER, MIDDLE, SETTINGS, START
from rome_fast import Edit, apply_edits, plan
from rome_fast.bench.flops import FlopCounter
from rome_fast.closing.closing import Closing
from rome_fast.closing.history import History
from rome_fast.errors import ArgumentError, EditError, StatisticsError
from rome_fast.methods import close, cost_of
from rome_fast.models.fingerprint import Fingerprint
from rome_fast.models.runner import Runner
from rome_fast.opening import checkpoints
from rome_fast.weights import Stream
from toys import D_FF, HIDDEN, LAYERS, save_toy, toy_model

EDITS = [START, MIDDLE, END]


def history_of(layers, edits):
    """Of the toy that is planned for, with two keys an edit."""
    keys = {layer: torch.randn(2 * edits, D_FF) for layer in layers}
    none = torch.zeros(2 * edits, dtype=torch.bool)
    return History(Fingerprint.of(Runner(toy_model("llama")), layers[0]), keys, none, 2)


# The keys of toys have much in common, so that a method with a ridge meets them in part.
pytestmark = pytest.mark.filterwarnings("ignore::rome_fast.closing.judging.SharedKeyWarning")


@pytest.fixture
def source(tmp_path, toy_tokenizers):
    return save_toy(tmp_path / "source", toy_model("llama"), toy_tokenizers[True], max_shard_size="100KB")


@pytest.fixture
def no_process(monkeypatch):
    """As if the process itself took nothing: budgets of toys are smaller than it."""
    monkeypatch.setattr(checkpoints, "anonymous_bytes", lambda: 0)


@pytest.mark.parametrize("schedule", ["joint", "sequential"])
@pytest.mark.parametrize(
    ("memory", "method", "layers"),
    [
        (220_000, "dual", (LAYER,)),
        (400_000, "dual", (LAYER,)),
        (320_000, "dual", (0, 1, 2)),
        (320_000, "memit", (0, 2, 3)),
    ],
)
def test_an_edit_reads_what_was_planned(memory, method, layers, schedule, source, tmp_path, no_process):
    """Never more; and not much less, with a stop rule that does not fire."""
    read = []
    settings = replace(SETTINGS, steps=6)
    usual = {
        "statistics": "identity",
        "method": method,
        "layers": layers,
        "settings": settings,
        "schedule": schedule,
        "contexts": CONTEXTS,
        "memory": memory,
    }
    made = plan(source, EDITS, **usual)
    apply_edits(
        source,
        EDITS,
        out=tmp_path / "out",
        guard="off",
        unconverged="write",
        on_read=lambda count, _rate: read.append(count),
        **usual,
    )
    planned = sum(made.read_bytes.values()) - made.read_bytes["loading"]
    # What is read ahead of a pass that does not come is not planned: less than the buffer, a few times a batch.
    assert planned / 2 < read[-1] <= planned + made.buffer_bytes * (4 + 3 * made.batches)
    assert made.batches == (1 if schedule == "joint" else 3)
    assert made.resident_layers + made.streamed_layers != ()
    assert sorted(made.resident_layers + made.streamed_layers) == list(range(LAYERS))
    assert made.memory_bytes == memory
    assert ("spreading" in made.passes, "looking ahead" in made.passes) == (len(layers) > 1, len(layers) > 1)
    # Six evaluations a batch, the last without a backward pass.
    assert made.passes["values"] == 11 * made.batches


@pytest.mark.parametrize(("columns", "d_ff", "d"), [(40, 96, 48), (600, 256, 128), (1500, 512, 96)])
def test_the_closed_form_takes_what_is_said(columns, d_ff, d):
    """The operations that are counted are all but those of decompositions and of solutions with them."""
    keys = torch.randn(columns, d_ff, generator=torch.Generator().manual_seed(0))
    with FlopCounter() as counted:
        factors = close(keys, keys, keys[:, :d], columns=2, penalty=0.3 * d_ff)
    assert factors.condition < 100
    cost = cost_of(columns, d_ff, d)
    before = 2 * d_ff**3 / 3 + 2 * columns * d_ff**2
    decomposed = 2 * columns**3 / 3 + 2 * columns**2 * d
    # Of the condition, half are products of columns above 512, and none below.
    condition = 8 * columns**2 * 4 * 12 if columns > 512 else 20 * columns**3
    wanted = cost.flops - before - decomposed - (condition / 2 if columns > 512 else condition)
    # Blocks of 1024 columns: the last one of a norm is smaller; and of each edit alone, four products of 2 columns.
    alone = columns / 2 * (2 * 4 * 2 * (d + d_ff) + 8 * d)
    assert counted.total == pytest.approx(wanted + alone, rel=0.1)
    tensors = 8 * (2 * columns * d_ff + columns**2 + columns * d)
    assert tensors < cost.bytes - 8 * d_ff**2 < 4 * tensors


def test_what_is_closed_together_is_said(source):
    edits = [Edit("The port of {} lies in", f"{START.subject} {i}", "Rome") for i in range(5)]
    usual = {"statistics": "identity", "layers": (0, 1), "contexts": CONTEXTS}
    joint, turns = plan(source, edits, **usual), plan(source, edits, schedule="sequential", batch_size=2, **usual)
    assert (joint.closing_columns, turns.closing_columns) == (10, 4)
    assert joint.closing_bytes == cost_of(10, D_FF, HIDDEN).bytes
    assert 0 < joint.closing_seconds < 60
    assert 5 / 2 * 0.9 < joint.rows_bytes / turns.rows_bytes < 5 / 2 * 1.1  # their subjects differ in tokens
    assert "rows on their way through the edit layers: about " in str(joint)
    assert "closed form: 10 columns for each edit layer, " in str(joint)
    # Those of earlier groups and calls are columns, too.
    for changes, columns in (
        ({"method": "memit-history"}, 5),
        ({"history": True}, 10),
        ({"history": history_of((0, 1), edits=3)}, 16),
    ):
        turns = plan(source, edits, schedule="sequential", batch_size=2, **usual | changes)
        assert turns.closing_columns == columns
        assert turns.closing_bytes == cost_of(columns, D_FF, HIDDEN).bytes
    one = plan(source, START, method="c-rome", **usual | {"layers": (LAYER,)})
    assert (one.closing_columns, one.rows_bytes) == (1, 0)


def test_edits_of_one_subject_are_one_in_a_batch(source):
    """A budget that holds a few rows at a time: with one value there are fewer batches, of more rows each."""
    facts = [Edit(f"The {word} of {{}} lies in", "Melbourne", "Rome") for word in ("port", "heart", "north", "end")]
    usual = {"statistics": "identity", "layers": (LAYER,), "contexts": CONTEXTS}
    assert plan(source, facts, **usual).batches == 1
    apart = plan(source, facts, schedule="sequential", **usual)
    assert apart.batches == 4


@pytest.mark.parametrize(
    ("method", "layers", "passed"),
    [
        ("dual", (LAYER,), []),
        ("dual", (0, 2), [0, 1, 2, 1, 2]),
        # From behind layer 0 to the last one, to layer 2, from behind it to the last one, where it then is.
        ("memit", (0, 2, 3), [0, 1, 2, 3, 1, 2, 3]),
    ],
)
def test_layers_are_passed_as_planned(method, layers, passed, source, tmp_path, no_process, monkeypatch):
    """While an edit is spread; twice as much is planned, for edits that are left out meanwhile."""
    taken, closing = [], []
    take, close = Stream.take, Closing.close
    monkeypatch.setattr(Stream, "take", lambda self, i: (taken.append(i) if closing else None, take(self, i))[1])

    def closed(*arguments):
        closing.append(1)
        try:
            return close(*arguments)
        finally:
            closing.clear()

    monkeypatch.setattr(Closing, "close", closed)
    usual = {"statistics": "identity", "method": method, "layers": layers, "contexts": CONTEXTS, "memory": 320_000}
    made = plan(source, EDITS, **usual)
    apply_edits(source, EDITS, out=tmp_path / "out", guard="off", unconverged="write", settings=SETTINGS, **usual)
    # Whatever goes through a layer goes through it while it is there.
    assert [i for i, before in zip(taken, [None, *taken], strict=False) if i != before] == passed
    outline = checkpoints.outline(source, layer=layers, memory=320_000, identity=True)
    sizes = [outline.parts.blocks[i].size * (i not in outline.placement.resident) for i in range(LAYERS)]
    planned = made.read_bytes.get("spreading", 0) + made.read_bytes.get("looking ahead", 0)
    last = sizes[layers[-1]] if method == "memit" else 0
    assert planned == 2 * (sum(sizes[i] for i in passed) + last)


def test_more_memory_is_less_to_read(source, no_process):
    plans = [plan(source, EDITS, statistics="identity", memory=memory) for memory in (220_000, 400_000, 500_000, None)]
    amounts = [sum(each.read_bytes.values()) for each in plans]
    assert amounts == sorted(amounts, reverse=True)
    assert len(set(amounts)) == len(amounts)
    kept = [len(each.resident_layers) for each in plans]
    assert kept == sorted(kept)
    assert kept[-1] == LAYERS
    # In memory as a whole, it is read once.
    assert plans[-1].read_bytes == {"loading": plans[-1].model_bytes}
    assert plans[-1].seconds_reading == pytest.approx(plans[-1].model_bytes / plans[-1].bytes_per_second)


def test_a_plan_says_it_in_words(source, no_process):
    text = str(plan(source, END, statistics="identity", memory=220_000, layer=LAYER))
    for part in ("4 layers, edit layer 1", "memory: 0.22 MB", "through a buffer of", "values: ", "to read", "GB/s"):
        assert part in text


def test_a_plan_refuses_what_the_edit_would(source):
    with pytest.raises(ArgumentError, match="memory: got 1,000 bytes, wanted at least"):
        plan(source, END, memory="1kB")
    with pytest.raises(ArgumentError, match="method: got 'none'"):
        plan(source, END, method="none")
    with pytest.raises(ArgumentError, match="layer: got 4"):
        plan(source, END, layer=4)
    with pytest.raises(EditError, match="tokens with its context"):
        plan(source, replace(END, prompt="word " * 300 + "{}"), statistics="identity")


@pytest.mark.parametrize(
    ("edits", "changes"),
    [
        ([], {}),
        (["The city of Chicago"], {}),
        ([END, END], {}),
        (END, {"schedule": "sequentially"}),
        (END, {"schedule": "sequential", "batch_size": 0}),
        (END, {"schedule": "sequential", "batch_size": 1.5}),
        (END, {"statistics": "none"}),
        (END, {"statistics": 3}),
        (END, {"contexts": ["It rained."]}),
        (END, {"contexts": []}),
        (END, {"history": "yes"}),
        (END, {"history": history_of((0, 1), edits=1)}),
    ],
)
def test_a_plan_refuses_arguments_in_the_words_of_the_edit(edits, changes, source, tmp_path):
    usual = {"statistics": "identity", "layer": LAYER, "contexts": CONTEXTS} | changes
    said = []
    for ask in (plan, partial(apply_edits, out=tmp_path / "out")):
        with pytest.raises((ArgumentError, EditError, StatisticsError)) as caught:
            ask(source, edits, **usual)
        said.append((caught.type, str(caught.value)))
    assert said[0] == said[1]
