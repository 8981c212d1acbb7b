"""The usual edit metrics, each without a prefix and, where contexts are given, behind them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..edits import Edit, checked_edits
from ..errors import ArgumentError
from ..models.rows import Asked, answered, asked, check_known, end_text
from ..models.runner import Runner
from ..opening.admission import admit_model, admit_tokenizer, plain_modes
from ..updates.delta import Delta
from .essence import essences
from .isolated import RowUpdates
from .resampling import Interval, bootstrap
from .scoring import Completion, Score, complete, score

UNSEEN = (
    "My neighbour told me a story about it. ",
    "According to the newspaper of last Tuesday, ",
    "She looked out of the window for a while. ",
)
"""Texts that no edit was made with, but by chance."""


@dataclass(frozen=True)
class EditMetrics:
    """Shares in 0 .. 1 for one edit; None where the request has nothing to measure it with."""

    subject: str
    target: str
    probability: float  # of the target behind the bare prompt
    argmax: bool  # teacher forced
    decoded: str  # greedy decoding, as many tokens as the target has, an end of it included
    decoded_right: bool
    answer: str | None  # greedy decoding until the model stops by itself, or at a bound; None where it was not asked
    answer_right: bool | None  # whether it stopped, having said the target or an alias and nothing else but blanks
    efficacy: float | None  # P(target_new) > P(target_true)
    paraphrase: float | None  # the same on the paraphrase prompts
    neighborhood: float | None  # P(true answer) > P(target_new) on the neighbourhood prompts and the neighbours
    probability_prefixed: float | None = None  # mean over the contexts
    argmax_prefixed: float | None = None
    decoded_right_prefixed: float | None = None  # behind the first context
    efficacy_prefixed: float | None = None
    paraphrase_prefixed: float | None = None
    probability_unseen: float | None = None  # the same behind contexts that the edit was not made with
    argmax_unseen: float | None = None
    decoded_right_unseen: float | None = None
    efficacy_unseen: float | None = None
    paraphrase_unseen: float | None = None
    probability_distracted: float | None = None  # the same behind texts that lead away, as `distractors` makes them
    argmax_distracted: float | None = None
    decoded_right_distracted: float | None = None
    efficacy_distracted: float | None = None
    paraphrase_distracted: float | None = None
    portability: float | None = None  # probes with an answer, in any spelling, whose every token leads, teacher forced
    reversal: float | None = None  # the same of those probes that ask from the target back to the subject
    negation: float | None = None  # texts that deny the fact and are not followed by the target
    essence_kl: float | None = None  # nats: what the edit did to the next token behind texts about the subject
    essence_text: str | None = None  # one of these texts, and what the model writes behind it
    essence_before: str | None = None
    essence_after: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@plain_modes()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    contexts: Sequence[str] = (),
    *,
    unseen_contexts: Sequence[str] = (),
    distracting: Sequence[Sequence[str]] | None = None,
    deltas: Sequence[Delta] | None = None,
    unedited: Delta | Mapping[str, Tensor] | None = None,
    answer_tokens: int = 16,
    essence_tokens: int = 16,
) -> list[EditMetrics]:
    """Measure each request, on the model as it is, or with `deltas` as `deltas[i]` alone would leave it for request i.

    `contexts`, those of the edit, are put before prompts for the prefixed figures, `unseen_contexts` for the unseen
    ones, and `distracting[i]` before those of request i for the distracted ones. Every text is that of the edit to the
    character, its target's end included. The model may say `answer_tokens` more than the target has before it stops by
    itself; with 0 it is not asked to.

    Essence compares with the model before the edit, and is None where nobody says what that was: with `deltas` it is
    the model as it is, otherwise the model without `unedited`, the Delta that is in it, or with those weights by name.
    `essence_tokens` may be written about a subject; with 0 its essence is not measured.

    Raises EditError for a request that cannot be scored, ArgumentError for other arguments than these and for
    distracting texts and Deltas that are not one per request, the latter all of the same layers.
    """
    admit_model(model)
    return measure(
        Runner(model),
        tokenizer,
        edits,
        contexts,
        unseen_contexts=unseen_contexts,
        distracting=distracting,
        deltas=deltas,
        unedited=unedited,
        answer_tokens=answer_tokens,
        essence_tokens=essence_tokens,
    )


@plain_modes()
def measure(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    contexts: Sequence[str] = (),
    *,
    unseen_contexts: Sequence[str] = (),
    distracting: Sequence[Sequence[str]] | None = None,
    deltas: Sequence[Delta] | None = None,
    unedited: Delta | Mapping[str, Tensor] | None = None,
    answer_tokens: int = 16,
    essence_tokens: int = 16,
) -> list[EditMetrics]:
    """`evaluate` of a model that may be read while it runs."""
    admit_tokenizer(tokenizer)
    edits = checked_edits(edits)
    contexts, unseen_contexts = _texts("contexts", contexts), _texts("unseen_contexts", unseen_contexts)
    for name, tokens in (("answer_tokens", answer_tokens), ("essence_tokens", essence_tokens)):
        if not isinstance(tokens, int) or tokens < 0:
            raise ArgumentError(f"{name}: got {tokens!r}, wanted a number of tokens, 0 for none")
    if deltas is not None and unedited is not None:
        raise ArgumentError("unedited: got it beside deltas, whose model is the unedited one; leave it out")
    originals = None if unedited is None else _originals(runner, unedited)
    groups = [{"prefixed": contexts, "unseen": unseen_contexts} for _ in edits]
    for name, given in (("distracting", distracting), ("deltas", deltas)):
        if given is not None and len(given) != len(edits):
            raise ArgumentError(f"{name}: got {len(given)} for {len(edits)} edits, wanted one each")
    if distracting is not None:
        groups = [g | {"distracted": _texts("distracting", d)} for g, d in zip(groups, distracting, strict=True)]
    updates = RowUpdates.of(runner, deltas) if deltas else None
    model_of = [-1] * len(edits) if updates is None else list(range(len(edits)))
    # Every text is scored once under an edit, however many figures use it.
    questions = [
        (which, question)
        for edit, which, behind in zip(edits, model_of, groups, strict=True)
        for question in _questions(tokenizer, edit, ["", *chain.from_iterable(behind.values())])
    ]
    questions = list(dict.fromkeys(questions))
    found = score(runner, tokenizer, [q for _, q in questions], updates, [which for which, _ in questions])
    scores: dict[int, dict[Asked, Score]] = {}
    for (which, question), one in zip(questions, found, strict=True):
        scores.setdefault(which, {})[question] = one

    decoding = [
        (i, prefix)
        for i, g in enumerate(groups)
        for prefix in dict.fromkeys(["", *(p for ps in g.values() for p in ps[:1])])
    ]
    texts = [asked(tokenizer, edits[i], prefix) for i, prefix in decoding]
    targets = [answer for _, answer in answered(tokenizer, texts)]
    for question, ids in zip(texts, targets, strict=True):
        check_known(tokenizer, "target", question.answer, ids)
    more = [0 if prefix else answer_tokens for _, prefix in decoding]
    models = [model_of[i] for i, _ in decoding]
    said = complete(runner, tokenizer, texts, [len(ids) for ids in targets], more, updates, models)
    decoded: list[dict[str, tuple[Completion, str]]] = [{} for _ in edits]
    for (i, prefix), completion, wanted in zip(decoding, said, tokenizer.batch_decode(targets), strict=True):
        decoded[i][prefix] = completion, wanted
    metrics = [
        _metrics(tokenizer, edit, scores[which], behind, own, answer_tokens > 0)
        for edit, which, behind, own in zip(edits, model_of, groups, decoded, strict=True)
    ]
    before = originals if updates is None else updates
    if before is None or not essence_tokens:
        return metrics
    found_essences = essences(runner, tokenizer, edits, essence_tokens, before)
    return [
        replace(m, essence_kl=e.kl, essence_text=e.text, essence_before=e.before, essence_after=e.after)
        for m, e in zip(metrics, found_essences, strict=True)
    ]


def _originals(runner: Runner, unedited: Delta | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights before the edit, by name; ArgumentError for a Delta that is in no model and for what does not fit."""
    if isinstance(unedited, Delta):
        if not unedited.is_applied:
            raise ArgumentError("unedited: got a Delta that is not in the model; apply it, or give it as deltas")
        unedited = unedited.originals
    if not isinstance(unedited, Mapping):
        raise ArgumentError(
            f"unedited: got {type(unedited).__name__}, wanted the Delta in the model, or weights by name"
        )
    own = dict(runner.model.named_parameters())
    for name, weight in unedited.items():
        if name not in own or own[name].shape != weight.shape or own[name].is_meta:
            raise ArgumentError(f"unedited: {name} is no weight of this model; give the Delta that is in it")
    return unedited


