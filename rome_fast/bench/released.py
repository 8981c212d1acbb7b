"""The baseline: one edit at a time, the way the released editors work.

All rows padded to one length; full forward passes through every layer and position, full logits, one edit at a time.
It is the simplest right program for δ and Δ, shares only tokenisation and the closed form with the fast path, and is
checked against the same oracle, so it also says what the fast path must equal.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..closing.flow import Flow
from ..closing.geometry import Geometry
from ..edits import Edit
from ..errors import ArgumentError
from ..methods import method_named
from ..models.rows import edit_rows, essence_row, needs_prefix
from ..models.runner import Runner, frozen_weights
from ..search.search import Solved
from ..search.values import Value, ValueSettings
from ..updates.delta import Delta


@dataclass(frozen=True)
class ReleasedEdit:
    """What the baseline found for one edit."""

    value: Tensor  # (d,) δ
    losses: tuple[float, ...]
    delta: Delta


def edit_as_released(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Edit,
    contexts: Sequence[str],
    *,
    layer: int,
    settings: ValueSettings,
    factor: Tensor | None,
    method: str = "rome",
) -> ReleasedEdit:
    """Compute one edit; the model is not changed. `factor` is the Cholesky factor of C, None for C = I.

    Of `settings`, both stop rules are honoured, so that the shares of algebra and of the rule can be told apart. Raises
    ArgumentError for a first-token subject by a method that gives it two keys.
    """
    runner, how = Runner(model), method_named(method)
    rows = edit_rows(tokenizer, edit, ["", *contexts])
    if how.rows == "prefixed" and needs_prefix(rows[0]):
        if how.bare:
            raise ArgumentError(
                f"method: got {method!r} for subject {edit.subject!r}, the first token, wanted a method of one key; "
                "measure it without the baseline"
            )
        del rows[0]
    essence = essence_row(tokenizer, edit)
    packed = runner.pack([row.inputs for row in [*rows, essence]])
    device = runner.device
    subjects = torch.tensor([row.subject for row in [*rows, essence]], device=device)
    # Made once: on a GPU every copy to it, and every answer from it, would wait for all the work before.
    scored = [torch.arange(row.target - 1, len(row.ids) - 1, device=device) for row in rows]
    labels = [torch.tensor(row.labels, device=device) for row in rows]
    wide = torch.promote_types(runner.dtype, torch.float32)
    arguments = {"input_ids": packed.ids, "attention_mask": packed.mask.long(), "use_cache": False}

    with torch.no_grad(), _tapped(runner, layer, subjects, None) as seen:
        model(**arguments)
    keys, values = seen[0][:-1], seen[1][:-1]
    mean_value = values.mean(0)
    base = (mean_value if how.rows == "prefixed" else values[0]).to(wide)

    delta = torch.zeros_like(base, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=settings.learning_rate)
    before: Tensor | None = None
    losses: list[float] = []
    held = 0
    with torch.enable_grad(), frozen_weights(model):
        for step in range(settings.steps):
            with _tapped(runner, layer, subjects, delta):
                logits = model(**arguments).logits.to(wide)
                # log_softmax adds over the vocabulary less exactly than logsumexp; in fp32, δ would show it.
                log_probs = logits - logits.logsumexp(-1, keepdim=True)
            after = log_probs[-1, essence.subject]
            before = after.detach() if before is None else before
            nll = torch.zeros((), dtype=wide, device=device)
            leads = []
            for i, (at, wanted) in enumerate(zip(scored, labels, strict=True)):
                nll = nll - log_probs[i, at, wanted].mean() / len(rows)
                leads.append((log_probs[i, at].argmax(1) == wanted).all())
            divergence = (after.exp() * (after - before)).sum()
            loss = nll + settings.kl_factor * divergence + settings.weight_decay * delta.norm() / base.norm() ** 2
            losses.append(loss.item())
            held = held + 1 if bool(torch.stack(leads).all()) else 0
            done = losses[-1] < settings.stop_loss if settings.stop == "loss" else held > settings.margin
            if done or step == settings.steps - 1:
                break
            (delta.grad,) = torch.autograd.grad(loss, [delta])
            optimiser.step()
            with torch.no_grad():
                limit = settings.clamp * base.norm()
                if delta.norm() > limit:
                    delta *= limit / delta.norm()

    value = Value(delta.detach(), tuple(losses), 0, 1.0, True)
    starts_bare = len(rows) > len(contexts)
    solved = Solved(keys, values[0], mean_value, value, starts_bare)
    flow = Flow.measuring(runner, tokenizer, how, {layer: Geometry(factor)}, contexts, settings)
    (closed,) = flow.closing.close_each([solved], flow.search)
    return ReleasedEdit(delta.detach(), tuple(losses), flow.closing.delta(closed))


@contextmanager
def _tapped(runner: Runner, layer: int, subjects: Tensor, delta: Tensor | None) -> Iterator[list[Tensor]]:
    """Read keys and values at the subjects, and add δ to the values there, for the length of the block."""
    seen: list[Tensor] = []
    every = torch.arange(len(subjects), device=subjects.device)

    def hook(_module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if delta is None:
            seen.extend((args[0][every, subjects], output[every, subjects]))
            return None
        added = torch.zeros_like(output).index_put((every, subjects), delta.to(output.dtype).expand(len(every), -1))
        return output + added

    handle = runner.projection(layer).register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
