"""What a program would have a GPU do, found out without one: launches, FLOPs and bytes of operators on meta tensors.

Tensors on the meta device have shapes and no data, so a model of any size runs there in no memory. Two things are not
as on a GPU, and are stood in for while a program is recorded:

- what the host asks a tensor for is not there. A single number is taken as 1, and whether anything is so as False,
  since programs ask for faults in this way. A list is made up by the caller. Either way the host would wait there for
  all that was launched, so what is recorded is parted at these places.
- `scaled_dot_product_attention` would fall apart into products. With a mask, a GPU takes the memory-efficient kernels,
  for which masks are padded to rows of sixteen.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..kernels import configs, operators, reference
from .flops import flops_of

Kind = Literal["products", "attention", "joining", "pointwise"]
KINDS: tuple[Kind, ...] = ("products", "attention", "joining", "pointwise")


class Launches(NamedTuple):
    """One call of an operator."""

    operator: str
    kind: Kind
    backward: bool  # whether autograd called it
    kernels: int  # that it launches
    flops: int  # those of a tile that is not full included
    moved_bytes: int


Stretch = Counter[Launches]
"""What is launched between two places where the host waits, and how often each."""


def launched(stretches: Sequence[Stretch]) -> int:
    """How many kernels."""
    return sum(count * launches.kernels for stretch in stretches for launches, count in stretch.items())


class Part(NamedTuple):
    """What is launched in one stage of an edit up to a list that the host asks for, or to the end of the stage."""

    stage: str
    stretches: list[Stretch]


Read = Callable[[str, Tensor], Any]
"""What the host is told in a stage that a tensor on the meta device holds, as `tolist` returns it."""

# Kernels launched by operators that launch another number than one.
_NONE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "promote_types"}
_SEVERAL = {
    # Zeros, and a copy into a part of them.
    "constant_pad_nd": 2,
    "slice_backward": 2,
    "select_backward": 2,
    # A copy, and a change of it.
    "index_add": 2,
    "scatter_add": 2,
    # As composed by torch: the maximum, which is taken as 0 where it is infinite, the exponentials, their sum, its
    # logarithm, the maximum again.
    "logsumexp": 8,
    # What is added up at places that may coincide is sorted first.
    "index_put": 10,
    "index_put_": 10,
}
_GATHERS = {"index", "index_select", "gather", "embedding"}  # they read as much as they return
_FILLS = {"copy_", "fill_", "zero_"}  # they do not read what they write to
_JOINS = {"cat", "stack"}

# Ops of a step of the search in plain torch, as which they can be counted.
_COMPOSED = {
    operators.target_losses_.default: reference.target_losses_ref_,
    operators.stop_rule_.default: reference.stop_rule_ref_,
    operators.clamped_adam_.default: reference.clamped_adam_ref_,
}

_LIBRARY_TILE, _LIBRARY_TILE_BACKWARD = (64, 128), (128, 128)  # queries, keys: fmha_cutlassF … 64x128, B … 128x128


class Recorder(TorchDispatchMode):
    """Records the operators on tensors of the meta device in `parts`. To be entered by `recording`.

    `composed`: what a step of the search does besides the model is taken for what it is in plain torch.
    """

    def __init__(self, read: Read, *, composed: bool = False) -> None:
        super().__init__()
        self.read, self.composed = read, composed
        self.stage = ""
        self.parts: list[Part] = []
        self._any: Tensor | None = None  # what `any` has returned last

    def begin(self, stage: str) -> None:
        """A part of this stage."""
        self.stage = stage
        self.parts.append(Part(stage, [Counter()]))

    def tolist(self, tensor: Tensor) -> Any:
        """What the host is told; then a new part begins."""
        self.parts[-1].stretches[-1][Launches("tolist", "pointwise", False, 1, 0, tensor.nbytes)] += 1
        answer = self.read(self.stage, tensor)
        self.begin(self.stage)
        return answer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            stretches = self.parts[-1].stretches
            stretches[-1][Launches("item", "pointwise", False, 1, 0, args[0].nbytes)] += 1
            stretches.append(Counter())
            return torch.full((), args[0] is not self._any, dtype=args[0].dtype, device="cpu").item()
        if self.composed and func in _COMPOSED:
            with self:
                return _COMPOSED[func](*args, **kwargs)
        out = func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten.any:
            self._any = out
        # On the host are token ids, and numbers on their way to the device.
        if any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, kwargs, out))):
            found = launches_of(func, args, kwargs, out)
            if found.kernels:
                self.parts[-1].stretches[-1][found] += 1
        return out


class _OnGpu(TorchFunctionMode):
    """Stands in for what tensors on the meta device have not, or do in another way than on a GPU."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.tolist and args[0].is_meta:
            return self.recorder.tolist(args[0])
        if function is scaled_dot_product_attention and args[0].is_meta:
            return _efficient_attention(*args, **kwargs)
        return function(*args, **kwargs)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """In this block, operators are recorded and tensors on the meta device answer as on a GPU."""
    with _OnGpu(recorder), recorder:
        yield


