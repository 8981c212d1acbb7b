"""Tiny random models of every decoder-only architecture of transformers that was looked at, without a download.

They have the vocabulary of the toy tokenizers. Weights are drawn as those of the toys, see there.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from toys import BOS, EOS, PAD, VOCABULARY

LAYERS, HIDDEN, D_FF, HEADS, POSITIONS, WINDOW = 4, 64, 96, 4, 256, 64

_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": D_FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}
_LLAMA = _SIZES | {"num_key_value_heads": 2, "head_dim": 16}
_GPT2 = {"n_embd": HIDDEN, "n_inner": D_FF, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
_EXPERTS = _LLAMA | {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
# The first layer is dense, the others have an expert that all tokens go through beside the routed ones.
_DEEPSEEK = _EXPERTS | {"n_shared_experts": 1, "first_k_dense_replace": 1, "topk_group": 1, "n_group": 1}
_LATENT = {  # attention through a narrow latent vector
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
_LINEAR = {  # attention as a recurrence
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_MULTIPLIED = {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0}

_LIKE_LLAMA = (
    "llama mistral qwen2 qwen3 smollm3 gemma olmo olmo2 starcoder2 glm glm4 seed_oss apertus arcee helium bitnet "
    "internlm3 ernie4_5 hunyuan_v1_dense cohere ministral ministral3 diffllama doge vaultgemma nanochat cwm jais2 "
    "hyperclovax exaone iquestcoder lara_mini flint"
)

KINDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_LIKE_LLAMA.split(), _LLAMA),
    **dict.fromkeys(("gemma3_text", "cohere2", "olmo3", "exaone4"), _LLAMA | _SLIDING),
    **{kind: _SIZES | {"num_key_value_heads": 2} for kind in ("stablelm", "nemotron")},
    **{kind: _SIZES | {"num_key_value_heads": 4} for kind in ("phi", "persimmon")},
    **dict.fromkeys(("minicpm3", "youtu"), _LLAMA | _LATENT),
    **dict.fromkeys(("qwen3_moe", "mixtral", "olmoe", "phimoe", "gpt_oss", "minimax"), _EXPERTS),
    **dict.fromkeys(("dots1", "glm4_moe"), _DEEPSEEK),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _DEEPSEEK | _LATENT),
    "gemma2": _LLAMA | {"sliding_window": WINDOW},
    "gemma3n_text": _LLAMA
    | {
        "intermediate_size": [D_FF] * LAYERS,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    }
    | _SLIDING,
    "gemma4_text": _LLAMA
    | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 16}
    | {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "youtu": _LLAMA | _LATENT | {"pad_token_id": None},
    "phi3": _LLAMA | {"pad_token_id": PAD},
    "granite": _LLAMA | _MULTIPLIED | {"attention_multiplier": 0.1},
    "granitemoe": _EXPERTS | _MULTIPLIED,
    "granitemoeshared": _EXPERTS | _MULTIPLIED | {"shared_intermediate_size": 48},
    "granitemoehybrid": _EXPERTS | _MAMBA | {"shared_intermediate_size": 48, "layer_types": ["mamba", "attention"] * 2},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3_next": _EXPERTS | _LINEAR | {"shared_expert_intermediate_size": 48},
    "qwen3_5_text": _LLAMA | _LINEAR,
    "llama4_text": _EXPERTS | {"intermediate_size_mlp": D_FF, "attention_chunk_size": 128},
    "ernie4_5_moe": _EXPERTS
    | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "hunyuan_v1_moe": _EXPERTS | {"moe_topk": 2},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gptj": _GPT2 | {"rotary_dim": 8},
    "codegen": _GPT2 | {"rotary_dim": 8},
    "openai-gpt": {name: value for name, value in _GPT2.items() if name != "n_inner"},
    "ctrl": {"n_embd": HIDDEN, "dff": D_FF, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS},
    "gpt_neo": {
        "hidden_size": HIDDEN,
        "intermediate_size": D_FF,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "attention_types": [[["global", "local"], LAYERS // 2]],
        "max_position_embeddings": POSITIONS,
        "window_size": WINDOW,
    },
    "gpt_neox": _SIZES,
    "gpt_neox_japanese": _SIZES | {"intermediate_multiple_size": 2},
    "biogpt": _SIZES,
    "modernbert-decoder": _SIZES,
    "opt": _SIZES | {"ffn_dim": D_FF, "word_embed_proj_dim": HIDDEN},
    "xglm": {"d_model": HIDDEN, "ffn_dim": D_FF, "num_layers": LAYERS, "attention_heads": HEADS}
    | {"max_position_embeddings": POSITIONS},
    "bloom": {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
    "falcon": _SIZES | {"ffn_hidden_size": D_FF},
    "mpt": {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": POSITIONS, "expansion_ratio": 2},
    "lfm2": _LLAMA
    | {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": D_FF, "conv_L_cache": 3}
    | {"block_auto_adjust_ff_dim": False},
    "mamba": {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 8},
    "falcon_mamba": {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 8},
    "mamba2": {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 8}
    | {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "rwkv": {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "context_length": POSITIONS},
    "recurrent_gemma": _SIZES | {"lru_width": HIDDEN, "attention_window_size": 128},
    "jamba": _EXPERTS
    | {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": _LLAMA | _MAMBA | {"attn_layer_indices": [1, 3]},
    "falcon_h1": _LLAMA | _MAMBA | {"mamba_d_ssm": 64, "mamba_n_heads": 4},
}

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def zoo_model(kind: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of a kind, which `changes` of its configuration make another one, always the same."""
    sizes = _TOKENS | KINDS[kind] | changes
    try:
        config = AutoConfig.for_model(kind, **sizes)
    except TypeError:  # old configurations do not take any name
        config = AutoConfig.for_model(kind)
        for name, value in sizes.items():
            if hasattr(config, name):
                setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = 0.12 * torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1.0 + values if is_gain else values)
    return model.eval()
