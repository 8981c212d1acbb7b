"""The part `values` of `make gpu`: seconds per edit of a random model of a shape in bfloat16."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import isfinite
from typing import Any

import torch

import uninstalled  # noqa: F401  (it makes rome_fast importable)

# isort: split
from measure import Table, forget_peak, origin, peak_bytes, results, yes
from rome_fast.bench.roofline import measure_roofline

_REPEATS, _SHORT_BATCH = 3, 1  # of a batch that is short; of a longer one, one
_CHECKED_EDITS = 2  # of a batch, against the model's own forward pass

RULES = ("default", "all steps")
"""15 steps on 5 rows and one on all, as the default rule takes of a target that never leads; the released rule."""
_DRAFTED_STEPS, _DRAFT_ROWS = 15, 5


def prepare_values(device: torch.device, shape: str, count: int) -> tuple[Any, list[Any], str]:
    """A random model set up for edits, so many of them, and what its tokenizer is."""
    from rome_fast.bench.command import REQUESTS
    from rome_fast.bench.shapes import repeated
    from rome_fast.bench.throughput import shape_setup
    from rome_fast.edits import load_edits
    from rome_fast.models.runner import Runner
    from rome_fast.search.requests import tokenise

    edits = load_edits(REQUESTS)
    setup, tokenizer = shape_setup(shape, device, torch.bfloat16, edits)
    runner = Runner(setup.model)
    requests = [tokenise(runner, setup.tokenizer, e, setup.contexts, setup.flow.method) for e in repeated(edits, count)]
    return setup, requests, tokenizer


def by_rule(settings: Any, rule: str) -> Any:
    """The settings of a random model, which never stops early, by one of `RULES`."""
    if rule == "all steps":
        return settings
    steps = min(settings.steps, _DRAFTED_STEPS + 1)
    # Nor by chance: what leads for so many steps has taken all of them.
    return replace(settings, stop="argmax", draft_rows=_DRAFT_ROWS, steps=steps, margin=steps, extra_steps=0)


def values(device: torch.device, shape: str, batches: Sequence[int]) -> int:
    """Seconds per edit of keys, values and update for batches of a random model's edits, by both rules.

    Right is a batch whose loss before the first step is that of the plain model, row by row, for some of the edits, and
    whose edits have taken all steps and end in numbers.
    """
    from rome_fast.bench.flops import FlopCounter
    from rome_fast.bench.throughput import Track, ideal, run_timed, warm_up

    table = Table(results() / "gpu_values.csv", origin(device))
    roofline = measure_roofline(device, torch.bfloat16)
    torch.cuda.empty_cache()
    whole, requests, tokenizer = prepare_values(device, shape, max(batches))
    weight_bytes = sum(p.nbytes for p in whole.model.parameters())
    plain, allowed = zip(*(plain_loss(whole.model, request) for request in requests[:_CHECKED_EDITS]), strict=True)
    wrong = 0
    for batch, rule in product(batches, RULES):
        group, setup = requests[:batch], replace(whole, settings=by_rule(whole.settings, rule))
        # This very group: every shape has a first use, which is slow.
        warm_up(setup, group)
        found = replace(setup, settings=replace(setup.settings, steps=1, extra_steps=0)).flow.solve_each(group)
        errors = [abs(record.loss - loss) for (_, record), loss in zip(found, plain, strict=False)]
        del found
        forget_peak(device)
        runs = []
        for _ in range(_REPEATS if batch <= _SHORT_BATCH else 1):
            track, flow = Track("rome_fast"), setup.flow
            runs.append((track, flow, run_timed(track, flow, group)))
        track, flow, made = sorted(runs, key=lambda run: run[0].wall_seconds)[len(runs) // 2]
        peak = peak_bytes(device)
        # A NaN compares as false.
        correct = all(error <= most for error, most in zip(errors, allowed, strict=False))
        correct &= all(record.steps == setup.settings.steps for _, record in made)
        correct &= all(isfinite(record.loss) and isfinite(record.update_norm) for _, record in made)
        wrong += not correct
        useful = ideal(setup, group, [record for _, record in made]) / batch
        counted: float | None = None
        if batch <= _SHORT_BATCH:
            with FlopCounter() as counter:
                setup.flow.solve_each(group)
            counted = counter.total / batch
        seconds = track.wall_seconds / batch
        row = {
            "shape": shape,
            "dtype": "bfloat16",
            "rule": rule,
            "batch": batch,
            "largest_batch": flow.search.largest_batch,
            "repeats": len(runs),
            "seconds_per_edit": seconds,
            "steps_per_edit": track.steps / batch,
            "drafted_per_edit": sum(record.drafted for _, record in made) / batch,
            "rows_per_edit": len(group[0].rows),
            **{f"{stage}_seconds_per_edit": s / batch for stage, s in flow.search.clock.seconds.items()},
            "loss_error": max(errors),
            "correct": yes(correct),
            "ideal_tflop_per_edit": useful / 1e12,
            "counted_tflop_per_edit": "" if counted is None else counted / 1e12,
            "tflop_per_s": useful / seconds / 1e12,
            "share_of_matrix_rate": useful / seconds / roofline.matrix_rate,
            "gemm_tflop_per_s": roofline.matrix_rate / 1e12,
            "peak_gib": peak / 2**30,
            "weights_gib": weight_bytes / 2**30,
            "statistics": "random, of the right size",
            "tokenizer": tokenizer,
        }
        table.add(row)
        print(
            f"batch {batch:4} (at once {flow.search.largest_batch}), {rule}: {seconds:.3f} s per edit, "
            f"{row['tflop_per_s']:.0f} TFLOP/s, {row['share_of_matrix_rate']:.0%} of the matrix rate, "
            f"peak {row['peak_gib']:.1f} GiB, first loss off by {max(errors):.1e}"
            f"{'' if correct else ' WRONG'}",
            flush=True,
        )
    return int(wrong > 0)


@torch.no_grad()
def plain_loss(model: Any, request: Any) -> tuple[float, float]:
    """The loss of an edit at δ = 0 by the model's own forward pass, a row at a time, and what two such may differ by.

    That is four standard deviations of ten roundings a layer of logits of their spread, over independent rows.
    """
    losses, spread = [], 0.0
    for row in (item.row for item in request.rows if item.row.labels):
        logits = model(torch.tensor([row.inputs], device=model.device)).logits[0].float()
        at = torch.arange(len(row.labels), device=model.device) + row.target - 1
        labels = torch.tensor(row.labels, device=model.device)
        losses.append(float(torch.nn.functional.cross_entropy(logits[at], labels)))
        spread = max(spread, float(logits.std()))
    roundings = 10 * model.config.num_hidden_layers
    allowed = 4 * roundings**0.5 * torch.finfo(model.dtype).eps / 2 * spread / len(losses) ** 0.5
    return sum(losses) / len(losses), allowed
