"""The usual edit metrics, each without a prefix and, where contexts are given, behind them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..delta import Delta
from ..edits import Edit
from ..errors import ArgumentError
from ..rows import check_tokenizer, encode, target_start, with_target
from ..runner import Runner
from .isolated import RowUpdates
from .scoring import Score, greedy_completion, score


@dataclass(frozen=True)
class EditMetrics:
    """Shares in 0 .. 1 for one edit; None where the request has nothing to measure it with."""

    subject: str
    target: str
    probability: float  # of the target behind the bare prompt
    argmax: bool  # teacher forced
    decoded: str  # free greedy decoding, as many tokens as the target has
    decoded_right: bool
    efficacy: float | None  # P(target_new) > P(target_true)
    paraphrase: float | None  # the same on the paraphrase prompts
    neighborhood: float | None  # P(true answer) > P(target_new) on the neighbourhood prompts
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    contexts: Sequence[str] = (),
    *,
    unseen_contexts: Sequence[str] = (),
    deltas: Sequence[Delta] | None = None,
) -> list[EditMetrics]:
    """Measure each request, on the model as it is, or with `deltas` as `deltas[i]` alone would leave it for request i.

    `contexts`, those of the edit, are put before prompts for the prefixed figures, `unseen_contexts` for the unseen
    ones. Raises EditError for a request that cannot be scored, ArgumentError for Deltas that are not one per request,
    all of the same layer.
    """
    check_tokenizer(tokenizer)
    if deltas is not None and len(deltas) != len(edits):
        raise ArgumentError(f"deltas: got {len(deltas)} for {len(edits)} edits, wanted one each")
    runner = Runner(model)
    updates = RowUpdates.of(runner, deltas) if deltas else None
    model_of = [-1] * len(edits) if updates is None else list(range(len(edits)))
    every = ("", *contexts, *unseen_contexts)
    # Every text is scored once under an edit, however many figures use it.
    asked = dict.fromkeys((w, *q) for edit, w in zip(edits, model_of, strict=True) for q in _questions(edit, every))
    found = score(runner, tokenizer, [(t, target) for _, t, target in asked], updates, [w for w, _, _ in asked])
    scores: dict[int, dict[tuple[str, str], Score]] = {}
    for (which, text, target), one in zip(asked, found, strict=True):
        scores.setdefault(which, {})[(text, target)] = one

    decoding = ("", *contexts[:1], *unseen_contexts[:1])
    texts = [prefix + edit.text for edit in edits for prefix in decoding]
    targets = [edit.target for edit in edits for _ in decoding]
    counts = [_target_length(tokenizer, t, target) for t, target in zip(texts, targets, strict=True)]
    decoded = iter(
        greedy_completion(runner, tokenizer, texts, counts, updates, [w for w in model_of for _ in decoding])
    )
    return [
        _metrics(edit, scores[which], contexts, unseen_contexts, {prefix: next(decoded) for prefix in decoding})
        for edit, which in zip(edits, model_of, strict=True)
    ]


def summarise(metrics: Sequence[EditMetrics]) -> dict[str, float]:
    """Mean of every figure over the edits that have it."""
    out = {}
    for field in fields(EditMetrics):
        values = [getattr(m, field.name) for m in metrics]
        numbers = [float(v) for v in values if v is not None and not isinstance(v, str)]
        if numbers:
            out[field.name] = sum(numbers) / len(numbers)
    return out


def _questions(edit: Edit, prefixes: Sequence[str]) -> list[tuple[str, str]]:
    targets = [edit.target] if edit.target_true is None else [edit.target, edit.target_true]
    texts = [prefix + text for text in (edit.text, *edit.paraphrase_prompts) for prefix in prefixes]
    pairs = [(text, target) for text in texts for target in targets]
    if _neighbor_answer(edit) is not None:
        for text in edit.neighborhood_prompts:
            pairs += [(text, edit.target), (text, str(_neighbor_answer(edit)))]
    return pairs


def _neighbor_answer(edit: Edit) -> str | None:
    return edit.neighborhood_answer or edit.target_true


def _metrics(
    edit: Edit,
    scores: dict[tuple[str, str], Score],
    contexts: Sequence[str],
    unseen_contexts: Sequence[str],
    decoded: dict[str, str],
) -> EditMetrics:
    def wins(texts: Sequence[str]) -> float | None:
        if edit.target_true is None or not texts:
            return None
        true = edit.target_true
        return _mean([scores[(t, edit.target)].log_probability > scores[(t, true)].log_probability for t in texts])

    def behind(prefixes: Sequence[str], suffix: str) -> dict[str, Any]:
        found = [scores[(prefix + edit.text, edit.target)] for prefix in prefixes]
        right = [decoded[prefix].strip() == edit.target.strip() for prefix in prefixes[:1]]
        return {
            f"probability_{suffix}": _mean([s.probability for s in found]),
            f"argmax_{suffix}": _mean([s.is_argmax for s in found]),
            f"decoded_right_{suffix}": _mean(right),  # behind the first of them
            f"efficacy_{suffix}": wins([prefix + edit.text for prefix in prefixes]),
            f"paraphrase_{suffix}": wins([prefix + p for p in edit.paraphrase_prompts for prefix in prefixes]),
        }

    bare = scores[(edit.text, edit.target)]
    answer = _neighbor_answer(edit)
    held = [
        scores[(t, answer)].log_probability > scores[(t, edit.target)].log_probability
        for t in edit.neighborhood_prompts
        if answer is not None
    ]
    return EditMetrics(
        subject=edit.subject,
        target=edit.target,
        probability=bare.probability,
        argmax=bare.is_argmax,
        decoded=decoded[""],
        decoded_right=decoded[""].strip() == edit.target.strip(),
        efficacy=wins([edit.text]),
        paraphrase=wins(edit.paraphrase_prompts),
        neighborhood=_mean(held),
        **behind(contexts, "prefixed"),
        **behind(unseen_contexts, "unseen"),
    )


def _mean(values: Sequence[float | bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _target_length(tokenizer: PreTrainedTokenizerBase, text: str, target: str) -> int:
    encoded = encode(tokenizer, [with_target(text, target)])[0]
    return len(encoded.ids) - target_start(encoded, text, target)
