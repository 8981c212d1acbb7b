"""The collapse detector: perplexity of ordinary sentences."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import ArgumentError
from ..rows import encode
from ..runner import Runner
from .isolated import RowUpdates, final_states


def sentence_perplexity(runner: Runner, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> float:
    """Mean over sentences of the sentence's own perplexity: exp of its mean NLL, the first token unscored.

    This is the rule of the ME-PPL sets (Yang et al. 2024). It is infinite for a model whose logits are not finite.
    Raises ArgumentError when no sentence has two tokens.
    """
    return _perplexities(runner, tokenizer, sentences, None, [-1])[0]


def edited_perplexities(
    runner: Runner, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], updates: RowUpdates
) -> list[float]:
    """The same for each of several edits, on the model as that edit alone would leave it."""
    return _perplexities(runner, tokenizer, sentences, updates, range(updates.left.shape[1]))


@torch.no_grad()
def _perplexities(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    updates: RowUpdates | None,
    edits: Sequence[int],
) -> list[float]:
    rows = [e.ids[: runner.max_length] for e in encode(tokenizer, sentences)]
    rows = [ids for ids in rows if len(ids) > 1]
    if not rows:
        raise ArgumentError("sentences: got none of at least two tokens, wanted one or more")
    uses = [(row, edit) for edit in edits for row in range(len(rows))]
    perplexities = [0.0] * len(uses)
    for some, hidden in final_states(runner, rows, uses, updates):
        for r, use in enumerate(some):
            ids = rows[uses[use][0]]
            logits = runner.head(hidden[r, : len(ids) - 1])
            labels = torch.tensor(ids[1:], device=logits.device)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            nll = float(torch.nn.functional.cross_entropy(wide, labels))
            perplexities[use] = math.exp(nll) if nll < 700 else math.inf
    means = [sum(perplexities[i : i + len(rows)]) / len(rows) for i in range(0, len(uses), len(rows))]
    return [math.inf if math.isnan(mean) else mean for mean in means]
