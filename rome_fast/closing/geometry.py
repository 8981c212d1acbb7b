"""What the closed form of a layer is solved with: C or parts of it, made when a layer's turn comes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..methods import hold_first_tokens, project_on_null_space, raised_factor
from ..models.runner import Runner
from ..statistics import LayerStatistics, Statistics


@dataclass
class Geometry:
    """What the closed form of a layer is solved with."""

    factor: Tensor | None = None  # Cholesky factor of C; None for C = I
    held: Tensor | None = None  # of C + λ C₁, for the keys of first tokens; None for `factor`
    moment: Tensor | None = None  # C itself, for its null space; None for C = I
    limit: float | None = None  # ‖Δ‖ / ‖W‖ of one edit above which a collapse is predicted; None for the usual one
    _projection: tuple[float, Tensor] | None = field(default=None, repr=False)
    _raised: tuple[float, Tensor] | None = field(default=None, repr=False)

    def factor_of(self, added: float, width: int, device: torch.device) -> Tensor | None:
        """Of C + added · I, kept for the next call; None for I alone."""
        if not added:
            return self.factor
        if self._raised is None or self._raised[0] != added:
            self._raised = added, raised_factor(self.factor, added, width).to(device)
        return self._raised[1]

    def projection(self, threshold: float, width: int, device: torch.device) -> Tensor:
        """P of AlphaEdit, (d_ff, d_ff) fp64, kept for the next call."""
        if self._projection is None or self._projection[0] != threshold:
            moment = torch.eye(width, device=device) if self.moment is None else self.moment.to(device)
            self._projection = threshold, project_on_null_space(moment, threshold)
        return self._projection[1]


class Geometries(Mapping[int, Geometry]):
    """Those of several layers, from statistics of this very model; identities without any.

    Of a streamed model only the one asked for last is kept: factors are as large as layers.

    Raises StatisticsError for layers that there are no statistics of, and for those of another model.
    """

    def __init__(self, runner: Runner, layers: tuple[int, ...], statistics: Statistics | None) -> None:
        self._runner, self._layers = runner, layers
        self._entries: dict[int, LayerStatistics] = {}
        if statistics is not None:
            statistics.check_layers(layers)
            self._entries = {layer: statistics.for_layer(runner, layer) for layer in layers}
        self._made: dict[int, Geometry] = {}
        self._first_tokens: Mapping[int, LayerStatistics] = {}

    @property
    def first_tokens(self) -> Mapping[int, LayerStatistics]:
        """Second moments C₁ by layer, for the keys of first tokens."""
        return self._first_tokens

    @first_tokens.setter
    def first_tokens(self, moments: Mapping[int, LayerStatistics]) -> None:
        # What was made before is without them.
        self._first_tokens = moments
        self._made.clear()

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> Geometry:
        if layer not in self._made:
            if self._runner.stream is not None:
                self._made.clear()  # before the next one is made
            self._made[layer] = self._make(layer)
        return self._made[layer]

    def check(self) -> None:
        """Raise StatisticsError now where a layer's matrix cannot be solved with."""
        for layer in self._layers:
            self[layer]

    def _make(self, layer: int) -> Geometry:
        device, entry = self._runner.device, self._entries.get(layer)
        factor = None
        if entry is not None:
            # Of a copy, where the factor is not to be kept with the entry.
            factor = (entry if self._runner.stream is None else replace(entry, _factor=None)).factor(device)
        held = None
        if layer in self._first_tokens:
            held = hold_first_tokens(factor, self._first_tokens[layer].moment.to(device))
        if entry is None:
            return Geometry(factor, held)
        return Geometry(factor, held, entry.moment, entry.collapse_limit)
