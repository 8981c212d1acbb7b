"""Layers like Llama's over a frozen past as one function of few launches, with the gradient of what enters them alone.

Of a layer that is h + MLP(norm(h)) with h = x + attention(norm(x)), a step launches twelve kernels forward, seven of
them products, and twelve backward, where the layer as written launches some forty and sixty. What an MLP adds is not
added at once but by the norm of the next layer, and gradients of several products with the same factor are added up by
the products themselves. Nobody asks for gradients of weights, keys of the past and masks, and none are computed.

What is kept for the backward pass, of a position: the hidden states in front of both norms, queries and keys as they
are attended to (and where heads are normed as they were before), values, what attention puts out, gate and up.

Which layers can be run so is told by what they consist of, and is not believed: their output and gradient are compared
with the layer's own by `rome_fast.models.verification`. A layer is looked at again in every call, so that hooks,
adapters and trained weights are not passed over.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import operators
from ..kernels.reference import ACTIVATIONS, SuffixCall
from .attention import Asked, PastParts
from .products import FrozenProducts


@dataclass(frozen=True)
class LikeLlama:
    """What of a layer is not read off its weights."""

    asked: Asked  # of attention
    activation: str  # a name of `kernels.gated_activation`

    def of_layer(self, layer: int) -> "LikeLlama":
        """The same of another layer."""
        return replace(self, asked=self.asked._replace(layer=layer))


class _Norm(NamedTuple):
    """weight · x / √(mean(x²) + eps)."""

    weight: Tensor
    eps: float


class _Parts(NamedTuple):
    """What a layer consists of."""

    attention_norm: _Norm
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    mlp_norm: _Norm
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    query_norm: _Norm | None  # of heads, as is the next
    key_norm: _Norm | None


ENABLED = True
"""Whether layers are run together where they can be; otherwise as they are written, for comparison."""

_PATHS = (
    *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_OTHERS = ("", "self_attn", "mlp", "mlp.act_fn")  # that a layer may have besides
_NO_MIDDLE = {"middle_keys": None, "middle_values": None, "middle_seen": None}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def like_llama(layer: nn.Module, asked: Asked, *, streamed: bool = False) -> LikeLlama | None:
    """What there is to know of a layer to run it as one like Llama's; None for one that has not the parts of such."""
    parts = _parts_of(layer, hooked=streamed)
    if parts is None:
        return None
    activation = _activation_name(getattr(layer.get_submodule("mlp"), "act_fn", None))
    width, key_width = asked.heads * asked.head_size, asked.kv_heads * asked.head_size
    fits = parts.query.out_features == parts.out.in_features == width
    fits = fits and parts.key.out_features == parts.value.out_features == key_width
    fits = fits and all(norm is None or len(norm.weight) == asked.head_size for norm in parts[-2:])
    return LikeLlama(asked, activation) if fits and activation is not None else None


def _parts_of(layer: nn.Module, *, hooked: bool) -> _Parts | None:
    """The parts of a layer that has those of a layer like Llama's, frozen and in one dtype; None for another one.

    Nothing else may change what the layer does: no forward of its own, and no hook but of the whole layer if `hooked`.
    """
    modules = dict(layer.named_modules())
    names = [*_PATHS, *(name for name in _HEAD_NORMS if name in modules)]
    if len(names) == len(_PATHS) + 1 or not {*names} <= modules.keys() <= {*names, *_OTHERS}:
        return None
    unhooked = [module for name, module in modules.items() if name or not hooked]
    if any("forward" in vars(x) for x in modules.values()) or any(vars(x)[hooks] for x in unhooked for hooks in _HOOKS):
        return None
    found: list[Any] = []
    dtypes = set()
    for name in names:
        module = modules[name]
        own = {key: p for key, p in module._parameters.items() if p is not None}
        if "weight" not in own or any(type(p) is not nn.Parameter for p in own.values()):
            return None
        if torch.is_grad_enabled() and any(p.requires_grad for p in own.values()):
            return None
        dtypes |= {p.dtype for p in own.values()}
        if type(module) is nn.Linear and "norm" not in name:
            found.append(module)
            continue
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if "norm" not in name or len(own) > 1 or not isinstance(eps, float):
            return None
        found.append(_Norm(own["weight"], eps))
    parts = _Parts(*found, *[None] * (len(_Parts._fields) - len(found)))
    one_eps = parts.query_norm is None or parts.key_norm is None or parts.query_norm.eps == parts.key_norm.eps
    return parts if len(dtypes) == 1 and one_eps else None


