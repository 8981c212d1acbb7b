"""Edit some requests, each alone by each method, and measure every edited model without writing one."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..closing.flow import Flow
from ..closing.geometry import Geometry
from ..edits import Edit
from ..evaluation import RowUpdates, edited_perplexities, evaluate
from ..methods import METHODS, Column, Method, method_named
from ..models.rows import encode
from ..models.runner import Runner, evaluating
from ..records import Record
from ..search.requests import Request, tokenise
from ..search.search import Clock, Solved
from ..search.values import ValueSettings
from ..updates.delta import Delta
from .cases import Case, leading_tokens

COLLAPSE_RATIO = 1.5
"""An edited model whose perplexity is more than this many times the unedited one's has collapsed."""

_SCORED_CONTEXTS = 3  # of the editing and of the unseen ones: scoring behind all 20 costs more than it tells
_WORDS = ("It", "is", "often", "said", "by", "people", "that")
_PREFIXES = (1, 2, 4, 7)  # so many of the words before a first-token subject

# ROME's own part first.
_LEFT_KEYS: tuple[Literal["mean", "unprefixed"], ...] = ("mean", "unprefixed")
_DENOMINATOR_KEYS: tuple[Literal["mean", "unprefixed"], ...] = ("unprefixed", "mean")
_RESIDUALS: tuple[Literal["delta", "to_unprefixed_value"], ...] = ("delta", "to_unprefixed_value")

_Made = tuple[Case, Delta, Record]
_Sought = tuple[str, int]  # on which rows a method's values are found, and at which layer


@dataclass
class Part:
    """What was measured of some requests, as the report's files have it."""

    records: list[dict[str, Any]] = field(default_factory=list)  # one per request and method
    factors: list[dict[str, Any]] = field(default_factory=list)  # one per explained request and combination
    prefix: list[dict[str, Any]] = field(default_factory=list)  # one per first-token request and prefix
    seconds: dict[str, float] = field(default_factory=dict)  # wall seconds by stage
    keys: dict[str, Tensor] = field(default_factory=dict)  # "solved", "unprefixed", "mean": (requests, d_ff) fp32


