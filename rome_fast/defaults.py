"""Edit layer and optimisation settings by model, as published for the released editors or measured here."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from .values import ValueSettings


@dataclass(frozen=True)
class Default:
    layer: int
    settings: ValueSettings


_GPT2 = ValueSettings()
_LLAMA = ValueSettings(steps=25, weight_decay=1e-3)

# (model type, layers, hidden size); the released hyper-parameter files of ROME and EasyEdit, except where noted.
_DEFAULTS: dict[tuple[str, int, int], Default] = {
    ("gpt2", 24, 1024): Default(8, ValueSettings(clamp=3.0)),
    ("gpt2", 36, 1280): Default(12, _GPT2),
    ("gpt2", 48, 1600): Default(17, _GPT2),
    ("gptj", 28, 4096): Default(5, _GPT2),
    ("llama", 32, 4096): Default(5, _LLAMA),
    ("mistral", 32, 4096): Default(5, _LLAMA),
    ("qwen2", 28, 3584): Default(5, _LLAMA),
    # SmolLM2-135M: measured, see docs/layers.md.
    ("llama", 30, 576): Default(9, ValueSettings(clamp=3.0, weight_decay=20.0)),
}
# Published layers lie between 0.16 (Llama) and 0.35 (GPT-2) of the depth.
_UNKNOWN_DEPTH = {"gpt2": 0.35, "gptj": 0.18}
_FALLBACK_DEPTH = 0.17


def _known(config: PretrainedConfig) -> Default | None:
    config = config.get_text_config()
    return _DEFAULTS.get((config.model_type, config.num_hidden_layers, config.hidden_size))


def default_layer(config: PretrainedConfig) -> int:
    """The layer to edit; for a model without a published one, at the depth that is usual for its kind."""
    known = _known(config)
    if known is not None:
        return known.layer
    return round(_UNKNOWN_DEPTH.get(config.model_type, _FALLBACK_DEPTH) * config.get_text_config().num_hidden_layers)


def default_settings(config: PretrainedConfig) -> ValueSettings:
    known = _known(config)
    if known is not None:
        return known.settings
    return _GPT2 if config.model_type in ("gpt2", "gptj") else _LLAMA
