"""The prefix contexts: short sampled texts put before a prompt, so that an edit holds whatever precedes it.

They follow the released ROME code in number and length; they are sampled from plain sentence openings rather than
from BOS, because models without a BOS of their own (and instruction-tuned ones) start a chat template there.
"""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelError
from ..models.products import in_dtype, usual_dtype
from ..models.rows import encode, padding_id
from ..models.runner import evaluating, plain_generation

_OPENINGS = ("The first", "There is", "Because of", "In the year", "I think that")
# New tokens of the continuations of each opening, in the order in which they are used: half of the contexts are of
# either length, as in the released code. Those that are not usable, or there already, take a few more or fewer.
_LENGTHS = (5, 5, 10, 10)
_TOP_K = 5
_ROUNDS = 8

SAMPLED_TOKENS = max(_LENGTHS)
"""Passes through the model that sampling takes, unless so few of the texts are usable that it has to be repeated."""


def sample_contexts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 20, seed: int = 0
) -> tuple[str, ...]:
    """Sample `count` different contexts, each ending in ". ", with `model.generate`.

    The global random state is left as it was. The same model, count and seed give the same contexts; store them
    with a result to repeat it on other hardware. Raises ModelError when the model does not produce usable text, or
    does not know the tokenizer's tokens.
    """
    openings = [tokens.ids for tokens in encode(tokenizer, _OPENINGS)]
    _check_known(model, tokenizer, openings)
    found: dict[str, None] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), evaluating(model):
        torch.manual_seed(seed)
        for _ in range(_ROUNDS):
            for texts in _sample(model, tokenizer, openings):
                new = next((text for text in texts if _usable(text) and f"{text}. " not in found), None)
                if len(found) < count and new is not None:
                    found[f"{new}. "] = None
            if len(found) >= count:
                return tuple(found)
    raise ModelError(
        f"contexts: got {len(found)} usable texts from the model, wanted {count}; pass your own as contexts=[...]"
    )


def _sample(model: Any, tokenizer: PreTrainedTokenizerBase, openings: list[list[int]]) -> list[list[str]]:
    """Continuations of every opening, all of them in one batch; of each, what it is with more tokens and with fewer.

    Short ones are the beginnings of what could be long ones, which is what a short one would be.
    """
    pad, several = padding_id(tokenizer), len(_LENGTHS)
    longest = max(map(len, openings))
    # Padded on the left whatever the tokenizer says: generation goes on from the last column.
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in openings], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in openings], device=model.device)
    dtype = model.get_input_embeddings().weight.dtype
    products = in_dtype(usual_dtype(model.device, dtype), dtype)
    with torch.no_grad(), plain_generation(model, keep_end=True), products:
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=_TOP_K,
            top_p=1.0,
            temperature=1.0,
            num_return_sequences=several,
            min_new_tokens=SAMPLED_TOKENS,
            max_new_tokens=SAMPLED_TOKENS,
            pad_token_id=pad,
        )
    grown = [
        [generated[opening * several + number, longest - len(tokens) : longest + n].tolist() for n in _lengths(length)]
        for number, length in enumerate(_LENGTHS)
        for opening, tokens in enumerate(openings)
    ]
    return [
        [" ".join(text.split()).rstrip(" .") for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
        for rows in grown
    ]


def _lengths(wanted: int) -> list[int]:
    """How many of a continuation's tokens to take, in the order in which they are tried."""
    return [*range(wanted, SAMPLED_TOKENS + 1), *range(wanted - 1, min(_LENGTHS) - 1, -1)]


def _usable(text: str) -> bool:
    """Not empty, and no half character at the end of the sample."""
    return bool(text) and "\ufffd" not in text


def _check_known(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> None:
    known = len(model.get_input_embeddings().get_parameter("weight"))
    strange = [token for row in rows for token in row if token >= known]
    if strange:
        text = tokenizer.convert_ids_to_tokens(strange[0])
        raise ModelError(
            f"tokenizer: got token {strange[0]} ({text!r}), wanted ids below the model's {known}; "
            "use the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer))"
        )
