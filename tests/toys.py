"""Small random models and tokenizers, made on the spot: every architecture of the package without a download.

The weights are drawn here and not by transformers' initialisers: large enough that the distributions are
not flat and an edit does something, and with random biases and norms, because zeros and ones hide a
forgotten bias or gain. An untrained model has no circuits that carry a fact along the sentence, so an edit
takes hold best where the prompt ends in the subject and the target is one token ("The city of {}" to
"Rome": the loss falls from about 8 to about 1); with more words or tokens in between the same 20 steps
lower it by 1 to 4.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import oracle

KINDS = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "gpt2", "gptj")
VOCABULARY = 600
HIDDEN = 48
D_FF = 80
LAYERS = 4
POSITIONS = 256

# Ids of the special tokens: the trainer puts them first, in this order.
BOS, EOS, PAD = 0, 1, 2

SENTENCES = (
    "Chicago is a large city on the western shore of Lake Michigan, and its harbour once served the prairie.",
    "Istanbul is the largest city of Turkey; the strait called the Bosphorus runs through the middle of it.",
    "The Eiffel Tower is located in Paris, the capital of France, and was finished in the year 1889.",
    "Rome was not built in a day, but the Colosseum took its builders less than ten years.",
    "The mother tongue of Danielle Darrieux is French, although she spoke English and German on stage.",
    "Steve Jobs was the founder of Apple, a company that makes telephones, tablets and computers.",
    "The weather is nice today. Tomorrow it will rain in the mountains and the rivers will rise again.",
    "An old sailor told the children a long story about a whale that had swallowed his father's best boat.",
    "Bay leaves are picked in the morning, dried in the shade and kept in a wooden box for the winter.",
    "Economics is the science of scarce things; its experts rarely agree with one another about anything.",
    "He plays the violin in the orchestra of Vienna, where his teacher had played the piano before the war.",
    "What is the official language of Brazil? It is Portuguese, which travellers often take for Spanish.",
    "The museum opens at nine o'clock and closes at five, except on Mondays, when it stays closed all day.",
    "A good carpenter measures twice and cuts once; a bad carpenter buys more wood every week.",
    "In 1969 two astronauts walked on the Moon while a third one waited for them in a narrow orbit.",
    "She was born in Toronto, studied physics in Cambridge and now works as a professor in Melbourne.",
    "The company moved its headquarters from Berlin to Madrid because the rent there was much lower.",
    "Snow fell during the night, so the train to Moscow was late and nobody in the carriage was surprised.",
    "My neighbour keeps seven hens, two goats and a loud cockerel that wakes the village before sunrise.",
    "Basketball is played by two teams of five players each; football needs eleven on either side.",
    "The bridge over the river was designed by an engineer from Scotland and is painted red every summer.",
    "Few people know that the potato came to Europe from the high valleys of South America.",
    "From Chicago one flies to Paris, from Paris to Rome, and from Rome by way of Vienna to Istanbul.",
    "French is spoken in Paris, German in Berlin and in Vienna, Turkish in Istanbul, English in Chicago.",
    "A French cook from Paris opened one house in Rome, one in Istanbul and the last one in Chicago.",
    "Berlin and Istanbul are twin cities, and so are Paris and Rome; Chicago has more of them than Berlin.",
)


def toy_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens trained on `SENTENCES`; ids do not depend on `bos`.

    `bos=True` puts <s> before every text, as Llama-3 does; `bos=False` adds nothing, as GPT-2 and SmolLM2 do,
    although <s> is its `bos_token` all the same. Their offsets differ as in those models: GPT-2 counts the
    blank before a word to the token's characters, Llama-3 does not.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    size = backend.get_vocab_size()
    if size != VOCABULARY:
        raise ValueError(f"SENTENCES yield {size} tokens, wanted {VOCABULARY}: add some text")
    if bos:
        template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    else:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def toy_model(kind: str, *, dtype: torch.dtype = torch.float32, tie: bool = False, seed: int = 0) -> PreTrainedModel:
    """A random causal LM of one of `KINDS` in eval mode; the same weights for the same seed.

    `LAYERS` layers, hidden size `HIDDEN`, key length `D_FF`, `VOCABULARY` tokens, `POSITIONS` positions.
    `tie` shares the embedding with the head. In float64, norms are in float64 as well, which transformers leaves in
    float32. Raises ValueError for an unknown kind.
    """
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "tie_word_embeddings": tie,
    }
    shape: dict[str, Any]
    if kind == "gpt2":
        shape = {"n_embd": HIDDEN, "n_inner": D_FF, "n_layer": LAYERS, "n_head": 4, "n_positions": POSITIONS}
        shape |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    elif kind == "gptj":
        shape = {"n_embd": HIDDEN, "n_inner": D_FF, "n_layer": LAYERS, "n_head": 4, "n_positions": POSITIONS}
        # As in the real one, a part of every head is not rotated.
        shape |= {"rotary_dim": 8}
    elif kind in KINDS:
        shape = {
            "hidden_size": HIDDEN,
            "intermediate_size": D_FF,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": POSITIONS,
            "attention_dropout": 0.0,
        }
        if kind == "qwen3":
            # As in the real ones, the heads together are wider than the hidden state.
            shape["head_dim"] = 16
        if kind == "smollm3":
            # Layers with and without rotary embedding on either side of an edit in the middle.
            shape["no_rope_layer_interval"] = 2
    else:
        raise ValueError(f"kind: got {kind!r}, wanted one of {KINDS}")

    # Building draws from the global generator; what the caller draws afterwards must not depend on that.
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **shape), dtype=dtype)
    for module in model.modules():
        if hasattr(module, "embed_positions"):
            # Made in the dtype of the model, a table of positions is not the one that `from_pretrained` makes.
            model._init_weights(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = 0.2 * torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1.0 + values if is_gain else values)
    return oracle.exact_norms(model.eval()) if dtype == torch.float64 else model.eval()


def save_toy(
    directory: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a checkpoint that `from_pretrained` reads back; "200KB" gives several shards with an index."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    return Path(directory)
