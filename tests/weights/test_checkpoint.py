import errno
import json
import os
import random
import resource
import shutil
import signal
import stat
import struct
import sys
import threading
import time
import traceback
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rome_fast.errors import ArgumentError, CheckpointError
from rome_fast.weights import Checkpoint, load_tensors, read_header, restore_tensors, save_tensors, write_edited
from rome_fast.weights import files as files_module
from rome_fast.weights.files import copy_file, rename_new, sha256_file
from rome_fast.weights.header import read_tensor

NAMES = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The same model as one file and as shards; what writes into it works on a copy."""
    root = tmp_path_factory.mktemp("saved")
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="12KB")
    assert len(list((root / "sharded").glob("*.safetensors"))) > 2
    return root


@pytest.fixture(params=["single", "sharded"])
def source(request, saved, tmp_path):
    return Path(shutil.copytree(saved / request.param, tmp_path / "source"))


def edits_for(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(directory)
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(checkpoint.entry(n).shape, generator=generator) for n in NAMES}


def digests(directory: Path) -> dict[str, str]:
    """Every entry, hidden ones too; a directory counts by its name."""
    return {p.name: sha256_file(p) if p.is_file() else "directory" for p in directory.iterdir()}


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


# Headers


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


def pair(*offsets: list[int]) -> dict:
    return {n: {"dtype": "U8", "shape": [o[1] - o[0]], "data_offsets": o} for n, o in zip("ab", offsets, strict=True)}


EIGHT = bytes(8)
BAD_HEADERS = {
    "empty file": (b"", "header of 0 bytes in a file of 0"),
    "seven bytes": (b"\x01" * 7, "in a file of 7 (limit"),
    "length beyond the file": (struct.pack("<Q", 2**63) + b"{}", "header of 9,223,372,036,854,775,808 bytes"),
    "no header": (packed(b""), "does not begin"),
    "a pickle": (b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01u." * 3, "is truncated or not safetensors"),
    "leading space": (packed(b" {}"), "does not begin"),
    "a list": (packed([]), "does not begin"),
    "cut JSON": (packed(b'{"a": '), "Expecting value"),
    "not UTF-8": (packed(b'{"\xff": 1}'), "utf-8"),
    "UTF-16": (packed("{}".encode("utf-16")), "does not begin"),
    "a key twice": (packed(b'{"a": 1, "a": 2}'), "'a' occurs twice"),
    "a key twice inside": (packed(b'{"a": {"dtype": "U8", "dtype": "U8"}}'), "'dtype' occurs twice"),
    "deep nesting": (packed(b'{"a":' * 200_000), "recursion"),
    "half a surrogate": (packed(b'{"\\ud800": 1}'), "not Unicode"),
    "half a surrogate in the metadata": (packed(b'{"__metadata__": {"k": "\\ud800"}}'), "not Unicode"),
    "metadata not strings": (packed({"__metadata__": {"k": 1}}), "not an object of strings"),
    "metadata a list": (packed({"__metadata__": ["k"]}), "not an object of strings"),
    "entry not an object": (packed({"a": 3}), "exactly dtype, shape and data_offsets"),
    "no dtype": (packed({"a": {"shape": [], "data_offsets": [0, 0]}}), "exactly dtype"),
    "a field too many": (packed(one(strides=[1]), EIGHT), "exactly dtype"),
    "unknown dtype": (packed(one("F33"), EIGHT), "unknown dtype 'F33'; known are F64"),
    "dtype a list": (packed(one(["F32"]), EIGHT), "unknown dtype"),
    "negative size": (packed(one(shape=[-2]), EIGHT), "-2 is not a size"),
    "two negative sizes": (packed(one(shape=[-1, -2]), EIGHT), "-1 is not a size"),
    "fraction": (packed(one(shape=[2.0]), EIGHT), "not a list of at most 64 sizes"),
    "NaN": (packed(b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 8]}}', EIGHT), "not a list"),
    "true is no size": (packed(one("F64", [True]), EIGHT), "not a list of at most 64 sizes"),
    "a string as shape": (packed(one(shape="2"), EIGHT), "not a list of at most 64 sizes"),
    "too many dimensions": (packed(one("F64", [1] * 65), EIGHT), "at most 64 sizes"),
    "a number of 5000 digits": (packed(b'{"a": ' + b"9" * 5000 + b"}"), "is not a size"),
    "overflow": (packed(one(shape=[2**40, 2**40, 0], offsets=[0, 0])), "overflows"),
    "three offsets": (packed(one(offsets=[0, 8, 8]), EIGHT), "are not [begin, end]"),
    "dtype against offsets": (packed(one("F64"), EIGHT), "F64 [2] = 16 bytes"),
    "begin after end": (packed(one(offsets=[8, 0]), EIGHT), "F32 [2] = 8 bytes"),
    "overlap": (packed(pair([0, 5], [3, 8]), EIGHT), "'b' at bytes 3 to 8 overlaps"),
    "hole": (packed(pair([0, 3], [5, 8]), EIGHT), "'b' at bytes 5 to 8 leaves a hole"),
    "hole at the start": (packed(pair([1, 3], [3, 8]), EIGHT), "'a' at bytes 1 to 3 leaves a hole"),
    "bytes after the last tensor": (packed(one(), EIGHT + b"x"), "take 8 bytes and the file has 9"),
    "data cut": (packed(one(), EIGHT[:-1]), "take 8 bytes and the file has 7"),
    "a terabyte claimed": (packed(one("U8", [2**40], [0, 2**40])), "take 1,099,511,627,776 bytes and the file has 0"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_is_named(case, tmp_path):
    content, fault = BAD_HEADERS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert fault in str(caught.value)
    assert peak < 1_000_000 + 40 * len(content)  # Python's objects for nested JSON take some 40 bytes a character


def test_header_over_the_limit_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(path, 200_000_000)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"limit 100,000,000"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_what_is_no_file_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "pipe", tmp_path / "nul\0", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="no such file"):
            read_header(path)


def test_header_of_a_good_file(tmp_path):
    tensors = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "empty": torch.ones(0, 5), "scalar": torch.tensor(3)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    start, raw = header_json(tmp_path / "x.safetensors")
    assert (header.data_start, header.metadata) == (start, raw.pop("__metadata__"))
    assert header.tensors.keys() == tensors.keys()
    for name, entry in header.tensors.items():
        assert (entry.dtype, entry.shape) == (tensors[name].dtype, tuple(tensors[name].shape))
        assert [entry.begin, entry.end] == raw[name]["data_offsets"]


GOOD_FILES = [
    save(
        {"a": torch.arange(6).reshape(2, 3).bfloat16(), "b": torch.arange(5.0), "e": torch.ones(0, 3)}, {"format": "pt"}
    ),
    save({"scalar": torch.tensor(3), "mask": torch.tensor([True, False])}),
    packed({}),
]
ODD = [
    -1, 0, 1, 2, 3, 2**31, 2**63, 2**70, 10**30, 1.5, 1e308, float("nan"), True, None, "", "F32", "U8", "a",
    "\ud800", "x" * 1000, [], [0], [0, 8], [[0]], [1] * 100, [2**62, 2**62], [0, 2**63],
    {}, {"dtype": "F32"}, {"a": {}},
]  # fmt: skip
FRAGMENTS = [*'-{}[], "\\\0\té', '"a":', "null", "NaN", "1e9", "9" * 30, "\\ud800"]


def damaged(rng: random.Random) -> bytes:
    """A good file with flipped bits, cut, with bytes inserted, an odd JSON value, or its JSON text edited."""
    content = rng.choice(GOOD_FILES)
    (length,) = struct.unpack("<Q", content[:8])
    text, data = content[8 : 8 + length].decode(), content[8 + length :]
    kind = rng.choice(["flip", "truncate", "insert", "value", "value", "text", "text"])
    if kind == "flip":
        changed = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == "truncate":
        return content[: rng.randrange(len(content))]
    if kind == "insert":
        at = rng.randint(0, len(content))
        return content[:at] + rng.randbytes(rng.randint(1, 9)) + content[at:]
    if kind == "value":
        header = json.loads(text)
        key = rng.choice([*header, "new"])
        field = rng.choice(["dtype", "shape", "data_offsets", "new", None])
        if field is None or key not in header:
            header[key] = rng.choice(ODD)
        elif isinstance(old := header[key].get(field), list) and old and rng.random() < 0.5:
            old[rng.randrange(len(old))] = rng.choice(ODD)
        else:
            header[key][field] = rng.choice(ODD)
        return packed(header, data)
    at = rng.randint(0, len(text))
    text = text[:at] + rng.choice(FRAGMENTS) + text[at + rng.randint(0, 8) :]
    return packed(text.encode(), data)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(rng=st.randoms(use_true_random=True))
def test_damaged_files_give_a_header_or_an_error(fuzzed, rng):
    """What is accepted must mean the same to the safetensors library; all else must be a CheckpointError."""
    content = damaged(rng)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzzed.unlink(missing_ok=True)  # a new file: some file systems flush one that is truncated and written again
    fuzzed.write_bytes(content)
    try:
        header = read_header(fuzzed)
    except CheckpointError as error:
        assert str(fuzzed) in str(error)  # noqa: PT017, most examples do not raise
    else:
        known = {name: (view["shape"], bytes(view["data"])) for name, view in safetensors.deserialize(content)}
        assert header.tensors.keys() == known.keys()
        for name in known:
            tensor = read_tensor(header, name)
            assert (list(tensor.shape), bits(tensor)) == known[name]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50_000  # kB


# Opening and reading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_read_returns_the_bits(dtype, tmp_path):
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0]).to(dtype)
    odd_start = torch.ones(3, dtype=torch.uint8)
    tensors = {"first": odd_start, "w": values, "e": values[:0].clone(), "s": values[1, 1].clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names() == ["e", "first", "s", "w"]
    for name in ("w", "e", "s"):
        got = checkpoint.read(name)
        assert (got.dtype, got.shape) == (dtype, tensors[name].shape)
        assert bits(got) == bits(tensors[name])
        assert checkpoint.shard_of(name) == "model.safetensors"


def test_every_tensor_of_the_model_is_read(model, source):
    checkpoint = Checkpoint.open(source)
    state = model.state_dict()
    assert checkpoint.names() == sorted(state)
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert (checkpoint.entry(name).dtype, checkpoint.entry(name).shape) == (tensor.dtype, tuple(tensor.shape))
    if (source / INDEX).exists():
        weight_map = json.loads((source / INDEX).read_text())["weight_map"]
        assert {name: checkpoint.shard_of(name) for name in state} == weight_map


def test_unknown_name_and_short_read(source):
    checkpoint = Checkpoint.open(source)
    for look in (checkpoint.read, checkpoint.entry, checkpoint.shard_of):
        with pytest.raises(CheckpointError, match=r"no tensor 'model.layer.0.*did you mean model\.layers\.0"):
            look("model.layer.0.mlp.down_proj.weight")
    shard = source / checkpoint.shard_of(NAMES[0])
    entry = checkpoint.entry(NAMES[0])
    start, _ = header_json(shard)
    os.truncate(shard, start + entry.end - 1)
    with pytest.raises(CheckpointError, match=r"3,071 of 3,072 bytes of model\.layers\.0"):
        checkpoint.read(NAMES[0])
    shard.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.read(NAMES[0])


def test_the_single_file_wins_as_in_transformers(model, saved, tmp_path):
    directory = Path(shutil.copytree(saved / "sharded", tmp_path / "both"))
    changed = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_file(changed, directory / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    assert torch.equal(loaded[NAMES[0]], changed[NAMES[0]])
    assert torch.equal(Checkpoint.open(directory).read(NAMES[0]), changed[NAMES[0]])


def test_directories_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="not a directory"):
        Checkpoint.open(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"safetensors only.*from_pretrained.*safe_serialization=True"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"'model\.safetensors' missing|model\.safetensors.*missing"):
        Checkpoint.open(tmp_path)


def set_index(directory: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "a\\x.safetensors", "C:x.safetensors",
     "", "..", ".hidden.safetensors", "pytorch_model.bin", "nul\0.safetensors", 3, None, ["x.safetensors"]],
)  # fmt: skip
def test_shards_may_not_leave_the_directory(shard, saved, tmp_path):
    directory = Path(shutil.copytree(saved / "sharded", tmp_path / "source"))
    set_index(directory, lambda weight_map: weight_map.update({NAMES[0]: shard}))
    with pytest.raises(CheckpointError, match="is no plain file name"):
        Checkpoint.open(directory)


@pytest.mark.parametrize(
    ("index", "fault"),
    [(b"{", "Expecting"), (b"\xff", "utf-8"), (b"[" * 200_000, "recursion"), (b"[]", "no weight_map"),
     (b"{}", "no weight_map"), (b'{"weight_map": {}}', "no weight_map"), (b'{"weight_map": 3}', "no weight_map"),
     (b'{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}', "occurs twice")],
)  # fmt: skip
def test_damaged_index(index, fault, tmp_path):
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(CheckpointError, match=fault):
        Checkpoint.open(tmp_path)


def test_index_and_shards_must_agree(saved, tmp_path):
    directory = Path(shutil.copytree(saved / "sharded", tmp_path / "source"))
    checkpoint = Checkpoint.open(directory)
    first, second = sorted(checkpoint.shards)[:2]
    set_index(directory, lambda weight_map: weight_map.update({"ghost": first}))
    with pytest.raises(CheckpointError, match=f"lists tensors that are not there: 'ghost' in {first}"):
        Checkpoint.open(directory)
    set_index(directory, lambda weight_map: weight_map.pop("ghost"))
    tensors = load_file(directory / second)
    stray = next(iter(checkpoint.shards[first].tensors))
    save_file({**tensors, stray: torch.zeros(1)}, directory / second)
    with pytest.raises(CheckpointError, match=rf"{second} has tensors of another shard: '{stray}' \({first}\)"):
        Checkpoint.open(directory)
    (directory / second).unlink()
    with pytest.raises(CheckpointError, match=f"'{second}' missing"):
        Checkpoint.open(directory)


# Writing an edited copy


def test_only_the_edited_bytes_differ(source, tmp_path):
    before, edits = digests(source), edits_for(source)
    (source / "empty.txt").touch()
    before["empty.txt"] = sha256_file(source / "empty.txt")
    out = tmp_path / "out"
    write_edited(source, out, edits, {"edit.json": b"{}", "note.txt": lambda path: path.write_text("made")})
    assert digests(source) == before
    assert {p.name for p in out.iterdir()} == {*before, "edit.json", "note.txt"}
    assert ((out / "edit.json").read_bytes(), (out / "note.txt").read_text()) == (b"{}", "made")
    checkpoint = Checkpoint.open(source)
    edited = {checkpoint.shard_of(name) for name in edits}
    after = digests(out)
    assert {name for name in before if after[name] != before[name]} == edited
    for shard in edited:
        start, header = header_json(source / shard)
        expected = bytearray((source / shard).read_bytes())
        for name, tensor in edits.items():
            if checkpoint.shard_of(name) == shard:
                begin, end = header[name]["data_offsets"]
                expected[start + begin : start + end] = tensor.numpy().tobytes()
        assert (out / shard).read_bytes() == expected


def test_transformers_loads_the_copy(model, source, tmp_path):
    edits = edits_for(source)
    write_edited(source, tmp_path / "out", edits, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in {**model.state_dict(), **edits}.items():
        assert torch.equal(loaded[name], tensor)


def test_every_layout_of_a_tensor_is_written(tmp_path):
    """Transposed bf16, a scalar, an empty tensor, every second element, a parameter: values, not strides."""
    old = {"t": torch.zeros(3, 5).bfloat16(), "s": torch.tensor(1.0), "e": torch.ones(0, 2), "p": torch.zeros(4)}
    (tmp_path / "source").mkdir()
    save_file(old, tmp_path / "source" / "model.safetensors")
    new = {
        "t": torch.arange(15).reshape(5, 3).bfloat16().T,
        "s": torch.tensor(-0.0),
        "e": torch.zeros(0, 2),
        "p": torch.nn.Parameter(torch.arange(8.0)[::2]),
    }
    write_edited(tmp_path / "source", tmp_path / "out", new, {})
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(got["t"], new["t"])
    assert got["s"].signbit()
    assert got["p"].tolist() == [0, 2, 4, 6]


def test_symlinked_cache_becomes_a_self_contained_copy(model, source, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    source.rename(blobs)
    snapshot.mkdir()
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../blobs/{blob.name}")
    before, edits = digests(blobs), edits_for(snapshot)
    write_edited(snapshot, tmp_path / "out", edits, {})
    assert digests(blobs) == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "out").iterdir())
    shutil.rmtree(blobs)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(loaded[NAMES[0]], edits[NAMES[0]])
    assert torch.equal(loaded["lm_head.weight"], model.state_dict()["lm_head.weight"])


def test_other_forms_of_the_weights_stay_behind(source, tmp_path):
    wanted = set(digests(source)) | {"tokenizer.json", "modeling_custom.py"}
    other = "pytorch_model.bin pytorch_model.bin.index.json consolidated.safetensors m.onnx m.pt a.h5 x.gguf"
    for name in ("tokenizer.json", "modeling_custom.py", ".hidden", *other.split()):
        (source / name).write_bytes(b"x")
    if not (source / INDEX).exists():
        (source / INDEX).write_text("{}")  # an unused index; in the copy it would name shards that are not there
    (source / "original").mkdir()
    (source / "dangling.bin").symlink_to("gone")
    write_edited(source, tmp_path / "out", {}, {})
    assert set(digests(tmp_path / "out")) == wanted
    (source / "merges.txt").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"links to nothing: merges\.txt"):
        write_edited(source, tmp_path / "again", {}, {})
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_bad_arguments_are_found_before_anything_is_written(source, tmp_path, monkeypatch):
    edits, before = edits_for(source), digests(source)
    (tmp_path / "taken").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    out, listing = tmp_path / "out", sorted(os.listdir(tmp_path))
    monkeypatch.setattr(files_module, "partial", lambda target: pytest.fail("began to write"))
    for path, fault in (
        (tmp_path / "taken", "exists"),
        (tmp_path / "link", "exists"),
        (tmp_path / "no" / "out", "does not exist"),
        (source / "out", "inside the source"),
    ):
        with pytest.raises(ArgumentError, match=fault):
            write_edited(source, path, edits, {})
    shard = Checkpoint.open(source).shard_of(NAMES[0])
    for name in ("../x", "/x", "", ".", "..", ".hidden", "a/b", "a\\b", shard, INDEX):
        with pytest.raises(ArgumentError, match="extra_files: got"):
            write_edited(source, out, edits, {name: b""})
    wrong = {"nope": torch.zeros(1), NAMES[0]: edits[NAMES[0]].T, NAMES[1]: edits[NAMES[1]].half()}
    with pytest.raises(CheckpointError) as caught:
        write_edited(source, out, wrong, {})
    assert "no tensor 'nope'" in str(caught.value)
    assert f"'{NAMES[0]}' is torch.float32 (16, 48) there, got torch.float32 (48, 16)" in str(caught.value)
    assert f"'{NAMES[1]}' is torch.float32 (16, 48) there, got torch.float16 (16, 48)" in str(caught.value)
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"bytes needed, 10,000 free"):
        write_edited(source, out, edits, {})
    assert (sorted(os.listdir(tmp_path)), digests(source)) == (listing, before)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
def test_an_exception_leaves_nothing_behind(failure, source, tmp_path):
    def fail(path: Path) -> None:
        path.write_text("half")
        raise failure

    with pytest.raises(failure):
        write_edited(source, tmp_path / "out", edits_for(source), {"x": fail})
    assert os.listdir(tmp_path) == ["source"]


def test_a_source_replaced_meanwhile_is_noticed(source, tmp_path, monkeypatch):
    edits = edits_for(source)

    def copy_another(path: Path, target: Path) -> None:
        if path.suffix == ".safetensors":
            save_file({NAMES[0]: torch.zeros(2), NAMES[1]: torch.zeros(2)}, target)
        else:
            copy_file(path, target)

    monkeypatch.setattr(files_module, "copy_file", copy_another)
    with pytest.raises(CheckpointError, match=r"is torch\.float32 \(2,\) there"):
        write_edited(source, tmp_path / "out", edits, {})
    assert os.listdir(tmp_path) == ["source"]


def limit_file_size(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


@forks
def test_a_full_disk_leaves_nothing_behind(source, tmp_path):
    """Real failures of write(2): no file may grow beyond a limit below the size of one shard."""
    edits, before = edits_for(source), digests(source)
    edited = tmp_path / "edited"
    write_edited(source, edited, edits, {"edit.json": b"{}"})
    kept = digests(edited)
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3)}, {})
    originals = {name: Checkpoint.open(source).read(name) for name in edits}

    def child() -> None:
        limit_file_size(6000)
        for attempt in (
            lambda: write_edited(source, tmp_path / "out", edits, {}),
            lambda: restore_tensors(edited, originals, remove=["edit.json"]),
            lambda: save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3000)}, {}),
        ):
            with pytest.raises(CheckpointError, match=r"File too large") as caught:
                attempt()
            assert "ulimit" in str(caught.value) or "x.safetensors" in str(caught.value)

    assert in_child(child) == 0
    assert sorted(os.listdir(tmp_path)) == ["edited", "source", "x.safetensors"]
    assert (digests(source), digests(edited)) == (before, kept)
    assert load_tensors(tmp_path / "x.safetensors")[0]["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("call", ["fsync", "copy_file_range"])
def test_no_space_at_any_call_leaves_nothing_behind(call, source, tmp_path, monkeypatch):
    edits, real = edits_for(source), getattr(os, call)
    write_edited(source, tmp_path / "out", edits, {})
    for failing in range(1, 100):
        shutil.rmtree(tmp_path / "out")
        left = [failing]

        def fail_once(*arguments, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail_once)
            try:
                write_edited(source, tmp_path / "out", edits, {})
            except CheckpointError as error:
                assert "No space left on device; free some space" in str(error)  # noqa: PT017, the last one succeeds
        if left[0] > 0:
            break
        if (tmp_path / "out").exists():  # the parent's fsync, after the rename
            assert call == "fsync"
        else:
            assert os.listdir(tmp_path) == ["source"]
            (tmp_path / "out").mkdir()
    assert failing > 5
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


@forks
def test_kill_9_at_any_moment_of_a_write(saved, tmp_path):
    source = Path(shutil.copytree(saved / "sharded", tmp_path / "source"))
    edits, before, out = edits_for(source), digests(source), tmp_path / "out"

    def write() -> None:
        write_edited(source, out, edits, {"edit.json": b"{}"})

    lines = lines_executed(write)
    complete = digests(out)
    shutil.rmtree(out)
    started = time.perf_counter()
    write()
    duration = time.perf_counter() - started
    shutil.rmtree(out)
    rng, survived, strays = random.Random(0), 0, 0
    at_lines = [(killed_at_line, rng.randrange(n, n + lines // 20)) for n in range(1, lines, lines // 20)]
    for kill, moment in at_lines + [(killed_after, rng.uniform(0, 1.5) * duration) for _ in range(20)]:
        kill(write, moment)
        assert digests(source) == before
        strays += any(tmp_path.glob(".out.*.partial"))
        if out.exists():
            survived += 1
            assert digests(out) == complete
            shutil.rmtree(out)
        write()
        assert digests(out) == complete
        assert sorted(os.listdir(tmp_path)) == ["out", "source"]
        shutil.rmtree(out)
    assert 0 < survived < 30
    assert strays > 10


def test_only_abandoned_directories_of_the_same_target_are_removed(source, tmp_path):
    dead = tmp_path / ".out.0123456789abcdef.partial"
    others = [".out.partial", ".out.0123456789abcdef", ".out.x.0123456789abcdef.partial", ".o.0123456789abcdef.partial"]
    for name in (dead.name, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    (tmp_path / ".out.fedcba9876543210.partial").symlink_to(others[0])
    write_edited(source, tmp_path / "out", {}, {})
    assert sorted(os.listdir(tmp_path)) == sorted([*others, ".out.fedcba9876543210.partial", "out", "source"])
    assert all(os.listdir(tmp_path / name) == ["x"] for name in others)


def test_a_living_writer_keeps_its_directory(source, tmp_path):
    out = tmp_path / "out"

    def overtake(path: Path) -> None:
        (mine,) = tmp_path.glob(".out.*.partial")
        write_edited(source, out, {}, {})
        assert mine.is_dir()
        shutil.rmtree(out)
        path.touch()

    write_edited(source, out, {}, {"x": overtake})
    assert set(digests(out)) == {*digests(source), "x"}
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


@pytest.mark.parametrize("opened", [False, True])
def test_a_directory_taken_before_it_was_locked_is_made_again(opened, source, tmp_path, monkeypatch):
    real, taken = os.open, []

    def take(path, *arguments, **keywords):
        if taken or not str(path).endswith(".partial"):
            return real(path, *arguments, **keywords)
        taken.append(path)
        descriptor = real(path, *arguments, **keywords) if opened else None
        os.rmdir(path)
        return descriptor or real(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", take)
    write_edited(source, tmp_path / "out", {}, {})
    assert len(taken) == 1
    assert digests(tmp_path / "out") == digests(source)


def test_an_out_that_appears_meanwhile_is_kept(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ArgumentError, match="appeared meanwhile"):
        write_edited(source, out, {}, {"x": lambda path: (path.touch(), out.mkdir())[1]})
    assert os.listdir(out) == []
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_everything_is_on_the_disk_before_it_gets_its_name(source, tmp_path, monkeypatch):
    out, log, real, rename = tmp_path / "out", [], os.fsync, files_module.rename_new

    def record(descriptor: int) -> None:
        real(descriptor)
        log.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(files_module, "rename_new", lambda old, new: (log.append(new), rename(old, new)))
    write_edited(source, out, edits_for(source), {"x": lambda path: path.write_text("x")})
    work = log[0].parent
    assert {path.name for path in log[: log.index(work)]} == set(os.listdir(out))
    assert log[log.index(work) :] == [work, out, tmp_path]
    for shard in {Checkpoint.open(out).shard_of(name) for name in NAMES}:
        assert log.count(work / shard) == 2  # as a copy and again after the edit
    log.clear()
    monkeypatch.setattr(os, "replace", lambda old, new: (log.append(new), os.rename(old, new)))
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    assert [path.name for path in log] == ["x.safetensors", "x.safetensors", tmp_path.name]


@pytest.mark.parametrize("exclusive", [True, False])
def test_of_two_writers_one_wins(exclusive, source, tmp_path, monkeypatch):
    if not exclusive:
        monkeypatch.setattr(files_module.ctypes, "CDLL", lambda *_, **__: object())
    edits, barrier, outcomes = edits_for(source), threading.Barrier(2, timeout=20), {}

    def write(who: int) -> None:
        def meet(path: Path) -> None:
            path.write_text(str(who))
            barrier.wait()

        try:
            changed = {name: tensor + who for name, tensor in edits.items()}
            write_edited(source, tmp_path / "out", changed, {"who": meet})
            outcomes[who] = None
        except ArgumentError as error:
            outcomes[who] = str(error)

    threads = [threading.Thread(target=write, args=(who,)) for who in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [0, 1]
    (winner,) = [who for who, error in outcomes.items() if error is None]
    assert "appeared meanwhile" in outcomes[1 - winner]
    assert (tmp_path / "out" / "who").read_text() == str(winner)
    assert torch.equal(Checkpoint.open(tmp_path / "out").read(NAMES[0]), edits[NAMES[0]] + winner)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


class Unsupported:
    @staticmethod
    def renameat2(*_: object) -> int:
        files_module.ctypes.set_errno(errno.EINVAL)
        return -1


@pytest.mark.parametrize("library", [None, object(), Unsupported()])
def test_rename_new_never_replaces_content(library, tmp_path, monkeypatch):
    if library is not None:
        monkeypatch.setattr(files_module.ctypes, "CDLL", lambda *_, **__: library)
    for name in ("new", "full"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("full")
    for target in ("full", "file", "link"):
        with pytest.raises(FileExistsError):
            rename_new(tmp_path / "new", tmp_path / target)
    with pytest.raises(FileNotFoundError):
        rename_new(tmp_path / "new", tmp_path / "no" / "x")
    rename_new(tmp_path / "new", tmp_path / "fresh")
    assert {p.name for p in tmp_path.iterdir()} == {"fresh", "full", "file", "link"}
    assert os.listdir(tmp_path / "fresh") == ["new"]
    assert os.listdir(tmp_path / "full") == ["full"]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("already", [0, 1000])
def test_copy_goes_on_where_the_kernel_gave_up(code, already, tmp_path, monkeypatch):
    content = os.urandom(300_000)
    (tmp_path / "a").write_bytes(content)
    real, calls = os.copy_file_range, []

    def give_up(source: int, target: int, count: int) -> int:
        calls.append(count)
        if already and len(calls) == 1:
            return real(source, target, already)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", give_up)
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == content


def test_copy_without_copy_file_range(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "copy_file_range")
    (tmp_path / "a").write_bytes(b"content")
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"content"


# Putting the originals back


def test_restore_gives_back_every_byte(source, tmp_path):
    edits, before, out = edits_for(source), digests(source), tmp_path / "out"
    originals = {name: Checkpoint.open(source).read(name) for name in edits}
    write_edited(source, out, edits, {"edit.json": b"{}", "originals.safetensors": b"x"})
    for shard in out.glob("*.safetensors"):
        shard.chmod(0o640)
    restore_tensors(out, originals, remove=["edit.json", "originals.safetensors", "absent"])
    assert digests(out) == before
    assert {stat.S_IMODE(shard.stat().st_mode) for shard in out.glob("*.safetensors")} == {0o640}
    restore_tensors(out, originals)
    assert digests(out) == before


def test_restore_refuses_before_writing(source, tmp_path, monkeypatch):
    edits, before = edits_for(source), digests(source)
    for name in ("../x", ".hidden", INDEX, Checkpoint.open(source).shard_of(NAMES[0])):
        with pytest.raises(ArgumentError, match="remove: got"):
            restore_tensors(source, edits, remove=[name])
    with pytest.raises(CheckpointError, match="no tensor 'nope'"):
        restore_tensors(source, {**edits, "nope": torch.zeros(1)})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(CheckpointError, match="10 free"):
        restore_tensors(source, edits)
    assert digests(source) == before


@forks
def test_kill_9_at_any_moment_of_a_restore(saved, tmp_path):
    source, out = Path(shutil.copytree(saved / "sharded", tmp_path / "source")), tmp_path / "out"
    edits, before = edits_for(source), digests(source)
    originals = {name: Checkpoint.open(source).read(name) for name in edits}
    assert len({Checkpoint.open(source).shard_of(name) for name in edits}) == 2
    write_edited(source, tmp_path / "kept", edits, {"edit.json": b"{}"})
    edited = digests(tmp_path / "kept")

    def restore() -> None:
        restore_tensors(out, originals, remove=["edit.json"])

    shutil.copytree(tmp_path / "kept", out)
    lines = lines_executed(restore)
    rng, states = random.Random(0), set()
    for start in range(1, lines, lines // 20):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "kept", out)
        assert killed_at_line(restore, rng.randrange(start, start + lines // 20)) in (0, -signal.SIGKILL)
        now = {name: digest for name, digest in digests(out).items() if not name.startswith(".")}
        for name, digest in now.items():
            assert digest in (edited[name], before.get(name))
        restored = sum(now[name] == before[name] != edited[name] for name in before)
        states.add(restored)
        assert "edit.json" in now or restored == 2
        restore()
        assert digests(out) == before
    assert states == {0, 1, 2}


# One file


def test_saved_tensors_come_back_to_the_bit(tmp_path):
    path = tmp_path / "delta.safetensors"
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {
        "whole": base,
        "again": base,
        "columns": base[:, ::2],
        "bf16": base.bfloat16(),
        "fp64": base.double(),
        "empty": base[:0],
        "scalar": base[0, 0],
        "grad": torch.nn.Parameter(base),
    }
    save_tensors(path, tensors, {"layer": "9", "größe": "≤"})
    got, metadata = load_tensors(path)
    assert metadata == {"layer": "9", "größe": "≤"}
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)
    save_tensors(path, {}, {})
    assert load_tensors(path) == ({}, {})
    assert os.listdir(tmp_path) == ["delta.safetensors"]


def test_saved_file_is_as_readable_as_any_new_file(tmp_path):
    """safetensors' own writer makes files of mode 0600: no other user could read shared statistics."""
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_failed_save_keeps_the_old_file(tmp_path):
    path, good = tmp_path / "x.safetensors", {"a": torch.ones(2)}
    save_tensors(path, good, {"k": "v"})
    before = digests(tmp_path)
    for tensors, metadata in (
        ({"a": torch.ones(2, dtype=torch.complex128)}, {}),
        ({"a": torch.ones(2).to_sparse()}, {}),
        ({"__metadata__": torch.ones(2)}, {}),
        ({"\ud800": torch.ones(2)}, {}),
        (good, {"k": 1}),
        (good, {"k": "\ud800"}),
    ):
        with pytest.raises(CheckpointError, match=r"writing .*x\.safetensors"):
            save_tensors(path, tensors, metadata)
    for target in (tmp_path / "no" / "x", tmp_path):
        with pytest.raises(CheckpointError):
            save_tensors(target, good, {})
    assert digests(tmp_path) == before
    with pytest.raises(CheckpointError, match="no such file"):
        load_tensors(tmp_path / "missing")


@forks
def test_kill_9_at_any_moment_of_a_save(tmp_path):
    path = tmp_path / "x.safetensors"

    def write_new() -> None:
        save_tensors(path, {"a": torch.ones(3)}, {})

    lines = lines_executed(write_new)
    for line in range(1, lines, lines // 20):
        save_tensors(path, {"a": torch.zeros(3)}, {})
        killed_at_line(write_new, line)
        assert load_tensors(path)[0]["a"].tolist() in ([0, 0, 0], [1, 1, 1])
        write_new()
        assert os.listdir(tmp_path) == ["x.safetensors"]
