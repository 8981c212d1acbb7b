"""Editing checkpoints that are read while they run: the bytes of a resident edit, whatever stays in memory."""

import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import CONTEXTS, END, LAYER, MIDDLE, SETTINGS, START, bits
from rome_fast import apply_edits, collect_statistics
from rome_fast.errors import ArgumentError, CheckpointError, ModelError
from rome_fast.evaluation import score
from rome_fast.models.fingerprint import Fingerprint
from rome_fast.models.rows import asked
from rome_fast.models.runner import Runner
from rome_fast.opening import checkpoints
from rome_fast.weights import Checkpoint, align_, memory
from rome_fast.weights import stream as streaming
from rome_fast.weights.reader import Files, Loader, ReadAhead, buffer_on
from toys import KINDS, LAYERS, SENTENCES, save_toy, toy_model
from zoo import zoo_model

# The keys of toys have much in common, so that a method with a ridge meets them in part.
pytestmark = pytest.mark.filterwarnings("ignore::rome_fast.closing.judging.SharedKeyWarning")

USUAL = {
    "statistics": "identity",
    "layer": LAYER,
    "contexts": CONTEXTS,
    "settings": replace(SETTINGS, steps=2),
    "guard": "off",
    "unconverged": "write",
}


def save(directory, kind, tokenizer, *, dtype=torch.float32, tie=False, shards=True):
    return save_toy(
        directory, toy_model(kind, dtype=dtype, tie=tie), tokenizer, max_shard_size="100KB" if shards else "5GB"
    )


def least(source, layers=LAYER):
    """The smallest budget that is accepted."""
    with pytest.raises(ArgumentError, match="memory: got 1 bytes, wanted at least") as caught:
        checkpoints.outline(source, memory=1, layer=layers, identity=True)
    return int(str(caught.value).split("at least ")[1].split(":")[0].replace(",", ""))


def edited_bits(directory, result):
    """Of all edited weights, in the order of their names."""
    stored = Checkpoint.open(directory)
    return torch.cat([bits(stored.read(name)) for name in sorted(result.delta.updates)])


def stream_of(source, memory=None):
    return checkpoints.outline(source, memory=memory or least(source), layer=LAYER, identity=True).stream()


@pytest.fixture
def source(tmp_path, toy_tokenizers):
    return save(tmp_path / "source", "llama", toy_tokenizers[True])


WAYS = (
    (torch.float32, False, True, "auto"),
    (torch.bfloat16, True, False, "auto"),
    (torch.float16, False, True, "auto"),
    # Of a resident model weights are converted once, of a streamed one for every product.
    (torch.float32, True, False, "bfloat16"),
)


@pytest.mark.parametrize(
    ("kind", "dtype", "tie", "shards", "products"),
    # Each kind one way, and two of them every way; `make acceptance` asks for all.
    [
        pytest.param(kind, *way, marks=[] if kind in ("llama", "gpt2") or i % 4 == j else pytest.mark.slow)
        for i, kind in enumerate(KINDS)
        for j, way in enumerate(WAYS)
    ],
)
def test_a_streamed_edit_has_the_bytes_of_a_resident_one(kind, dtype, tie, shards, products, tmp_path, toy_tokenizers):
    """With next to nothing in memory; joint, with every figure of the records."""
    usual = USUAL | {"settings": replace(USUAL["settings"], compute_dtype=products)}
    source = save(tmp_path / "source", kind, toy_tokenizers[True], dtype=dtype, tie=tie, shards=shards)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    resident = apply_edits(
        model, [START, MIDDLE, END], tokenizer=AutoTokenizer.from_pretrained(source), out=tmp_path / "resident", **usual
    )
    streamed = apply_edits(source, [START, MIDDLE, END], out=tmp_path / "streamed", memory=least(source), **usual)
    assert torch.equal(edited_bits(tmp_path / "streamed", streamed), edited_bits(tmp_path / "resident", resident))
    assert [r.to_json() for r in streamed.records] == [r.to_json() for r in resident.records]


SEVERAL = (0, 1, 2)


