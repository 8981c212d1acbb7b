"""Models of real shapes with random weights: what an edit costs, without a download.

The sizes are those of the published config.json files. What a text means to such a model is of no consequence; how
many tokens it has, and how large every product is, are as in the real one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ..assets import MODEL_NAME, cache_dir
from ..edits import Edit
from ..errors import ArgumentError


class Shape(NamedTuple):
    """An architecture and its sizes, by the names of its transformers configuration."""

    model_type: str
    sizes: dict[str, Any]


def _llama_like(
    hidden: int, inner: int, layers: int, heads: int, shared: int, vocabulary: int, positions: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
    }


SHAPES: dict[str, Shape] = {
    "gpt2-xl": Shape("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024, "vocab_size": 50257}),
    "gpt-j-6b": Shape(
        "gptj",
        {
            "n_embd": 4096,
            "n_layer": 28,
            "n_head": 16,
            "n_positions": 2048,
            "rotary_dim": 64,
            "vocab_size": 50400,
            "tie_word_embeddings": False,
        },
    ),
    "llama-2-7b": Shape("llama", _llama_like(4096, 11008, 32, 32, 32, 32000, 4096)),
    "llama-3-8b": Shape("llama", _llama_like(4096, 14336, 32, 32, 8, 128256, 8192)),
    "qwen2-7b": Shape("qwen2", _llama_like(3584, 18944, 28, 28, 4, 152064, 32768)),
    "mistral-7b": Shape("mistral", _llama_like(4096, 14336, 32, 32, 8, 32768, 32768) | {"sliding_window": None}),
    "tiny": Shape("llama", _llama_like(64, 160, 4, 4, 2, 1024, 512)),
}
"""`tiny` is nobody's: it shows within seconds that a machine is set up. mistral-7b is its version 0.3."""

CONTEXTS = (
    "The first train of the day. ",
    "There is a house. ",
    "Because of the rain. ",
    "In the year 1990. ",
    "I think that it works. ",
    "The first of them left early. ",
    "There is no doubt. ",
    "Because of its size. ",
    "In the year of the flood. ",
    "I think that we should go. ",
    "The first time I saw the sea I was eight. ",
    "There is a small museum behind the old station. ",
    "Because of the war they had to leave the country. ",
    "In the year 2004 the company moved to the north. ",
    "I think that the answer is in the second book. ",
    "The first chapter is about the history of the town. ",
    "There is more than one way to get to the island. ",
    "Because of the strike there were no newspapers that week. ",
    "In the year after the election the law was changed again. ",
    "I think that nobody in the room had expected the news. ",
)
"""As long as the sampled ones. A model that has learned nothing writes no text whose tokens are those it sampled."""


def random_model(
    name: str, device: torch.device, dtype: torch.dtype, seed: int = 0, *, layers: int | None = None
) -> PreTrainedModel:
    """The model of a shape in evaluation mode, made on `device` in `dtype` with the initialisation of transformers.

    No copy of the weights is made on the way. The same arguments on the same kind of device give the same weights.
    `layers` makes so many of them instead of all. Raises ArgumentError for an unknown shape.
    """
    config = shape_config(name, layers)
    own = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=own), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config._name_or_path = f"{name}, random weights" + ("" if layers is None else f", {layers} layers")
    return model.eval()


_SMALL = {
    **{"hidden_size": 64, "n_embd": 64, "intermediate_size": 96, "vocab_size": 256, "rotary_dim": 8},
    **{"num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4, "n_head": 4},
    **{"max_position_embeddings": 64, "n_positions": 64},
}


def small_model(name: str) -> PreTrainedModel:
    """One of a shape's architecture that has two small layers, in float32 on the CPU; raises as `random_model`."""
    shape = known_shape(name)
    sizes = shape.sizes | {size: _SMALL[size] for size in shape.sizes if size in _SMALL}
    sizes |= dict.fromkeys(("bos_token_id", "eos_token_id"))  # the usual ones are beyond its vocabulary
    if "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = 4 * shape.sizes["num_key_value_heads"] // shape.sizes["num_attention_heads"] or 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.model_type, **sizes)).eval()


def shape_config(name: str, layers: int | None = None) -> PretrainedConfig:
    """The configuration of a shape, with another number of layers where one is given; raises as `random_model`."""
    shape = known_shape(name)
    sizes = dict(shape.sizes)
    if layers is not None:
        sizes["n_layer" if "n_layer" in sizes else "num_hidden_layers"] = layers
    return AutoConfig.for_model(shape.model_type, **sizes)


def known_shape(name: str) -> Shape:
    """Raises ArgumentError for an unknown shape."""
    if name not in SHAPES:
        raise ArgumentError(f"shape: got {name!r}, wanted one of {', '.join(SHAPES)}")
    return SHAPES[name]


def random_factor(width: int, device: torch.device, seed: int = 0) -> Tensor:
    """A lower Cholesky factor of a positive definite matrix, (width, width) fp64, condition below 100.

    It stands for the factor of real statistics: solving with it costs the same, and making it next to nothing.
    """
    generator = torch.Generator(device).manual_seed(seed)
    entries = torch.randn(width, width, dtype=torch.float32, device=device, generator=generator)
    factor = entries.tril_(-1).mul_(0.5 / width**0.5).double()
    factor.diagonal().fill_(1.0)
    return factor


def repeated(edits: Sequence[Edit], count: int | None) -> list[Edit]:
    """`count` requests, the given ones over and over; all of them once for None."""
    return [edits[i % len(edits)] for i in range(len(edits) if count is None else count)]


def tokenizer_for(vocabulary: int, texts: Sequence[str]) -> tuple[PreTrainedTokenizerFast, str]:
    """A fast tokenizer of at most `vocabulary` tokens, and what it is.

    The demo model's, if it is in the cache, cut to its first tokens where it has more; otherwise one trained on
    `texts`, in which most words are one token. Nothing is downloaded.
    """
    file = cache_dir() / MODEL_NAME / "tokenizer.json"
    if not file.exists():
        return trained_tokenizer(vocabulary, texts)
    backend, what = _first_tokens(file, vocabulary)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False), what


def trained_tokenizer(vocabulary: int, texts: Sequence[str]) -> tuple[PreTrainedTokenizerFast, str]:
    """One of at most `vocabulary` tokens trained on `texts`, and what it is: the same on every machine."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 4096),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" " + text for text in texts], trainer)
    what = f"byte-level BPE of {backend.get_vocab_size()} tokens trained on the requests"
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False), what


def _first_tokens(file: Path, vocabulary: int) -> tuple[Tokenizer, str]:
    """A byte-level BPE tokenizer with the tokens below `vocabulary` only, which are the ones merged first."""
    document = json.loads(file.read_text(encoding="utf-8"))
    model = document["model"]
    whole = len(model["vocab"])
    kept = {token: number for token, number in model["vocab"].items() if number < vocabulary}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    model["vocab"] = kept
    model["merges"] = [pair for pair in pairs if {pair[0], pair[1], pair[0] + pair[1]} <= kept.keys()]
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < vocabulary]
    what = "SmolLM2's" if len(kept) == whole else f"the first {len(kept)} tokens of SmolLM2's"
    return Tokenizer.from_str(json.dumps(document)), what
