"""Closing: from keys and values to updates of one layer or, in turn, of several.

At the i-th of n edit layers, what is still missing of δ is divided by the n − i + 1 layers left, or by a power of that,
and the keys are those of the model with the layers below edited (Meng et al. 2023, algorithm 1). A single layer takes
all of it, and the last one all of a first token's own value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..kernels import prefixed_solve
from ..methods import Column, Factors, Keys, Method, close
from ..models.fingerprint import Fingerprint
from ..models.runner import Runner
from ..search.keys import Trail
from ..search.search import Search, Solved
from ..updates.delta import Delta, LowRank
from .geometry import Geometry
from .guard import Guard, largest_harmless
from .history import History
from .walk import Walk


@dataclass
class Closed:
    """Updates by layer, and what became of every edit in them."""

    factors: dict[int, Factors]
    weight_norms: dict[int, float]
    # Of every edit: the share of what is wanted behind the prompt alone that is added there; None where nothing is, or
    # no row is of the prompt alone.
    arrived_bare: list[float | None]
    missed: list[float]  # of every edit: ‖added − wanted‖ / ‖wanted‖ over its columns; 0 where nothing is wanted
    columns: dict[int, tuple[Tensor, Tensor]]  # of every layer: u and k of all columns
    first_tokens: list[bool]  # of every column: whether it was solved with C + λ C₁
    limits: dict[int, float | None]  # ‖Δ‖ / ‖W‖ of one edit in a layer above which a collapse is predicted

    @property
    def condition(self) -> float:
        return max(factors.condition for factors in self.factors.values())


@dataclass(frozen=True)
class _AtLayer:
    """The rows of one edit at one layer, or of its bare request."""

    keys: Tensor  # (rows, d_ff)
    arrived: Tensor | None  # (rows, d) what has been added so far to what the layer puts out; None for nothing


_Walked = tuple[Walk, list[tuple[int, bool]]]
"""A walk, and which edit each of its trails is of: its rows, or (true) those of its bare request."""


@dataclass
class Closing:
    """Makes the updates of a method; what stays the same from one group of edits to the next."""

    runner: Runner
    method: Method
    layers: Mapping[int, Geometry]  # by edit layer, ascending
    guard: Guard
    history: History | None = None  # of the model as it is given; later groups are then remembered as well
    # u and k of earlier groups by layer, where they are remembered, and which of them are of first tokens.
    _earlier: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict, init=False, repr=False)
    _first_tokens: list[bool] = field(default_factory=list, init=False, repr=False)

    def close(self, solved: Sequence[Solved], search: Search) -> Closed:
        """The closed form for these edits together, held where that would be too large, unless the guard is off."""
        solved = self._asked_for(solved, self.reach(len(solved)))
        if len(self.layers) > 1:
            return self._close_on_the_way(solved, search, held=True)
        (layer,) = self.layers
        norm = self._weight_norm(layer)
        columns = self._columns_here(layer, solved)
        return self._closed_here(layer, solved, columns, self._solve(layer, solved, *columns, norm), norm)

    def close_each(self, solved: Sequence[Solved], search: Search) -> list[Closed]:
        """The same for every edit alone, and never held."""
        solved = self._asked_for(solved, self.reach(1))
        if len(self.layers) > 1:
            return [self._close_on_the_way([each], search, held=False) for each in solved]
        (layer,) = self.layers
        norm = self._weight_norm(layer)
        # One solve for all: with a single right-hand side it is bound by latency.
        columns = self._columns_here(layer, solved)
        found = []
        for i, each in enumerate(solved):
            u, keys, residuals = (t[i :: len(solved)] for t in columns)
            factors = self._solve(layer, [each], u, keys, residuals, None)
            found.append(self._closed_here(layer, [each], (u, keys), factors, norm))
        return found

    def reach(self, edits: int) -> float:
        """How many times the δ of edits made together is asked for: of one layer once, which has all of it to carry."""
        return self.method.reach_of(edits + self.earlier_edits) if len(self.layers) > 1 else 1.0

    def remember(self, closed: Closed) -> None:
        """Keep the columns of updates that are about to be applied, where the method or a history asks for it."""
        if self.method.remembers or self.history is not None:
            for layer, columns in closed.columns.items():
                self._earlier_at(layer).append(columns)
            self._first_tokens += closed.first_tokens

    @property
    def earlier_edits(self) -> int:
        """How many are remembered, those of the history included."""
        return len(self.history or ()) + len(self._first_tokens) // len(self.method.columns)

    def history_by_now(self) -> History:
        """Of all that is remembered."""
        keys = {}
        for layer in self.layers:
            known = [k.cpu() for _, k in self._earlier_at(layer)]
            keys[layer] = (
                torch.cat(known) if known else torch.empty(0, self.runner.weight(layer).shape[1], device="cpu")
            )
        before = [] if self.history is None else self.history.first_tokens.tolist()
        first_tokens = torch.tensor([*before, *self._first_tokens], dtype=torch.bool, device="cpu")
        fingerprint = Fingerprint.of(self.runner, min(self.layers))
        return History(fingerprint, keys, first_tokens, len(self.method.columns))

    def _earlier_at(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        if layer not in self._earlier:
            self._earlier[layer] = []
            if self.history is not None and len(self.history):
                keys = self.history.keys[layer].to(self.runner.device)
                flags = self.history.first_tokens.tolist()
                self._earlier[layer].append((self._solved_for(keys.split(1), flags, self.layers[layer])[1], keys))
        return self._earlier[layer]

    def delta(self, closed: Closed) -> Delta:
        """The Delta of updates, in fp32 (fp64 for an fp64 model)."""
        return Delta({self.runner.weight_name(layer): self._update(f) for layer, f in closed.factors.items()})

    @staticmethod
    def _asked_for(solved: Sequence[Solved], reach: float) -> Sequence[Solved]:
        """With `reach` times their δ; a first token's own one, which is shortened already, stays as it is."""
        if reach == 1:
            return solved
        return [replace(each, value=replace(each.value, delta=reach * each.value.delta)) for each in solved]

    def _closed_here(
        self, layer: int, solved: Sequence[Solved], columns: Sequence[Tensor], factors: Factors, norm: float
    ) -> Closed:
        shares = []
        for each in solved:
            key = (each if each.bare is None else each.bare).keys[0]
            shares.append(self._share_bare(each, factors.left @ (factors.right @ key.to(factors.right.dtype))))
        return Closed(
            {layer: factors},
            {layer: norm},
            shares,
            factors.missed.tolist(),
            {layer: (columns[0], columns[1])},
            self._apart(solved),
            {layer: self.layers[layer].limit},
        )

    def _close_on_the_way(self, solved: Sequence[Solved], search: Search, *, held: bool) -> Closed:
        layers = list(self.layers)
        walks = self._walks(solved, search)
        closed = Closed({}, {}, [], [], {}, self._apart(solved), {})
        # The search may have been for more layers than these.
        start = _trail(solved[0], False).first
        for number, layer in enumerate(layers):
            for walk, _ in walks:
                walk.through(start, layer + 1, keep=True)
            start = layer + 1
            own = self.method.arrival == "here" or (self.method.arrival == "ahead" and layer == layers[-1])
            ahead = None if own else self._ahead(walks, solved, layer)
            rows, bare = _at_layer(walks, solved, layer)
            columns = self._columns(layer, solved, rows, bare, len(layers) - number, ahead)
            norm = self._weight_norm(layer)
            factors = self._solve(layer, solved, *columns, norm if held else None)
            for walk, _ in walks:
                walk.add(self._update(factors))
            closed.factors[layer], closed.weight_norms[layer] = factors, norm
            closed.columns[layer], closed.limits[layer] = (columns[0], columns[1]), self.layers[layer].limit
        for each, arrived, arrived_bare in zip(solved, *_arrived(walks, solved, layers[-1]), strict=True):
            off, wanted = [], []
            for column in self.method.columns:
                own_bare = arrived_bare if column.at == "unprefixed" else None
                added = arrived if own_bare is None else own_bare
                wanted.append(self._wanted(column, each, own_bare))
                off.append(_averaged(column.at, added, each, own_bare is not None).mean(0) - wanted[-1])
            asked = float(torch.stack(wanted).norm())
            closed.missed.append(float(torch.stack(off).norm()) / asked if asked else 0.0)
            closed.arrived_bare.append(self._share_bare(each, (arrived if arrived_bare is None else arrived_bare)[0]))
        return closed

    def _walks(self, solved: Sequence[Solved], search: Search) -> list[_Walked]:
        """The edits' rows and, behind them, those of their bare requests, by what their contexts stand behind."""
        found = []
        for head in dict.fromkeys(each.head for each in solved):
            places = [(i, False) for i, each in enumerate(solved) if each.head == head]
            places += [(i, True) for i, _ in places if solved[i].bare is not None]
            trails = [_trail(solved[i], bare) for i, bare in places]
            found.append((Walk(self.runner, search.contexts_behind(head), trails), places))
        return found

    def _ahead(
        self, walks: Sequence[_Walked], solved: Sequence[Solved], layer: int
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """(d,) of every edit's first row and of its bare one: what has been added so far to the last layer's output."""
        last = max(self.layers)
        found = []
        for walk, places in walks:
            after = walk.ahead(layer + 1, last + 1)
            before = [_trail(solved[i], bare).put_out[last][0] for i, bare in places]
            found.append([_difference(now[0], then) for now, then in zip(after, before, strict=True)])
        return _by_edit(walks, found, len(solved))

    def _columns_here(self, layer: int, solved: Sequence[Solved]) -> tuple[Tensor, Tensor, Tensor]:
        rows = [_AtLayer(each.keys, None) for each in solved]
        bare = [None if each.bare is None else _AtLayer(each.bare.keys, None) for each in solved]
        return self._columns(layer, solved, rows, bare, 1, None)

    def _columns(
        self,
        layer: int,
        solved: Sequence[Solved],
        rows: Sequence[_AtLayer],
        bare: Sequence[_AtLayer | None],
        left: int,
        ahead: tuple[Sequence[Tensor], Sequence[Tensor | None]] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """u (columns, d_ff), k_den (columns, d_ff) and what must be added to the values there (columns, d).

        In the order of `Factors`; `left` counts this layer and those that come after it.
        """
        geometry, wide = self.layers[layer], self._wide
        sources, at, residuals, first_token = [], [], [], []
        for column in self.method.columns:
            for i, each in enumerate(solved):
                own_bare = bare[i] if column.at == "unprefixed" else None
                one = rows[i] if own_bare is None else own_bare
                sources.append(_averaged(column.left, one.keys, each, own_bare is not None))
                at.append(None if column.at == column.left else _averaged(column.at, one.keys, each, False))
                first_token.append(own_bare is not None)
                residual = self._wanted(column, each, own_bare)
                if ahead is not None:
                    bare_ahead = None if own_bare is None else ahead[1][i]
                    residual = residual - (ahead[0][i] if bare_ahead is None else bare_ahead)
                elif one.arrived is not None:
                    residual = residual - _averaged(column.at, one.arrived, each, own_bare is not None).mean(0)
                if own_bare is not None and left > 1:
                    residual = torch.zeros_like(residual)  # it waits for the last layer
                residuals.append(residual if left == 1 else residual / left**self.method.sharing)
        means, u = self._solved_for(sources, first_token, geometry)
        if any(keys is not None for keys in at):
            # As they are, where there is but one: a mean would widen it.
            own = [m if keys is None else _mean(keys, wide) for m, keys in zip(means, at, strict=True)]
            means = torch.stack([t.to(torch.promote_types(wide, own[0].dtype)) for t in own])
        return u, means, torch.stack(residuals)

    def _solved_for(
        self, sources: Sequence[Tensor], first_token: Sequence[bool], geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        """The mean of every source, and u made of it."""
        parts = []
        for held in (False, True):
            places = [i for i, first in enumerate(first_token) if first == held]
            if not places:
                continue
            some = [sources[i] for i in places]
            if held and geometry.held is not None:
                factor: Tensor | None = geometry.held
            else:
                factor = geometry.factor_of(self.method.added_to_moment, some[0].shape[1], some[0].device)
            groups = torch.cat([torch.full((len(k),), i, device=k.device) for i, k in enumerate(some)])
            keys = torch.cat(some).to(self._wide)
            if self.method.null_space is None:
                mean, u, _ = prefixed_solve(keys, groups, len(some), factor)
            else:
                mean, _, _ = prefixed_solve(keys, groups, len(some), None)
                mean = mean.to(torch.float64)
                u = mean @ geometry.projection(self.method.null_space, keys.shape[1], keys.device)
            parts.append((places, mean, u))
        if len(parts) == 1:
            return parts[0][1], parts[0][2]
        order = torch.tensor([i for places, _, _ in parts for i in places], device=sources[0].device).argsort()
        return torch.cat([mean for _, mean, _ in parts])[order], torch.cat([u for _, _, u in parts])[order]

    def _wanted(self, column: Column, solved: Solved, bare: object) -> Tensor:
        """(d,) what is to be added to the value at a column's key."""
        if bare is not None and column.at == "unprefixed" and solved.bare is not None:
            return solved.bare.value.delta
        delta = solved.value.delta
        if column.residual == "delta":
            return delta
        return solved.unprefixed_value.to(self._wide) + delta - solved.mean_value.to(self._wide)

    def _share_bare(self, solved: Solved, added: Tensor) -> float | None:
        """How much of what is wanted behind the prompt alone is in what is added (d,) at the edit's first row there."""
        if solved.bare is None and not solved.starts_bare:
            return None
        wanted = self._wanted(self.method.columns[0], solved, None) if solved.bare is None else solved.bare.value.delta
        wanted = wanted.to(added.dtype)
        asked = float(wanted @ wanted)
        return float(wanted @ added) / asked if asked else None

    def _solve(
        self, layer: int, solved: Sequence[Solved], u: Tensor, keys: Tensor, residuals: Tensor, norm: float | None
    ) -> Factors:
        earlier = self._earlier_at(layer)
        if earlier:
            u = torch.cat([u, *(e[0].to(u.dtype) for e in earlier)])
            keys = torch.cat([keys, *(e[1].to(keys.dtype) for e in earlier)])
            residuals = torch.cat([residuals, residuals.new_zeros(len(u) - len(residuals), residuals.shape[1])])
        before = len(u) - len(self.method.columns) * len(solved)
        penalty: float | Tensor = self.method.penalty
        if ridge := self.method.ridge_of(len(solved) + before // len(self.method.columns)):
            apart = self._apart(solved)
            if before:
                apart += [] if self.history is None else self.history.first_tokens.tolist()
                apart += self._first_tokens
            penalty = ridge * _mean_diagonals(u, keys, apart) + penalty
        return close(
            u,
            keys,
            residuals,
            columns=len(self.method.columns),
            earlier=before,
            penalty=penalty,
            harmless=float("inf") if norm is None else largest_harmless(self.guard, norm, self.layers[layer].limit),
        )

    def _apart(self, solved: Sequence[Solved]) -> list[bool]:
        """Which columns are solved with C + λ C₁."""
        return [c.at == "unprefixed" and each.bare is not None for c in self.method.columns for each in solved]

    def _update(self, factors: Factors) -> LowRank:
        return LowRank(factors.left.to(self._wide).contiguous(), factors.right.to(self._wide).contiguous())

    def _weight_norm(self, layer: int) -> float:
        return float(torch.linalg.vector_norm(self.runner.weight(layer), dtype=torch.float64))

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.runner.dtype, torch.float32)


def _mean_diagonals(u: Tensor, keys: Tensor, apart: Sequence[bool]) -> Tensor:
    """(columns,) fp64: the mean uᵀ k of columns, of those that are solved with C and with C + λ C₁ apart.

    The latter's are a hundredth of the others'.
    """
    diagonal = (u.to(torch.float64) * keys.to(torch.float64)).sum(1).abs()
    those = torch.tensor(apart, device=u.device)
    means = [diagonal[some].mean() if bool(some.any()) else diagonal.new_zeros(()) for some in (~those, those)]
    return torch.where(those, means[1], means[0])


def _trail(solved: Solved, bare: bool) -> Trail:
    trail = solved.bare.trail if bare and solved.bare is not None else solved.trail
    if trail is None:
        raise RuntimeError("an edit of several layers was solved for one")
    return trail


def _at_layer(
    walks: Sequence[_Walked], solved: Sequence[Solved], layer: int
) -> tuple[list[_AtLayer], list[_AtLayer | None]]:
    """Every edit's rows, and those of its bare request, at the edit layer that was passed last."""
    keys, bare_keys = _by_edit(walks, [walk.keys() for walk, _ in walks], len(solved))
    arrived, bare_arrived = _arrived(walks, solved, layer)
    bare = [
        None if key is None or added is None else _AtLayer(key, added)
        for key, added in zip(bare_keys, bare_arrived, strict=True)
    ]
    return [_AtLayer(*pair) for pair in zip(keys, arrived, strict=True)], bare


def _arrived(
    walks: Sequence[_Walked], solved: Sequence[Solved], layer: int
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(rows, d) of every edit, and of its bare request: what that layer puts out more than before the edit."""
    found = []
    for walk, places in walks:
        outs = zip(places, walk.put_out(), strict=True)
        found.append([_difference(out, _trail(solved[i], bare).put_out[layer]) for (i, bare), out in outs])
    return _by_edit(walks, found, len(solved))


def _difference(now: Tensor, before: Tensor) -> Tensor:
    wide = torch.promote_types(now.dtype, torch.float32)
    return now.to(wide) - before.to(wide)


def _by_edit(
    walks: Sequence[_Walked], found: Sequence[Sequence[Tensor]], count: int
) -> tuple[list[Tensor], list[Tensor | None]]:
    """What was found on all walks, sorted into that of every edit and that of its bare request."""
    rows: dict[int, Tensor] = {}
    bare: dict[int, Tensor] = {}
    for (_, places), tensors in zip(walks, found, strict=True):
        for (i, is_bare), tensor in zip(places, tensors, strict=True):
            (bare if is_bare else rows)[i] = tensor
    return [rows[i] for i in range(count)], [bare.get(i) for i in range(count)]


def _averaged(keys: Keys, rows: Tensor, solved: Solved, is_bare: bool) -> Tensor:
    """The rows (n, …) of an edit whose mean is asked for; of a bare request there is only one."""
    prompt = 1 if solved.starts_bare else 0
    if is_bare or keys == "mean":
        return rows
    if keys == "contexts":
        return rows[prompt:]
    if keys == "unprefixed":
        return rows[:1]
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    behind = wide[prompt:].mean(0, keepdim=True)
    return (wide[:1] + behind) / 2 if prompt else behind


def _mean(rows: Tensor, wide: torch.dtype) -> Tensor:
    return rows[0] if len(rows) == 1 else rows.to(wide).mean(0)
