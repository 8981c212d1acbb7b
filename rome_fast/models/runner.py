"""Run any stretch of a model's layers on hidden states; does not know what an edit is.

Weights are in the model, or come from a checkpoint while they are needed: of that, only this file and `weights` know.

Rows are always packed right-padded with positions counted from their first token. Attention is causal, so padding
behind a row cannot reach it and no padding mask is needed: results do not depend on the tokenizer's padding side.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig, PreTrainedModel

from ..errors import ModelError
from ..weights import Stream, Task
from . import Decoder, oriented
from .attention import PastParts, attending_apart
from .fused import LikeLlama, layers_like_llama, run_fused
from .products import Copies, FrozenProducts, in_dtype, usual_dtype

# Of configurations: how far back a layer sees, or in chunks of what length.
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size", "local_attention")
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

    @property
    def apart(self) -> bool:
        """Whether `update` returns the new ones alone; `rome_fast.models.attention` attends to the others."""

    @property
    def fused(self) -> Mapping[int, LikeLlama]:
        """Layers that may be run behind it by `rome_fast.models.fused`, which takes a past in parts."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values (rows, heads, past + time, head size) a layer attends to, given the new ones."""


@dataclass(frozen=True)
class _Calls:
    """Arguments of the layers, and for what."""

    shape: torch.Size
    positions: Tensor | None
    mask: Tensor | None
    arguments: list[dict[str, Any]]

    def fit(self, shape: torch.Size, positions: Tensor | None, mask: Tensor | None) -> bool:
        # Only with a mask, which belongs to one batch of rows: some layers hand things on through their arguments.
        return mask is not None and mask is self.mask and positions is self.positions and shape == self.shape


