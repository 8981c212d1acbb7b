"""Collapse checks before anything is written.

An update that destroys a model is large beside the weight it changes: measured on real models, healthy rank-one
edits stay near 0.1 – 0.9 of ‖W‖ and collapsing ones start above 2. The check costs nothing and needs no forward pass.

Healthy edits that are made together can collapse a model as well, when it takes a large update to tell their keys
apart. `largest_harmless` is where the closed form stops doing so.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Literal, get_args

from ..errors import ArgumentError, CollapseError, quoted
from ..records import Record

Guard = Literal["raise", "warn", "skip", "off"]

UPDATE_RATIO_LIMIT = 1.5
"""‖Δ‖ / ‖W‖ of one edit above which a collapse is predicted, unless a study of the model has found its own limit."""


class CollapseWarning(UserWarning):
    """An edit that is predicted to collapse the model was applied all the same (guard="warn")."""


def check_guard(guard: str) -> None:
    if guard not in get_args(Guard):
        raise ArgumentError(f"guard: got {guard!r}, wanted one of {', '.join(get_args(Guard))}")


def predicts_collapse(update_norm: float, weight_norm: float, limit: float | None = None) -> bool:
    limit = UPDATE_RATIO_LIMIT if limit is None else limit
    return not update_norm <= limit * weight_norm  # also true for NaN


def largest_harmless(guard: Guard, weight_norm: float, limit: float | None = None) -> float:
    """‖Δ‖ up to which edits made together are met exactly, whatever they have in common; infinite for guard="off"."""
    return math.inf if guard == "off" else (UPDATE_RATIO_LIMIT if limit is None else limit) * weight_norm


def judge(records: Sequence[Record], guard: Guard) -> list[bool]:
    """Which edits to keep. Raises CollapseError (guard="raise") or warns for those predicted to collapse."""
    bad = [record for record in records if record.collapsed]
    if bad and guard in ("raise", "warn"):
        lines = [
            f"  {quoted(r.subject)} → {quoted(r.target)}: ‖Δ‖ = {r.update_norm:.3g} against ‖W‖ = {r.weight_norm:.3g}, "
            f"denominator {r.denominator:.3g}"
            for r in bad
        ]
        what = f"{len(bad)} edit(s) by method {bad[0].method!r} would collapse the model:\n" + "\n".join(lines)
        consistent = bad[0].method in ("dual", "c-rome")
        other = "check the statistics, lower the clamp, " if consistent else "use method='dual', the default, "
        remedy = f"{other}or choose what to do with guard='warn' | 'skip' | 'off'"
        if guard == "raise":
            raise CollapseError(f"{what}\nnothing was written; {remedy}")
        warnings.warn(f"{what}\n{remedy}", CollapseWarning, stacklevel=4)
    return [guard != "skip" or not record.collapsed for record in records]
