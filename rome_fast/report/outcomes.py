"""What became of an edit, from the worst to the best, and what to try where that is not what was asked for."""

from ..records import MUCH_MISSED, MUCH_MISSED_BY_RIDGE, Record

_FEWER = (
    "another edit of the run has nearly its key (the nearest is named there) and no weight gives one key two values: "
    "make fewer edits at once, or one of the two at another layer in a call of its own"
)

REMEDIES = {
    "left out: loss not finite": (
        "load the model in float32 (--dtype float32), or lower the learning rate (--settings lr=0.1)"
    ),
    "left out: did not converge": (
        "allow more steps (--settings steps=50), edit at the layers that rome-fast tune finds, or write such edits all "
        "the same (--unconverged write)"
    ),
    "left out: would collapse": (
        "use --method dual, collect statistics from more text, or bound what is added more tightly (--settings clamp=2)"
    ),
    "left out: unknown why": "run the edit again",
    "collapse": (
        "take the edit back (rome-fast revert), and have such edits left out (--guard skip) or made by --method dual"
    ),
    "fact lost": (
        f"if much of it is off, {_FEWER}; otherwise allow more steps (--settings steps=50) or edit over other layers"
    ),
    "edited, answers behind a prefix": (
        "ask for it behind some text, or use --method dual, which holds edits without a prefix as well; where it was "
        "made by that, allow more steps (--settings steps=50)"
    ),
    "edited, but not behind a prefix": (
        "give contexts like those it will be asked behind (--contexts), or spread it over more layers (--layers)"
    ),
    "met in part": _FEWER,
    "applied": "",
    "edited": "",
}
"""By outcome, the worst first; empty where nothing has to be tried."""


def outcome(record: Record) -> str:
    """One of REMEDIES. `met in part` are edits that answer although more than half of them is missing."""
    if not record.applied:
        return f"left out: {record.left_out or 'unknown why'}"
    if record.collapsed:
        return "collapse"
    found = _answers(record)
    return "met in part" if found in ("edited", "applied") and record.missed > MUCH_MISSED_BY_RIDGE else found


def verdict(record: Record) -> str:
    """The same in words: whether the edit was made, whether the model survived, and where the fact answers."""
    if not record.applied:
        return outcome(record)
    if record.collapsed:
        return "collapse predicted" if record.perplexity_after is None else "model collapsed"
    found = _answers(record)
    return f"{found}, met in part ({record.missed:.0%} off)" if record.missed > MUCH_MISSED else found


def _answers(record: Record) -> str:
    behind = record.argmax_after_prefixed
    if record.argmax_after:
        return "edited" if behind is None or behind >= 0.5 else "edited, but not behind a prefix"
    if behind is not None and behind >= 0.5:
        return "edited, answers behind a prefix"
    return "applied" if record.argmax_after is None else "fact lost"