def distractors(edits: Sequence[Edit]) -> list[list[str]]:
    """For every request, texts that lead away from it: that name its true answer, and the next other subject.

    A model whose edit is a reflex to nearby words answers with what it has just read. (After CHED, Park et al. 2025,
    where contexts are written around the old answer.)
    """
    found = []
    for i, edit in enumerate(edits):
        others = (
            other.subject for other in (*edits[i + 1 :], *edits[:i]) if other.subject.strip() != edit.subject.strip()
        )
        names = (edit.target_true, next(others, None))
        found.append([f"People were just talking about {name.strip()}. " for name in names if name and name.strip()])
    return found


def _texts(name: str, given: Sequence[str]) -> list[str]:
    # A text is a sequence of texts as well, of its characters.
    texts = None if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise ArgumentError(f"{name}: got {given!r}, wanted a list of texts, as ['It rained. ']")
    return texts


def summarise(metrics: Sequence[EditMetrics]) -> dict[str, float]:
    """Mean of every figure over the edits that have it."""
    return {name: sum(numbers) / len(numbers) for name, numbers in _numbers(metrics).items()}


def intervals(metrics: Sequence[EditMetrics]) -> dict[str, Interval]:
    """The same with the 95 % interval that other edits of their kind would leave the mean in."""
    return {name: bootstrap(numbers) for name, numbers in _numbers(metrics).items()}


