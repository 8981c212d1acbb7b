"""Headers of safetensors files: what is damaged is named, never believed."""

import json
import os
import random
import resource
import struct
import tracemalloc
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from on_disk import (
    bits,
    header_json,
)
from rome_fast.errors import CheckpointError
from rome_fast.weights import read_header
from rome_fast.weights.header import read_tensor


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