class Runner:
    """A model cut into embedding, layers and head."""

    def __init__(self, model: PreTrainedModel, stream: Stream | None = None) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ModelError(f"model: got {type(model).__name__}, wanted a transformers PreTrainedModel")
        self.model = model
        self.stream = stream  # for a model whose weights are read while it runs
        # By parameter name, elements at flat indices (n,) int64 of what the edits recorded in its checkpoint overwrote.
        self.overwritten: Mapping[str, Callable[[Tensor], Tensor]] = {}
        self.decoder = Decoder(model)
        self.layers = self.decoder.layers
        self._embedding: Tensor = model.get_input_embeddings().get_parameter("weight")
        attention = getattr(model.config, "_attn_implementation", None) or "sdpa"
        if attention not in ("sdpa", "eager"):
            # The others take no additive mask, which says what of a past a row may see.
            raise ModelError(
                f"model: got attn_implementation {attention!r}, wanted 'sdpa' or 'eager'; load it so, or "
                "switch by model.set_attn_implementation(…)"
            )
        self._calls: _Calls | None = None  # made last
        self._compute_dtype: torch.dtype | None = None
        self._copies: Copies | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """In which products with weights are taken, see `rome_fast.models.products`."""
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
        return self.decoder.projection(layer)

    def weight_name(self, layer: int) -> str:
        """Name of the down-projection's parameter. Raises ModelError for a layer without one."""
        return self.decoder.weight_name(layer)

    def stored_weight(self, layer: int) -> Tensor:
        """The down-projection's weight as the model stores it, without gradient."""
        return self.model.get_parameter(self.weight_name(layer)).detach()

    def weight(self, layer: int) -> Tensor:
        """The same as a (d, d_ff) view."""
        return oriented(self.model, self.weight_name(layer), self.stored_weight(layer))

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
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return len(self._embedding)

    @property
    def max_length(self) -> int:
        """Longest row that full causal attention is right for (the context, or the sliding window)."""
        config = self.model.config.get_text_config()
        longest = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        # Their last positions see less than all: masks given to the layers do not say so.
        for name in _WINDOWS:
            window = getattr(config, name, None)
            if isinstance(window, int) and window and getattr(config, f"use_{name}", True):
                longest = min(longest, window)
        return longest

    def pack(self, rows: Sequence[Sequence[int]]) -> PackedRows:
        """Raises ModelError for a token that the model does not have."""
        # Put together on the host, so that a GPU gets two transfers, which it does while the host goes on.
        lengths = torch.tensor([len(row) for row in rows], device="cpu")
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64, device="cpu")
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64, device="cpu")
        largest, known = int(ids.max()), self.vocab_size
        if largest >= known:
            raise ModelError(
                f"tokenizer: got token {largest}, wanted ids below the model's {known}; use the model's own tokenizer"
            )
        if self.device.type == "cuda":
            ids, lengths = ids.pin_memory(), lengths.pin_memory()
        return PackedRows(ids.to(self.device, non_blocking=True), lengths.to(self.device, non_blocking=True))

    def embed(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Hidden states (rows, time, d) that enter layer 0; positions count from 0 unless given."""
        return self.decoder.embed(ids, positions)

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
        if self.stream is None:
            out = self._run_fused(hidden, start, stop, positions, mask, past)
            if out is not None:
                return out
        run_layer = self._layers_with(hidden, positions, mask, past)
        if self.stream is not None and torch.is_grad_enabled() and hidden.requires_grad:
            self.stream.expect_steps(start, stop)
            return _Recomputed.apply(hidden, run_layer, range(start, stop))
        for layer in range(start, stop):
            hidden = run_layer(layer, hidden)
        return hidden

    def run_adding(
        self,
        hidden: Tensor,  # (rows, time, d)
        layer: int,
        added: Tensor,  # (rows, d): to the values of the layer
        at: Tensor,  # (rows,) int64: where in the row
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """What one layer puts out when something is added to its down-projection's output, with a gradient to that."""
        run_layer = self._layers_with(hidden, positions, mask, past)
        rows = torch.arange(len(at), device=at.device)

        def run_with(layer: int, added: Tensor) -> Tensor:
            def add(_keys: Tensor, values: Tensor) -> Tensor:
                return values.index_put((rows, at), added, accumulate=True)

            with self.watching(layer, add):
                return run_layer(layer, hidden)

        if self.stream is not None and torch.is_grad_enabled() and added.requires_grad:
            return _Recomputed.apply(added, run_with, [layer])
        return run_with(layer, added)

    def _layers_with(
        self, hidden: Tensor, positions: Tensor | None, mask: Tensor | None, past: Past | None
    ) -> Callable[[int, Tensor], Tensor]:
        """A function of (layer, hidden states like these) that runs the layer."""
        calls = self._arguments(hidden, positions, mask)

        def run_layer(layer: int, hidden: Tensor) -> Tensor:
            if self.stream is not None:
                # Before anything is entered here that another computation, whose turn it may be, must not be in.
                self.stream.take(layer)
            if self.stream is not None and past is not None and past.fused:
                # One after the other, which gives the same to the bit.
                out = self._run_fused(hidden, layer, layer + 1, positions, mask, past)
                if out is not None:
                    return out
            arguments = self.decoder.with_past(layer, calls[layer], past)
            apart = past is not None and past.apart
            attention = attending_apart(self.decoder.configs) if apart else any_shape(hidden.device)
            with in_dtype(self.compute_dtype, self.dtype, self._copies), attention:
                out = self.layers[layer](hidden, **arguments)
            self.decoder.see(out)
            return out if isinstance(out, Tensor) else out[0]

        return run_layer

    def _run_fused(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        positions: Tensor | None,
        mask: Tensor | None,
        past: Past | None,
    ) -> Tensor | None:
        """What leaves layer stop - 1 if layers may be run together; None for some that are to be run as they are."""
        if past is None or not past.fused:
            return None
        streamed = self.stream is not None
        layers = layers_like_llama(past.fused, list(self.layers[start:stop]), start, hidden.dtype, streamed=streamed)
        if layers is None:
            return None
        arguments = self._arguments(hidden, positions, mask)[start:stop]
        products = FrozenProducts(self.compute_dtype, self._copies)
        return run_fused(hidden, layers, arguments, cast(PastParts, past), products)

    def _arguments(self, hidden: Tensor, positions: Tensor | None, mask: Tensor | None) -> list[dict[str, Any]]:
        """What every layer is called with, for hidden states like these."""
        # The steps of a search ask for the same again and again.
        if self._calls is None or not self._calls.fit(hidden.shape, positions, mask):
            self._calls = _Calls(hidden.shape, positions, mask, self.decoder.calls(hidden, positions, mask))
        return self._calls.arguments

    def in_turn(self, tasks: Sequence[Task]) -> None:
        """Run computations on the model: one after the other, or where it is read, many on each reading of a layer."""
        if self.stream is not None:
            self.stream.in_turn(tasks, self.stream.placement.activation_bytes)
        else:
            for task in tasks:
                task.run()

    @contextmanager
    def watching(self, layer: int, see: Callable[[Tensor, Tensor], Tensor | None]) -> Iterator[None]:
        """In this block, `see(keys, values)` is called with what goes into a layer's down-projection and comes out.

        Both are (rows, time, …), also where a layer runs its MLP on tokens in one long row. What `see` returns takes
        the place of the values, unless it is None.
        """
        shape: list[int] = []

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden: Tensor = next(iter((*args, *kwargs.values())))
            shape[:] = hidden.shape[:2]

        def leave(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            changed = see(args[0].reshape(*shape, -1), output.reshape(*shape, -1))
            return None if changed is None else changed.reshape(output.shape)

        handles = [
            self.layers[layer].register_forward_pre_hook(enter, with_kwargs=True),
            self.projection(layer).register_forward_hook(leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (…, vocabulary) of the last layer's hidden states (…, d)."""
        if self.stream is not None:
            self.stream.take(len(self.layers))
        with in_dtype(self.compute_dtype, self.dtype, self._copies):
            return self.decoder.head(hidden)

    def exact_logits(self, hidden: Tensor) -> Tensor:
        """The same in fp32 (fp64 for an fp64 model), not rounded to the dtype that products are taken in."""
        wide = torch.promote_types(self.dtype, torch.float32)
        with in_dtype(self.compute_dtype, self.dtype, self._copies, wide):
            return self.decoder.head(hidden).to(wide)


def any_shape(device: torch.device) -> AbstractContextManager[Any]:
    """Attention without cuDNN in this block: it plans for every shape anew, which takes longer than ours run."""
    return sdpa_kernel(_UNPLANNED_ATTENTION) if device.type == "cuda" else nullcontext()


class _Recomputed(torch.autograd.Function):
    """Layers whose weights are gone by the time of the backward pass, which runs each of them again.

    Only the input of every layer is kept. Both passes run a layer as it runs where its graph is kept, so that the
    results are the same to the bit.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, run_layer: Callable[[int, Tensor], Tensor], layers: Sequence[int]) -> Tensor:
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


def causal_mask(rows: int, time: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, 1, time, time), zero where a position may look and very negative where it may not."""
    mask = torch.full((time, time), torch.finfo(dtype).min, dtype=dtype, device=device)
    return mask.triu(1).expand(rows, 1, -1, -1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen weights in this block.

    Dropout has then no part in what is measured, and kernels are those of a streamed model: torch chooses some of them
    by whether a weight wants a gradient.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with frozen_weights(model):
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
def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """In this block, the model has these weights, by name and stored as it stores its own, in the place of those."""
    parameters = {name: model.get_parameter(name) for name in weights}
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(parameter)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


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
