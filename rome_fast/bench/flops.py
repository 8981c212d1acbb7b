"""How many floating-point operations an edit takes, counted and at best.

The ideal count is that of a program which computes nothing twice, pads nothing and skips what cannot change:

- once for all edits: every context through every layer;
- once per edit: the tokens behind the context through layers 0 .. l, those of them before the subject's last token
  through the layers above as well;
- where it is spread over several layers, the last of them l, once per edit: the contexts, and the tokens behind them up
  to the subject's last one, from the first of these layers to the last again, as they are while it is made;
- in every step, of the rows that the step is taken on, the tokens from the subject's last one on through the layers
  above l, and the head where a target token or the KL term is scored; forward, and backward to the activations, which
  costs the same again, except after the last step. (Attention: 1.5 times, as it recomputes the scores, and once more
  between these tokens, since only their keys and values have a gradient.)

A product of (m, k) and (k, n) counts 2 m k n. Norms, activations and the solve for u are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from .. import kernels  # noqa: F401  (registers operators)
from ..models.past import Contexts
from ..models.rows import Row
from ..models.runner import Runner
from ..records import Record
from ..search.requests import Request
from ..search.values import ValueSettings, draft_rows


def _suffix_attention_flop(query: Any, _key: Any, _value: Any, context_keys: Any, *rest: Any, out_val: Any) -> int:
    """Of all positions that there is room for, seen or not."""
    rows, heads, time, size = query.shape
    return 4 * rows * heads * time * size * _keys_of(query, context_keys, rest)


def _suffix_attention_backward_flop(*args: Any, out_val: Any) -> int:
    query, _, _, context_keys, *rest = args[3:]
    rows, heads, time, size = query.shape
    return 2 * rows * heads * time * size * (3 * _keys_of(query, context_keys, rest) + 2 * time)


def _keys_of(query: Any, context_keys: Any, rest: Any) -> int:
    _, _, _, middle_keys, *_ = rest
    return context_keys.shape[2] + (0 if middle_keys is None else middle_keys.shape[2]) + query.shape[2]


_OURS = torch.ops.rome_fast
# The registry of torch leaves out products added in place and the fused attention of CPUs.
_COUNTS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    _OURS.suffix_attention: _suffix_attention_flop,
    _OURS.suffix_attention_backward: _suffix_attention_backward_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class FlopCounter(TorchDispatchMode):
    """Sums the FLOPs of every operator that torch has a formula for.

    torch's own FlopCounterMode also tracks modules by backward hooks, which `autograd.grad` does not allow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += flops_of(func, args, kwargs or {}, out)
        return out


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of one call of an operator; 0 where torch has no formula for it."""
    count = _COUNTS.get(func.overloadpacket)
    return 0 if count is None else count(*args, **kwargs, out_val=out)


@dataclass(frozen=True)
class Shape:
    """What a model's products cost."""

    layers: int
    layer_weights: int  # elements of one layer's matrices
    attention: int  # 4 · heads · head size: per pair of a query and a key
    head: int  # 2 · d · vocabulary: per row of logits

    @classmethod
    def of(cls, runner: Runner) -> "Shape":
        config = runner.model.config
        weights = sum(p.numel() for p in runner.layers[0].parameters() if p.dim() == 2)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            len(runner.layers),
            weights,
            4 * config.num_attention_heads * head_size,
            2 * config.hidden_size * config.vocab_size,
        )


def ideal_flops(
    runner: Runner,
    contexts: Contexts,
    requests: Sequence[Request],
    records: Sequence[Record],
    layers: Sequence[int],
    settings: ValueSettings,
) -> float:
    """The ideal count for all requests, each edited alone, at the number of loss evaluations each of them took."""
    shape, layer = Shape.of(runner), layers[-1]
    spread = layer - layers[0] + 1 if len(layers) > 1 else 0
    above = shape.layers - layer - 1

    def passes(tokens: int, before: int, layers: int) -> float:
        """Forward through layers: tokens that attend to each other and to what is before them."""
        pairs = tokens * (before + tokens)
        return layers * (2.0 * tokens * shape.layer_weights + shape.attention * pairs)

    def steps(rows: Sequence[Row], evaluations: int) -> float:
        """Loss evaluations on these rows, the last one without a gradient of the layers."""
        forward, backward, scored = 0.0, 0.0, 1  # the KL term scores one position
        for row in rows:
            suffix = len(row.inputs) - row.subject
            once = passes(suffix, row.subject, above)
            forward += once
            backward += once + above * shape.attention * suffix * (0.5 * (row.subject + suffix) + suffix)
            scored += len(row.labels)
        # The gradient of the head is taken with the loss, in every evaluation.
        return evaluations * (forward + 2.0 * scored * shape.head) + (evaluations - 1) * backward

    total = sum(passes(len(ids), 0, shape.layers) for ids in contexts.ids)
    for request, record in zip(requests, records, strict=True):
        rows = [item.row for item in request.rows]
        for item in request.rows:
            shared = contexts.shared_with(item.context, item.row)
            middle, suffix = item.row.subject - shared, len(item.row.inputs) - item.row.subject
            total += passes(middle + suffix, shared, layer + 1) + passes(middle, shared, above)
            total += passes(middle + 1, shared, spread)
        total += sum(passes(len(ids), 0, spread) for ids in contexts.ids)
        if record.drafted:
            total += steps([rows[i] for i in draft_rows(rows, settings)], record.drafted)
        total += steps(rows, record.steps - record.drafted)
    return total
