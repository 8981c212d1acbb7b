"""GPT-J: attention and MLP side by side, rotary positions inside every layer, and a head with a bias."""

from typing import Any

from torch import Tensor, nn

from .base import Family


class GPTJ(Family):
    model_types = ("gptj",)
    projection_path = "transformer.h.{}.mlp.fc_out"
    past_argument = "layer_past"

    def layers(self, model: Any) -> nn.ModuleList:
        return model.transformer.h

    def embed(self, model: Any, ids: Tensor, positions: Tensor) -> Tensor:
        return model.transformer.wte(ids)

    def position_arguments(self, model: Any, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
        return {"position_ids": positions}

    def head(self, model: Any, hidden: Tensor) -> Tensor:
        return model.lm_head(model.transformer.ln_f(hidden))
