"""GPT-J: attention and MLP side by side, rotary positions, and a head with a bias."""

from typing import Any

from torch import Tensor, nn

from .base import Family


class GPTJ(Family):
    model_types = ("gptj",)
    projection_path = "transformer.h.{}.mlp.fc_out"

    def layers(self, model: Any) -> nn.ModuleList:
        return model.transformer.h

    def embed(self, model: Any, ids: Tensor, positions: Tensor) -> Tensor:
        return model.transformer.wte(ids)

    def position_arguments(self, model: Any, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
        arguments: dict[str, Any] = {"position_ids": positions}
        # Earlier releases of transformers rotate inside every layer, by the positions alone.
        if hasattr(model.transformer, "rotary_emb"):
            arguments["position_embeddings"] = model.transformer.rotary_emb(hidden, position_ids=positions)
        return arguments

    def head(self, model: Any, hidden: Tensor) -> Tensor:
        return model.lm_head(model.transformer.ln_f(hidden))
