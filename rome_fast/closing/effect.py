"""What an edit did to the model, measured: its targets' probabilities, and how well the model still reads.

The second is the mean NLL of the contexts' own tokens, ordinary text that the model is at home in. It rises with the
perplexity of anything else (docs/methods.md), and is scored in the same passes as the targets.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..edits import Edit
from ..errors import CollapseError
from ..evaluation import score
from ..models.rows import Asked, asked, encode
from ..models.runner import Runner
from ..records import Record
from ..updates.delta import applied_to
from .guard import CollapseWarning, Guard

DRIFT_LIMIT = 0.7
"""Rise of the contexts' mean NLL, in nats a token, above which a model is taken to be collapsing: e^0.7 is two."""


@dataclass(frozen=True)
class ContextNLL:
    """Mean NLL of the contexts' tokens, in nats, before and after an edit."""

    before: float
    after: float
    # Before the first of the edits that are in the model, of the contexts of that time, and of the same ones now.
    origin: float
    since_origin: float

    @property
    def drift(self) -> float:
        """What this edit and those before it have added, whichever says more."""
        return max(self.after - self.before, self.since_origin - self.origin)


# Contexts and their NLL before the first edit of a model in memory.
_ORIGINS: WeakKeyDictionary[PreTrainedModel, tuple[tuple[str, ...], float]] = WeakKeyDictionary()


class Effect:
    """Measures some edits before and after they are applied."""

    def __init__(
        self, runner: Runner, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], contexts: Sequence[str]
    ) -> None:
        self._runner, self._tokenizer, self._edits, self._contexts = runner, tokenizer, edits, tuple(contexts)
        self._readings = _readings(tokenizer, self._contexts)
        self._probabilities: list[float] = []
        self._nll = float("nan")
        self._origin = (self._contexts, self._nll)

    def before(self) -> None:
        """To be called before anything of the edits is in the model."""
        pairs = [asked(self._tokenizer, edit) for edit in self._edits]
        scores = score(self._runner, self._tokenizer, [*pairs, *self._readings])
        self._probabilities = [s.probability for s in scores[: len(pairs)]]
        self._nll = _mean_nll([s.log_probability for s in scores[len(pairs) :]])
        model = self._runner.model
        if self._readings:
            if not applied_to(model) or model not in _ORIGINS:
                _ORIGINS[model] = self._contexts, self._nll
            self._origin = _ORIGINS[model]

    def after(self, records: Sequence[Record]) -> ContextNLL | None:
        """Fill the records of the edits, which are in the model now; None where no context has two tokens to read."""
        pairs = [asked(self._tokenizer, edit, context) for edit in self._edits for context in ("", *self._contexts)]
        old = [] if self._origin[0] == self._contexts else _readings(self._tokenizer, self._origin[0])
        scores = score(self._runner, self._tokenizer, [*pairs, *self._readings, *old])
        per_edit = 1 + len(self._contexts)
        for i, record in enumerate(records):
            bare, *prefixed = scores[i * per_edit : (i + 1) * per_edit]
            record.probability_before = self._probabilities[i]
            record.probability_after = bare.probability
            record.argmax_after = bare.is_argmax
            record.probability_after_prefixed = sum(s.probability for s in prefixed) / len(prefixed)
            record.argmax_after_prefixed = sum(s.is_argmax for s in prefixed) / len(prefixed)
        if not self._readings:
            return None
        read = [s.log_probability for s in scores[len(pairs) :]]
        now = _mean_nll(read[: len(self._readings)])
        return ContextNLL(self._nll, now, self._origin[1], _mean_nll(read[len(self._readings) :]) if old else now)


def judge_drift(nll: ContextNLL | None, guard: Guard) -> None:
    """Raise CollapseError or warn where a model has come to read ordinary text much worse, as the guard says."""
    if nll is None or guard == "off" or nll.drift <= DRIFT_LIMIT:
        return
    what = (
        f"the model's mean NLL of the contexts rose by {nll.drift:.2f} nats a token, to {nll.after:.2f}: it reads "
        "ordinary text much worse than before its edits"
    )
    remedy = "make fewer edits, spread them over more layers, or choose what to do with guard='warn' | 'off'"
    if guard == "warn":
        warnings.warn(f"{what}\n{remedy}", CollapseWarning, stacklevel=4)
        return
    # No single edit can be left out for what all of them do.
    raise CollapseError(f"{what}\nnothing was written; {remedy}")


def _readings(tokenizer: PreTrainedTokenizerBase, contexts: Sequence[str]) -> list[Asked]:
    """Every context as its first token, which is not scored, and what follows."""
    texts = [context.strip() for context in contexts]
    found = []
    for text, tokens in zip(texts, encode(tokenizer, texts), strict=True):
        ends = [stop for _, stop in tokens.spans if stop]
        if ends and ends[0] < len(text):
            found.append(Asked(text[: ends[0]], text[ends[0] :]))
    return found


def _mean_nll(log_probabilities: Sequence[float]) -> float:
    """NaN where there are none, or the model's logits are no numbers."""
    return -sum(log_probabilities) / len(log_probabilities) if log_probabilities else float("nan")
