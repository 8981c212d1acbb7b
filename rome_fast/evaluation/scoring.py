"""Teacher-forced probability of a target behind a text, and what the model says when it decodes freely."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..errors import EditError
from ..models.rows import Asked, answered, encode, padding_id
from ..models.runner import Runner, evaluating, plain_generation
from ..weights import Task
from .isolated import RowUpdates, carrying, see_final_states

HEAD_POSITIONS = 512
"""Enough for the head, which is read as a whole each time, and logits of a size that a CPU's memory bears."""


@dataclass(frozen=True)
class Score:
    """A target behind a text, teacher forced."""

    log_probability: float  # mean over the target's tokens
    is_argmax: bool  # every target token is the most probable one

    @property
    def probability(self) -> float:
        """Geometric mean of the target tokens' probabilities."""
        return math.exp(self.log_probability)


@torch.no_grad()
def score(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Asked | tuple[str, str]],
    updates: RowUpdates | None = None,
    edits: Sequence[int] | None = None,
) -> list[Score]:
    """Score every target behind its text, in the order given. Only target positions go through the head.

    A pair is `rome_fast.models.rows.Asked`, or a text and what follows it to the character: nothing is put between
    them.

    With `updates`, pair i is scored on the model as edit `edits[i]` of them would leave it (-1: as it is).
    Raises EditError for a text that is too long for the model, and for a target without a token of its own.
    """
    asked = [Asked(*pair) for pair in pairs]
    place = {pair: i for i, pair in enumerate(dict.fromkeys(asked))}
    encoded = answered(tokenizer, list(place))
    rows = [[*tokens.ids, *answer] for tokens, answer in encoded]
    for (text, *_), ids in zip(place, rows, strict=True):
        _check_length(runner, text, len(ids) - 1)
    found: dict[tuple[int, int], Score] = {}  # by pair and edit
    inputs = [tuple(ids[:-1]) for ids in rows]
    wanted = list(dict.fromkeys(zip((place[pair] for pair in asked), edits or [-1] * len(pairs), strict=True)))
    covers = _covers([(edit, inputs[i]) for i, edit in wanted])
    uses = list(dict.fromkeys(covers))
    read_in: dict[tuple[int, tuple[int, ...]], list[int]] = {use: [] for use in uses}
    for (i, _), cover in zip(wanted, covers, strict=True):
        read_in[cover].append(i)

    def see(some: list[int], hidden: Tensor) -> None:
        read = [(row, i) for row, use in enumerate(some) for i in read_in[uses[use]]]
        spans = [range(len(encoded[i][0].ids) - 1, len(rows[i]) - 1) for _, i in read]
        where = [(row, at) for (row, _), span in zip(read, spans, strict=True) for at in span]
        labels = torch.tensor([token for _, i in read for token in encoded[i][1]], device=hidden.device)
        row_of, position = torch.tensor(where, device=hidden.device).T
        own: list[float] = []
        best: list[bool] = []
        for states, some_labels in zip(
            hidden[row_of, position].split(HEAD_POSITIONS), labels.split(HEAD_POSITIONS), strict=True
        ):
            logits = runner.head(states)
            log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            own += log_probs.gather(1, some_labels.unsqueeze(1)).squeeze(1).tolist()
            best += (log_probs.argmax(1) == some_labels).tolist()
        at = 0
        for (row, i), span in zip(read, spans, strict=True):
            part = slice(at, at := at + len(span))
            found[i, uses[some[row]][0]] = Score(sum(own[part]) / len(span), all(best[part]))

    distinct = {ids: number for number, ids in enumerate(dict.fromkeys(ids for _, ids in uses))}
    see_final_states(runner, list(distinct), [(distinct[ids], edit) for edit, ids in uses], updates, see)
    return [found[place[pair], edit] for pair, edit in zip(asked, edits or [-1] * len(pairs), strict=True)]


def _covers(rows: Sequence[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """For each of some rows of token ids under an edit, the longest one under the same edit that begins with it.

    Attention is causal, so that the longer row has all that the shorter one would have. Most targets are one token,
    which is predicted and never read: a prompt is run once for all of its answers.
    """
    cover: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]] = {}
    following: tuple[int, tuple[int, ...]] | None = None
    # Of rows in order, what begins with a row comes right behind it.
    for row in sorted(set(rows), reverse=True):
        begins = following is not None and following[0] == row[0] and following[1][: len(row[1])] == row[1]
        cover[row] = cover[following] if begins and following is not None else row
        following = row
    return [cover[row] for row in rows]


@torch.no_grad()
def next_log_probabilities(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Asked],
    updates: RowUpdates | None = None,
    edits: Sequence[int] | None = None,
) -> Tensor:
    """(texts, vocabulary) log P of the token that follows each text, fp32 | fp64 on the CPU.

    With `updates`, text i is read by the model as edit `edits[i]` of them would leave it (-1: as it is).
    Raises EditError for a text that is too long for the model.
    """
    rows = {text: encode(tokenizer, [text.text], special=text.special)[0].ids for text in texts}
    for text, ids in rows.items():
        _check_length(runner, text.text, len(ids))
    place = {text: i for i, text in enumerate(rows)}
    which = [-1] * len(texts) if updates is None else edits or []
    uses = [(place[text], edit) for text, edit in zip(texts, which, strict=True)]
    found: list[Tensor] = [torch.empty(0)] * len(texts)

    def see(some: list[int], hidden: Tensor) -> None:
        last = torch.tensor([len(rows[texts[i]]) - 1 for i in some], device=hidden.device)
        logits = runner.head(hidden[torch.arange(len(some), device=hidden.device), last])
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).cpu()
        for i, own in zip(some, wide, strict=True):
            found[i] = own

    see_final_states(runner, list(rows.values()), uses, updates, see)
    return torch.stack(found)


