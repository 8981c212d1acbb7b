"""Architecture families. A new one is one new file here and one entry in `FAMILIES`."""

from transformers import PretrainedConfig

from ..errors import ModelError
from .base import Family
from .gpt2 import GPT2
from .gptj import GPTJ
from .llama import LlamaLike

FAMILIES: tuple[Family, ...] = (LlamaLike(), GPT2(), GPTJ())


def known_model_types() -> tuple[str, ...]:
    return tuple(name for family in FAMILIES for name in family.model_types)


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model's configuration; ModelError lists the known ones for any other."""
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = ", ".join(known_model_types())
    raise ModelError(
        f"model: got architecture {config.model_type!r}, wanted one of {known}; "
        "a new family is one file in rome_fast/models"
    )
