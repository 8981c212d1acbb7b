"""The way weights take to a GPU, on a CPU: a ring filled by tensor copies, and copies that come late.

What these tests do not see is whether CUDA keeps its promises: streams, events and pinned memory are simulated.
"""

import math
import threading
from dataclasses import replace
from itertools import count

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import CONTEXTS, END, LAYER, MIDDLE, SETTINGS, START, bits
from rome_fast import apply_edits
from rome_fast.errors import ArgumentError, CheckpointError
from rome_fast.opening import checkpoints
from rome_fast.weights import Checkpoint
from rome_fast.weights.reader import Files, Loader, ReadAhead, _all_parts, buffer_on, view
from simulated_device import Simulated
from toys import LAYERS, save_toy, toy_model

USUAL = {
    "statistics": "identity",
    "layer": LAYER,
    "contexts": CONTEXTS,
    "settings": replace(SETTINGS, steps=2),
    "guard": "off",
    "unconverged": "write",
}


def least(source):
    """The smallest budget that is accepted: one block at a time."""
    with pytest.raises(ArgumentError) as caught:
        checkpoints.outline(source, memory=1, layer=LAYER, identity=True)
    return int(str(caught.value).split("at least ")[1].split(":")[0].replace(",", ""))


def outline_of(source, memory=None):
    return checkpoints.outline(source, memory=memory or least(source), layer=LAYER, identity=True)


def edited_bits(directory, result):
    (name,) = result.delta.updates
    return bits(Checkpoint.open(directory).read(name))


def content(source, block):
    """(bytes) what a block holds, read by itself; gaps are zero."""
    memory, stored = torch.zeros(block.size, dtype=torch.uint8), Checkpoint.open(source)
    for piece in block.pieces:
        raw = bits(stored.read(piece.parameter))
        memory[piece.offset : piece.offset + len(raw)] = raw
    return memory


def holds(memory, block, wanted):
    return all(
        torch.equal(memory[part], wanted[part])
        for piece in block.pieces
        for part in [slice(piece.offset, piece.offset + piece.nbytes)]
    )


def wait_for(condition, seconds=5.0):
    event = threading.Event()
    for _ in range(int(seconds * 1000)):
        if condition():
            return
        event.wait(0.001)
    pytest.fail("it did not happen")


@pytest.fixture
def source(tmp_path, toy_tokenizers):
    return save_toy(tmp_path / "source", toy_model("llama"), toy_tokenizers[True], max_shard_size="100KB")


@pytest.fixture
def resident(source, tmp_path):
    """The bytes of the edited weight where all weights are in memory."""
    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    result = apply_edits(model, [START, MIDDLE, END], tokenizer=tokenizer, out=tmp_path / "resident", **USUAL)
    return edited_bits(tmp_path / "resident", result)


class ByTensorCopies(Loader):
    """Fills memory as a GPU's is filled, by copies that torch knows of."""

    def fill(self, memory, block):
        read = buffer_on(torch.device("cpu"), block.size)
        super().fill(read, block)
        memory.copy_(read)


def test_a_copy_of_the_next_block_does_not_change_the_one_in_use_for_autograd(source, monkeypatch):
    """All blocks lie in one tensor, whose version counter rises with every copy into it."""
    monkeypatch.setattr("rome_fast.weights.stream.Loader", ByTensorCopies)
    stream = outline_of(source, 2 * least(source)).stream()
    ring, (first, second, third) = stream._reader, stream._streamed[:3]
    stream.take(stream._parts.blocks.index(first))
    wait_for(lambda: ring._loaded[-1].block is second and ring._loaded[-1].ready)
    x = torch.ones(2, 48, requires_grad=True)
    weight = stream.model.get_parameter("model.layers.0.mlp.gate_proj.weight")
    out, read = x @ weight.t(), ring.bytes_read
    ring.expect([third])
    wait_for(lambda: ring.bytes_read == read + third.size)
    (gradient,) = torch.autograd.grad(out[0, 3], x)
    assert torch.equal(gradient[0], Checkpoint.open(source).read("model.layers.0.mlp.gate_proj.weight")[3])
    stream.close()


