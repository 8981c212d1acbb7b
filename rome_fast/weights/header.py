"""The header of a safetensors file, checked against the file's size before anything relies on it.

Layout: 8 bytes (little-endian n), n bytes of JSON `{name: {"dtype", "shape", "data_offsets": [begin, end]}}`,
data. The offsets count from the first byte of the data, which the tensors fill without holes or overlaps.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .files import os_errors

MAX_JSON_BYTES = 100_000_000
_MAX_DIMENSIONS = 64
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "C64": "complex64", "BOOL": "bool", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {k: getattr(torch, v) for k, v in _TORCH_NAMES.items() if hasattr(torch, v)}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: bytes `begin` to `end` of the data section."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header; the data section starts at byte `data_start` of `path`."""

    path: Path
    data_start: int
    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]


def read_header(path: Path | str) -> Header:
    """Parse and check a safetensors header; anything wrong is a CheckpointError naming file and fault."""
    path = Path(path)
    with os_errors(f"reading {path}"):
        # Before opening it, because opening a named pipe waits for a writer.
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; wanted a safetensors file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
                raise CheckpointError(
                    f"{path}: damaged safetensors file: a header of {length:,} bytes in a file of {size:,} "
                    f"(limit {MAX_JSON_BYTES:,}); it is truncated or not safetensors, fetch it again"
                )
            raw = file.read(length)
    try:
        metadata, tensors = _parse(raw, data_bytes=size - 8 - length)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged safetensors header: {error}; fetch the file again") from error
    return Header(path, 8 + length, metadata, tensors)


def read_tensor(header: Header, name: str) -> torch.Tensor:
    """Read one tensor into fresh CPU memory, without mapping the file; raises CheckpointError."""
    entry = header.tensors[name]
    data = torch.empty(entry.end - entry.begin, dtype=torch.uint8, device="cpu")
    with os_errors(f"reading {name} from {header.path}"), header.path.open("rb") as file:
        file.seek(header.data_start + entry.begin)
        got = file.readinto(data.numpy().data)
    if got != data.numel():
        raise CheckpointError(
            f"{header.path}: {got:,} of {data.numel():,} bytes of {name}; the file was cut after opening"
        )
    return data.view(entry.dtype).reshape(entry.shape)


def read_elements(header: Header, name: str, index: torch.Tensor) -> torch.Tensor:
    """(n,) elements of a tensor at flat indices (n,) int64, and nothing else of it; raises CheckpointError."""
    entry = header.tensors[name]
    out = torch.empty(len(index), dtype=entry.dtype, device="cpu")
    size, raw = entry.dtype.itemsize, out.view(torch.uint8).numpy().data
    with os_errors(f"reading {name} from {header.path}"), header.path.open("rb") as file:
        for i, at in enumerate(index.tolist()):
            file.seek(header.data_start + entry.begin + at * size)
            if file.readinto(raw[i * size : (i + 1) * size]) != size:
                raise CheckpointError(f"{header.path}: it ends within {name}; the file was cut after opening")
    return out


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for json: ValueError for a repeated key and for one that is not Unicode text."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        _check_text(key)
        if key in result:
            raise ValueError(f"key {key[:200]!r} occurs twice")
        result[key] = value
    return result


def _parse(raw: bytes, data_bytes: int) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    if not raw.startswith(b"{"):
        raise ValueError("it does not begin with '{'")
    root = json.loads(raw.decode(), object_pairs_hook=unique_keys, parse_int=_natural)
    metadata = root.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not an object of strings")
    for value in metadata.values():
        _check_text(value)
    tensors = {name: _entry(name, fields) for name, fields in root.items()}
    filled = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != filled:
            fault = "overlaps the one before it" if entry.begin < filled else "leaves a hole before it"
            raise ValueError(f"tensor {name[:200]!r} at bytes {entry.begin} to {entry.end} {fault}")
        filled = entry.end
    if filled != data_bytes:
        raise ValueError(f"the tensors take {filled:,} bytes and the file has {data_bytes:,} bytes of data")
    return metadata, tensors


def _entry(name: str, fields: Any) -> TensorEntry:
    label = f"tensor {name[:200]!r}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{label} does not have exactly dtype, shape and data_offsets")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{label} has the unknown dtype {str(code)[:50]!r}; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"the shape of {label} is not a list of at most {_MAX_DIMENSIONS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"the data_offsets of {label} are not [begin, end]")
    dtype, (begin, end) = DTYPES[code], offsets
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        raise ValueError(f"the shape of {label} overflows")
    if end - begin != (wanted := math.prod(shape) * dtype.itemsize):
        raise ValueError(f"{label} is {code} {shape} = {wanted:,} bytes, with data_offsets {offsets}")
    return TensorEntry(dtype, tuple(shape), begin, end)


def _natural(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 18:
        raise ValueError(f"{digits[:24]} is not a size")
    return int(digits)


def _are_sizes(value: Any) -> bool:
    # Not isinstance(): JSON's true is an int to Python.
    return isinstance(value, list) and all(type(item) is int for item in value)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text[:200]!r} is not Unicode text") from None