@dataclass(frozen=True)
class Completion:
    """What a model writes behind a text when it takes the most probable token each time."""

    forced: str  # as many tokens as were asked for, an end of text being a token like any other
    free: str  # until it stops by itself, or at the bound, without the token that it stops with
    stopped: bool


def greedy_completion(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Asked | str],
    counts: Sequence[int],
    updates: RowUpdates | None = None,
    edits: Sequence[int] | None = None,
) -> list[str]:
    """What the model writes behind each text, taken to the character, when it decodes greedily for `counts[i]` tokens.

    With `updates`, text i is completed by the model as edit `edits[i]` of them would leave it (-1: as it is).
    Raises EditError for a text that is too long for the model.
    """
    return [c.forced for c in complete(runner, tokenizer, texts, counts, [0] * len(texts), updates, edits)]


@torch.no_grad()
def complete(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Asked | str],
    counts: Sequence[int],
    more: Sequence[int],
    updates: RowUpdates | None = None,
    edits: Sequence[int] | None = None,
) -> list[Completion]:
    """The same, and where it stops by itself within `more[i]` further tokens, as far as the model attends."""
    asked = [Asked(text, "") if isinstance(text, str) else text for text in texts]
    encoded = [encode(tokenizer, [text], special=special)[0].ids for text, _, special in asked]
    most = []
    # Rows of one length need no padding, so that its side cannot matter. Short and long answers apart.
    groups: dict[tuple[int, bool], list[int]] = {}
    for index, (question, ids, count) in enumerate(zip(asked, encoded, counts, strict=True)):
        _check_length(runner, question.text, len(ids) + count - 1)
        most.append(min(count + more[index], runner.max_length - len(ids) + 1))
        groups.setdefault((len(ids), most[index] > count), []).append(index)
    stops = stop_ids(runner, tokenizer)
    pad = padding_id(tokenizer)
    out: list[Completion | None] = [None] * len(texts)
    generator: Any = runner.model

    def run(length: int, members: list[int]) -> None:
        rows = torch.tensor([encoded[i] for i in members], device=runner.device)
        least, bounds = ([of[i] for i in members] for of in (counts, most))
        with ExitStack() as stack:
            if updates is not None and edits is not None:
                of_rows = torch.tensor([edits[i] for i in members], device=runner.device)
                stack.enter_context(carrying(runner, updates, of_rows))
            generated = generator.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                do_sample=False,
                max_new_tokens=max(bounds),
                pad_token_id=pad,
                stopping_criteria=StoppingCriteriaList([_AllDone(length, least, bounds, stops)]),
            )
        for i, ids in zip(members, generated[:, length:].tolist(), strict=True):
            end = next((at for at, token in enumerate(ids[: most[i]]) if token in stops), None)
            forced, free = tokenizer.batch_decode([ids[: counts[i]], ids[: most[i] if end is None else end]])
            out[i] = Completion(forced, free, end is not None)

    tasks = []
    for (length, _), members in groups.items():
        positions = len(members) * (length + max(most[i] for i in members))
        # The keys and values of all layers at the end, as if every head had its own.
        size = 2 * positions * len(runner.layers) * runner.hidden_size * runner.dtype.itemsize
        tasks.append(Task(size, partial(run, length, members)))
    with evaluating(generator), plain_generation(generator):
        if updates is None:
            runner.in_turn(tasks)
        else:
            for task in tasks:
                task.run()
    return [completion for completion in out if completion is not None]


def stop_ids(runner: Runner, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that `generate` stops at: those of the model's generation config, and the tokenizer's end of text."""
    own = getattr(runner.model.generation_config, "eos_token_id", None)
    found = own if isinstance(own, list) else [own]
    return {int(token) for token in (*found, tokenizer.eos_token_id) if token is not None}


class _AllDone(StoppingCriteria):
    """Stop a batch as a whole once every row has enough tokens, and has stopped by itself or come to its bound."""

    def __init__(self, start: int, least: Sequence[int], most: Sequence[int], stops: set[int]) -> None:
        self.start, self.least, self.most, self.stops = start, least, most, stops

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        new = input_ids[:, self.start :]
        least, most = (torch.tensor(of, device=new.device) for of in (self.least, self.most))
        stops = torch.tensor(sorted(self.stops), device=new.device, dtype=new.dtype)
        stopped = torch.isin(new, stops).any(1)
        done = bool(((new.shape[1] >= least) & (stopped | (new.shape[1] >= most))).all())
        return torch.full((len(new),), done, device=new.device)


def _check_length(runner: Runner, text: str, tokens: int) -> None:
    if tokens > runner.max_length:
        raise EditError(
            f"prompt {text[:40]!r}…: got {tokens} tokens, wanted at most the {runner.max_length} the model attends to; "
            "shorten it"
        )