def _activation_name(act: Any) -> str | None:
    """Which of ours a function is, by what it does."""
    x = torch.linspace(-30, 30, 481, dtype=torch.float64, device="cpu")
    for name, ours in ACTIVATIONS.items():
        try:
            # Both forms of GELU differ by up to 5e-4.
            if bool(((act(x) - ours(x)).abs() <= 1e-6).all()):
                return name
        except (TypeError, RuntimeError, AttributeError):
            return None
    return None


def layers_like_llama(
    known: Mapping[int, LikeLlama],
    layers: Sequence[nn.Module],
    first: int,
    dtype: torch.dtype,
    *,
    streamed: bool = False,
) -> "list[FusedLayer] | None":
    """These layers, numbered from `first` on, as they are run together; None where one is to be run by itself.

    `streamed`: a hook of the whole layer brings its weights, which the caller has done.
    """
    found = []
    for number, layer in enumerate(layers, first):
        parts = _parts_of(layer, hooked=streamed) if number in known else None
        if parts is None or parts.query.weight.dtype != dtype:
            return None
        found.append(FusedLayer(parts, known[number]))
    return found


class FusedLayer(NamedTuple):
    """A layer and what is known of it."""

    parts: _Parts
    known: LikeLlama


class _Kept(NamedTuple):
    """What the backward pass of a layer needs of the forward pass; n = rows · time."""

    entering: Tensor  # (n, d)
    query: Tensor | None  # before heads were normed (rows, time, heads, size), as are the next three
    key: Tensor | None
    turned_query: Tensor
    turned_key: Tensor
    value: Tensor
    attended: Tensor  # (rows, heads, time, size)
    total: Tensor  # what attention keeps
    middle: Tensor  # (n, d)
    gate: Tensor  # (n, d_ff), as is the next
    up: Tensor


class Calls(NamedTuple):
    """What a layer is called with besides hidden states."""

    cos: Tensor  # (rows, time, rotated), as is the next
    sin: Tensor
    past: dict[str, Any]  # as `kernels.suffix_attention` takes it


def _nothing_before(hidden: Tensor, asked: Asked) -> dict[str, Any]:
    """A past without positions."""
    none = hidden.new_empty(1, asked.kv_heads, 0, asked.head_size)
    zero = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    return {"context_keys": none, "context_values": none, "context_index": zero, "context_seen": zero}


def run_fused(
    hidden: Tensor,  # (rows, time, d)
    layers: Sequence[FusedLayer],
    arguments: Sequence[Mapping[str, Any]],  # of each
    past: PastParts,
    products: FrozenProducts,
) -> Tensor:
    """What leaves the last of these layers, with a gradient to `hidden`."""
    calls, nothing = [], None
    for layer, given in zip(layers, arguments, strict=True):
        cos, sin = (x.expand(*hidden.shape[:2], -1) for x in given["position_embeddings"])
        parts = past.parts(layer.known.asked.layer)
        if not parts:
            parts = nothing = nothing or _nothing_before(hidden, layer.known.asked)
        calls.append(Calls(cos, sin, parts))
    out: Tensor = _Stretch.apply(hidden, layers, calls, products, past.keep)
    return out


class _Stretch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        layers: Sequence[FusedLayer],
        calls: Sequence[Calls],
        products: FrozenProducts,
        keep: Callable[[int, Tensor, Tensor], None],
    ) -> Tensor:
        shape = hidden.shape
        ctx.layers, ctx.calls, ctx.products = layers, calls, products
        kept: list[Tensor | None] = []
        last, update = hidden.detach().reshape(-1, shape[2]), None
        for layer, call in zip(layers, calls, strict=True):
            of_layer, update = _forward(layer, call, last, update, products, shape)
            last = of_layer.middle
            keep(layer.known.asked.layer, *(x.transpose(1, 2) for x in (of_layer.turned_key, of_layer.value)))
            if ctx.needs_input_grad[0]:
                kept += of_layer
        ctx.save_for_backward(*kept)
        out = last if update is None else last + update
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled():
            # Else torch would take the gradient for a constant.
            raise RuntimeError("layers run together have no second derivative; take it without create_graph=True")
        kept, size = ctx.saved_tensors, len(_Kept._fields)
        shape = gradient.shape
        gradient = gradient.reshape(-1, shape[2])
        for index in reversed(range(len(ctx.layers))):
            of_layer = _Kept(*kept[index * size : (index + 1) * size])
            gradient = _backward(ctx.layers[index], ctx.calls[index], of_layer, gradient, ctx.products)
        return gradient.view(shape), None, None, None, None


