"""Run any stretch of a model's layers on hidden states; does not know what an edit is.

Weights are in the model, or come from a checkpoint while they are needed: of that, only this file and `weights` know.

Rows are always packed right-padded with positions counted from their first token. Attention is causal, so padding
behind a row cannot reach it and no padding mask is needed: results do not depend on the tokenizer's padding side.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig, PreTrainedModel

from .errors import ModelError
from .models import family_of
from .products import Copies, in_dtype, usual_dtype
from .weights import Stream

_UNPLANNED_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class PackedRows:
    """Right-padded token ids and the length of every row."""

    ids: Tensor  # (rows, time) int64
    lengths: Tensor  # (rows,) int64

    @property
    def mask(self) -> Tensor:
        """(rows, time) bool: true on tokens, false on padding."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths.unsqueeze(1)


class Past(Protocol):
    """Attention keys and values of earlier positions, handed to the layers in place of a transformers cache."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values (rows, heads, past + time, head size) a layer attends to, given the new ones."""


class Runner:
    """A model cut into embedding, layers and head."""

    def __init__(self, model: PreTrainedModel, stream: Stream | None = None) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ModelError(f"model: got {type(model).__name__}, wanted a transformers PreTrainedModel")
        self.model = model
        self.stream = stream  # for a model whose weights are read while it runs
        self.family = family_of(model.config)
        self.layers = self.family.layers(model)
        self._embedding: Tensor = model.get_input_embeddings().get_parameter("weight")
        attention = getattr(model.config, "_attn_implementation", None) or "sdpa"
        if attention not in ("sdpa", "eager"):
            # The others take no additive mask, which says what of a past a row may see.
            raise ModelError(
                f"model: got attn_implementation {attention!r}, wanted 'sdpa' or 'eager'; load it so, or "
                "switch by model.set_attn_implementation(…)"
            )
        self._eager = attention == "eager"
        self._past_argument = self.family.past_argument(self.layers[0])
        self._compute_dtype: torch.dtype | None = None
        self._copies: Copies | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """In which products with weights are taken, see `rome_fast.products`."""
        return self._compute_dtype or usual_dtype(self.device, self.dtype)

    def computing_in(self, dtype: torch.dtype, *, keep: bool = False) -> "Runner":
        """The same model, its products with weights taken in another dtype.

        `keep` converts every weight once for as long as the runner lives; until then the weights must not change.
        """
        runner = copy(self)
        runner._compute_dtype, runner._copies = dtype, Copies() if keep else None
        return runner

    def projection(self, layer: int) -> nn.Module:
        """The down-projection module of a layer."""
        return self.family.projection(self.model, layer)

    def stored_weight(self, layer: int) -> Tensor:
        """The down-projection's weight as the model stores it, without gradient."""
        return self.model.get_parameter(self.family.weight_name(layer)).detach()

    def weight(self, layer: int) -> Tensor:
        """The same as a (d, d_ff) view."""
        return self.family.oriented(self.stored_weight(layer))

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """All weights by name, large ones perhaps in parts; each is there until the next is asked for."""
        return iter(self.model.named_parameters()) if self.stream is None else self.stream.parameters()

    def elements(self, name: str, index: Tensor) -> Tensor:
        """(n,) elements of a parameter at flat indices (n,) int64, on the CPU."""
        if self.stream is not None:
            return self.stream.elements(name, index)
        flat = self.model.get_parameter(name).detach().reshape(-1)
        return flat[index.to(flat.device)].cpu()

    @property
    def spare_bytes(self) -> int | None:
        """What hidden states and gradients may take; None where that is a matter of the machine alone."""
        return None if self.stream is None else self.stream.placement.activation_bytes

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def max_length(self) -> int:
        """Longest row that full causal attention is right for (the context, or the sliding window)."""
        config = self.model.config
        longest = int(getattr(config, "max_position_embeddings", 1 << 30))
        window = getattr(config, "sliding_window", None)
        if window and getattr(config, "use_sliding_window", True):
            longest = min(longest, int(window))
        return longest

    def pack(self, rows: Sequence[Sequence[int]]) -> PackedRows:
        """Raises ModelError for a token that the model does not have."""
        # Put together on the host, so that a GPU gets two transfers, which it does while the host goes on.
        lengths = torch.tensor([len(row) for row in rows], device="cpu")
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64, device="cpu")
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64, device="cpu")
        largest, known = int(ids.max()), len(self._embedding)
        if largest >= known:
            raise ModelError(
                f"tokenizer: got token {largest}, wanted ids below the model's {known}; use the model's own tokenizer"
            )
        if self.device.type == "cuda":
            ids, lengths = ids.pin_memory(), lengths.pin_memory()
        return PackedRows(ids.to(self.device, non_blocking=True), lengths.to(self.device, non_blocking=True))

    def embed(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Hidden states (rows, time, d) that enter layer 0; positions count from 0 unless given."""
        return self.family.embed(self.model, ids, self._positions(ids.shape[1], positions))

    def run(
        self,
        hidden: Tensor,  # (rows, time, d)
        start: int,
        stop: int,
        *,
        positions: Tensor | None = None,  # (rows, time) int64
        mask: Tensor | None = None,  # (rows, 1, time, past + time) additive
        past: Past | None = None,
    ) -> Tensor:
        """Layers start .. stop - 1.

        Without `mask`, every row attends causally to itself; with `past`, a mask must say what of it is seen.
        """
        if start >= stop:
            return hidden
        arguments = self.family.position_arguments(self.model, hidden, self._positions(hidden.shape[1], positions))
        arguments[self._past_argument] = past
        if mask is None and self._eager:
            mask = causal_mask(hidden.shape[1], hidden.dtype, hidden.device)

        def run_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
            with in_dtype(self.compute_dtype, self.dtype, self._copies), _any_shape(hidden):
                out = layer(hidden, attention_mask=mask, use_cache=past is not None, **arguments)
            return out[0] if isinstance(out, tuple) else out

        if self.stream is not None and torch.is_grad_enabled() and hidden.requires_grad:
            self.stream.expect_steps(start, stop)
            return _Recomputed.apply(hidden, run_layer, list(self.layers[start:stop]))
        for layer in self.layers[start:stop]:
            hidden = run_layer(layer, hidden)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (…, vocabulary) of the last layer's hidden states (…, d)."""
        with in_dtype(self.compute_dtype, self.dtype, self._copies):
            return self.family.head(self.model, hidden)

    def exact_logits(self, hidden: Tensor) -> Tensor:
        """The same in fp32 (fp64 for an fp64 model), not rounded to the dtype that products are taken in."""
        wide = torch.promote_types(self.dtype, torch.float32)
        with in_dtype(self.compute_dtype, self.dtype, self._copies, wide):
            return self.family.head(self.model, hidden).to(wide)

    def _positions(self, time: int, positions: Tensor | None) -> Tensor:
        return torch.arange(time, device=self.device).unsqueeze(0) if positions is None else positions


def _any_shape(hidden: Tensor) -> AbstractContextManager[Any]:
    """Attention without cuDNN in this block: it plans for every shape anew, which takes longer than ours run."""
    return sdpa_kernel(_UNPLANNED_ATTENTION) if hidden.is_cuda else nullcontext()


class _Recomputed(torch.autograd.Function):
    """Layers whose weights are gone by the time of the backward pass, which runs each of them again.

    Only the input of every layer is kept. Both passes run a layer as it runs where its graph is kept, so that the
    results are the same to the bit.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, run_layer: Callable[[nn.Module, Tensor], Tensor], layers: list[nn.Module]
    ) -> Tensor:
        ctx.run_layer, ctx.layers, ctx.inputs = run_layer, layers, []
        for layer in layers:
            ctx.inputs.append(hidden.detach())
            with torch.enable_grad():
                hidden = run_layer(layer, hidden.detach().requires_grad_()).detach()
        return hidden

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        for layer in reversed(ctx.layers):
            hidden = ctx.inputs.pop().requires_grad_()
            with torch.enable_grad():
                out = ctx.run_layer(layer, hidden)
            (gradient,) = torch.autograd.grad(out, hidden, gradient)
        return gradient, None, None


def causal_mask(time: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, 1, time, time), zero where a position may look and very negative where it may not.

    The eager attention, unlike the fused ones, does not apply causality by itself.
    """
    mask = torch.full((time, time), torch.finfo(dtype).min, dtype=dtype, device=device)
    return mask.triu(1)[None, None]


@contextmanager
def watching(module: nn.Module, see: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Call `see(input, output)` each time the module runs, for the length of the block."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        see(args[0], output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in this block, so that dropout has no part in what is measured."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def plain_generation(model: Any, *, keep_end: bool = False) -> Iterator[None]:
    """`generate` does in this block what its arguments say and nothing else; `keep_end` lets it know the ends of text.

    Models ship penalties and ends of text of their own, which `generate` puts wherever nothing is given.
    """

    def gather(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].contiguous(), *args[1:])

    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id if keep_end else None)
    # `generate` gives the head the last positions of its rows as a slice. torch multiplies that by as many copies of
    # the weight as there are rows: ten rows through a head of 131 MB in bfloat16 took 1.3 GB and 6 s on a CPU.
    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
        model.generation_config = own


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """No gradients for weights in this block, so that backward passes compute only what flows to activations."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