@pytest.mark.parametrize("with_statistics", [False, True])
@pytest.mark.parametrize("method", ["dual", "memit"])
@pytest.mark.parametrize(
    ("kind", "bos", "dtype"), [("llama", False, torch.float32), ("gpt2", True, torch.bfloat16), ("bloom", False, None)]
)
def test_a_streamed_edit_of_several_layers_has_the_bytes_of_a_resident_one(
    kind, bos, dtype, method, with_statistics, tmp_path, toy_tokenizers, monkeypatch
):
    """Without BOS, one of the subjects is the first token: each of the two collects C₁ for itself."""
    model = zoo_model(kind) if dtype is None else toy_model(kind, dtype=dtype)
    source = save_toy(tmp_path / "source", model, toy_tokenizers[bos], max_shard_size="100KB")
    usual = USUAL | {"layer": None, "layers": SEVERAL, "method": method}
    if with_statistics:
        usual["statistics"] = collect_statistics(model, toy_tokenizers[bos], SENTENCES, SEVERAL, 600).with_ridge(1e-3)
    results = {}
    for name, budget in (("resident", None), ("streamed", least(source, SEVERAL))):
        monkeypatch.setenv("ROME_FAST_CACHE", str(tmp_path / f"cache, {name}"))
        results[name] = apply_edits(source, [START, MIDDLE, END], out=tmp_path / name, memory=budget, **usual)
    resident, streamed = results["resident"], results["streamed"]
    assert ("first tokens" in streamed.seconds) == (method == "dual" and not bos)
    assert sorted(streamed.delta.updates) == sorted(Runner(model).weight_name(layer) for layer in SEVERAL)
    assert torch.equal(edited_bits(tmp_path / "streamed", streamed), edited_bits(tmp_path / "resident", resident))
    assert [r.to_json() for r in streamed.records] == [r.to_json() for r in resident.records]
    # Of the layers, the edited weights are there at the end and nothing else; after a revert, as the source has them.
    names = sorted(streamed.delta.updates)
    layers = Runner(streamed.model).layers
    assert sum(not p.is_meta and p.untyped_storage().nbytes() > 512 for p in layers.parameters()) == len(names)
    streamed.revert()
    assert torch.equal(edited_bits(source, streamed), torch.cat([bits(model.get_parameter(name)) for name in names]))


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_head_in_the_checkpoint_of_a_config_that_ties_it(kind, same, tmp_path, toy_tokenizers):
    """`from_pretrained` ties it only where it is the embedding to the bit."""
    source = save(tmp_path / "source", kind, toy_tokenizers[True], tie=True, shards=False)
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight" if kind == "llama" else "transformer.wte.weight"]
    tensors["lm_head.weight"] = embedding.clone() if same else embedding.flip(0).contiguous()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    resident = apply_edits(source, END, out=tmp_path / "resident", **USUAL)
    assert (resident.model.lm_head.weight is resident.model.get_input_embeddings().weight) == same
    streamed = apply_edits(source, END, out=tmp_path / "streamed", memory=least(source), **USUAL)
    assert torch.equal(edited_bits(tmp_path / "streamed", streamed), edited_bits(tmp_path / "resident", resident))
    assert streamed.records[0].to_json() == resident.records[0].to_json()


@pytest.mark.parametrize("schedule", ["joint", "sequential"])
def test_every_budget_gives_the_same_bytes(schedule, source, tmp_path):
    """From one block at a time to all in memory, and sampled contexts, which need a model that generates."""
    usual = USUAL | {"contexts": None, "schedule": schedule, "measure": False}
    whole = apply_edits(source, [START, END], out=tmp_path / "whole", **usual)
    wanted = edited_bits(tmp_path / "whole", whole)
    start = least(source)
    stop = sum(shard.stat().st_size for shard in source.glob("*.safetensors"))
    streamed = 0
    for i in range(3):
        memory = start + (stop - start) * i // 2
        # As if the process itself took nothing, or nothing would stay resident under so small a budget.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints, "anonymous_bytes", lambda memory=memory: -memory // 8)
            kept = checkpoints.outline(source, memory=memory, layer=LAYER, identity=True).placement
            streamed += kept is not None
            result = apply_edits(source, [START, END], out=tmp_path / f"out {i}", memory=memory, **usual)
        assert result.contexts == whole.contexts
        assert torch.equal(edited_bits(tmp_path / f"out {i}", result), wanted)
    assert streamed >= 2


