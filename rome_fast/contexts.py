"""The prefix contexts: short sampled texts put before a prompt, so that an edit holds whatever precedes it.

They follow the released ROME code in number and length; they are sampled from plain sentence openings rather than
from BOS, because models without a BOS of their own (and instruction-tuned ones) start a chat template there.
"""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import ModelError
from .rows import encode, padding_id
from .runner import evaluating, plain_generation

_OPENINGS = ("The first", "There is", "Because of", "In the year", "I think that")
_LENGTHS = (5, 10)  # new tokens; half of the contexts each, as in the released code
_TOP_K = 5
_ROUNDS = 20


def sample_contexts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 20, seed: int = 0
) -> tuple[str, ...]:
    """Sample `count` different contexts, each ending in ". ", with `model.generate`.

    The global random state is left as it was. The same model, count and seed give the same contexts; store them
    with a result to repeat it on other hardware. Raises ModelError when the model does not produce usable text.
    """
    found: dict[str, None] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), evaluating(model):
        torch.manual_seed(seed)
        for round_index in range(_ROUNDS):
            for text in _sample(model, tokenizer, _LENGTHS[round_index % len(_LENGTHS)]):
                if len(found) < count and _usable(text):
                    found[f"{text}. "] = None
            if len(found) >= count:
                return tuple(found)
    raise ModelError(
        f"contexts: got {len(found)} usable texts from the model, wanted {count}; pass your own as contexts=[...]"
    )


def _sample(model: Any, tokenizer: PreTrainedTokenizerBase, length: int) -> list[str]:
    """Two continuations of every opening, by `length` tokens, in one batch."""
    openings = [tokens.ids for tokens in encode(tokenizer, _OPENINGS)]
    pad = padding_id(tokenizer)
    longest = max(map(len, openings))
    # Padded on the left whatever the tokenizer says: generation goes on from the last column.
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in openings], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in openings], device=model.device)
    with torch.no_grad(), plain_generation(model, keep_end=True):
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=_TOP_K,
            top_p=1.0,
            temperature=1.0,
            num_return_sequences=2,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=pad,
        )
    rows = [row[longest - len(openings[i // 2]) :] for i, row in enumerate(generated.tolist())]
    return [" ".join(text.split()).rstrip(" .") for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def _usable(text: str) -> bool:
    """Not empty, and no half character at the end of the sample."""
    return bool(text) and "\ufffd" not in text
