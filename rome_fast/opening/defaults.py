"""Edit layer and optimisation settings of a model: given, found by `rome-fast tune`, published, or by a rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

from transformers import PretrainedConfig

from ..errors import ArgumentError
from ..search.values import ValueSettings

LayerSource = Literal["given", "tune", "published", "depth rule"]
"""Who says which layer to edit. Published are the layers of `known`, the one measured for SmolLM2 among them."""


@dataclass(frozen=True)
class Default:
    layer: int
    settings: ValueSettings
    layers: tuple[int, ...] = ()  # first to last of those to spread edits over, MEMIT's where any were published


class Tuned(Protocol):
    """A layer and settings that were measured on the very model."""

    @property
    def layer(self) -> int: ...
    @property
    def settings(self) -> ValueSettings: ...


@dataclass(frozen=True)
class Selection:
    """The layers and settings of an edit."""

    layers: tuple[int, ...]  # ascending
    settings: ValueSettings
    layer_source: LayerSource

    @property
    def layer(self) -> int:
        """Where δ is found."""
        return self.layers[-1]


def explain_layer(layers: Sequence[int], source: LayerSource, model: str) -> str:
    """One line on who chose the layers, and for those that nobody chose for this very model what would."""
    return (
        f"layer{'' if len(layers) == 1 else 's'} {', '.join(map(str, layers))}: "
        + {
            "given": "as given",
            "tune": "chosen by rome-fast tune",
            "published": "published for models of this type and size",
            "depth rule": "by its depth alone, since none is published for this model; find its own with: "
            f"rome-fast tune {model}",
        }[source]
    )


_GPT2 = ValueSettings()
_LLAMA = ValueSettings(steps=25, weight_decay=1e-3)
_3_4, _4_8 = (3, 4), (4, 5, 6, 7, 8)

# (model type, layers, hidden size); the released hyper-parameter files of ROME, MEMIT and EasyEdit, except where noted.
_KNOWN: dict[tuple[str, int, int], Default] = {
    ("gpt2", 24, 1024): Default(8, ValueSettings(clamp=3.0)),
    ("gpt2", 36, 1280): Default(12, _GPT2),
    ("gpt2", 48, 1600): Default(17, _GPT2, (13, 14, 15, 16, 17)),
    ("gptj", 28, 4096): Default(5, _GPT2, (3, 4, 5, 6, 7, 8)),
    ("gpt_neox", 44, 6144): Default(15, _GPT2),  # GPT-NeoX-20B
    ("llama", 32, 4096): Default(5, _LLAMA, _4_8),  # Llama-2-7B, Llama-3-8B, Llama-3.1-8B
    ("llama", 40, 5120): Default(3, _LLAMA, _3_4),  # Llama-2-13B
    ("llama", 28, 3072): Default(5, _LLAMA, _4_8),  # Llama-3.2-3B
    ("llama", 30, 4096): Default(3, _LLAMA, _3_4),  # DeepSeek-7B
    ("mistral", 32, 4096): Default(5, _LLAMA, _4_8),
    # Qwen2-7B, and Qwen2.5-7B, for which another source has 11 and 7 to 11.
    ("qwen2", 28, 3584): Default(5, _LLAMA, _4_8),
    ("qwen3_5_text", 32, 4096): Default(5, _LLAMA, _4_8),  # Qwen3.5-9B
    ("falcon", 32, 4544): Default(3, _LLAMA, _3_4),  # Falcon-7B
    ("gemma", 28, 3072): Default(3, _LLAMA, _3_4),  # Gemma-7B; only the two layers were published
    # SmolLM2-135M: measured, see docs/layers.md.
    ("llama", 30, 576): Default(9, ValueSettings(clamp=3.0, weight_decay=20.0), (3, 4, 5, 6, 7, 8, 9)),
}
# Published layers lie between 0.09 (Falcon) and 0.35 (GPT-2) of the depth; most of them at 0.16.
_UNKNOWN_DEPTH = {"gpt2": 0.35, "gptj": 0.18, "gpt_neox": 0.34}
_FALLBACK_DEPTH = 0.17


def known(config: PretrainedConfig) -> Default | None:
    """What is published for a model of this type and size; None where nothing is."""
    text = config.get_text_config()
    return _KNOWN.get((text.model_type, text.num_hidden_layers, text.hidden_size))


def select(
    config: PretrainedConfig,
    layers: Sequence[int] | None = None,
    settings: ValueSettings | Mapping[str, Any] | None = None,
    tuned: Tuned | None = None,
    *,
    spread: bool = False,
) -> Selection:
    """Layers and settings of an edit: those given, else those of `tuned`, else the model's defaults.

    With `spread`, several layers unless told otherwise: the published ones, and where none are, those from a third of
    the depth of the one layer on.

    A mapping of settings changes some of those that it would be otherwise. Settings that were tuned belong to their
    layer: with another one, the defaults are taken. Raises ArgumentError for settings of another type or name.
    """
    source: LayerSource = "given"
    if layers is not None:
        chosen = tuple(sorted(layers))
    elif tuned is not None:
        chosen, source = spread_below(tuned.layer) if spread else (tuned.layer,), "tune"
    else:
        chosen, source = default_layers(config, spread), "published" if known(config) else "depth rule"
    if not isinstance(settings, ValueSettings):
        usual = tuned.settings if tuned is not None and tuned.layer == chosen[-1] else default_settings(config)
        settings = replace(usual, **_changes(settings))
    return Selection(chosen, settings, source)


def default_layers(config: PretrainedConfig, spread: bool) -> tuple[int, ...]:
    """The layers to edit, where nobody has said which: one, or with `spread` several."""
    published = known(config)
    if not spread:
        return (default_layer(config),)
    return published.layers if published is not None and published.layers else spread_below(default_layer(config))


def spread_below(layer: int) -> tuple[int, ...]:
    """Layers to spread edits over whose δ is found at this one."""
    return tuple(range(round(layer / 3), layer + 1))


def _changes(settings: object) -> dict[str, Any]:
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise ArgumentError(
            f"settings: got {type(settings).__name__}, wanted a rome_fast.ValueSettings, a mapping of some of its "
            "fields, or None"
        )
    names = [field.name for field in fields(ValueSettings)]
    if unknown := [str(name) for name in settings if name not in names]:
        raise ArgumentError(f"settings: got {', '.join(unknown)}, wanted some of {', '.join(names)}")
    return dict(settings)


def default_layer(config: PretrainedConfig) -> int:
    """The layer to edit; for a model without a published one, at the depth that is usual for its kind."""
    published = known(config)
    if published is not None:
        return published.layer
    text = config.get_text_config()
    return round(_UNKNOWN_DEPTH.get(text.model_type, _FALLBACK_DEPTH) * text.num_hidden_layers)


def default_settings(config: PretrainedConfig) -> ValueSettings:
    """How δ is optimised, unless told otherwise."""
    published = known(config)
    if published is not None:
        return published.settings
    return _GPT2 if config.get_text_config().model_type in ("gpt2", "gptj", "gpt_neox") else _LLAMA
