"""What an edit did, and the way back."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .closing.effect import ContextNLL
from .closing.history import History
from .errors import ArgumentError
from .models.runner import Runner
from .opening.defaults import LayerSource
from .records import Record, report_json
from .search.values import ValueSettings, compute_dtype
from .updates import saving
from .updates.delta import Delta
from .weights import Link


@dataclass(repr=False)
class EditResult:
    """What an edit did, and the way back."""

    model: PreTrainedModel
    delta: Delta
    records: list[Record]
    contexts: tuple[str, ...]
    schedule: str
    settings: ValueSettings
    condition: float  # of the joint closed form; 1 for a single key
    layer_source: LayerSource = "given"  # who says which layer
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by stage
    tokenizer: PreTrainedTokenizerBase | None = None
    context_nll: ContextNLL | None = None  # None where it was not measured, or no context has two tokens
    # Of the model as it is now, for the next call's `history`; None where this one was called without.
    history: History | None = None
    streaming: dict[str, Any] | None = None  # of weights read while they are needed: bytes and rates, see `Stream`
    rounds: int = 1  # of searches for values

    def __post_init__(self) -> None:
        # Kept with the Delta, for as long as the edit is in the model; it must not hold the model itself.
        self.delta.report.update(
            model=str(self.model.config._name_or_path),
            method=self.records[0].method,
            layer=self.records[0].layer,
            layers=self.records[0].layers,
            layer_source=self.layer_source,
            schedule=self.schedule,
            rounds=self.rounds,
            dtype=str(self.model.dtype).removeprefix("torch."),
            compute_dtype=str(compute_dtype(Runner(self.model), self.settings)).removeprefix("torch."),
            edits=self.records,
            contexts=list(self.contexts),
            settings=asdict(self.settings),
            condition=self.condition,
            context_nll=None if self.context_nll is None else asdict(self.context_nll),
            seconds=self.seconds,
            **({} if self.streaming is None else {"streaming": self.streaming}),
        )

    def __repr__(self) -> str:
        applied = sum(record.applied for record in self.records)
        return f"EditResult({applied} of {len(self.records)} edits applied, {self.delta!r})"

    def revert(self) -> None:
        """Restore the model's weights bit for bit; where every edit was left out they never changed."""
        if self.delta.updates:
            self.delta.revert(self.model)

    def save(self, out: str | Path, source: str | Path | None = None, link: Link = "copy") -> None:
        """Write the model in memory as a complete checkpoint directory `out`, exactly as it is.

        That is with all the edits that are in it, before and after this one, each of which `rome-fast revert` undoes,
        the last one first. What the edits did not touch is copied from `source`, the checkpoint that the model was
        loaded from, by default the one it says itself, once every weight was found to be the same there; but for the
        tokenizer, where the edit was made by another one than is there. Where a weight is
        not (an adapter was merged, the dtype, the vocabulary or the config is another, the model was trained, or there
        is no such checkpoint), the model is written as by `save_pretrained`, with its tokenizer; `link` is then of no
        use, and the record in `out/rome_fast` says what differs.

        Raises ArgumentError where `out` exists or cannot be made, every edit was left out, or this one is not in the
        model any more; ModelError for a model that cannot be stored; CheckpointError for a `source` that was given and
        is no checkpoint, and a full disk.
        """
        self.check_applied()
        saving.save(self.model, self.delta, out, source, tokenizer=self.tokenizer, link=link)

    def check_applied(self, argument: str = "out") -> None:
        """Raise ArgumentError where every edit was left out."""
        if not self.delta.updates:
            reasons = ", ".join(sorted({record.left_out for record in self.records if record.left_out is not None}))
            raise ArgumentError(f"{argument}: no edit was applied ({reasons}), so there is no edited model to write")

    def report(self) -> dict[str, Any]:
        """Everything that is needed to read or repeat this edit, as JSON values."""
        return report_json(self.delta.report)