def test_weights_read_while_running_are_those_of_the_file(source):
    stream = stream_of(source)
    stored = Checkpoint.open(source)
    rows = []
    for name, tensor in stream.parameters():
        if name == "model.embed_tokens.weight":
            rows.append(tensor.clone())
        else:
            assert torch.equal(bits(tensor), bits(stored.read(name))), name
    assert torch.equal(torch.cat(rows), stored.read("model.embed_tokens.weight"))
    assert {name for name, _ in stream.parameters()} == set(stored.names())
    stream.close()


def test_nothing_but_the_edited_weight_is_left_behind(source, tmp_path):
    before = threading.active_count()
    result = apply_edits(source, END, out=tmp_path / "out", memory=least(source), **USUAL)
    (name,) = result.delta.updates
    assert threading.active_count() == before
    real = [n for n, p in result.model.named_parameters() if not p.is_meta and p.untyped_storage().nbytes() > 256]
    assert real == [name]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in result.model.modules())
    # The source's weight is what a revert leaves, and the result can still be written.
    result.save(tmp_path / "again")
    assert torch.equal(edited_bits(tmp_path / "again", result), edited_bits(tmp_path / "out", result))
    result.revert()
    assert torch.equal(bits(result.model.get_parameter(name)), bits(Checkpoint.open(source).read(name)))


def test_fingerprint_and_scores_are_those_of_the_resident_model(source):
    model = align_model(AutoModelForCausalLM.from_pretrained(source))
    tokenizer = AutoTokenizer.from_pretrained(source)
    stream = stream_of(source)
    runner = Runner(stream.model, stream)
    for layer in range(LAYERS):
        assert str(Fingerprint.of(runner, layer)) == str(Fingerprint.of(Runner(model), layer))
    pairs = [asked(tokenizer, edit) for edit in (START, MIDDLE, END)]
    assert score(runner, tokenizer, pairs) == score(Runner(model), tokenizer, pairs)
    stream.close()


def align_model(model):
    align_(model)
    return model


def test_alignment_keeps_the_values_and_the_parameters(source):
    """Weights that transformers maps from a file begin anywhere."""
    model = AutoModelForCausalLM.from_pretrained(source)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    assert any(parameter.data_ptr() % 64 for parameter, _ in before.values())
    align_(model)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.data_ptr() % 64 == 0


