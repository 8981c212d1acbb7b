"""Attention keys and values that an edit cannot change: computed once, shared, never differentiated.

Everything before the subject's last token is frozen while a value is optimised. Of that, the contexts are the same
for every request, so their keys and values are computed once per model and shared by all edits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .attention import ask
from .fused import LikeLlama
from .rows import Row, encode
from .runner import Runner, causal_mask


class Recorder:
    """A past that stores what each layer adds to it, behind whatever an inner past already holds."""

    apart: ClassVar[bool] = False

    def __init__(
        self, inner: "ContextPast | None" = None, fused: Mapping[int, LikeLlama] = MappingProxyType({})
    ) -> None:
        self.inner = inner
        self.fused = fused  # layers to be run by `models.fused`
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keep(layer, keys, values)
        return (keys, values) if self.inner is None else self.inner.update(keys, values, layer)

    def keep(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.keys[layer], self.values[layer] = keys, values

    def parts(self, layer: int) -> dict[str, Any]:
        """As `kernels.suffix_attention` takes it; nothing without an inner past."""
        return {} if self.inner is None else self.inner.parts(layer)


class EmptyPast:
    """Nothing before, for attention to attend to apart."""

    apart: ClassVar[bool] = True
    fused: ClassVar[Mapping[int, LikeLlama]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._none = keys[:, :, :0], values[:, :, :0]
        ask(self, layer)
        return keys, values

    def keep(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """They are of no use later."""

    def parts(self, _layer: int) -> dict[str, Any]:
        """As `kernels.suffix_attention` takes it."""
        keys, values = self._none
        zero = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
        return {"context_keys": keys, "context_values": values, "context_index": zero, "context_seen": zero}


@dataclass(frozen=True)
class ContextPast:
    """The contexts' keys and values, each row seeing the context it belongs to."""

    apart: ClassVar[bool] = False

    contexts: "Contexts"
    index: Tensor  # (rows,) which context a row has
    seen: Tensor | None = None  # (rows,) int64: how many of its positions, the first ones; for `fused`
    fused: Mapping[int, LikeLlama] = field(default_factory=dict)  # layers to be run by `models.fused`

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        past_keys, past_values = self.of_layer(layer)
        return torch.cat([past_keys, keys], 2), torch.cat([past_values, values], 2)

    def keep(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """They are of no use later."""

    def parts(self, layer: int) -> dict[str, Any]:
        """The past of a layer as `kernels.suffix_attention` takes it."""
        recorded = self.contexts.recorded
        return {
            "context_keys": recorded.keys[layer],
            "context_values": recorded.values[layer],
            "context_index": self.index,
            "context_seen": self.seen,
        }

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.contexts.recorded.keys[layer][self.index], self.contexts.recorded.values[layer][self.index]


@dataclass(frozen=True)
class FrozenPast:
    """Keys and values of all positions before the subject's last token: those of the contexts, and behind them a row's.

    The contexts' are stored once for all rows. Where attention is not apart, they are put before a row's own whenever a
    layer asks.
    """

    shared: ContextPast
    keys: dict[int, Tensor]  # by layer (rows, heads, middle, head size); no layers where no row has a middle
    values: dict[int, Tensor]
    context_seen: Tensor  # (rows,) int64: how many of its context's positions a row has, the first ones
    middle_seen: Tensor  # (rows,) int64: how many of its middle's; what is behind is padding
    apart: bool
    fused: Mapping[int, LikeLlama] = field(default_factory=dict)  # layers to be run by `models.fused`, if it is apart

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.apart:
            ask(self, layer)
            return keys, values
        past_keys, past_values = self.shared.of_layer(layer)
        own = layer in self.keys
        return (
            torch.cat([past_keys, self.keys[layer], keys] if own else [past_keys, keys], 2),
            torch.cat([past_values, self.values[layer], values] if own else [past_values, values], 2),
        )

    def keep(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """They are of no use later."""

    def parts(self, layer: int) -> dict[str, Any]:
        """The past of a layer as `kernels.suffix_attention` takes it."""
        recorded, own = self.shared.contexts.recorded, layer in self.keys
        return {
            "context_keys": recorded.keys[layer],
            "context_values": recorded.values[layer],
            "context_index": self.shared.index,
            "context_seen": self.context_seen,
            "middle_keys": self.keys[layer] if own else None,
            "middle_values": self.values[layer] if own else None,
            "middle_seen": self.middle_seen if own else None,
        }

    @property
    def middle(self) -> int:
        """Positions of the longest middle."""
        return next((keys.shape[2] for keys in self.keys.values()), 0)

    @property
    def seen(self) -> Tensor:
        """(rows, longest context + middle) bool: false on padding."""
        parts = (
            (self.context_seen, self.shared.contexts.longest),
            (self.middle_seen, self.middle),
        )
        return torch.cat([torch.arange(size, device=count.device) < count.unsqueeze(1) for count, size in parts], 1)

    def rows(self, index: Tensor) -> "FrozenPast":
        return replace(
            self,
            shared=ContextPast(self.shared.contexts, self.shared.index[index]),
            keys={layer: k[index] for layer, k in self.keys.items()},
            values={layer: v[index] for layer, v in self.values.items()},
            context_seen=self.context_seen[index],
            middle_seen=self.middle_seen[index],
        )


@dataclass(frozen=True)
class Contexts:
    """Token ids of the contexts and what the model makes of them, once for all edits."""

    ids: tuple[tuple[int, ...], ...]
    lengths: Tensor  # (contexts,)
    recorded: Recorder  # (contexts, heads, longest, head size) by layer
    layer: int  # the first of the edit layers, below which nothing changes
    last: int  # the last of them: what is above is run by another runner
    entering: Tensor  # (contexts, longest, d): what enters it

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        runner: Runner,
        tokenizer: PreTrainedTokenizerBase,
        contexts: Sequence[str],
        layers: Sequence[int],
        above: Runner | None = None,
        head: str | None = None,
        fused: Mapping[int, LikeLlama] = MappingProxyType({}),
    ) -> "Contexts":
        """Run every context through the model. A context without a token shares nothing and costs nothing.

        `head` is what a chat template puts before each of them. `above` runs the layers above the edit layers, where it
        is not to be the same runner; `fused` are those that may be run by `models.fused`.
        """
        layer = layers[0]
        # The space a context ends in belongs to the prompt's first token.
        texts = [(head or "") + context.rstrip() for context in contexts]
        ids = tuple(tuple(e.ids) for e in encode(tokenizer, texts, special=head is None))
        packed = runner.pack([row or (0,) for row in ids])
        recorder = Recorder(fused=fused)
        mask = causal_mask(len(ids), packed.ids.shape[1], runner.dtype, runner.device)
        entering = runner.run(runner.embed(packed.ids), 0, layer, past=recorder, mask=mask)
        lengths = torch.tensor([len(row) for row in ids], device=runner.device)
        return cls(ids, lengths, recorder, layer, layers[-1], entering).after_edit(runner, above, fused)

    @torch.no_grad()
    def after_edit(
        self,
        runner: Runner,
        above: Runner | None = None,
        fused: Mapping[int, LikeLlama] = MappingProxyType({}),
    ) -> "Contexts":
        """The same contexts once the weights of edit layers are others, which the layers below do not see."""
        recorder = Recorder(fused=fused)
        for layer in range(self.layer):
            recorder.keys[layer], recorder.values[layer] = self.recorded.keys[layer], self.recorded.values[layer]
        mask = causal_mask(len(self.ids), self.entering.shape[1], runner.dtype, runner.device)
        hidden = runner.run(self.entering, self.layer, self.last + 1, past=recorder, mask=mask)
        (above or runner).run(hidden, self.last + 1, len(runner.layers), past=recorder, mask=mask)
        return replace(self, recorded=recorder)

    @property
    def longest(self) -> int:
        """Positions of the longest context, which the others are padded to."""
        return self.entering.shape[1]

    def shared_with(self, context: int, row: Row) -> int:
        """How many of the row's tokens are the context's, at most up to the subject's last token."""
        shared = 0
        for mine, theirs in zip(self.ids[context], row.ids[: row.subject], strict=False):
            if mine != theirs:
                break
            shared += 1
        return shared


def attention_mask(seen: Tensor, time: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (rows, 1, time, past + time): what of the past is there, and causality behind it."""
    rows, past = seen.shape
    allowed = torch.ones(rows, 1, time, past + time, dtype=torch.bool, device=seen.device)
    allowed[..., :past] = seen[:, None, None, :]
    allowed[..., past:] = torch.ones(time, time, dtype=torch.bool, device=seen.device).tril()
    return torch.zeros(allowed.shape, dtype=dtype, device=seen.device).masked_fill_(~allowed, torch.finfo(dtype).min)
