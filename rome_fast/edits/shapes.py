"""The shapes of data sets: one small function each, from the fields of a record to the edits that it asks for.

Which shape a record has is told from its fields. What a function does not take is named as not read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import EditError
from .edit import REVERSAL, Edit, Probe
from .fields import Fields, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Spellings of a question and of what is right to say to it.
_PROMPT = ("prompt", "loc", "question", "New Question")
_ANSWERS = ("ground_truth", "answers", "answer", "loc_ans", "New Answer")
# Fields of Edit that a file gives as they are, blank ones too.
_AS_THEY_ARE = ("separator", "end")
# Those that a record has one of, and those of whose spellings the first counts.
_ONLY = ("prompt", "subject")
_FIRST = {
    "target_true": ("target_true", "ground_truth"),
    "neighborhood_answer": ("neighborhood_answer",),
}
_MOST_KEYS = 20


def edits_from(fields: Fields, tokenizer: "PreTrainedTokenizerBase | None" = None) -> list[Edit]:
    """The edits of a record, more than one only for MQuAKE. Raises EditError with what is wrong with it.

    `tokenizer` has the template that a chat is put through.
    """
    if "messages" in fields:
        return [_chat(fields, tokenizer)]
    if "requested_rewrite" in fields:
        return _counterfact(fields)
    # Beside a prompt, fields of these names are somebody's notes.
    shapes = {} if "prompt" in fields else _SHAPES
    return next((read for mark, read in shapes.items() if mark in fields), _flat)(fields)


def is_request(record: dict[str, Any]) -> bool:
    """Whether an object has the looks of a record, faulty or not, rather than of something around a list of them."""
    return any(key in record for key in ("prompt", "subject", "messages", "requested_rewrite", *_SHAPES))


def _flat(fields: Fields, spelled: Sequence[str] = ("prompt", "subject", "target_new"), **given: Any) -> list[Edit]:
    """Our own shape, and flat CounterFact, EasyEdit, KnowEdit and QAEdit; others after they have taken what is theirs.

    Arguments and errors are those of `_values`.
    """
    return [Edit(**_values(fields, spelled, given))]


def _chat(fields: Fields, tokenizer: "PreTrainedTokenizerBase | None") -> Edit:
    """Our own shape with messages in place of a prompt: an edit of what the model answers in a chat."""
    messages = fields.take("messages")
    values = _values(fields, ("messages", "subject", "target_new"), {"prompt": messages})
    if tokenizer is None:
        raise EditError("messages: a chat needs the template of a tokenizer; give load_edits(…, tokenizer=…)")
    return Edit.chat(values.pop("prompt"), tokenizer=tokenizer, **values)


def _values(fields: Fields, spelled: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    """Values of Edit by name.

    `given` are those that were taken already, `spelled` the names of prompt, subject and target for messages. Raises
    EditError where one of these three is missing.
    """
    values: dict[str, Any] = {name: fields.exactly(name) for name in _AS_THEY_ARE if name in fields.keys}
    for name in _ONLY:
        values[name] = given[name] if name in given else fields.only(name)
    for name, spellings in _FIRST.items():
        values[name] = given[name] if name in given else fields.first(*spellings)
    values["case_id"] = given["case_id"] if "case_id" in given else _case_id(fields)
    if "target" in given:
        values["target"], aliases = given["target"], given.get("aliases", ())
    else:
        values["target"], *aliases = fields.texts("target_new", "target") or (None,)
    values["aliases"] = (*aliases, *fields.texts("aliases"))
    values["paraphrase_prompts"] = (
        *given.get("paraphrase_prompts", ()),
        *fields.texts("paraphrase_prompts", "rephrase_prompt", "rephrase"),
    )
    values["neighborhood_prompts"] = fields.texts("neighborhood_prompts")
    values["essence_prompts"] = fields.texts("essence_prompts", "essence")
    values["negation_prompts"] = fields.texts("negation_prompts", "negation")
    values["relation"] = given["relation"] if "relation" in given else _relation(fields)
    values["portability"] = (
        *given.get("portability", ()),
        *_beside(fields, "portability_prompt", "portability_ground_truth", "portability_answer"),
        *_probes(fields, "portability"),
        *_beside(fields, "reversal_prompt", "reversal_ground_truth", "reversal_answer", kind=REVERSAL),
        *_probes(fields, "reversal", REVERSAL),
    )
    values["neighbors"] = (
        *given.get("neighbors", ()),
        *_beside(fields, "locality_prompt", "locality_ground_truth", "locality_answer"),
        *_probes(fields, "locality"),
        *_probes(fields, "neighbors"),
    )
    missing = [key for key, name in zip(spelled, ("prompt", "subject", "target"), strict=True) if values[name] is None]
    if missing:
        keys = [shown(key) for key in fields.keys[:_MOST_KEYS]] + ["…"] * (len(fields.keys) > _MOST_KEYS)
        blank = "".join(f"; {key} is blank" for key in missing if key in fields.keys)
        raise EditError(f"{', '.join(missing)} missing; the keys found are {', '.join(keys) or 'none'}{blank}")
    return {name: value for name, value in _alike(values).items() if value is not None}


def _counterfact(fields: Fields) -> list[Edit]:
    """CounterFact: the request is an object of its own, and its neighbours' answer is the true target."""
    if fields.is_list("requested_rewrite"):
        return _mquake(fields)
    fields.lift("requested_rewrite")
    (edit,) = _flat(fields)
    if edit.neighborhood_prompts and edit.neighborhood_answer is None:
        edit = replace(edit, neighborhood_answer=edit.target_true)
    return [edit]


