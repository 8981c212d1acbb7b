"""What becomes of edits whose value was not found, and what is said of those that are met in part."""

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

from ..errors import ArgumentError, ConvergenceError, quoted
from ..records import MUCH_MISSED, MUCH_MISSED_BY_RIDGE, Record

Unconverged = Literal["skip", "write", "raise"]

_TOLD = 10  # edits that a warning names


class SharedKeyWarning(UserWarning):
    """Edits that have one key, as those of one subject behind the same words, or nearly, were met in part."""


class ConvergenceWarning(UserWarning):
    """An edit was left out because its value was not found."""


def check_unconverged(unconverged: str) -> None:
    if unconverged not in get_args(Unconverged):
        raise ArgumentError(f"unconverged: got {unconverged!r}, wanted one of {', '.join(get_args(Unconverged))}")


def judge_convergence(records: Sequence[Record], unconverged: Unconverged, total: int) -> None:
    """Leave out edits whose value was not found, in their records; `total` counts those of all groups.

    Raises ConvergenceError where `unconverged` says so, and where not one of all edits has a finite loss.
    """
    broken = [r for r in records if not r.applied]
    missed = [r for r in records if r.applied and not r.converged]
    if unconverged == "write":
        missed = []
    if not broken and not missed:
        return
    what = _listing(broken, missed)
    if unconverged == "raise" or len(broken) == total:
        raise unconverged_error(broken, missed)
    for record in missed:
        record.applied, record.left_out = False, "did not converge"
    rest = "; write those that are finite with unconverged='write'" if missed else ""
    warnings.warn(f"{what}\nthey were left out{rest}", ConvergenceWarning, stacklevel=5)


def tell_missed(records: Sequence[Record], *, ridge: bool, earlier: int = 0) -> None:
    """Warn of edits that a joint update meets in part, by a closed form with or without a ridge; one alone shares none.

    With a ridge all are met in part, and the more of them the less. `earlier` edits were made before, and nothing is to
    be added at their keys: who changes what one of them says asks for two values at one key.
    """
    most = MUCH_MISSED_BY_RIDGE if ridge else MUCH_MISSED
    missed = sorted((r for r in records if r.missed > most), key=lambda r: -r.missed)
    if len(records) + earlier < 2 or not missed:
        return
    named = [
        f"  {quoted(r.prompt)} of {quoted(r.subject)} → {quoted(r.target)}: {r.missed:.0%} off" for r in missed[:_TOLD]
    ]
    if len(missed) > _TOLD:
        named.append(f"  and {len(missed) - _TOLD} more, see missed in their records")
    reason, remedy = (
        (
            "as they have nearly the key of another one (those of one subject behind the same words have one key), or "
            f"as {len(records) + earlier} edits at once want a ridge",
            "no weight gives one key two values, and one that tells near keys apart is large: make fewer edits",
        )
        if ridge
        else (
            "as they have the key of another one (those of one subject behind the same words do) or nearly",
            "no weight gives one key two values, and one that tells near keys apart is large: make fewer edits, make "
            "some at another layer, in a call of its own, or have all of them met as far as they can be, whatever that "
            "does to the model, with guard='off'",
        )
    )
    if earlier:
        remedy += (
            f"; {earlier} of them are earlier edits of the history, which keep what they have: to change what one of "
            "them says, edit without the history, or revert that edit and leave it out"
        )
    listed = "\n".join(named)
    warnings.warn(
        f"{len(missed)} edit(s) are met in part, {reason}:\n{listed}\n{remedy}", SharedKeyWarning, stacklevel=5
    )


def unconverged_error(broken: Sequence[Record], missed: Sequence[Record] = ()) -> ConvergenceError:
    """The error of edits whose loss is not finite, and of those whose target leads in too few rows."""
    return ConvergenceError(
        f"{_listing(broken, missed)}\nnothing was written; allow more steps, lower the learning rate, load the model "
        "in float32, or choose what to do with unconverged='skip' | 'write'"
    )


def _listing(broken: Sequence[Record], missed: Sequence[Record]) -> str:
    reasons = [(r, f"the loss became {r.loss} at step {r.steps}") for r in broken]
    reasons += [(r, f"the target leads in too few rows, loss {r.loss:.3g}") for r in missed]
    lines = [f"  {quoted(r.subject)} → {quoted(r.target)}: {why}" for r, why in reasons]
    return f"{len(lines)} edit(s) did not converge:\n" + "\n".join(lines)