def test_weights_in_one_buffer_have_version_counters_of_their_own(source):
    block = outline_of(source).parts.blocks[0]
    memory = buffer_on(torch.device("cpu"), block.size)
    one, other = (view(memory, piece) for piece in block.pieces[:2])
    memory.zero_()
    one.add_(1)
    assert (one._version, other._version) == (1, 0)
    # They are views of the same bytes none the less.
    assert memory.view(one.dtype)[: one.numel()].eq(1).all()
    memory.view(one.dtype)[0] = 7
    assert one.view(-1)[0] == 7


@pytest.mark.parametrize("blocks", [1, 2])
def test_an_edit_through_a_ring_of_tensor_copies(blocks, source, resident, tmp_path, monkeypatch):
    """Freed places are filled with NaN, so that whatever is still read there spoils the edit."""

    class Poisoned(ByTensorCopies):
        def fill(self, memory, block):
            memory.fill_(0xFF)
            super().fill(memory, block)

    given, taken = [], []

    class Watched(ReadAhead):
        def take(self, block, then):
            if taken and taken[0] is not block:
                # What was handed out was left alone for as long as it was in use, whatever was read meanwhile.
                assert holds(given[0], taken[0], contents[taken[0].name])
                given[0].fill_(0xFF)
            given[:], taken[:] = [super().take(block, then)], [block]
            assert holds(given[0], block, contents[block.name])
            return given[0]

    contents = {block.name: content(source, block) for block in outline_of(source).parts.blocks}
    monkeypatch.setattr("rome_fast.weights.stream.Loader", Poisoned)
    monkeypatch.setattr("rome_fast.weights.stream.ReadAhead", Watched)
    # The edited weight is in no block: names and sizes are those of every edit of this layer.
    result = apply_edits(source, [START, MIDDLE, END], out=tmp_path / "out", memory=blocks * least(source), **USUAL)
    assert torch.equal(edited_bits(tmp_path / "out", result), resident)


# A device that runs behind the host


def simulate(monkeypatch, device, staging=1000):
    """Have loaders go through a simulated device, a piece in several parts."""
    monkeypatch.setattr("rome_fast.weights.reader._STAGING_BYTES", staging)
    monkeypatch.setattr("rome_fast.weights.reader.transfers_to", lambda _: device)


def wrong_bytes(source, device, steps=60):
    """How often a block was not what was asked for when the device came to use it; in all orders, expected or not."""
    outline = outline_of(source)
    blocks = outline.parts.blocks[:LAYERS]
    contents = [content(source, block) for block in blocks]
    loader = Loader(Files(Checkpoint.open(source).shards.values()), torch.device("cpu"))
    ahead, wrong = ReadAhead(loader, int(2.5 * max(block.size for block in blocks))), []
    order = torch.randint(len(blocks), (steps,), generator=torch.Generator().manual_seed(0)).tolist()
    for step, index in enumerate(order):
        if step % 5 == 0:
            ahead.expect([blocks[i] for i in order[step : step + 10]])
        memory = ahead.take(blocks[index], lambda step=step: [blocks[i] for i in order[step + 1 : step + 5]])

        def use(memory=memory, index=index):
            if not holds(memory, blocks[index], contents[index]):
                wrong.append(index)

        device.compute(use)
        if step % 3 == 0:
            # So that what is read ahead is not only what was just asked for.
            wait_for(lambda: ahead._place(ahead._next.size) is None if ahead._next else True)
    ahead.close()
    loader.close()
    device.wait(device.computed())
    return len(wrong)


@pytest.mark.parametrize("late", ["copies", "work"])
def test_a_device_that_runs_behind_the_host_uses_the_right_bytes(late, source, monkeypatch):
    device = Simulated(late)
    simulate(monkeypatch, device)
    assert wrong_bytes(source, device) == 0
    assert len(device.copies.queued) > 1000