def _mquake(fields: Fields) -> list[Edit]:
    """MQuAKE: several edits, and questions that follow from all of them together; the first edit carries these."""
    rewrites = [rewrite for _, rewrite in fields.objects("requested_rewrite")]
    if not rewrites:
        raise EditError("requested_rewrite: got a list of other things, wanted JSON objects")
    case_id = _case_id(fields)
    edits = []
    for number, rewrite in enumerate(rewrites, start=1):
        own_id = case_id if case_id is None or len(rewrites) == 1 else f"{case_id}.{number}"
        try:
            edits += _flat(rewrite, paraphrase_prompts=rewrite.texts("question"), case_id=own_id)
        except EditError as error:
            raise EditError(f"requested_rewrite[{number - 1}]: {error}") from error
    if "questions" in fields and "new_answer" in fields:
        answers = (*fields.texts("new_answer"), *fields.texts("new_answer_alias"))
        questions = tuple(Probe(text, answers, "multi-hop") for text in fields.texts("questions"))
        edits[0] = replace(edits[0], portability=(*edits[0].portability, *questions))
    return edits


def _zsre(fields: Fields) -> list[Edit]:
    """zsRE: `answers` are right before the edit, `alt` after it."""
    target, *aliases = fields.texts("alt") or (None,)
    return _flat(
        fields,
        ("src", "subject", "alt"),
        prompt=fields.only("src"),
        target=target,
        aliases=tuple(aliases),
        target_true=fields.first("answers"),
        neighbors=tuple(_beside(fields, "loc", "loc_ans")),
    )


def _wikibio(fields: Fields) -> list[Edit]:
    """KnowEdit's WikiBio: the sentence that is to follow a passage about a concept."""
    return _flat(
        fields,
        ("text", "concept", "labels"),
        prompt=fields.only("text"),
        subject=fields.only("concept"),
        target=fields.first("labels"),
    )


def _rippleedits(fields: Fields) -> list[Edit]:
    """RippleEdits: the edit is a sentence with its target, and neither the subject nor the target stands alone.

    The target is the answer to one of the record's queries that ends the sentence, or what it does not share with the
    original fact; the subject what the sentence shares with all queries about the same entity.
    """
    edit = fields.open("edit")
    queries = list(_queries(fields))
    statement = edit.only("prompt")
    if statement is None:
        raise EditError("edit.prompt missing")
    entity = edit.take("subject_id")
    original = edit.open("original_fact").first("prompt") if "original_fact" in edit else None
    stem, target, aliases = _target_of(statement, original, [names for q in queries for names in q.answers])
    about = [q.prompt for q in queries if q.own_words and q.entity == entity]
    return _flat(
        fields,
        ("edit.prompt", "subject", "edit.prompt"),
        prompt=stem,
        subject=fields.only("subject") or edit.only("subject") or _subject_of(stem, about),
        target=target,
        aliases=aliases,
        target_true=_without(stem, original),
        relation=_relation(edit),
        portability=tuple(q.probe for q in queries if q.kind not in _MUST_STAY),
        neighbors=tuple(q.probe for q in queries if q.kind in _MUST_STAY),
    )


# By the field that gives a shape away, the first that a record has.
_SHAPES: dict[str, Callable[[Fields], list[Edit]]] = {
    "edit": _rippleedits,
    "src": _zsre,
    "concept": _wikibio,
}


def _case_id(fields: Fields) -> int | str | None:
    for key in ("case_id", "id"):
        if fields.is_number_or_text(key):
            return fields.take(key)
    if "case_id" in fields:
        raise EditError("case_id: wanted an integer or a string")
    return None


def _relation(fields: Fields) -> str | None:
    key = next((key for key in ("relation_id", "relation") if fields.is_number_or_text(key)), None)
    return None if key is None else str(fields.take(key))


def _alike(values: dict[str, Any]) -> dict[str, Any]:
    """Neighbours of no certain kind that share one answer as prompts with that answer."""
    probes: Sequence[Probe] = values["neighbors"]
    common = {(probe.answers, probe.kind in ("", "neighborhood")) for probe in probes}
    if values["neighborhood_prompts"] or len(common) != 1:
        return values
    (answers, plain) = common.pop()
    if len(answers) > 1 or not plain or values["neighborhood_answer"] not in (None, answers[0]):
        return values
    prompts = tuple(probe.prompt for probe in probes)
    return values | {"neighbors": (), "neighborhood_prompts": prompts, "neighborhood_answer": answers[0]}