def test_nan_in_any_part_is_named(tmp_path, toy_tokenizers):
    for number, name in enumerate(("model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight", "lm_head.weight")):
        model = toy_model("llama")
        with torch.no_grad():
            model.get_parameter(name).view(-1)[-1] = torch.nan
        source = save_toy(tmp_path / str(number), model, toy_tokenizers[True])
        with pytest.raises(ModelError, match=f"{name} contains NaN or infinity"):
            apply_edits(source, END, out=tmp_path / "out", memory=least(source), **USUAL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("8 apples", "memory: got '8 apples', wanted a number of bytes such as '8GiB'"),
        (0, "memory: got 0"),
        (-5, "memory: got -5"),
        (True, "memory: got True"),
        ("1e9", "memory: got '1e9'"),
        ("1kB", r"memory: got 1,000 bytes, wanted at least [\d,]+: the head, the largest part of the model"),
    ],
)
def test_a_budget_that_cannot_be_kept(memory, message, source, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        apply_edits(source, END, out=tmp_path / "out", memory=memory, **USUAL)
    assert not (tmp_path / "out").exists()


def test_memory_of_a_model_in_memory_is_refused(toy_tokenizers):
    with pytest.raises(ArgumentError, match="memory: got a budget for a model that is in memory already"):
        apply_edits(toy_model("llama"), END, tokenizer=toy_tokenizers[True], memory="1GiB", **USUAL)


def test_config_and_file_must_agree(tmp_path, toy_tokenizers):
    source = save(tmp_path / "source", "llama", toy_tokenizers[True])
    config = (source / "config.json").read_text()
    for change, message in (
        (('"float32"', '"bfloat16"'), r"is torch\.float32, config\.json says torch\.bfloat16"),
        (('"intermediate_size": 80', '"intermediate_size": 81'), r"has shape \(48, 80\), config\.json says \(48, 81\)"),
        (('"num_hidden_layers": 4', '"num_hidden_layers": 5'), "holds no tensor model.layers.4"),
    ):
        assert change[0] in config
        (source / "config.json").write_text(config.replace(*change))
        with pytest.raises(CheckpointError, match=message):
            apply_edits(source, END, out=tmp_path / "out", memory=150_000, **USUAL)
    # transformers casts while it loads a model as a whole.
    (source / "config.json").write_text(config.replace('"float32"', '"bfloat16"'))
    result = apply_edits(source, END, out=tmp_path / "cast", **USUAL)
    assert result.model.dtype == torch.bfloat16
    (name,) = result.delta.updates
    assert Checkpoint.open(tmp_path / "cast").entry(name).dtype == torch.float32


def test_a_read_error_ends_the_edit(source, tmp_path, monkeypatch):
    """At every moment: when the layers are read first, and later."""
    import os

    real, calls = os.preadv, []
    memory = least(source)
    monkeypatch.setattr(os, "preadv", lambda *a: (calls.append(1), real(*a))[1])
    apply_edits(source, END, out=tmp_path / "out", memory=memory, **USUAL)
    count = len(calls)
    assert count > 50
    for failing in range(1, count - 3, count // 12):
        left = [failing]

        def fail(*arguments, left=left):
            left[0] -= 1
            if not left[0]:
                raise OSError(5, "Input/output error")
            return real(*arguments)

        monkeypatch.setattr(os, "preadv", fail)
        threads = threading.active_count()
        with pytest.raises(CheckpointError, match=r"reading .*safetensors: Input/output error"):
            apply_edits(source, END, out=tmp_path / f"out {failing}", memory=memory, **USUAL)
        assert threading.active_count() == threads
        assert not (tmp_path / f"out {failing}").exists()


def test_an_error_of_the_progress_report_ends_the_edit(source, tmp_path):
    """It comes up in the reading thread, for which nobody may wait in vain."""

    def fail(_count, _rate):
        raise ZeroDivisionError("mine")

    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="mine"):
        apply_edits(source, END, out=tmp_path / "out", memory=least(source), on_read=fail, **USUAL)
    assert threading.active_count() == threads
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["gpu", "", "meta", "cuda:99:1", 7.5])
def test_a_device_that_is_none(device, source, tmp_path):
    with pytest.raises(ArgumentError, match=r"device: got .*, wanted 'cpu', or 'cuda'"):
        apply_edits(source, END, out=tmp_path / "out", device=device, **USUAL)


def test_a_file_cut_while_it_is_read(source):
    stream = stream_of(source)
    for shard in source.glob("*.safetensors"):
        with shard.open("r+b") as file:
            file.truncate(1000)
    with pytest.raises(CheckpointError, match="it was cut after opening"):
        list(stream.parameters())
    stream.close()


def test_files_replaced_while_they_are_read_stay_what_they_were(source, tmp_path):
    """Another program may rename new shards into place: an edit never mixes the two."""
    stream, stored = stream_of(source), Checkpoint.open(source)
    wanted = {name: stored.read(name) for name in stored.names()}
    for shard in source.glob("*.safetensors"):
        shard.unlink()
        shard.write_bytes(b"other")
    for name, tensor in stream.parameters():
        if name != "model.embed_tokens.weight":
            assert torch.equal(bits(tensor), bits(wanted[name]))
    stream.close()


# The reader


@pytest.fixture
def blocks(source):
    return checkpoints.outline(source, memory=least(source), layer=LAYER, identity=True).parts.blocks[:LAYERS]


