"""What the rest of the package needs to know of an architecture."""

from abc import ABC, abstractmethod
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor, nn


class Family(ABC):
    """Where the parts of one architecture family are, and how one of its layers is called.

    A family qualifies when the MLP's down-projection output is added to the residual stream unchanged, so that
    adding δ to that output equals adding it to the layer's output.
    """

    model_types: ClassVar[tuple[str, ...]]
    projection_path: ClassVar[str]  # dotted path of the down-projection module, `{}` is the layer
    transposed: ClassVar[bool] = False  # True where the weight is stored (d_ff, d), as Conv1D does

    def past_argument(self, layer: nn.Module) -> str:
        """What a layer calls attention keys and values of the past; releases of transformers differ."""
        known = signature(layer.forward).parameters
        return next(name for name in ("cache", "past_key_values", "layer_past") if name in known)

    @abstractmethod
    def layers(self, model: Any) -> nn.ModuleList:
        """The decoder layers, first to last."""

    @abstractmethod
    def embed(self, model: Any, ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states (batch, time, d) that enter layer 0."""

    @abstractmethod
    def position_arguments(self, model: Any, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
        """Keyword arguments about positions that every layer of one pass shares."""

    @abstractmethod
    def head(self, model: Any, hidden: Tensor) -> Tensor:
        """Logits (…, vocabulary) of the last layer's hidden states (…, d)."""

    def projection(self, model: Any, layer: int) -> nn.Module:
        """The down-projection module of a layer."""
        return model.get_submodule(self.projection_path.format(layer))

    def weight_name(self, layer: int) -> str:
        return self.projection_path.format(layer) + ".weight"

    def oriented(self, weight: Tensor) -> Tensor:
        """The stored weight as a (d, d_ff) view."""
        return weight.T if self.transposed else weight