def _numbers(metrics: Sequence[EditMetrics]) -> dict[str, list[float]]:
    """By figure, those of the edits that have it."""
    found: dict[str, list[float]] = {}
    for field in fields(EditMetrics):
        values = [getattr(m, field.name) for m in metrics]
        if numbers := [float(v) for v in values if v is not None and not isinstance(v, str)]:
            found[field.name] = numbers
    return found


def _questions(tokenizer: PreTrainedTokenizerBase, edit: Edit, prefixes: Sequence[str]) -> list[Asked]:
    targets = [edit.target] if edit.target_true is None else [edit.target, edit.target_true]
    out = [
        asked(tokenizer, edit, prefix, text=text, target=target)
        for text in (edit.text, *edit.paraphrase_prompts)
        for prefix in prefixes
        for target in targets
    ]
    answer = _neighbor_answer(edit)
    if answer is not None:
        for text in edit.neighborhood_prompts:
            out += [asked(tokenizer, edit, text=text, target=target) for target in (edit.target, answer)]
    out += [asked(tokenizer, edit, text=text) for text in edit.negation_prompts]
    for probe in (*edit.neighbors, *edit.portability):
        out += [asked(tokenizer, edit, text=probe.prompt, target=answer) for answer in probe.answers]
    return out + [asked(tokenizer, edit, text=probe.prompt) for probe in edit.neighbors]


def _neighbor_answer(edit: Edit) -> str | None:
    return edit.neighborhood_answer or edit.target_true


def _metrics(
    tokenizer: PreTrainedTokenizerBase,
    edit: Edit,
    scores: dict[Asked, Score],
    behind: dict[str, list[str]],
    decoded: dict[str, tuple[Completion, str]],
    answers: bool,
) -> EditMetrics:
    """`behind` has the prefixes of each group of figures, `decoded` by prefix what the model says and the target as the
    tokenizer spells it."""

    def log_p(text: str, target: str, prefix: str = "") -> float:
        return scores[asked(tokenizer, edit, prefix, text=text, target=target)].log_probability

    def wins(texts: Sequence[str], prefixes: Sequence[str] = ("",)) -> float | None:
        if edit.target_true is None:
            return None
        true = edit.target_true
        return _mean([log_p(t, edit.target, p) > log_p(t, true, p) for t in texts for p in prefixes])

    def is_right(prefix: str) -> bool:
        completion, wanted = decoded[prefix]
        return completion.forced.strip() == wanted.strip()

    def figures_behind(prefixes: Sequence[str], suffix: str) -> dict[str, Any]:
        found = [scores[asked(tokenizer, edit, prefix)] for prefix in prefixes]
        return {
            f"probability_{suffix}": _mean([s.probability for s in found]),
            f"argmax_{suffix}": _mean([s.is_argmax for s in found]),
            f"decoded_right_{suffix}": _mean([is_right(prefix) for prefix in prefixes[:1]]),  # behind the first of them
            f"efficacy_{suffix}": wins([edit.text], prefixes),
            f"paraphrase_{suffix}": wins(edit.paraphrase_prompts, prefixes),
        }

    bare = scores[asked(tokenizer, edit)]
    said, wanted = decoded[""]
    # As it was asked for, and as the tokenizer has it, which may know small letters only.
    spelled = wanted.strip().removesuffix(end_text(tokenizer, edit))
    right = {text.strip() for text in (edit.target, *edit.aliases, spelled)}
    answer = _neighbor_answer(edit)
    held = [log_p(t, answer) > log_p(t, edit.target) for t in edit.neighborhood_prompts if answer is not None]
    for probe in edit.neighbors:
        held.append(max(log_p(probe.prompt, spelling) for spelling in probe.answers) > log_p(probe.prompt, edit.target))
    follows = [
        any(scores[asked(tokenizer, edit, text=probe.prompt, target=spelling)].is_argmax for spelling in probe.answers)
        for probe in edit.portability
    ]
    leads_back = [led for led, probe in zip(follows, edit.portability, strict=True) if probe.is_reversal]
    denied = [not scores[asked(tokenizer, edit, text=text)].is_argmax for text in edit.negation_prompts]
    figures: dict[str, Any] = {}
    for suffix, prefixes in behind.items():
        figures |= figures_behind(prefixes, suffix)
    return EditMetrics(
        subject=edit.subject,
        target=edit.target,
        probability=bare.probability,
        argmax=bare.is_argmax,
        decoded=said.forced,
        decoded_right=is_right(""),
        answer=said.free if answers else None,
        answer_right=said.stopped and said.free.strip() in right if answers else None,
        efficacy=wins([edit.text]),
        paraphrase=wins(edit.paraphrase_prompts),
        neighborhood=_mean(held),
        portability=_mean(follows),
        reversal=_mean(leads_back),
        negation=_mean(denied),
        **figures,
    )


def _mean(values: Sequence[float | bool]) -> float | None:
    return sum(values) / len(values) if values else None
