"""The collapse detector: perplexity of ordinary sentences."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import ArgumentError
from ..models.rows import encode
from ..models.runner import Runner
from .isolated import RowUpdates, see_final_states
from .scoring import HEAD_POSITIONS


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
    return _perplexities(runner, tokenizer, sentences, updates, range(updates.count))


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

    def see(some: list[int], hidden: Tensor) -> None:
        texts = [rows[uses[use][0]] for use in some]
        lengths = torch.tensor([len(ids) - 1 for ids in texts], device=hidden.device)
        scored = hidden[torch.arange(hidden.shape[1], device=hidden.device) < lengths.unsqueeze(1)]
        labels = torch.tensor([label for ids in texts for label in ids[1:]], device=hidden.device)
        parts = zip(scored.split(HEAD_POSITIONS), labels.split(HEAD_POSITIONS), strict=True)
        losses = torch.cat([_losses(runner, *part) for part in parts])
        for use, own in zip(some, losses.split(lengths.tolist()), strict=True):
            nll = float(own.mean())
            perplexities[use] = math.exp(nll) if nll < 700 else math.inf

    see_final_states(runner, rows, uses, updates, see)
    means = [sum(perplexities[i : i + len(rows)]) / len(rows) for i in range(0, len(uses), len(rows))]
    return [math.inf if math.isnan(mean) else mean for mean in means]


def _losses(runner: Runner, hidden: Tensor, labels: Tensor) -> Tensor:
    """(n,) -log P of each label (n,) at hidden states (n, d)."""
    logits = runner.head(hidden)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, labels, reduction="none")
