"""Collapse checks before anything is written.

An update that destroys a model is large beside the weight it changes: measured on real models, healthy rank-one
edits stay near 0.1 – 0.9 of ‖W‖ and collapsing ones start above 2. The check costs nothing and needs no forward pass.
"""

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

from .errors import ArgumentError, CollapseError
from .records import Record

Guard = Literal["raise", "warn", "skip", "off"]

UPDATE_RATIO_LIMIT = 1.5
"""‖Δ‖ / ‖W‖ of one edit above which a collapse is predicted, unless a study of the model has found its own limit."""


_JOINT_EXCESS = 2.0
"""Healthy edits add up like independent vectors; beyond this multiple of that, they fight each other."""


class CollapseWarning(UserWarning):
    """An edit that is predicted to collapse the model was applied all the same (guard="warn")."""


def check_guard(guard: str) -> None:
    if guard not in get_args(Guard):
        raise ArgumentError(f"guard: got {guard!r}, wanted one of {', '.join(get_args(Guard))}")


def predicts_collapse(update_norm: float, weight_norm: float, limit: float | None = None) -> bool:
    limit = UPDATE_RATIO_LIMIT if limit is None else limit
    return not update_norm <= limit * weight_norm  # also true for NaN


def judge(records: Sequence[Record], guard: Guard) -> list[bool]:
    """Which edits to keep. Raises CollapseError (guard="raise") or warns for those predicted to collapse."""
    bad = [record for record in records if record.collapsed]
    if bad and guard in ("raise", "warn"):
        lines = [
            f"  {r.subject!r} → {r.target!r}: ‖Δ‖ = {r.update_norm:.3g} against ‖W‖ = {r.weight_norm:.3g}, "
            f"denominator {r.denominator:.3g}"
            for r in bad
        ]
        what = f"{len(bad)} edit(s) by method {bad[0].method!r} would collapse the model:\n" + "\n".join(lines)
        consistent = "use method='c-rome', " if bad[0].method != "c-rome" else "check the statistics, lower the clamp, "
        remedy = f"{consistent}or choose what to do with guard='warn' | 'skip' | 'off'"
        if guard == "raise":
            raise CollapseError(f"{what}\nnothing was written; {remedy}")
        warnings.warn(f"{what}\n{remedy}", CollapseWarning, stacklevel=3)
    return [guard != "skip" or not record.collapsed for record in records]


def judge_together(joint_norm: float, records: Sequence[Record], guard: Guard) -> None:
    """The same for edits made together: harmless ones can collapse a model when they contradict each other.

    Raises CollapseError, also for guard="skip", since none of them is to blame alone; or warns (guard="warn").
    """
    weight_norm = records[0].weight_norm
    independent = sum(record.update_norm**2 for record in records) ** 0.5
    if guard == "off" or not predicts_collapse(joint_norm, weight_norm) or joint_norm <= _JOINT_EXCESS * independent:
        return
    what = (
        f"{len(records)} edits together would collapse the model: ‖Δ‖ = {joint_norm:.3g} against ‖W‖ = "
        f"{weight_norm:.3g}, where independent edits of these sizes make {independent:.3g}; "
        "some ask for different things of one subject"
    )
    remedy = "make them one after another with schedule='sequential', or drop some"
    if guard != "warn":
        raise CollapseError(f"{what}\nnothing was written; {remedy}")
    warnings.warn(f"{what}\n{remedy}", CollapseWarning, stacklevel=4)
