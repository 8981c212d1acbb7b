"""Llama-like decoders: Llama, Mistral, Qwen2, Qwen3, SmolLM3."""

from typing import Any

from torch import Tensor, nn

from .base import Family


class LlamaLike(Family):
    model_types = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
    projection_path = "model.layers.{}.mlp.down_proj"

    def layers(self, model: Any) -> nn.ModuleList:
        return model.model.layers

    def embed(self, model: Any, ids: Tensor, positions: Tensor) -> Tensor:
        return model.model.embed_tokens(ids)

    def position_arguments(self, model: Any, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
        return {
            "position_ids": positions,
            "position_embeddings": model.model.rotary_emb(hidden, position_ids=positions),
        }

    def head(self, model: Any, hidden: Tensor) -> Tensor:
        return model.lm_head(model.model.norm(hidden))
