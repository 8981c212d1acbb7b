"""The collapse detector: perplexity of ordinary sentences."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import ArgumentError
from ..rows import encode
from ..runner import Runner, evaluating
from .scoring import packed_by_length


@torch.no_grad()
def sentence_perplexity(runner: Runner, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> float:
    """Mean over sentences of the sentence's own perplexity: exp of its mean NLL, the first token unscored.

    This is the rule of the ME-PPL sets (Yang et al. 2024). It is infinite for a model whose logits are not finite.
    Raises ArgumentError when no sentence has two tokens.
    """
    rows = [e.ids[: runner.max_length] for e in encode(tokenizer, sentences)]
    rows = [ids for ids in rows if len(ids) > 1]
    if not rows:
        raise ArgumentError("sentences: got none of at least two tokens, wanted one or more")
    perplexities: list[float] = []
    for batch in packed_by_length([len(ids) for ids in rows]):
        packed = runner.pack([rows[i] for i in batch])
        with evaluating(runner.model):
            hidden = runner.run(runner.embed(packed.ids), 0, len(runner.layers))
        for r, i in enumerate(batch):
            logits = runner.head(hidden[r, : len(rows[i]) - 1])
            labels = packed.ids[r, 1 : len(rows[i])]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            nll = float(torch.nn.functional.cross_entropy(wide, labels))
            perplexities.append(math.exp(nll) if nll < 700 else math.inf)
    mean = sum(perplexities) / len(perplexities)
    return math.inf if math.isnan(mean) else mean