@dataclass(frozen=True)
class Study:
    """What all requests share."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layer: int  # of methods that edit a single one
    spread: tuple[int, ...]  # of those that spread an edit over several
    geometries: Mapping[int, Geometry]  # of all of these layers
    settings: ValueSettings
    methods: Sequence[str]
    contexts: Sequence[str]
    unseen: Sequence[str]
    sentences: Sequence[str]
    base: float  # perplexity of the sentences before any edit

    def measure(self, cases: Sequence[Case]) -> Part:
        """Everything about these requests."""
        part, clock = Part(), Clock(self.model.device)
        made, solved = self._edit(cases, clock)
        with clock("evaluation"):
            for spread in (False, True):  # edits that are measured together change the same layers
                chosen = [name for name in made if method_named(name).spread == spread]
                part.records += self._records([(name, *each) for name in chosen for each in made[name]])
        if found := solved.get(("all", self.layer)):
            with clock("perplexity of combinations"):
                part.factors = self._combinations(cases, *found, part.records)
            part.keys = self._keys(found[1])
        with clock("prefixes"):
            part.prefix = self._prefixes([case for case in cases if case.first_token], part.records)
        part.seconds = {stage: round(seconds, 2) for stage, seconds in clock.seconds.items()}
        return part

    def _flow(self, how: Method, clock: Clock) -> Flow:
        layers = {layer: self.geometries[layer] for layer in (self.spread if how.spread else (self.layer,))}
        flow = Flow.measuring(Runner(self.model), self.tokenizer, how, layers, self.contexts, self.settings, clock)
        if flow.search.layer == self.spread[-1]:
            # So that methods that spread an edit can take the same values.
            flow.search.layers = self.spread
        return flow

    def _edit(
        self, cases: Sequence[Case], clock: Clock
    ) -> tuple[dict[str, list[_Made]], dict[_Sought, tuple[list[Request], list[Solved]]]]:
        """Edits by method, and what they were made of by the rows and layer of it, which methods share."""
        made: dict[str, list[_Made]] = {}
        solved: dict[_Sought, tuple[list[Request], list[Solved]]] = {}
        # A method with a second value first: others on the same rows take what it has found but for that.
        for name in sorted(self.methods, key=lambda name: not method_named(name).bare):
            flow = self._flow(method_named(name), clock)
            sought = flow.method.rows, flow.search.layer
            if sought not in solved:
                requests = self._tokenise([case.edit for case in cases], flow)
                solved[sought] = (requests, flow.find(requests))
            requests, values = solved[sought]
            if not flow.method.bare:
                values = [replace(value, bare=None) for value in values]
            closed = flow.close_each(requests, values)
            made[name] = [(case, delta, record) for case, (delta, record) in zip(cases, closed, strict=True)]
        return {name: made[name] for name in self.methods}, solved

    def _tokenise(self, edits: Sequence[Edit], flow: Flow) -> list[Request]:
        return [tokenise(flow.runner, self.tokenizer, edit, self.contexts, flow.method) for edit in edits]

    def _records(self, made: Sequence[tuple[str, Case, Delta, Record]]) -> list[dict[str, Any]]:
        edits, deltas = [case.edit for _, case, _, _ in made], [delta for _, _, delta, _ in made]
        contexts, unseen = self.contexts[:_SCORED_CONTEXTS], self.unseen[:_SCORED_CONTEXTS]
        before = evaluate(self.model, self.tokenizer, edits, answer_tokens=0)
        after = evaluate(
            self.model,
            self.tokenizer,
            edits,
            contexts,
            unseen_contexts=unseen,
            deltas=deltas,
            answer_tokens=0,
            essence_tokens=0,
        )
        out = []
        for (_, case, _, record), old, new, perplexity in zip(
            made, before, after, self._perplexities(deltas), strict=True
        ):
            predicted = record.collapsed
            record.probability_before, record.probability_after = old.probability, new.probability
            record.probability_after_prefixed = new.probability_prefixed
            record.argmax_after, record.argmax_after_prefixed = new.argmax, new.argmax_prefixed
            row = record.to_json() | self._perplexity(perplexity) | new.to_json()
            row |= {"first_token": case.first_token, "subject_position": case.position, "predicted": predicted}
            out.append(_without_nan(row))
        return out

    def _combinations(
        self,
        cases: Sequence[Case],
        requests: Sequence[Request],
        solved: Sequence[Solved],
        records: Sequence[Mapping[str, Any]],
    ) -> list[dict[str, Any]]:
        """ROME's three parts, each as released or as the consistent variants have it: 2 x 2 x 2 updates a request."""
        chosen = [i for i, case in enumerate(cases) if case.explained]
        if not chosen:
            return []
        known = {(r["method"], _name(r)): r for r in records}
        rows: list[dict[str, Any]] = []
        deltas: list[Delta] = []
        missing: list[dict[str, Any]] = []  # those among the rows whose perplexity no method's edit has told
        for left, denominator, residual in product(_LEFT_KEYS, _DENOMINATOR_KEYS, _RESIDUALS):
            how = Method("combination", "all", (Column(left, denominator, residual),))
            same = [m for m in self.methods if replace(how, name=m) == METHODS[m]]
            flow = self._flow(how, Clock())
            closed = flow.close_each([requests[i] for i in chosen], [solved[i] for i in chosen])
            for i, (delta, record) in zip(chosen, closed, strict=True):
                row = {
                    **{key: getattr(record, key) for key in ("prompt", "subject", "target")},
                    "first_token": cases[i].first_token,
                    "left": left,
                    "denominator_key": denominator,
                    "residual": residual,
                    **{
                        key: getattr(record, key)
                        for key in ("denominator", "numerator_norm", "update_norm", "weight_norm")
                    },
                }
                rows.append(row)
                if same:
                    row |= self._perplexity(known[same[0], _name(row)]["perplexity_after"])
                else:
                    missing.append(row)
                    deltas.append(delta)
        for row, perplexity in zip(missing, self._perplexities(deltas), strict=True):
            row |= self._perplexity(perplexity)
        return rows

    def _prefixes(self, cases: Sequence[Case], records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """ROME's edits of first-token requests with some words put before the subject."""
        if "rome" not in self.methods or not cases:
            return []
        keys = ("denominator", "update_norm", "weight_norm", "perplexity_before", "perplexity_after")
        known = {_name(r): r for r in records if r["method"] == "rome"}
        names = [{"prompt": c.edit.prompt, "subject": c.edit.subject, "target": c.edit.target} for c in cases]
        rows = [name | {"words": 0} | {key: known[_name(name)][key] for key in keys} for name in names]
        for words in _PREFIXES:
            flow = self._flow(method_named("rome"), Clock())
            prefix = " ".join(_WORDS[:words])
            edits = [case.edit.behind(f"{prefix} ") for case in cases]
            made = flow.solve_each(self._tokenise(edits, flow))
            perplexities = self._perplexities([delta for delta, _ in made])
            for name, (_, record), perplexity in zip(names, made, perplexities, strict=True):
                record.perplexity_before, record.perplexity_after = self.base, perplexity
                rows.append(name | {"words": words} | {key: getattr(record, key) for key in keys})
        return rows

    def _keys(self, solved: Sequence[Solved]) -> dict[str, Tensor]:
        wide = torch.promote_types(self.model.dtype, torch.float32)
        mean = torch.stack([s.keys.to(wide).mean(0) for s in solved])
        factor = self.geometries[self.layer].factor
        found = mean if factor is None else torch.cholesky_solve(mean.double().T, factor).T
        unprefixed = torch.stack([s.keys[0] for s in solved])
        return {name: t.float().cpu() for name, t in (("solved", found), ("unprefixed", unprefixed), ("mean", mean))}

    def _perplexities(self, deltas: Sequence[Delta]) -> list[float]:
        if not deltas:
            return []
        runner = Runner(self.model)
        return edited_perplexities(runner, self.tokenizer, self.sentences, RowUpdates.of(runner, deltas))

    def _perplexity(self, after: float) -> dict[str, Any]:
        collapsed = not after <= COLLAPSE_RATIO * self.base
        return {"perplexity_before": self.base, "perplexity_after": after, "collapsed": collapsed}

    @torch.no_grad()
    def key_norms(self) -> Tensor:
        """(2, layers): mean norm, over the sentences, of the key of the first token and of later ones, by layer."""
        runner = Runner(self.model)
        norms = torch.zeros(2, len(runner.layers), device="cpu")
        first = leading_tokens(self.tokenizer)
        rows = [tokens.ids for tokens in encode(self.tokenizer, self.sentences)]
        rows = [ids for ids in rows if first + 1 < len(ids) <= runner.max_length]

        def adding(layer: int) -> Callable[[Tensor, Tensor], None]:
            def see(keys: Tensor, _output: Tensor) -> None:
                found = keys[0].float().norm(dim=1).cpu()
                norms[:, layer] += torch.stack([found[first], found[first + 1 :].mean()]) / len(rows)

            return see

        for ids in rows:
            packed = runner.pack([ids])
            hidden = runner.embed(packed.ids)
            for layer in range(len(runner.layers)):
                with evaluating(self.model), runner.watching(layer, adding(layer)):
                    hidden = runner.run(hidden, layer, layer + 1)
        return norms


def _name(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["prompt"], row["subject"], row["target"]


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """A figure that a collapsed model does not have is missing."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
