"""GPT-2: learned positions, and down-projections stored transposed (Conv1D)."""

from typing import Any

from torch import Tensor, nn

from .base import Family


class GPT2(Family):
    model_types = ("gpt2",)
    projection_path = "transformer.h.{}.mlp.c_proj"
    transposed = True

    def layers(self, model: Any) -> nn.ModuleList:
        return model.transformer.h

    def embed(self, model: Any, ids: Tensor, positions: Tensor) -> Tensor:
        return model.transformer.wte(ids) + model.transformer.wpe(positions)

    def position_arguments(self, model: Any, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
        return {}

    def head(self, model: Any, hidden: Tensor) -> Tensor:
        return model.lm_head(model.transformer.ln_f(hidden))
