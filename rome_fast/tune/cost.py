"""What a sweep will take, said before it starts."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..edits import Edit
from ..methods import method_named
from ..models.rows import encode
from ..models.runner import Runner
from ..runs.costs import layer_flops
from ..search.requests import tokenise
from ..search.values import ValueSettings
from .measure import CONTEXTS

# Measured of edits with the default stop rule: how many of the steps are taken, and on how many of the rows.
_SHARE_OF_STEPS, _SHARE_OF_ROWS = 0.7, 0.5
_BACKWARD = 2  # a pass to the activations costs what the forward pass does
_CONTEXT_TOKENS = 10


def edit_flops(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    method: str,
    layer: int,
    settings: ValueSettings,
    sentences: Sequence[str],
) -> float:
    """FLOPs of one edit of these and its evaluation, the mean over them, by formula."""
    layers, one = len(runner.layers), layer_flops(runner)
    above = layers - layer - 1
    config = runner.model.config.get_text_config()
    head = 2.0 * config.hidden_size * config.vocab_size
    contexts = tuple(f"Text {'of some words ' * 2}{number}. " for number in range(20))
    total = 0.0
    for edit in edits:
        request = tokenise(runner, tokenizer, edit, contexts, method_named(method))
        rows, suffix = len(request.rows), request.suffix
        searched = settings.steps * _SHARE_OF_STEPS * _SHARE_OF_ROWS * rows * _BACKWARD
        total += searched * (suffix * above * one + head)
        total += rows * ((suffix + request.middle) * (layer + 1) + request.middle * above) * one
        targets = 1 if edit.target_true is None else 2
        asked = encode(tokenizer, [edit.text, *edit.paraphrase_prompts])
        tokens = sum((1 + CONTEXTS) * len(e.ids) + CONTEXTS * _CONTEXT_TOKENS for e in asked)
        near = encode(tokenizer, edit.neighborhood_prompts)
        total += targets * (tokens + sum(len(e.ids) for e in near)) * layers * one
        total += 2 * (len(asked[0].ids) + _CONTEXT_TOKENS) * layers * one  # two free completions
    read = sum(len(e.ids) for e in encode(tokenizer, sentences))
    return total / len(edits) + read * (above * one + head)