@pytest.mark.parametrize(
    ("late", "forgotten"), [("copies", "compute_after"), ("copies", "wait"), ("work", "copy_after")]
)
def test_each_wait_that_is_left_out_shows_as_wrong_bytes(late, forgotten, source, monkeypatch):
    """What the test before is worth: computing before the copy, changing what is copied, overwriting what is used."""
    device = Simulated(late, forgets=forgotten)
    simulate(monkeypatch, device)
    assert wrong_bytes(source, device) > 0


def test_parts_are_read_by_several_threads_into_slots_of_their_own(source, monkeypatch):
    """Two for each thread, of which none is read into before what was in it has been copied."""
    made, readers = [], set()

    class Noting(Simulated):
        def staging(self, size):
            made.append(size)
            return super().staging(size)

    class Slow(Files):
        def read(self, header, begin, targets):
            readers.add(threading.get_ident())
            threading.Event().wait(0.002)
            super().read(header, begin, targets)

    device = Noting("copies")
    simulate(monkeypatch, device, staging=2000)
    monkeypatch.setattr("rome_fast.weights.reader.os.sched_getaffinity", lambda _: range(3))
    blocks = outline_of(source).parts.blocks[:LAYERS]
    loader = Loader(Slow(Checkpoint.open(source).shards.values()), torch.device("cpu"))
    memories = [loader.load(block) for block in blocks]
    # The device's copies wait until somebody needs them: what is under way is in a slot, or in the queue behind one.
    assert device.copies.done < len(device.copies.queued)
    loader.finish()
    for memory, block in zip(memories, blocks, strict=True):
        assert holds(memory, block, content(source, block))
    assert made == [2000] * 6
    assert len(readers) == 3
    loader.close()


def test_a_read_that_fails_leaves_nobody_writing_into_its_slot(source, monkeypatch):
    device, begun, ended = Simulated("copies"), [], []

    class Failing(Files):
        def read(self, header, begin, targets):
            begun.append(begin)
            if len(begun) == 2:
                raise CheckpointError("gone")
            threading.Event().wait(0.005)
            super().read(header, begin, targets)
            ended.append(begin)

    simulate(monkeypatch, device, staging=2000)
    block = outline_of(source).parts.blocks[0]
    loader = Loader(Failing(Checkpoint.open(source).shards.values()), torch.device("cpu"))
    with pytest.raises(CheckpointError, match="gone"):
        loader.load(block)
    assert len(ended) == len(begun) - 1 == len(list(_all_parts(block, 2000))) - 1
    loader.close()


