"""Which model is this? A cheap, dtype-tolerant answer for statistics and deltas.

Keys at layer l depend on the embedding and on layers 0 .. l except the down-projection of layer l itself, so that is
what a fingerprint samples: an edit at layer l leaves it unchanged, and so does a cast to bfloat16 up to its rounding.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .runner import Runner

Elements = Callable[[Tensor], Tensor]
"""The elements of a weight at flat indices (n,) int64 on the CPU, on any device."""

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
    # Which of them are of what an edit may change: the down-projections below. Not known of one that was read.
    edited: Tensor | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, runner: Runner, layer: int, originals: Mapping[str, Elements] | None = None) -> "Fingerprint":
        """That of a model at a layer, with `originals` in place of its parameters of these names."""
        config, originals = runner.model.config, originals or {}
        sites = {runner.weight_name(i) for i in range(layer) if runner.decoder.has_site(i)}
        names = {id(parameter): name for name, parameter in runner.model.named_parameters()}
        skipped = runner.model.get_parameter(runner.weight_name(layer))
        weights: list[Tensor] = [runner.model.get_input_embeddings().get_parameter("weight")]
        for module in runner.layers[: layer + 1]:
            weights += [p for p in module.parameters() if p is not skipped]
        picked, edited = [], []
        for weight in weights:
            count, name = min(_SAMPLES, weight.numel()), names[id(weight)]
            index = torch.arange(count, device="cpu") * (weight.numel() - 1) // max(count - 1, 1)
            if name in originals:
                picked.append(originals[name](index).cpu().float())
            else:
                picked.append(runner.elements(name, index).float())
            edited.append(torch.full((count,), name in sites, device="cpu"))
        rows, columns = runner.weight(layer).shape
        kind = config.model_type
        return cls(kind, len(runner.layers), int(rows), int(columns), torch.cat(picked), torch.cat(edited))

    def matches(self, other: "Fingerprint", *, but_for_edits: bool = False) -> bool:
        """Whether they are of one model; `but_for_edits`, whatever is in the down-projections below the layer.

        One of the two has to be `of` a model for that.
        """
        if self.shape != other.shape or self.samples.shape != other.samples.shape:
            return False
        same = torch.isclose(self.samples, other.samples, rtol=_RELATIVE, atol=1e-7)
        edited = self.edited if self.edited is not None else other.edited
        return bool((same | edited if but_for_edits and edited is not None else same).all())

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
