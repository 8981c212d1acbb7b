"""Attention to a frozen past that stays where it lies, through transformers' table of attention functions.

A layer asks its past for all keys and values, and hands them to the function that its configuration names. Here the
past gives back the new ones alone, and the function of this file finds the rest: nothing is gathered and joined in
every layer of every step (see `kernels.suffix_attention`). No layer knows of it. One with an attention function of its
own attends to too little then, which `rome_fast.models.verification` finds out beforehand, and an error here in any
case.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from ..kernels import suffix_attention

NAME = "rome_fast_suffix"
_KNOWN = ("position_ids", "cache_position")  # tensors that say nothing of scores


class PastParts(Protocol):
    """A past in parts, as `kernels.suffix_attention` takes it."""

    def parts(self, layer: int) -> dict[str, Any]:
        """Its arguments from `context_keys` to `middle_seen`; nothing where there is no past."""

    def keep(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Take the new keys and values of a layer (rows, kv_heads, time, head size), if they are wanted later."""


class Asked(NamedTuple):
    """How a layer has attended to a past apart."""

    layer: int  # as which it asked for keys and values
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    soft_cap: float | None
    window: int | None


class _Asked(threading.local):
    """Whom the layer that runs in this thread has asked for keys and values, and not attended to yet."""

    past: tuple[PastParts, int] | None = None
    last: Asked | None = None  # of the layer that attended last


_ASKED = _Asked()


def ask(past: PastParts, layer: int) -> None:
    """The attention function that is called next attends to this past of a layer."""
    _ASKED.past = past, layer


def asked_last() -> Asked | None:
    """How the layer attended that ran last in this thread within `attending_apart`."""
    return _ASKED.last


@contextmanager
def attending_apart(configs: Sequence[PretrainedConfig]) -> Iterator[None]:
    """In this block, layers with these configurations attend to a past apart from their own keys and values.

    Raises NotImplementedError behind it where one has asked for a past and not attended to it.
    """
    usual = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = NAME
    _ASKED.past = _ASKED.last = None
    try:
        yield
        if _ASKED.past is not None:
            raise NotImplementedError("a layer has an attention function that transformers' table does not replace")
    finally:
        _ASKED.past = None
        for config, name in zip(configs, usual, strict=True):
            config._attn_implementation = name


def _attend(
    _module: nn.Module,
    query: Tensor,  # (rows, heads, time, head size)
    key: Tensor,  # (rows, kv_heads, time, head size), as is the next
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """(rows, time, heads, head size), as transformers' own attention functions return it.

    The mask is not looked at: it says what a past in parts says in numbers. Raises NotImplementedError for scores that
    depend on more than queries and keys.
    """
    unknown = [name for name, x in others.items() if isinstance(x, Tensor) and name not in _KNOWN]
    if unknown or _ASKED.past is None:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'no past'}")
    past, layer = _ASKED.past
    _, heads, _, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    _ASKED.past, _ASKED.last = None, Asked(layer, heads, key.shape[1], size, scale, softcap, sliding_window)
    out = suffix_attention(query, key, value, **past.parts(layer), scale=scale, soft_cap=softcap, window=sliding_window)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, _attend)


def pays(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a past is better read where it lies than joined to the keys of every row.

    Not on a CPU in fp32 where every head has keys of its own: edits of GPT-2's size then took 6 to 7 % longer.
    """
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None) or heads
    return device.type != "cpu" or dtype.itemsize != 4 or shared != heads