def _beside(fields: Fields, prompt: str, *answers: str, kind: str = "") -> Iterator[Probe]:
    """Probes given by two fields of the record, each a text or a list; without an answer they stay unread."""
    answer = next((key for key in answers if key in fields), None)
    if prompt in fields and answer is not None:
        yield from _paired(fields, prompt, answer, kind)


def _probes(fields: Fields, key: str, usual: str = "") -> Iterator[Probe]:
    """Probes given as an object, a list of objects, or either by kind; without an answer they stay unread."""
    for kind, probe in fields.objects(key, *_PROMPT):
        prompt = next((name for name in _PROMPT if name in probe), None)
        answer = next((name for name in _ANSWERS if name in probe), None)
        if prompt is not None and answer is not None:
            yield from _paired(probe, prompt, answer, kind or probe.first("kind") or usual)


def _paired(fields: Fields, prompt: str, answer: str, kind: str) -> Iterator[Probe]:
    """One prompt with all the answers, or as many answers as prompts."""
    prompts = fields.texts(prompt)
    if len(prompts) == 1:
        yield Probe(prompts[0], fields.texts(answer), kind)
        return
    groups = fields.lists(answer)
    if len(groups) != len(prompts):
        raise EditError(
            f"{prompt} and {answer}: got {len(prompts)} and {len(groups)}, wanted an answer for each prompt"
        )
    for text, answers in zip(prompts, groups, strict=True):
        if answers:
            yield Probe(text, answers, kind)


# RippleEdits: what an edit must leave as it was, and what follows from it. The misspelling is in some of its files.
_MUST_STAY = ("Relation_Specificity", "Relation_Specifity", "Forgetfulness")
_FOLLOWS = ("Logical_Generalization", "Subject_Aliasing", "Compositionality_I", "Compositionality_II")


@dataclass(frozen=True)
class _Query:
    kind: str
    prompt: str
    answers: tuple[tuple[str, ...], ...]  # a label and its aliases each
    entity: object  # what it asks about
    own_words: bool  # with the label of the entity, rather than an alias or a description

    @property
    def probe(self) -> Probe:
        return Probe(self.prompt, tuple(name for names in self.answers for name in names), self.kind)


def _queries(fields: Fields) -> Iterator[_Query]:
    for kind in (*_MUST_STAY, *_FOLLOWS):
        for _, test in fields.objects(kind):
            for _, query in test.objects("test_queries"):
                answers = [(*a.texts("value"), *a.texts("aliases")) for _, a in query.objects("answers")]
                named = tuple(names for names in answers if names)
                own_words = not query.has("phrase", "second_relation")
                query.take("phrase")
                prompt = query.first("prompt") if named else None
                if prompt is not None:
                    yield _Query(kind, prompt, named, query.take("subject_id"), own_words)


def _target_of(
    statement: str, original: str | None, answers: Sequence[tuple[str, ...]]
) -> tuple[str, str, tuple[str, ...]]:
    """(prompt, target, its aliases) of a sentence that ends in the target."""
    sentence = statement.strip().removesuffix(".")
    ends = [(len(name), name, names) for names in answers for name in names if sentence.endswith(" " + name)]
    if ends:
        _, target, names = max(ends)
        return sentence.removesuffix(target).rstrip(), target, tuple(name for name in names if name != target)
    words, others = sentence.split(" "), (original or "").split(" ")
    shared = next((i for i, pair in enumerate(zip(words, others, strict=False)) if pair[0] != pair[1]), 0)
    # "New York" and "New Jersey" share more than the prompt, which ends in a verb.
    while shared and words[shared - 1] not in _BEFORE_A_TARGET:
        shared -= 1
    if not shared:
        raise EditError(f"edit.prompt: where the target begins in {statement!r} cannot be told")
    return " ".join(words[:shared]), " ".join(words[shared:]), ()


def _without(stem: str, original: str | None) -> str | None:
    """The target of the original fact."""
    if original is None or not original.startswith(stem):
        return None
    return original.removeprefix(stem).strip().removesuffix(".") or None


_BEFORE_A_TARGET = ("is", "are", "follows", "by")
# Words around the subject in RippleEdits' questions.
_FRAME = {"the", "name", "names", "of", "which", "in", "is", "are", "has", "won", "with", "a", "by", "plays"}
_FRAME |= {"follows", "followed", "associated"}
_LONGEST_SUBJECT = 24


def _subject_of(stem: str, prompts: Sequence[str]) -> str:
    """The longest run of words that the stem shares with all prompts, without the frame that questions have."""
    words = stem.split(" ") if prompts else []
    runs = [words[i : i + n] for i in range(len(words)) for n in range(1, min(_LONGEST_SUBJECT, len(words) - i) + 1)]
    found = [
        " ".join(run)
        for run in runs
        if not {run[0], run[-1]} & _FRAME and all(f" {' '.join(run)} " in f" {prompt} " for prompt in prompts)
    ]
    subject = max(found, key=lambda run: (run != "The", run != run.lower(), len(run)), default="The")
    if subject == "The":
        raise EditError(f"subject missing: which part of {stem!r} it is cannot be told; add a field subject")
    return subject