def test_a_stream_says_how_fast_it_was_against_its_source_and_its_copies(source, monkeypatch):
    """By a clock that counts one second for every look at it."""
    seconds = count()
    monkeypatch.setattr("rome_fast.weights.reader.time.perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr("rome_fast.weights.reader._TIMED_BYTES", 1)
    for device in (None, Simulated("work")):
        monkeypatch.setattr("rome_fast.weights.reader.transfers_to", lambda _, device=device: device)
        stream = outline_of(source).stream()
        assert stream.rates["achieved"] is None
        list(stream.parameters())
        found, read = stream.rates, stream._reader.bytes_read
        assert found["bytes_read"] == read > 0
        assert found["achieved"] == read / stream._reader.seconds_reading
        assert (found["copies"] is None) == (device is None)
        slower = min(found["source"], found["copies"] or math.inf)
        assert found["share"] == found["achieved"] / slower
        stream.close()


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("late", ["copies", "work"])
def test_an_edit_through_a_device_that_runs_behind_the_host(late, blocks, source, resident, tmp_path, monkeypatch):
    """Also what stays in memory: its copies are waited for before anything is computed."""
    device = Simulated(late)
    simulate(monkeypatch, device)
    memory = blocks * least(source)
    # As if the process itself took nothing, or no layer would stay.
    monkeypatch.setattr(checkpoints, "anonymous_bytes", lambda: -memory // 8)
    result = apply_edits(source, [START, MIDDLE, END], out=tmp_path / "out", memory=memory, **USUAL)
    assert torch.equal(edited_bits(tmp_path / "out", result), resident)
    assert device.copies.done == len(device.copies.queued) > 0
    said = result.report()["streaming"]
    assert said["bytes_read"] > 0
    assert said["copies"] is None  # too small to be timed
    assert said["share"] == said["achieved"] / said["source"]


def test_memory_is_given_back_only_when_no_copy_into_it_is_under_way(source, monkeypatch):
    """The next owner of the ring's memory would find a block of weights written over what it has put there."""
    device = Simulated("copies")
    simulate(monkeypatch, device)
    blocks = outline_of(source).parts.blocks[:LAYERS]
    loader = Loader(Files(Checkpoint.open(source).shards.values()), torch.device("cpu"))
    ahead = ReadAhead(loader, 3 * max(block.size for block in blocks))
    ahead.expect(blocks[:3])
    ahead.take(blocks[0], list)
    wait_for(lambda: len(ahead._loaded) == 3 and ahead._loaded[2].ready)
    assert device.copies.done < len(device.copies.queued)
    ahead.close()
    assert device.copies.done == len(device.copies.queued)
    loader.close()


@pytest.mark.parametrize("ring", [False, True])
def test_new_memory_is_filled_after_the_work_that_gave_it_back(ring, source, monkeypatch):
    """An allocator hands memory on as soon as the host lets go of it, when a GPU may still have to use it."""
    device = Simulated("work")
    simulate(monkeypatch, device)
    block = outline_of(source).parts.blocks[0]
    memory, seen = torch.full((block.size,), 7, dtype=torch.uint8), []
    device.compute(lambda: seen.append(memory.clone()))
    monkeypatch.setattr("rome_fast.weights.reader.buffer_on", lambda _device, size: memory[:size])
    loader = Loader(Files(Checkpoint.open(source).shards.values()), torch.device("cpu"))
    if ring:
        ahead = ReadAhead(loader, block.size)
        ahead.take(block, list)
        ahead.close()
    else:
        loader.load(block)
    loader.close()
    assert holds(memory, block, content(source, block))
    assert [bool(each.eq(7).all()) for each in seen] == [True]


def test_a_file_cut_while_it_is_staged(source, monkeypatch):
    simulate(monkeypatch, Simulated("copies"))
    stream = outline_of(source).stream()
    for shard in source.glob("*.safetensors"):
        with shard.open("r+b") as file:
            file.truncate(1000)
    with pytest.raises(CheckpointError, match="it was cut after opening"):
        list(stream.parameters())
    stream.close()


def test_a_streamed_edit_makes_its_tensors_where_they_belong(source, resident, tmp_path):
    """Whatever is made without a device of its own lands on "meta" here, as it does on a GPU that is the default."""
    with torch.device("meta"):
        result = apply_edits(source, [START, MIDDLE, END], out=tmp_path / "out", memory=least(source), **USUAL)
    assert torch.equal(edited_bits(tmp_path / "out", result), resident)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_edit_on_a_gpu_has_the_bytes_of_a_resident_one(dtype, tmp_path, toy_tokenizers):
    source = save_toy(
        tmp_path / "source", toy_model("llama", dtype=dtype), toy_tokenizers[True], max_shard_size="100KB"
    )
    usual = USUAL | {"contexts": None, "device": "cuda"}
    whole = apply_edits(source, [START, MIDDLE, END], out=tmp_path / "whole", **usual)
    for blocks in (1, 2):
        memory = blocks * least(source)
        result = apply_edits(source, [START, MIDDLE, END], out=tmp_path / str(blocks), memory=memory, **usual)
        assert result.contexts == whole.contexts
        assert torch.equal(edited_bits(tmp_path / str(blocks), result), edited_bits(tmp_path / "whole", whole))
