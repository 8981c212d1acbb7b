"""Essence: what a model says of a subject beside the fact that was edited, before the edit and after it.

After "essence drift" (Meng et al. 2022), which is what an edit does to its subject otherwise: by how much the next
token's distribution moves behind texts about the subject, and what the model then writes.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..edits import Edit
from ..models.rows import Asked
from ..models.runner import Runner, with_weights
from .isolated import RowUpdates
from .scoring import Completion, complete, next_log_probabilities

NEUTRAL = ("{} is", "{} has")
"""English texts about the subject of a request that has no essence prompts of its own."""

_ELEMENTS = 1 << 26  # of log-probabilities at a time


@dataclass(frozen=True)
class Essence:
    """Of one request."""

    kl: float  # Σ p log (p / q) in nats, p before the edit and q after it; mean over the texts
    text: str  # the first of them
    before: str  # what follows it greedily, until the model stops by itself or at a bound
    after: str


def essences(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    tokens: int,
    before: Mapping[str, Tensor] | RowUpdates,
) -> list[Essence]:
    """The essence of every request's subject; the model writes at most `tokens` tokens behind its first text.

    `before` are weights by name, which the model had before the edit; or updates, one for each request, as its own of
    which would leave the model that it is.
    """
    texts = [essence_texts(edit) for edit in edits]
    owners = [i for i, own in enumerate(texts) for _ in own]
    every = [text for own in texts for text in own]
    updates = before if isinstance(before, RowUpdates) else None

    def unedited() -> AbstractContextManager[object]:
        return nullcontext() if isinstance(before, RowUpdates) else with_weights(runner.model, before)

    def written(of: Sequence[int]) -> list[Completion]:
        firsts = [own[0] for own in texts]
        return complete(runner, tokenizer, firsts, [0] * len(of), [tokens] * len(of), updates, of)

    found: list[list[float]] = [[] for _ in edits]
    at_once = max(1, _ELEMENTS // runner.vocab_size)
    for start in range(0, len(every), at_once):
        some, of = every[start : start + at_once], owners[start : start + at_once]
        with unedited():
            p = next_log_probabilities(runner, tokenizer, some, updates, [-1] * len(of)).double()
        q = next_log_probabilities(runner, tokenizer, some, updates, of).double()
        for owner, kl in zip(of, (p.exp() * (p - q)).sum(1).tolist(), strict=True):
            # Not below 0 but by rounding; the logits of a destroyed model are no numbers.
            found[owner].append(max(kl, 0.0) if kl == kl else float("inf"))
    with unedited():
        said = written([-1] * len(edits))
    return [
        Essence(sum(kls) / len(kls), own[0].text, then.free, now.free)
        for kls, own, then, now in zip(found, texts, said, written(range(len(edits))), strict=True)
    ]


def essence_texts(edit: Edit) -> list[Asked]:
    """What is asked of the subject: the request's own texts, or neutral ones, in a chat as what the user begins to say.

    A neutral text that asks for the fact itself is left out.
    """
    special, subject = edit.user_at is None, edit.subject.strip()
    head = edit.head or ""
    asks = {edit.text.strip(), *(text.strip() for text in edit.paraphrase_prompts)}
    neutral = [head + text.replace("{}", subject) for text in NEUTRAL]
    return [
        Asked(text, "", special) for text in edit.essence_prompts or [t for t in neutral if t not in asks] or neutral
    ]
