"""Products with weights, in the dtype that the device multiplies fast.

A CPU without bfloat16 instructions multiplies bfloat16 several times slower than fp32, and a GPU fp32 many times slower
than bfloat16. So a product may be taken in another dtype than its weight has: weights are converted as they are
needed, a part at a time, and again for the backward pass, so that there is never a second copy of the model.
Activations keep their dtype from layer to layer.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_HALF = (torch.bfloat16, torch.float16)
# Elements of a factor converted at a time; on a CPU they should stay in its cache until they are multiplied.
_PART, _PART_OF_CPU = 1 << 27, 1 << 22

# Of torch 2.8 and newer.
_WIDE_RESULTS = "dtype_out" in torch.ops.aten.mm.overloads()

_rooms = threading.local()


@cache
def multiplies_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has instructions for products in a 16-bit dtype."""
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported") if dtype == torch.bfloat16 else ()
    return any(getattr(torch.cpu, name, bool)() for name in (*names, "_is_amx_fp16_supported"))


def usual_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype for products with weights of `dtype`: their own, but fp32 where a CPU has no instructions for it."""
    slow = dtype in _HALF and device.type == "cpu" and not multiplies_fast(device, dtype)
    return torch.float32 if slow else dtype


class Copies:
    """Weights converted once, each at its first use; they must not change as long as this is used."""

    def __init__(self) -> None:
        # With the weight itself, so that its address stays its own.
        self._kept: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The whole weight in another dtype, laid out in memory as it is."""
        key = weight.data_ptr(), weight.shape, weight.stride(), dtype
        if key not in self._kept:
            self._kept[key] = weight, weight.to(dtype)
        return self._kept[key][1]


def in_dtype(
    dtype: torch.dtype, weights: torch.dtype, copies: Copies | None = None, result: torch.dtype | None = None
) -> AbstractContextManager[Any]:
    """In this block, linear layers with weights of dtype `weights`, unless they are trained, multiply in `dtype`.

    With `copies`, weights are converted at their first use; without, anew for every product: the results are the same.
    They have the dtype of the weights, or `result`, without having been rounded to a narrower one in between.
    """
    plain = dtype == weights and result in (None, weights)
    return nullcontext() if plain else _Converted(dtype, weights, copies, result)


class _Converted(TorchFunctionMode):
    def __init__(
        self, dtype: torch.dtype, weights: torch.dtype, copies: Copies | None, result: torch.dtype | None
    ) -> None:
        super().__init__()
        self.dtype, self.weights, self.copies, self.result = dtype, weights, copies, result

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        # nn.Linear calls the first, the Conv1D of GPT-2 the second.
        if function is torch.nn.functional.linear and not kwargs:
            x, weight, bias = (*args, None)[:3]
            weight = weight.t()
        elif function is torch.addmm and not kwargs:
            bias, x, weight = args
        else:
            return function(*args, **(kwargs or {}))
        trained = weight.requires_grad and torch.is_grad_enabled()
        if weight.dtype != self.weights or x.dtype != self.weights or trained:
            return function(*args)
        forward = self.dtype
        if self.result is not None and x.device.type == "cpu" and self.result.itemsize > forward.itemsize:
            # A CPU rounds the results of a product to the dtype of its factors.
            forward = self.result
        out = _Product.apply(x, weight, forward, self.dtype, self.copies, self.result or self.weights)
        return out if bias is None else out + bias


class _Product(torch.autograd.Function):
    """x (…, n) times a frozen weight (n, m), in one dtype forward and perhaps another one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        forward: torch.dtype,
        backward: torch.dtype,
        copies: Copies | None,
        result: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype, ctx.copies, ctx.result = backward, copies, x.dtype
        return _multiply(x, _kept(weight, forward, copies), forward, result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        weight = _kept(weight, ctx.dtype, ctx.copies)
        return _multiply(gradients[0], weight.t(), ctx.dtype, ctx.result), *(None,) * 5


@dataclass(frozen=True)
class FrozenProducts:
    """Products with the frozen weights of linear layers, and their gradients, as `in_dtype` takes them."""

    dtype: torch.dtype
    copies: Copies | None = None

    def forward(self, x: Tensor, module: nn.Linear) -> Tensor:
        """x (n, a) Wᵀ + b, (n, b)."""
        weight, bias = module.weight.t(), module.bias
        if self.dtype == weight.dtype:
            return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
        out = _multiply(x, _kept(weight, self.dtype, self.copies), self.dtype, x.dtype)
        return out if bias is None else out.add_(bias)

    def backward(self, gradient: Tensor, module: nn.Linear, total: Tensor | None = None) -> Tensor:
        """Gradient (n, b) W, (n, a), added to `total` in place where there is one."""
        weight = module.weight
        if self.dtype == weight.dtype:
            return torch.mm(gradient, weight) if total is None else total.addmm_(gradient, weight)
        out = _multiply(gradient, _kept(weight.t(), self.dtype, self.copies).t(), self.dtype, gradient.dtype)
        return out if total is None else total.add_(out)


def _kept(weight: Tensor, dtype: torch.dtype, copies: Copies | None) -> Tensor:
    return weight if copies is None or weight.dtype == dtype else copies.of(weight, dtype)


def _multiply(x: Tensor, weight: Tensor, dtype: torch.dtype, result: torch.dtype) -> Tensor:
    """x (…, n) times weight (n, m) in `dtype`, the result in another one.

    Parts are the same whether the weight has to be converted or not, and with them the rounding.
    """
    # What a GPU adds up in fp32 need not be rounded to 16 bits.
    unrounded = x.is_cuda and dtype in _HALF and result == torch.float32 and _WIDE_RESULTS
    wide = {"out_dtype": result} if unrounded else {}
    out = x.new_empty(*x.shape[:-1], weight.shape[1], dtype=result)
    step = max(1, (_PART_OF_CPU if x.device.type == "cpu" else _PART) // weight.shape[0])
    for rows, into in zip(x.reshape(-1, x.shape[-1]).split(step), out.view(-1, out.shape[-1]).split(step), strict=True):
        converted = _converted("rows", rows, dtype)
        for part, piece in zip(weight.split(step, 1), into.split(step, 1), strict=True):
            product = _room("product", piece.shape, result if wide else dtype, x.device)
            piece.copy_(torch.mm(converted, _converted("part", part, dtype), **wide, out=product))
    return out


def _converted(name: str, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix in a dtype, laid out in memory as it is; valid until the next one of that name."""
    if matrix.dtype == dtype:
        return matrix
    transposed = matrix.stride(0) == 1
    across = matrix.t() if transposed else matrix
    copy = _room(name, across.shape, dtype, matrix.device).copy_(across)
    return copy.t() if transposed else copy


def _room(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that is kept, for one use of its name at a time: large pieces taken and given back again would scatter."""
    key, size = (name, dtype, device), shape.numel()
    kept = _rooms.__dict__.setdefault("kept", {})
    if key not in kept or len(kept[key]) < size:
        kept.pop(key, None)
        kept[key] = torch.empty(size, dtype=dtype, device=device)
    return kept[key][:size].view(shape)
