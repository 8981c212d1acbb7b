"""A ledger's base model at work: it finds values, closes them, and holds the update, all beside its own weights."""

import json
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..closing.closing import Closing
from ..closing.effect import Effect, judge_drift
from ..closing.flow import Flow
from ..closing.geometry import Geometries
from ..closing.history import History
from ..closing.neighbours import tell_nearest
from ..closing.rebasing import rebased
from ..editor import checked_statistics
from ..edits import Edit
from ..errors import CheckpointError
from ..models.runner import evaluating
from ..opening.admission import admit_tokenizer, plain_modes
from ..opening.opening import Opened, check_weights, open_checkpoint
from ..result import EditResult
from ..runs.processes import ALONE
from ..search.requests import Request, tokenise
from ..search.search import Clock, Progress, Search, Solved
from ..statistics import Statistics, first_token_statistics
from ..updates import chains
from ..updates.delta import Delta
from ..updates.samples import Sample
from ..weights import Checkpoint, OnRead, stored_name
from .base import Base
from .entries import Entry


def open_base(
    stack: ExitStack,
    base: Base,
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    memory: int | str | None,
    device: str | torch.device | None,
    trust_remote_code: bool,
    on_read: OnRead | None,
) -> Opened:
    """The base model from its checkpoint, without what the ledger has written there last; raises CheckpointError.

    It is there until the stack is closed.
    """

    def layers(config: PretrainedConfig) -> Sequence[int]:
        # What has fewer of them is not the base, which is said of it when it is compared.
        count = config.get_text_config().num_hidden_layers
        return [layer for layer in base.layers if layer < count] or [count - 1]

    opened = open_checkpoint(
        stack,
        source,
        tokenizer,
        None,
        layers=layers,
        method=base.method,
        statistics="identity" if base.statistics is None else None,
        memory=memory,
        device=device,
        # Under a budget weights are as they are stored.
        dtype=getattr(torch, base.dtype) if memory is None else None,
        trust_remote_code=trust_remote_code,
        processes=ALONE,
        on_read=on_read,
    )
    directory = opened.source
    last = None if directory is None else last_written(base, directory)
    if directory is not None and last is not None:
        originals, faults = last.checked_originals()
        if faults:
            raise CheckpointError("; ".join(faults))
        checkpoint = Checkpoint.open(directory)
        for name in base.weights:
            if (stored := stored_name(checkpoint, name, opened.model)) in originals:
                opened.model.get_parameter(name).data.copy_(originals[stored])
    return opened


def last_written(base: Base, checkpoint: str | Path) -> chains.Recorded | None:
    """The last edit of a checkpoint, where it is one of the ledger."""
    last = next(reversed(chains.edits_of(checkpoint)), None)
    about = None if last is None else last.document().get("ledger")
    return last if isinstance(about, dict) and about.get("id") == base.id else None


def check_base(base: Base, opened: Opened) -> None:
    """Raise what `apply_edits` does for a model that cannot be edited, and ArgumentError for another than the base."""
    admit_tokenizer(opened.tokenizer, opened.model)
    base.check_model(opened.runner)
    base.check_tokenizer(opened.tokenizer)
    check_weights(opened.runner, base.layers)


