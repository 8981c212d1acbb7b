"""Requests edited alone at one layer with some settings, and what each of those edits does; no weight is written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..closing.flow import Flow
from ..closing.geometry import Geometry
from ..edits import Edit
from ..evaluation import RowUpdates, edited_perplexities, evaluate
from ..methods import method_named
from ..models.runner import Runner
from ..runs.parts import Parts
from ..search.requests import tokenise
from ..search.values import ValueSettings
from .objective import Figures

CONTEXTS = 3
"""Texts that the edits were not made with, behind which their prompts are asked."""


@dataclass(frozen=True, order=True)
class Candidate:
    """A layer, and the two settings that decide how large an edit becomes."""

    layer: int
    weight_decay: float
    clamp: float

    @classmethod
    def of(cls, layer: int, settings: ValueSettings) -> "Candidate":
        return cls(layer, float(settings.weight_decay), float(settings.clamp))

    def settings(self, base: ValueSettings) -> ValueSettings:
        return replace(base, weight_decay=self.weight_decay, clamp=self.clamp)

    def __str__(self) -> str:
        return f"layer {self.layer}, weight decay {self.weight_decay:g}, clamp {self.clamp:g}"

    @property
    def file_name(self) -> str:
        return f"layer-{self.layer}-decay-{self.weight_decay:g}-clamp-{self.clamp:g}"


@dataclass
class Sweep:
    """What all candidates share."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    edits: Sequence[Edit]
    method: str
    base: ValueSettings  # of which a candidate changes two
    geometry_of: Callable[[int], Geometry]  # of a layer
    contexts: Sequence[str]
    unseen: Sequence[str]
    sentences: Sequence[str]
    perplexity: float  # of the sentences before any edit
    parts: Parts
    advance: Callable[[int], None]  # told how many edits are made, or found, by now
    done: int = 0
    _geometry: tuple[int, Geometry] | None = None  # of the layer measured last: those of all would not fit

    def measure(self, candidate: Candidate, start: int, stop: int) -> list[Figures]:
        """Figures of requests start .. stop - 1, out of the folder where they are there."""
        name = f"{candidate.file_name}-requests-{start}-{stop}"
        found = self.parts.get(name)
        if found is None:
            found = self.parts.keep(name, [f.to_json() for f in self._edit(candidate, self.edits[start:stop])])
        self.done += stop - start
        self.advance(self.done)
        return [Figures(**each) for each in found]

    def _edit(self, candidate: Candidate, edits: Sequence[Edit]) -> list[Figures]:
        runner = Runner(self.model)
        flow = Flow.measuring(
            runner,
            self.tokenizer,
            method_named(self.method),
            {candidate.layer: self._geometry_at(candidate.layer)},
            self.contexts,
            candidate.settings(self.base),
        )
        made = flow.solve_each([tokenise(runner, self.tokenizer, edit, self.contexts, flow.method) for edit in edits])
        deltas = [delta for delta, _ in made]
        unseen = self.unseen[:CONTEXTS]
        asked: dict[str, Any] = {"unseen_contexts": unseen, "answer_tokens": 0, "essence_tokens": 0}
        after = evaluate(self.model, self.tokenizer, edits, deltas=deltas, **asked)
        perplexities = edited_perplexities(runner, self.tokenizer, self.sentences, RowUpdates.of(runner, deltas))
        return [
            Figures(
                probability=metrics.probability,
                probability_behind=metrics.probability_unseen or 0.0,
                argmax=float(metrics.argmax),
                efficacy=metrics.efficacy,
                efficacy_behind=metrics.efficacy_unseen,
                paraphrase=metrics.paraphrase,
                neighborhood=metrics.neighborhood,
                perplexity_ratio=perplexity / self.perplexity,
                update_ratio=record.update_norm / record.weight_norm,
            )
            for metrics, perplexity, (_, record) in zip(after, perplexities, made, strict=True)
        ]

    def _geometry_at(self, layer: int) -> Geometry:
        if self._geometry is None or self._geometry[0] != layer:
            self._geometry = (layer, self.geometry_of(layer))
        return self._geometry[1]
