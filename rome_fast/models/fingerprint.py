"""Which model is this? A cheap, dtype-tolerant answer for statistics and deltas.

Keys at layer l depend on the embedding and on layers 0 .. l except the down-projection of layer l itself, so that is
what a fingerprint samples: an edit at layer l leaves it unchanged, and so does a cast to bfloat16 up to its rounding.
"""

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from .runner import Runner

_SAMPLES = 8  # elements per parameter
# A cast to bf16 moves a value by at most 2⁻⁹ of itself, twice for two models cast from one source.
_RELATIVE = 2.0**-7


@dataclass(frozen=True)
class Fingerprint:
    """Shape of the model and a sample of the weights that a layer's keys depend on."""

    model_type: str
    layer_count: int
    hidden_size: int
    key_size: int
    samples: Tensor  # fp32, on the CPU

    @classmethod
    def of(cls, runner: Runner, layer: int) -> "Fingerprint":
        config = runner.model.config
        names = {id(parameter): name for name, parameter in runner.model.named_parameters()}
        skipped = runner.model.get_parameter(runner.weight_name(layer))
        weights: list[Tensor] = [runner.model.get_input_embeddings().get_parameter("weight")]
        for module in runner.layers[: layer + 1]:
            weights += [p for p in module.parameters() if p is not skipped]
        picked = []
        for weight in weights:
            count = min(_SAMPLES, weight.numel())
            index = torch.arange(count, device="cpu") * (weight.numel() - 1) // max(count - 1, 1)
            picked.append(runner.elements(names[id(weight)], index).float())
        rows, columns = runner.weight(layer).shape
        return cls(config.model_type, len(runner.layers), int(rows), int(columns), torch.cat(picked))

    def matches(self, other: "Fingerprint") -> bool:
        return (
            self.shape == other.shape
            and self.samples.shape == other.samples.shape
            and torch.allclose(self.samples, other.samples, rtol=_RELATIVE, atol=1e-7)
        )

    @property
    def shape(self) -> tuple[str, int, int, int]:
        return (self.model_type, self.layer_count, self.hidden_size, self.key_size)

    def __str__(self) -> str:
        kind, layers, hidden, width = self.shape
        digest = hashlib.sha256(self.samples.numpy().tobytes()).hexdigest()[:12]
        return f"{kind}-{layers}x{hidden}x{width}-{digest}"

    def to_json(self) -> str:
        return json.dumps({"shape": list(self.shape), "samples": self.samples.tolist()})

    @classmethod
    def from_json(cls, text: str) -> "Fingerprint":
        fields = json.loads(text)
        kind, layers, hidden, width = fields["shape"]
        return cls(str(kind), int(layers), int(hidden), int(width), torch.tensor(fields["samples"], device="cpu"))