@pytest.fixture
def reader(source, blocks):
    made = []

    def make(times):
        files = Files(Checkpoint.open(source).shards.values())
        made.append(ReadAhead(Loader(files, torch.device("cpu")), int(times * max(b.size for b in blocks))))
        return made[-1]

    yield make
    for each in made:
        each.close()


def content(source, block):
    memory = buffer_on(torch.device("cpu"), block.size).zero_()
    stored = Checkpoint.open(source)
    for piece in block.pieces:
        raw = bits(stored.read(piece.parameter))
        memory[piece.offset : piece.offset + len(raw)] = raw
    return memory


@pytest.mark.parametrize("part", [1000, 1 << 24])
@pytest.mark.parametrize("times", [1, 1.5, 2, 3.7, 10])
def test_whatever_is_taken_in_whatever_order_is_right(times, part, source, blocks, reader, monkeypatch):
    """Expected or not, again and again, with expectations that come true, come late or are wrong."""
    monkeypatch.setattr("rome_fast.weights.reader._PART_BYTES", part)
    generator = torch.Generator().manual_seed(int(times * 10))
    ahead, contents = reader(times), [content(source, block) for block in blocks]
    order = torch.randint(len(blocks), (300,), generator=generator).tolist()
    for step, index in enumerate(order):
        if step % 7 == 0:
            ahead.expect([blocks[i] for i in order[step : step + 10]])
        if step % 11 == 0:
            ahead.expect([blocks[(index + 1) % len(blocks)]] * 3)
        memory = ahead.take(blocks[index], lambda step=step: [blocks[i] for i in order[step + 1 : step + 5]])
        for piece in blocks[index].pieces:
            part = slice(piece.offset, piece.offset + piece.nbytes)
            assert torch.equal(memory[part], contents[index][part])


def test_the_next_block_is_read_while_one_is_in_use(blocks, reader):
    ahead = reader(2)
    ahead.expect(blocks)
    for index, block in enumerate(blocks[:-1]):
        ahead.take(block, list)
        # Called before the loop goes on, so that the late binding of `index` does no harm.
        wait_for(lambda: ahead.bytes_read >= sum(b.size for b in blocks[: index + 2]))  # noqa: B023
        assert ahead.bytes_read == sum(b.size for b in blocks[: index + 2])


def wait_for(condition, seconds=5.0):
    event = threading.Event()
    for _ in range(int(seconds * 1000)):
        if condition():
            return
        event.wait(0.001)
    pytest.fail("it did not happen")


def test_a_block_in_use_is_never_overwritten(source, blocks, reader):
    ahead = reader(1)
    ahead.expect(blocks)
    memory = ahead.take(blocks[0], list)
    wanted = memory.clone()
    threading.Event().wait(0.05)
    assert torch.equal(memory, wanted)


# Memory


@pytest.mark.skipif(memory._trim() is None, reason="only the allocator of glibc keeps what is freed")
def test_what_is_free_between_pieces_in_use_is_given_back():
    """One in ten stays, so that nothing at the end of the heap is free."""
    before = memory.anonymous_bytes()
    pieces = [bytearray(100_000) for _ in range(2000)]
    for piece in pieces:
        piece[::4096] = b"\1" * len(piece[::4096])
    kept = pieces[::10]
    del pieces, piece
    held = memory.anonymous_bytes()
    memory.give_back()
    after = memory.anonymous_bytes()
    # 180 of 200 MB are free; pages that a piece in use ends in are not.
    assert held - after > 120_000_000
    assert after - before < 60_000_000
    assert len(kept) == 200


@pytest.mark.parametrize(("held", "wanted"), [(0.5, False), (0.9, True)])
def test_the_allocator_keeps_nothing_where_the_budget_is_tight(held, wanted, source, monkeypatch):
    outline, given = checkpoints.outline(source, memory=least(source), layer=LAYER, identity=True), []
    monkeypatch.setattr(streaming, "anonymous_bytes", lambda: int(held * outline.placement.budget_bytes))
    monkeypatch.setattr(streaming, "give_back", lambda: given.append(1))
    stream = outline.stream()
    for index in range(LAYERS):
        stream.take(index)
    stream.close()
    assert given == [1] * LAYERS * wanted
