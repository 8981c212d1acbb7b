"""Architectures: any decoder of transformers, none of them by its name."""

from transformers import PretrainedConfig

from ..errors import ModelError
from .decoder import Decoder, is_transposed

__all__ = ["Decoder", "check_known", "is_transposed", "known_model_types"]


def known_model_types() -> tuple[str, ...]:
    return ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2", "gptj")


def check_known(config: PretrainedConfig) -> None:
    """Raise ModelError, which lists the known ones, for any other architecture."""
    if config.model_type not in known_model_types():
        known = ", ".join(known_model_types())
        raise ModelError(f"model: got architecture {config.model_type!r}, wanted one of {known}")
