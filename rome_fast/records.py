"""What one edit reports about itself."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

LeftOut = Literal["did not converge", "would collapse", "loss not finite"]

MUCH_MISSED = 0.05
"""Share of an edit that a joint update may stay off before more is said of it."""

MUCH_MISSED_BY_RIDGE = 0.5
"""The same of methods whose closed form stays off by itself, as one with a ridge does.

Of 300 edits at once in the demo's model, 275 of the 288 that stayed off less answered the bare prompt, and 7 of the 12
that stayed off more.
"""


@dataclass
class Record:
    """One edit, its diagnostics and its effect. Probabilities are geometric means over the target's tokens."""

    prompt: str
    subject: str
    target: str
    method: str
    layer: int  # where δ was found, the last one of `layers`
    loss: float  # at the δ that was used; this and the next two of the prefixed δ, where there are two
    steps: int  # loss evaluations
    drafted: int  # how many of them on some of the rows only
    converged: bool  # whether the target leads in at least half of the rows at that δ
    denominator: float  # uᵀ k_den with u = C⁻¹ k_left; this and the next of the prefixed key, where there are two
    numerator_norm: float  # ‖r uᵀ‖
    update_norm: float  # ‖Δ‖ of this edit alone; this, the two before and the next of the layer that it changes most
    weight_norm: float  # ‖W‖ before the edit
    # How far a joint update stays off, ‖Δ k - r‖ / ‖r‖: where edits have one key, or nearly, each is met in part. Above
    # 1 where others move the value of this one by more than it asks for.
    missed: float
    # Whether the fact answers only behind some text: predicted from the keys, of dual measured with the rest.
    needs_prefix: bool
    collapsed: bool  # predicted from the norms; replaced by the measured verdict where perplexity is measured
    layers: list[int] = field(default_factory=list)  # that the edit is spread over
    update_ratios: list[float] = field(default_factory=list)  # ‖Δ‖ / ‖W‖ of this edit alone in each of them
    # Share of what is asked for (`Method.reach` times δ) that is added behind the prompt alone, of its own δ where
    # there are two; None for a δ of zero, and for first-token subjects whose rows are all prefixed.
    share_bare: float | None = None
    applied: bool = True  # false where it was left out
    left_out: LeftOut | None = None  # why; None where it was applied
    text: str = ""  # what was asked, to the character: the prompt with its subject, in a chat with all of its template
    separator: str = ""  # what stands between that and the target
    # The tokens whose probability was raised, its end among them, each as text.
    target_tokens: list[str] = field(default_factory=list)
    probability_before: float | None = None  # of the target behind the bare prompt
    probability_after: float | None = None
    probability_after_prefixed: float | None = None  # mean over the editing contexts
    argmax_after: bool | None = None  # every target token is the most probable one behind the bare prompt
    argmax_after_prefixed: float | None = None  # share of the editing contexts where that holds
    # Place in the call of the edit whose key is nearest, by the cosine of mean keys at `layer`; None for one alone.
    nearest: int | None = None
    nearest_cosine: float | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def report_json(report: Mapping[str, Any]) -> dict[str, Any]:
    """What an edit says of itself, its records under "edits" and wall times under "seconds", as JSON values."""
    changed: dict[str, Any] = {}
    if "edits" in report:
        changed["edits"] = [record.to_json() for record in report["edits"]]
    if "seconds" in report:
        changed["seconds"] = {stage: round(seconds, 3) for stage, seconds in report["seconds"].items()}
    return {**report, **changed}