def _efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `scaled_dot_product_attention` calls the memory-efficient kernels on a GPU."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if attn_mask is not None:
        keys = attn_mask.shape[-1]
        if keys % 16:
            attn_mask = pad(attn_mask, (0, -keys % 16))[..., :keys]
        attn_mask = attn_mask.expand(*query.shape[:3], keys)
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, wants, dropout_p, is_causal, scale=scale
    )[0]
    return out


def launches_of(func: Any, args: Any, kwargs: Any, out: Any) -> Launches:
    """Kernels, FLOPs and bytes of one call of an operator, by its schema and the shapes of its tensors."""
    space, _, name = func._schema.name.partition("::")
    backward = torch._C._current_graph_task_id() != -1
    if func.is_view or name in _NONE:
        return Launches(name, "pointwise", backward, 0, 0, 0)
    count = _SEVERAL.get(name, 1)
    if name in ("index_put", "index_put_") and not (args[3] if len(args) > 3 else kwargs.get("accumulate", False)):
        count = 1 if name.endswith("_") else 2
    flops, moved = flops_of(func, args, kwargs, out), moved_bytes(func, args, kwargs, out)
    kind: Kind = "joining" if name in _JOINS else "pointwise"
    if "attention" in name:
        kind = "attention"
        if space == "rome_fast":
            flops, moved = _suffix_attention(args, moved, backward=name.endswith("backward"))
        else:
            query, key = args[1:3] if name.endswith("backward") else args[:2]
            flops = _library_attention(query, key, backward=name.endswith("backward"))
    elif flops:
        kind = "products"
    return Launches(name, kind, backward, count, flops, moved)


def moved_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes read and written by one call of an operator, as if no cache held them; views move nothing.

    An expanded tensor counts once, what a gather does not return not at all, and what is changed in place twice.
    """
    arguments, name = [*args, *kwargs.values()], func._schema.name.partition("::")[2]
    read = [value for value in tree_leaves(arguments) if isinstance(value, Tensor)]
    held = {tensor.untyped_storage()._cdata for tensor in read}
    written = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
    if func._schema.is_mutable:
        places = zip(args, func._schema.arguments, strict=False)
        named = {a.name: a for a in func._schema.arguments}
        both = [*places, *((value, named[key]) for key, value in kwargs.items())]
        written = [v for v, a in both if isinstance(v, Tensor) and a.alias_info is not None and a.alias_info.is_write]
        if name in _FILLS or func._schema.overload_name.endswith("out"):
            read = [x for x in read if all(x is not y for y in written)]
    elif any(tensor.untyped_storage()._cdata in held for tensor in written):
        return 0
    if name in _GATHERS:
        read = [*written, *(x for x in read if x is not args[0])]
    return sum(map(_bytes, read)) + sum(map(_bytes, written))


def _bytes(tensor: Tensor) -> int:
    # An expanded tensor is larger than what it reads.
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(sizes) * tensor.element_size() if tensor.numel() else 0


def _library_attention(query: Tensor, key: Tensor, *, backward: bool) -> int:
    """FLOPs of the memory-efficient kernels: two products forward, five backward, of whole tiles."""
    rows, heads, time, size = query.shape
    queries, keys = _LIBRARY_TILE_BACKWARD if backward else _LIBRARY_TILE
    pairs = _whole(time, queries) * _whole(key.shape[2], keys)
    return (10 if backward else 4) * rows * heads * pairs * size


def _suffix_attention(args: Any, moved: int, *, backward: bool) -> tuple[int, int]:
    """FLOPs and bytes of our kernels (`kernels/suffix.py`): of whole tiles, and of all positions there is room for.

    Every row reads the keys and values of its context, which several rows share and the second-level cache may hold.
    """
    query, key, _, context_keys, context_values, context_index, _, middle_keys, *_ = args[3 if backward else 0 :]
    rows, heads, time, size = query.shape
    group = heads // key.shape[1]
    row_bytes = _power_of_two(size) * query.element_size()
    tile = min(max(16, configs.SUFFIX_TILE_BYTES // row_bytes), _power_of_two(time * group))
    queries, own = _whole(time * group, tile), _whole(time, configs.SUFFIX_KEYS)
    past = sum(_whole(x.shape[2], configs.SUFFIX_KEYS) for x in (context_keys, middle_keys) if x is not None)
    pairs = (6 if backward else 4) * queries * (past + own) + (8 * queries * own if backward else 0)
    contexts = [_bytes(context_keys), _bytes(context_values)]
    moved += sum(contexts) * len(context_index) // max(1, len(context_keys)) - sum(contexts)
    return pairs * rows * key.shape[1] * _power_of_two(size), moved


def _power_of_two(size: int) -> int:
    """The least one that is not below, and 16 at least."""
    return max(16, 1 << (size - 1).bit_length())


def _whole(size: int, tile: int) -> int:
    return -(-size // tile) * tile
