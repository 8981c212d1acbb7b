"""Teacher-forced probability of a target behind a text, and what the model says when it decodes freely."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import EditError
from ..rows import encode, padding_id, target_start, with_target
from ..runner import Runner, evaluating, plain_generation

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Score:
    """A target behind a text, teacher forced."""

    log_probability: float  # mean over the target's tokens
    is_argmax: bool  # every target token is the most probable one

    @property
    def probability(self) -> float:
        """Geometric mean of the target tokens' probabilities."""
        return math.exp(self.log_probability)


def packed_by_length(lengths: Sequence[int], batch_tokens: int = _BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices in batches of similar length, each batch's padded size within `batch_tokens` (or a single row)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def score(runner: Runner, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[Score]:
    """Score every (text, target), in the order given. Only target positions go through the head.

    Raises EditError for a text that is too long for the model, and for a target without a token of its own.
    """
    texts = [with_target(text, target) for text, target in pairs]
    encoded = encode(tokenizer, texts)
    for text, tokens in zip(texts, encoded, strict=True):
        _check_length(runner, text, len(tokens.ids) - 1)
    starts = [target_start(e, text, target) for e, (text, target) in zip(encoded, pairs, strict=True)]
    scores: dict[int, Score] = {}
    for batch in packed_by_length([len(e.ids) for e in encoded]):
        packed = runner.pack([encoded[i].ids[:-1] for i in batch])
        with evaluating(runner.model):
            hidden = runner.run(runner.embed(packed.ids), 0, len(runner.layers))
        where = [(r, p) for r, i in enumerate(batch) for p in range(starts[i] - 1, len(encoded[i].ids) - 1)]
        targets = [encoded[i].ids[p] for i in batch for p in range(starts[i], len(encoded[i].ids))]
        labels = torch.tensor(targets, device=hidden.device)
        row_of, position = torch.tensor(where, device=hidden.device).T
        logits = runner.head(hidden[row_of, position])
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        found = log_probs.gather(1, labels.unsqueeze(1)).squeeze(1).tolist()
        best = (log_probs.argmax(1) == labels).tolist()
        at = 0
        for i in batch:
            count = len(encoded[i].ids) - starts[i]
            scores[i] = Score(sum(found[at : at + count]) / count, all(best[at : at + count]))
            at += count
    return [scores[i] for i in range(len(pairs))]


@torch.no_grad()
def greedy_completion(
    runner: Runner, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], counts: Sequence[int]
) -> list[str]:
    """What the model writes behind each text when it decodes greedily for `counts[i]` tokens.

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
        with evaluating(generator), plain_generation(generator):
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
