"""Teacher-forced probability of a target behind a text, and what the model says when it decodes freely."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import EditError
from ..rows import encode, padding_id, target_start, with_target
from ..runner import Runner, evaluating, plain_generation
from .isolated import RowUpdates, carrying, final_states


@dataclass(frozen=True)
class Score:
    """A target behind a text, teacher forced."""

    log_probability: float  # mean over the target's tokens
    is_argmax: bool  # every target token is the most probable one

    @property
    def probability(self) -> float:
        """Geometric mean of the target tokens' probabilities."""
        return math.exp(self.log_probability)


@torch.no_grad()
def score(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    updates: RowUpdates | None = None,
    edits: Sequence[int] | None = None,
) -> list[Score]:
    """Score every (text, target), in the order given. Only target positions go through the head.

    With `updates`, pair i is scored on the model as edit `edits[i]` of them would leave it (-1: as it is).
    Raises EditError for a text that is too long for the model, and for a target without a token of its own.
    """
    place = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
    texts = [with_target(text, target) for text, target in place]
    encoded = encode(tokenizer, texts)
    for text, tokens in zip(texts, encoded, strict=True):
        _check_length(runner, text, len(tokens.ids) - 1)
    starts = [target_start(e, text, target) for e, (text, target) in zip(encoded, place, strict=True)]
    uses = [(place[pair], edit) for pair, edit in zip(pairs, edits or [-1] * len(pairs), strict=True)]
    scores: dict[int, Score] = {}
    for some, hidden in final_states(runner, [e.ids[:-1] for e in encoded], uses, updates):
        rows = [uses[i][0] for i in some]
        where = [(r, p) for r, i in enumerate(rows) for p in range(starts[i] - 1, len(encoded[i].ids) - 1)]
        targets = [encoded[i].ids[p] for i in rows for p in range(starts[i], len(encoded[i].ids))]
        labels = torch.tensor(targets, device=hidden.device)
        row_of, position = torch.tensor(where, device=hidden.device).T
        logits = runner.head(hidden[row_of, position])
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        found = log_probs.gather(1, labels.unsqueeze(1)).squeeze(1).tolist()
        best = (log_probs.argmax(1) == labels).tolist()
        at = 0
        for use, i in zip(some, rows, strict=True):
            count = len(encoded[i].ids) - starts[i]
            scores[use] = Score(sum(found[at : at + count]) / count, all(best[at : at + count]))
            at += count
    return [scores[i] for i in range(len(pairs))]


@torch.no_grad()
def greedy_completion(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    counts: Sequence[int],
    updates: RowUpdates | None = None,
    edits: Sequence[int] | None = None,
) -> list[str]:
    """What the model writes behind each text when it decodes greedily for `counts[i]` tokens.

    With `updates`, text i is completed by the model as edit `edits[i]` of them would leave it (-1: as it is).
    Raises EditError for a text that is too long for the model.
    """
    encoded = [e.ids for e in encode(tokenizer, [text.rstrip() for text in texts])]
    for text, ids, count in zip(texts, encoded, counts, strict=True):
        _check_length(runner, text, len(ids) + count - 1)
    groups: dict[tuple[int, int], list[int]] = {}
    for index, ids in enumerate(encoded):
        groups.setdefault((len(ids), counts[index]), []).append(index)
    pad = padding_id(tokenizer)
    out = [""] * len(texts)
    for (length, count), members in groups.items():
        # Rows of one length need no padding, so that its side cannot matter.
        rows = torch.tensor([encoded[i] for i in members], device=runner.device)
        generator: Any = runner.model
        with ExitStack() as stack:
            stack.enter_context(evaluating(generator))
            stack.enter_context(plain_generation(generator))
            if updates is not None and edits is not None:
                of_rows = torch.tensor([edits[i] for i in members], device=runner.device)
                stack.enter_context(carrying(runner, updates, of_rows))
            generated = generator.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                do_sample=False,
                max_new_tokens=count,
                pad_token_id=pad,
            )
        for i, new in zip(members, tokenizer.batch_decode(generated[:, length:]), strict=True):
            out[i] = new
    return out


def _check_length(runner: Runner, text: str, tokens: int) -> None:
    if tokens > runner.max_length:
        raise EditError(
            f"prompt {text[:40]!r}…: got {tokens} tokens, wanted at most the {runner.max_length} the model attends to; "
            "shorten it"
        )