class Working:
    """The base model of a ledger. `stack` is closed with it, for a model that is read while it runs."""

    def __init__(
        self, base: Base, opened: Opened, statistics: Statistics | Literal["identity"] | None, stack: ExitStack
    ) -> None:
        self.base, self.runner, self.tokenizer = base, opened.runner, opened.tokenizer
        weakref.finalize(self, stack.close)
        self.applied: Delta | None = None  # the one that the ledger has put into the model last
        self._statistics = statistics
        self._geometries: Geometries | None = None
        # What the model made of the contexts is kept from one call to the next.
        self._search: Search | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.runner.model

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """The model in this block as it was before the ledger's update, which is put back unless another one is there.

        Raises ArgumentError where it is not the base then, as with another edit in it.
        """
        delta = self.applied if self.applied is not None and self.applied.is_applied else None
        with plain_modes(), evaluating(self.model):
            if delta is not None:
                delta.revert(self.model)
            try:
                self.base.check_model(self.runner)
                yield
            finally:
                if delta is not None and self.applied is delta:
                    delta.apply(self.model)

    def find(
        self, edits: Sequence[Edit], progress: Progress | None, update: Delta | None = None
    ) -> tuple[list[Request], list[Solved]]:
        """The value of every edit alone, on the base or with an update in it; inside `unedited`."""
        requests, search = self._tokenised(edits), self._searching(Clock(self.runner.device))
        search.progress, search.total, search.done = progress, len(edits), 0
        if update is None:
            return requests, search.find(requests, merge=False)
        update.apply(self.model)
        try:
            solved = search.find(requests, merge=False)
        finally:
            update.revert(self.model)
        return requests, rebased(self.runner, search, solved, update)

    def find_merged(self, groups: Sequence[Sequence[Edit]]) -> list[list[Solved]]:
        """The values of edits of one subject each that are made together, as `apply_edits` finds them.

        Group by group, so that none depends on the others.
        """
        search = self._searching(Clock(self.runner.device))
        search.progress = None
        return [search.find(self._tokenised(group)) for group in groups]

    def _tokenised(self, edits: Sequence[Edit]) -> list[Request]:
        admit_tokenizer(self.tokenizer, self.model, [f"{edit.text} {edit.target}" for edit in edits])
        return [tokenise(self.runner, self.tokenizer, e, self.base.contexts, self.base.method) for e in edits]

    def close(self, requests: Sequence[Request], solved: Sequence[Solved], *, history: bool = False) -> EditResult:
        """The update for all of them, at least one, by the closing of `apply_edits`; inside `unedited`."""
        base, clock = self.base, Clock(self.runner.device)
        bare = any(each.bare is not None for each in solved)
        before = History.none(self.runner, base.layers, len(base.method.columns)) if history else None
        closing = Closing(self.runner, base.method, self._closed_with(bare), base.guard, before)
        flow = Flow(self._searching(clock), closing, base.guard, base.unconverged, len(requests))
        made, records = flow.close(requests, [each.to(self.runner.device) for each in solved])
        tell_nearest(records, flow.keys)
        delta = Delta({}) if made is None else made
        weights = {self.runner.weight_name(layer): self.runner.weight(layer) for layer in base.layers}
        delta.samples = {n: Sample.of(weights[n], update.left, update.right) for n, update in delta.updates.items()}
        delta.metadata.update(
            method=base.method.name,
            layers=json.dumps(base.layers),
            model_type=self.model.config.model_type,
            contexts=json.dumps(base.contexts, ensure_ascii=False),
        )
        return EditResult(
            self.model,
            delta,
            records,
            base.contexts,
            "joint",
            base.settings,
            flow.condition,
            base.layer_source,
            clock.seconds,
            self.tokenizer,
            history=closing.history_by_now() if history else None,
            streaming=None if self.runner.stream is None else self.runner.stream.rates,
        )

    def factor(self, name: str) -> Tensor | None:
        """Cholesky factor of C of the layer that a weight is of; None for C = I."""
        layer = next(layer for layer in self.base.layers if self.runner.weight_name(layer) == name)
        return self._closed_with(False)[layer].factor

    def put_in(self, result: EditResult, asked: Sequence[Entry] = ()) -> None:
        """Apply an update to the base; CollapseError or a warning, as the guard says, where it reads much worse then.

        Fills in what was measured: the contexts' NLL, and where the entries that the records are of are to be `asked`,
        their probabilities. Inside `unedited`; after an error the model is as it was.
        """
        effect = Effect(self.runner, self.tokenizer, [entry.edit for entry in asked], self.base.contexts)
        effect.before()
        result.delta.apply(self.model)
        try:
            result.context_nll = effect.after(result.records if asked else [])
            for entry, record in zip(asked, result.records, strict=False):
                if entry.needs_prefix and self.base.method.bare:
                    record.needs_prefix = not record.argmax_after
            judge_drift(result.context_nll, self.base.guard)
        except BaseException:
            result.delta.revert(self.model)
            raise
        result.delta.report["context_nll"] = None if result.context_nll is None else asdict(result.context_nll)

    def _searching(self, clock: Clock) -> Search:
        if self._search is None:
            base = self.base
            self._search = Search(
                self.runner, self.tokenizer, base.layers, base.method, base.contexts, base.settings, clock
            )
        self._search.clock = clock
        return self._search

    def _closed_with(self, bare: bool) -> Geometries:
        layers = self.base.layers
        if self._geometries is None:
            found = self.base.found_statistics() if self._statistics is None else None
            statistics = checked_statistics(self.runner, layers, self._statistics if found is None else found)
            geometries = Geometries(self.runner, layers, statistics)
            if found is None:
                self.base.check_statistics(statistics)
            geometries.check()
            self._geometries = geometries
        if bare and not self._geometries.first_tokens:
            self._geometries.first_tokens = first_token_statistics(self.runner, layers)
        return self._geometries