def _forward(
    layer: FusedLayer, call: Calls, hidden: Tensor, update: Tensor | None, products: FrozenProducts, shape: torch.Size
) -> tuple[_Kept, Tensor]:
    """What a layer keeps, and what its MLP adds to the last hidden states kept; hidden + update is what enters it."""
    parts, known = layer
    added, x = operators.add_rms_norm(hidden, update, *parts.attention_norm)
    entering = hidden if update is None else added
    query, key, value = (
        products.forward(x, module).view(*shape[:2], -1, known.asked.head_size)
        for module in (parts.query, parts.key, parts.value)
    )
    turned_query, turned_key = operators.rotate_heads(query, key, call.cos, call.sin, *_head_norms(parts))
    attended, total = operators.suffix_attention(*_attention(known, call, turned_query, turned_key, value))
    update = products.forward(attended.transpose(1, 2).reshape(len(x), -1), parts.out)
    middle, x = operators.add_rms_norm(entering, update, *parts.mlp_norm)
    gate, up = products.forward(x, parts.gate), products.forward(x, parts.up)
    update = products.forward(operators.gated_activation(gate, up, known.activation), parts.down)
    before = (query, key) if parts.query_norm is not None else (None, None)
    kept = _Kept(entering, before[0], before[1], turned_query, turned_key, value, attended, total, middle, gate, up)
    return kept, update


def _backward(layer: FusedLayer, call: Calls, kept: _Kept, gradient: Tensor, products: FrozenProducts) -> Tensor:
    """Gradient (n, d) of what enters a layer, for that of what leaves it."""
    parts, known = layer
    of_gated = products.backward(gradient, parts.down)
    of_gate, of_up = operators.gated_activation_backward(of_gated, kept.gate, kept.up, known.activation)
    of_x = products.backward(of_up, parts.up, products.backward(of_gate, parts.gate))
    gradient = operators.add_rms_norm_backward(of_x, gradient, kept.middle, *parts.mlp_norm)
    of_attended = products.backward(gradient, parts.out).view_as(kept.turned_query).transpose(1, 2)
    arguments = _attention(known, call, kept.turned_query, kept.turned_key, kept.value)
    of_heads = operators.suffix_attention_backward(of_attended, kept.attended, kept.total, *arguments)
    of_query, of_key, of_value = (x.transpose(1, 2) for x in of_heads)
    of_query, of_key = operators.rotate_heads_backward(
        of_query, of_key, kept.query, kept.key, call.cos, call.sin, *_head_norms(parts)
    )
    of_query, of_key, of_value = (x.reshape(len(gradient), -1) for x in (of_query, of_key, of_value))
    of_x = products.backward(of_query, parts.query)
    of_x = products.backward(of_value, parts.value, products.backward(of_key, parts.key, of_x))
    return operators.add_rms_norm_backward(of_x, gradient, kept.entering, *parts.attention_norm)


def _head_norms(parts: _Parts) -> tuple[Tensor | None, Tensor | None, float]:
    if parts.query_norm is None or parts.key_norm is None:
        return None, None, 0.0
    return parts.query_norm.weight, parts.key_norm.weight, parts.query_norm.eps


def _attention(known: LikeLlama, call: Calls, query: Tensor, key: Tensor, value: Tensor) -> SuffixCall:
    """Of heads (rows, time, heads, size)."""
    asked = known.asked
    return SuffixCall(
        *(x.transpose(1, 2) for x in (query, key, value)),
        **(_NO_MIDDLE | call.past),
        scale=asked.scale,
        soft_cap=asked.soft_cap,
        window=asked.window,
        slopes=None,
    )
