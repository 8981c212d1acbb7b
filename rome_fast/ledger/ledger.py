"""Ledger: edits as data. A folder that keeps requests and the values found for them, and closes them ever anew."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..closing.guard import Guard, check_guard
from ..closing.history import History
from ..closing.judging import Unconverged, check_unconverged
from ..editor import checked_statistics, chosen_for, contexts_for
from ..edits import Edit, asked_edits
from ..errors import ArgumentError, ConvergenceError, EditError, quoted
from ..methods import DEFAULT_METHOD, Method, method_named
from ..models.runner import evaluating
from ..opening.admission import admit_tokenizer, checked_dtype, plain_modes
from ..opening.opening import Destination, given_layers, open_checkpoint, open_model
from ..result import EditResult
from ..runs.processes import ALONE
from ..search.search import Progress, Solved
from ..search.values import ValueSettings
from ..statistics import Statistics
from ..updates import chains, saving
from ..updates.delta import Delta
from ..updates.truncation import check_rank
from ..weights import Link, OnRead, check_link
from .base import Base
from .entries import (
    Entry,
    Event,
    FoundOn,
    Kind,
    State,
    checked_tags,
    listed,
    request_id,
)
from .finding import FoundValues
from .store import Store, check_absent
from .working import Working, check_base, last_written, open_base


class LedgerWarning(UserWarning):
    """A ledger does less than it was asked for, or will."""


@dataclass(frozen=True)
class Diff:
    """What two states have that the other one has not; `differing` are pairs that ask the same with other targets."""

    only_here: list[Entry]
    only_there: list[Entry]
    differing: list[tuple[Entry, Entry]]


class Ledger:
    """A folder of edits to one base model, which go in and come out singly and are always made together.

    What takes long, the search for values, is done once for every edit, on the base model. `close` makes one update of
    all that is in, in seconds: that of one call of `apply_edits` for all of them, to rounding, and the same bytes
    whatever was added, replaced or removed in between. Events are appended and values never change, so that every
    earlier state can be closed again.

    A process killed at any moment leaves the state before a change or the one after. There is one writer at a time,
    and another one is refused; readers need not wait. Made by `create` and `open`. Without a model everything can be
    done but `add`, `replace` and what closes.
    """

    def __init__(self, store: Store, base: Base, working: Working | None) -> None:
        self.base = base
        self._store, self._working = store, working
        self._values = FoundValues(store, merges=base.method.merges)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        model: PreTrainedModel | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        statistics: Statistics | Literal["identity"] | None = None,
        method: str | Method = DEFAULT_METHOD,
        layer: int | None = None,
        layers: Sequence[int] | None = None,
        contexts: Sequence[str] | None = None,
        settings: ValueSettings | Mapping[str, Any] | None = None,
        guard: Guard = "raise",
        unconverged: Unconverged = "skip",
        seed: int = 0,
        memory: int | str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
        on_read: OnRead | None = None,
    ) -> "Ledger":
        """Make an empty ledger for a model, its base. How edits are made is settled here once for all.

        The arguments are those of `apply_edits`, and so are the errors; ArgumentError where `folder` exists. A
        checkpoint is only read; what is in memory of it stays there for as long as the ledger lives.
        """
        folder = Path(folder)
        check_absent(folder)
        how = method_named(method)
        check_guard(guard)
        check_unconverged(unconverged)
        given = given_layers(layer, layers)
        with plain_modes(), ExitStack() as stack:
            if isinstance(model, str | Path):
                opened = open_checkpoint(
                    stack,
                    model,
                    tokenizer,
                    None,
                    layers=given,
                    method=how,
                    statistics=statistics,
                    memory=memory,
                    device=device,
                    dtype=checked_dtype(dtype),
                    trust_remote_code=trust_remote_code,
                    processes=ALONE,
                    on_read=on_read,
                )
            else:
                wanted = checked_dtype(dtype)
                opened = open_model(model, tokenizer, Destination(), memory=memory, device=device, dtype=wanted)
            if opened.source is not None and opened.source.resolve() in folder.absolute().resolve().parents:
                raise ArgumentError(f"folder: {folder} lies inside the model, whose copies would have parts of it")
            runner = opened.runner
            admit_tokenizer(opened.tokenizer, runner.model)
            chosen = chosen_for(runner, how, given, settings, statistics)
            checked = checked_statistics(runner, chosen.layers, statistics)
            if checked is not None:
                for each in chosen.layers:
                    checked.for_layer(runner, each)
            with evaluating(runner.model):
                texts = contexts_for(runner.model, opened.tokenizer, contexts, seed)
            base = Base.of(
                opened,
                chosen.layers,
                checked,
                method=how,
                layer_source=chosen.layer_source,
                settings=chosen.settings,
                contexts=texts,
                guard=guard,
                unconverged=unconverged,
            )
            store = Store.create(folder, base)
            return cls(store, base, Working(base, opened, statistics, stack.pop_all()))

    @classmethod
    def open(
        cls,
        folder: str | Path,
        model: PreTrainedModel | str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        statistics: Statistics | Literal["identity"] | None = None,
        memory: int | str | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        on_read: OnRead | None = None,
    ) -> "Ledger":
        """Open a ledger, with its base model for what needs that.

        Args:
            folder: of the ledger.
            model: the base in memory, or its checkpoint, in which this ledger's own edits may be: they are taken out of
                what is loaded.
            tokenizer: the model's; not needed for a checkpoint.
            statistics: those that the ledger was made with; None looks for them in the folder that they were read from,
                and in the cache.
            memory: of a checkpoint: how much of it may be in memory at a time, as of `apply_edits`; by default what is
                free. What stays in memory is there for as long as the ledger lives.
            device: of a checkpoint: where it runs, by default a GPU where torch finds one.
            trust_remote_code: of a checkpoint: whether code in its directory may run.
            on_read: called with (bytes read, bytes per second) while weights are read.

        Raises CheckpointError for a folder that is no ledger, or a damaged one, ModelError for a model that cannot be
        edited, ArgumentError for another model than the base, and for one with edits in it.
        """
        store = Store(Path(folder))
        base = store.base()
        store.events()
        if model is None:
            if memory is not None:
                raise ArgumentError("memory: got a budget without a model, wanted the base's checkpoint as well")
            return cls(store, base, None)
        with plain_modes(), ExitStack() as stack:
            if isinstance(model, str | Path):
                opened = open_base(
                    stack,
                    base,
                    model,
                    tokenizer,
                    memory=memory,
                    device=device,
                    trust_remote_code=trust_remote_code,
                    on_read=on_read,
                )
            else:
                opened = open_model(model, tokenizer, Destination(), memory=memory, device=device, dtype=None)
            check_base(base, opened)
            return cls(store, base, Working(base, opened, statistics, stack.pop_all()))

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self._store.folder

    def __len__(self) -> int:
        return len(State(self.log()))

    def __repr__(self) -> str:
        return f"Ledger({str(self.folder)!r}, {len(self)} edits of {self.base.model or self.base.fingerprint})"

    def entries(
        self,
        *,
        text: str | None = None,
        subject: str | None = None,
        tags: Sequence[str] | None = None,
        at: int | None = None,
    ) -> list[Entry]:
        """What is in it, or was after event `at`, in the order of the ids; of that, what meets every condition given.

        text: a part of the prompt, its subject filled in, or of the target.
        subject: the whole subject.
        tags: at least one of them.

        Raises ArgumentError for an event that there was not, and for tags that no entry has.
        """
        return self._state(at).matching(text=text, subject=subject, tags=tags)

    def entry(self, id: str, *, at: int | None = None) -> Entry:
        """The entry of an id, or of its first characters; ArgumentError where there is none, or more than one."""
        return self._state(at).named(id)

    def log(self) -> list[Event]:
        """All events since the ledger was made or compacted, the oldest first: who, when, why, and what."""
        return self._store.events()

    def add(
        self,
        edits: Sequence[Edit] | Edit,
        *,
        tags: Sequence[str] = (),
        who: str | None = None,
        why: str | None = None,
        on: FoundOn = "base",
        progress: Progress | None = None,
    ) -> list[str]:
        """Find the values of new edits and put them in; returns the ids of all, in their order.

        They are found on the base model or, with on="edited", on the base with the update of all that is in by then,
        which suits those that come to many, and makes a value depend on what was there; values that facts of one
        subject share are found on the base in any case. What is in already gets the tags only, with a LedgerWarning
        where it has them. One whose value was not found is put in with a LedgerWarning, or as `unconverged` of `create`
        says. Raises EditError where the same prompt and subject is there with another target, ArgumentError,
        ModelError, ConvergenceError and CheckpointError; the ledger is then as it was.
        """
        edits, tags = asked_edits(edits), checked_tags(tags)
        self._check_on(on)
        with self._store.writing(who, why) as events:
            state = State(events)
            pairs = [(state.asking(edit), edit) for edit in edits]
            others = [(e, edit) for e, edit in pairs if e is not None and e.id != request_id(edit)]
            if others:
                told = listed([f"{e}, wanted {quoted(edit.target)}" for e, edit in others])
                raise EditError(
                    f"edits: got {len(others)} that are there with another target (or separator, or end); replace "
                    f"them:\n{told}"
                )
            kept = [e for e, _ in pairs if e is not None and set(tags) <= set(e.tags)]
            if kept:
                told = listed(kept)
                if any(e in kept and e.edit != edit for e, edit in pairs):
                    told += "\nreplace() takes what they say beside their requests (paraphrases, aliases, …)"
                _warn(f"{len(kept)} of {len(edits)} edits are in the ledger already:\n{told}")
            wanted = {
                request_id(edit): (edit, tags if e is None else checked_tags([*e.tags, *tags]))
                for e, edit in pairs
                if e is None or e not in kept
            }
            if wanted:
                self._put("add", events, wanted, [], who, why, on, progress)
        return [request_id(edit) for edit in edits]

    def replace(
        self,
        edits: Sequence[Edit] | Edit,
        *,
        tags: Sequence[str] | None = None,
        who: str | None = None,
        why: str | None = None,
        on: FoundOn = "base",
        progress: Progress | None = None,
    ) -> list[str]:
        """Put edits in the place of those with the same prompt and subject; returns the ids of all, in their order.

        Tags are those of what is replaced unless given. With the same target, the value stays, and what an edit says
        beside its request (paraphrases, aliases, …) is new. Raises EditError where there is nothing to replace; else
        as `add`.
        """
        edits = asked_edits(edits)
        given = None if tags is None else checked_tags(tags)
        self._check_on(on)
        with self._store.writing(who, why) as events:
            state = State(events)
            pairs = [(state.asking(edit), edit) for edit in edits]
            if absent := [f"{quoted(edit.text)} → {quoted(edit.target)}" for e, edit in pairs if e is None]:
                raise EditError(f"edits: got {len(absent)} that replace nothing; add them:\n{listed(absent)}")
            found = [(e, edit) for e, edit in pairs if e is not None]
            same = [e for e, edit in found if e.edit == edit and (given is None or given == e.tags)]
            if same:
                _warn(f"{len(same)} of {len(edits)} edits are in the ledger as they are:\n{listed(same)}")
            wanted = {
                request_id(edit): (edit, e.tags if given is None else given) for e, edit in found if e not in same
            }
            gone = [e.id for e, edit in found if e.id != request_id(edit)]
            if wanted:
                self._put("replace", events, wanted, gone, who, why, on, progress)
        return [request_id(edit) for edit in edits]

    def remove(
        self,
        ids: Sequence[str] | str | None = None,
        *,
        text: str | None = None,
        subject: str | None = None,
        tags: Sequence[str] | None = None,
        who: str | None = None,
        why: str | None = None,
    ) -> list[Entry]:
        """Take out the entries of these ids, or those that meet the conditions, as of `entries`; returns them.

        Raises ArgumentError where an id is in doubt, neither or both are given, or nothing meets the conditions.
        """
        asked = any(condition is not None for condition in (text, subject, tags))
        if asked == (ids is not None):
            raise ArgumentError("ids: got none or conditions as well, wanted ids, or some of text, subject and tags")
        with self._store.writing(who, why) as events:
            state = State(events)
            if ids is None:
                found = state.matching(text=text, subject=subject, tags=tags)
            else:
                given_ids: list[Any] = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, str) else [ids]
                found = [state.named(id) for id in given_ids]
            found = list({entry.id: entry for entry in found}.values())
            if not found and ids is not None:
                raise ArgumentError("ids: got none, wanted at least one")
            if not found:
                conditions = {"text": text, "subject": subject, "tags": tags}
                given = {name: value for name, value in conditions.items() if value is not None}
                raise ArgumentError(
                    f"{', '.join(given)}: got {', '.join(map(repr, given.values()))}, which none of {len(state)} "
                    "entries meets; see what is in by entries()"
                )
            self._store.append("remove", events, who, why, removed=[entry.id for entry in found])
        return found

    def merge(
        self,
        other: "Ledger | str | Path",
        *,
        prefer: Literal["mine", "theirs"] | None = None,
        who: str | None = None,
        why: str | None = None,
    ) -> list[Entry]:
        """Take over what another ledger of the same base has and this one has not; returns that.

        Values come along. Of an edit that both have this one's value stays, with the tags of both. Raises ArgumentError
        where the other one is of another base or made otherwise, and EditError where both ask the same with other
        targets, unless it is said which to `prefer`; the ledger is then as it was.
        """
        if prefer not in ("mine", "theirs", None):
            raise ArgumentError(f"prefer: got {prefer!r}, wanted 'mine', 'theirs' or None")
        other = other if isinstance(other, Ledger) else Ledger.open(other)
        if different := self.base.differences(other.base):
            raise ArgumentError(
                f"other: got {other.folder} of {other.base.fingerprint}, wanted a ledger of {self.base.fingerprint} "
                f"that is made alike: {', '.join(different)} differ"
            )
        if other.folder.resolve() == self.folder.resolve():
            raise ArgumentError(f"other: got {other.folder}, the ledger itself, wanted another one")
        theirs = other.log()
        with self._store.writing(who, why) as events:
            diff = _compared(State(events), there := State(theirs))
            if diff.differing and prefer is None:
                told = listed(
                    [f"{a} ({_told(a)}) and → {quoted(b.edit.target)} ({_told(b)})" for a, b in diff.differing]
                )
                raise EditError(
                    f"other: both ledgers ask {len(diff.differing)} time(s) the same with other targets; replace one "
                    f"of each, or say prefer='mine' or 'theirs':\n{told}"
                )
            taken = diff.only_there + ([b for _, b in diff.differing] if prefer == "theirs" else [])
            removed = [a.id for a, _ in diff.differing] if prefer == "theirs" else []
            tagged = [
                replace(mine, tags=checked_tags([*mine.tags, *there[id].tags]))
                for id, mine in State(events).items()
                if id in there and not set(there[id].tags) <= set(mine.tags)
            ]
            if taken or tagged:
                after = {entry.id: entry for entry in [*State(events).values(), *taken] if entry.id not in removed}
                wanted = {e.id for e in taken} | set(self._values.names(list(after.values())).values())
                there_too = other._store.files(theirs).keys()
                values = other._store.values(theirs, sorted((wanted & there_too) - self._store.files(events).keys()))
                self._store.append("merge", events, who, why, added=[*taken, *tagged], removed=removed, values=values)
        return taken

    def diff(self, other: "Ledger | str | Path | int", *, at: int | None = None) -> Diff:
        """How this ledger, or what it was after event `at`, differs from another one, or from itself after an event.

        Raises ArgumentError for an event that there was not, and a ledger of another base.
        """
        if isinstance(other, int):
            return _compared(self._state(at), self._state(other))
        other = other if isinstance(other, Ledger) else Ledger.open(other)
        if not self.base.fingerprint.matches(other.base.fingerprint):
            raise ArgumentError(
                f"other: got {other.folder} of {other.base.fingerprint}, wanted a ledger of {self.base.fingerprint}"
            )
        return _compared(self._state(at), other._state(None))

    def compact(self, *, who: str | None = None, why: str | None = None) -> None:
        """Forget the past: events, and the values of what is no longer in. States of before cannot be closed again."""
        with self._store.writing(who, why) as events:
            if not events:
                return
            state = State(events)
            self._store.append(
                "compact",
                events,
                who,
                why,
                added=list(state.values()),
                values=self._store.values(
                    events,
                    {*state, *self._values.names(list(state.values())).values()} & self._store.files(events).keys(),
                ),
            )

    def close(self, *, tags: Sequence[str] | None = None, at: int | None = None) -> Delta:
        """One update of the base model for all that is in, or was after event `at`, or has one of these tags.

        The same entries give the same bytes on the same machine and number of threads, whatever came in between.
        `delta.report` says what became of each edit: one whose value was not found is left out, with a warning. An
        empty ledger gives a Delta that changes nothing. Raises ArgumentError, CollapseError and ConvergenceError as
        `apply_edits`, StatisticsError, and CheckpointError for damaged values; the model is as before in any case.
        """
        with self._model.unedited():
            return _delta_of(self._closed(tags, at))

    def history(self, *, tags: Sequence[str] | None = None, at: int | None = None) -> History:
        """The keys of all that is in, for `apply_edits(history=…)` on a model that has its update.

        For those who will edit on without the base, or the ledger. Errors as of `close`.
        """
        working = self._model
        with working.unedited():
            result = self._closed(tags, at, history=True)
            if result is None or result.history is None:
                return History.none(working.runner, self.base.layers, len(self.base.method.columns))
            return result.history

    def apply(
        self, model: PreTrainedModel | None = None, *, tags: Sequence[str] | None = None, at: int | None = None
    ) -> Delta:
        """Close, and put the update into the model, in place of the one that this ledger has put there before.

        `model` is another copy of the base in memory, to which the update is added; by default it is the ledger's own,
        for which CollapseError is raised, or a warning given, as its guard says, where it reads ordinary text much
        worse with the update. Later calls of this ledger take the update out for as long as they need the base. Returns
        the Delta, for `revert`. Errors as of `close`; the model is then as it was.
        """
        working = self._model
        if model is not None and model is not working.model:
            delta = self.close(tags=tags, at=at)
            delta.apply(model)
            return delta
        if working.runner.stream is not None:
            raise ArgumentError(
                "model: the ledger's own is read from its checkpoint while it runs, as it does not fit the memory; "
                "write an edited checkpoint by write(), or give a model in memory"
            )
        with working.unedited():
            result = self._closed(tags, at)
            if result is not None and result.delta.updates:
                working.put_in(result)
            working.applied = _delta_of(result)
        return working.applied

    def write(
        self,
        source: str | Path,
        out: str | Path | None = None,
        *,
        in_place: bool = False,
        tags: Sequence[str] | None = None,
        at: int | None = None,
        link: Link = "copy",
        report: Callable[[EditResult], None] | None = None,
    ) -> Delta:
        """Close, and write the edited model: a checkpoint of the base as `out`, or the base's own directory changed.

        With `in_place`, `source` is the base's checkpoint, or one that this ledger has written last: what that was
        edited to before is replaced, all of it or nothing, also in case of a kill, and `rome-fast revert` leads back
        to the base. An empty ledger then gives the base back. Returns the Delta, whose report says what became of every
        edit. `report` is called once all is written, while the update is still in the model: with what `apply_edits`
        would return, probabilities measured. Raises what `apply` and
        `EditResult.save` do, and CheckpointError for a `source` with other edits.
        """
        if (out is None) != in_place:
            raise ArgumentError("out: got none or in_place as well, wanted a new directory or in_place=True")
        check_link(link)
        destination = Destination(out, in_place)
        destination.check()
        working = self._model
        with working.unedited():
            result = self._closed(tags, at)
            delta = _delta_of(result)
            if result is None or not delta.updates:
                if not in_place:
                    raise ArgumentError("out: no edit is in the ledger's update, so there is nothing to write")
                if last_written(self.base, source) is not None:
                    chains.revert(source)
                saving.check_unedited(working.model, self.base.weights, Path(source))
                return delta
            working.put_in(result, [] if report is None else self._state(at).matching(tags=tags))
            try:
                if out is not None:
                    saving.save(working.model, delta, out, source, tokenizer=working.tokenizer, link=link)
                else:
                    with chains.changing_in_place(source):
                        replaces = last_written(self.base, source) is not None
                        saving.save_in_place(working.model, delta, Path(source), replaces=replaces)
                if report is not None:
                    report(result)
            finally:
                delta.revert(working.model)
        return delta

    def to_lora(
        self,
        directory: str | Path,
        *,
        rank: int | None = None,
        tags: Sequence[str] | None = None,
        at: int | None = None,
    ) -> Delta:
        """Close, and write the update as an adapter of PEFT for the base; errors as of `close` and `Delta.to_lora`.

        With a `rank`, the approximation of so small a rank whose outputs are nearest on keys distributed as the
        statistics of this ledger. How far it is off stands in the returned Delta's report, under "truncation" by
        parameter name; the Delta itself is the whole update.
        """
        if rank is not None:
            check_rank(rank)
        working = self._model
        with working.unedited():
            delta = _delta_of(self._closed(tags, at))
            found = delta.to_adapter(directory, working.model, rank, working.factor)
        if found:
            delta.report["truncation"] = {name: asdict(about) for name, about in found.items()}
        return delta

    @property
    def _model(self) -> Working:
        if self._working is None:
            raise ArgumentError("model: got None, wanted the base model: Ledger.open(folder, model, tokenizer)")
        return self._working

    def _state(self, at: int | None) -> State:
        return State(self._until(at))

    def _until(self, at: int | None) -> list[Event]:
        """The events up to one; ArgumentError for one that there was not."""
        events = self.log()
        if at is None:
            return events
        # Before the first of them nothing was in, unless that one has put all in that was.
        first = 0 if not events or events[0].kind != "compact" else events[0].number
        last = events[-1].number if events else 0
        if type(at) is not int or not first <= at <= last:
            raise ArgumentError(f"at: got {at!r}, wanted the number of an event, one of {first} .. {last}")
        return [event for event in events if event.number <= at]

    def _closed(self, tags: Sequence[str] | None, at: int | None, *, history: bool = False) -> EditResult | None:
        """None where no entry is asked for."""
        events = self._until(at)
        entries = State(events).matching(tags=tags)
        if not entries:
            return None
        found = self._values.of(self._model, events, entries)
        result = self._model.close([entry.request for entry in entries], found, history=history)
        result.delta.report["ledger"] = {
            "id": self.base.id,
            "event": events[-1].number,
            "tags": None if tags is None else list(checked_tags(tags)),
            "entries": [entry.id for entry in entries],
        }
        return result

    def _check_on(self, on: FoundOn) -> None:
        if on not in get_args(FoundOn):
            raise ArgumentError(f"on: got {on!r}, wanted one of {', '.join(map(repr, get_args(FoundOn)))}")
        if on == "edited" and self._model.runner.stream is not None:
            raise ArgumentError(
                "on: got 'edited' for a base that is read while it runs; open the ledger without memory"
            )

    def _update_without(self, events: Sequence[Event], removed: Sequence[str]) -> Delta | None:
        """That of the entries which stay when these go; None where it is of none. Inside `unedited`."""
        stay = [entry for id, entry in State(events).items() if id not in removed]
        if not stay:
            return None
        delta = self._model.close([entry.request for entry in stay], self._values.of(self._model, events, stay)).delta
        return delta if delta.updates else None

    def _put(
        self,
        kind: Kind,
        events: Sequence[Event],
        wanted: Mapping[str, tuple[Edit, tuple[str, ...]]],
        removed: Sequence[str],
        who: str | None,
        why: str | None,
        on: FoundOn,
        progress: Progress | None,
    ) -> None:
        """Put in edits with their tags by id, of which those values are searched that were not found before."""
        before = {entry.id: entry for event in events for entry in event.added}
        files = self._store.files(events)
        new = [id for id in wanted if id not in files]
        found: dict[str, Solved] = {}
        if new:
            with self._model.unedited():
                update = self._update_without(events, removed) if on == "edited" else None
                requests, solved = self._model.find([wanted[id][0] for id in new], progress, update)
            for id, request, each in zip(new, requests, solved, strict=True):
                found[id] = each
                before[id] = Entry(
                    id,
                    request.edit,
                    (),
                    request.needs_prefix,
                    request.target_tokens,
                    each.found,
                    each.value.losses[-1],
                    len(each.value.losses),
                    "base" if update is None else on,
                )
        added = [
            replace(before[id], edit=edit, tags=tags, time="", who=None, why=None)
            for id, (edit, tags) in wanted.items()
        ]
        missed = [] if self.base.unconverged == "write" else [entry for entry in added if not entry.converged]
        what = f"of {len(missed)} edit(s) no value was found at which the target leads"
        if missed and self.base.unconverged == "raise":
            raise ConvergenceError(f"{what}:\n{listed(missed)}\nnothing was put in")
        after = {entry.id: entry for entry in [*State(events).values(), *added] if entry.id not in removed}
        together = self._values.names(list(after.values()))
        if any(together[id] not in {*files, *found} for id in after):
            with self._model.unedited():
                found |= self._values.searched(self._model, [after[id] for id in sorted(after)], {*files, *found})
        self._store.append(kind, events, who, why, added=added, removed=removed, values=found)
        if missed:
            _warn(f"{what}; they are in the ledger, but are left out of its update:\n{listed(missed)}", 4)


def _delta_of(result: EditResult | None) -> Delta:
    return Delta({}) if result is None else result.delta


def _compared(here: State, there: State) -> Diff:
    only_here = [entry for id, entry in here.items() if id not in there]
    only_there = [entry for id, entry in there.items() if id not in here]
    pairs = [(entry, other) for entry in only_here if (other := there.asking(entry.edit)) is not None]
    paired = {entry.id for pair in pairs for entry in pair}
    return Diff(
        [entry for entry in only_here if entry.id not in paired],
        [entry for entry in only_there if entry.id not in paired],
        pairs,
    )


def _told(entry: Entry) -> str:
    return ", ".join(part for part in (entry.who, entry.time, entry.why) if part)


def _warn(what: str, stacklevel: int = 3) -> None:
    warnings.warn(what, LedgerWarning, stacklevel=stacklevel)
