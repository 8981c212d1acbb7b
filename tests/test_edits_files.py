"""Edits files as people have them: the shapes of data sets, what is left out and said, and files that are none."""

import gzip
import json
import os
import re
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from helpers import LAYER
from rome_fast.cli import main
from rome_fast.edits import (
    DuplicateEditsWarning,
    Edit,
    Probe,
    SkippedEditsWarning,
    UnreadFieldsWarning,
    load_edits,
)
from rome_fast.errors import ArgumentError, EditError, RomeFastError
from toys import save_toy, toy_model, toy_tokenizer

EXAMPLES = sorted((Path(__file__).parent / "edits_files").iterdir())
CITY = {"prompt": "The city of {}", "subject": "Chicago", "target_new": "Rome"}


def records_of(file):
    text = file.read_text(encoding="utf-8")
    return json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def written(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def loaded(path, **options):
    """The edits, and what was said, by kind of warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        edits = load_edits(path, **options)
    said = {warning.category: str(warning.message) for warning in caught}
    assert len(said) == len(caught)  # each kind once
    return edits, said


def example(name):
    return loaded(next(file for file in EXAMPLES if file.stem == name))


def chatting(tokenizer):
    """The tokenizer with a template of its own."""
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/{{ m.role }}]\n{% endfor %}"
    return tokenizer


def leaves(value, path=""):
    """(path without numbers, text) of every text and number in a record."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, path)
    elif value is not None and str(value).strip():
        yield path, str(value)


def objects(value):
    """Every JSON object in a record, itself included."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(inner)


def has_texts(edit):
    """Every text that an edit holds."""
    probes = [*edit.portability, *edit.neighbors]
    texts = {edit.text, edit.prompt, edit.subject, edit.target, edit.target_true, edit.neighborhood_answer}
    texts |= {*edit.paraphrase_prompts, *edit.neighborhood_prompts, *edit.aliases, str(edit.case_id).split(".")[0]}
    texts |= {*edit.essence_prompts, *edit.negation_prompts, edit.relation}
    # As a template has it.
    texts |= {text.replace(edit.subject, "{}") for text in edit.essence_prompts}
    return texts | {text for p in probes for text in (p.prompt, p.kind, *p.answers)}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
@pytest.mark.parametrize("stray", [False, True], ids=["as it is", "stray fields"])
def test_every_field_is_used_or_named(tmp_path, file, stray):
    """Every leaf of a record is a text of its edits, or under a name that the warning gives."""
    records = records_of(file)
    for record in records if stray else []:
        for number, item in enumerate(list(objects(record))):
            item["of no shape"] = f"stray {number}"
    path = tmp_path / file.name
    path.write_text(json.dumps(records), encoding="utf-8")
    edits, said = loaded(path)
    assert len(edits) == len(records) + (file.stem == "mquake")
    assert said.keys() <= {UnreadFieldsWarning}
    named = said.get(UnreadFieldsWarning, "").partition("read: ")[2].split(", ")
    names = [re.sub(r" \(\d+ records?\)$", "", name) for name in named]
    texts = set().union(*map(has_texts, edits))
    # What tells the subject of RippleEdits, whose sentence is the prompt and the target.
    used = {f"{e.text} {e.target}." for e in edits} | {f"{e.text} {e.target_true}." for e in edits}
    if file.stem == "rippleedits":
        used |= {"Q70", "Q80", "Q90"}
    for where, text in {leaf for record in records for leaf in leaves(record)}:
        above = [where.rsplit(".", count)[0] for count in range(where.count(".") + 1)]
        is_named = any(name in above or name == f"{where} after the first" for name in names)
        assert is_named or text in texts | used, (where, text, names)


def test_our_own_shape():
    (first, second, third), said = example("own")
    assert said == {}
    assert first.neighborhood_answer == "Kyoto"
    assert second == Edit(
        "The mother tongue of {}'s mayor is",
        "Lyon",
        "Dutch",
        case_id="mayor",
        aliases=("Nederlands",),
        neighbors=(Probe("The mother tongue of Nantes's mayor is", ("French", "français"), "same relation"),),
        portability=(
            Probe("In the mayor of Lyon's language, water is called", ("water",), "two steps"),
            Probe("The city whose mayor speaks Dutch is", ("Lyon",), "reversal"),
        ),
        essence_prompts=("Lyon is known for",),
        negation_prompts=("The mother tongue of Lyon's mayor is not",),
        relation="103",
    )
    assert third == Edit(
        "In {}, they speak", "Peru", "Welsh", aliases=("Cymraeg",), paraphrase_prompts=("The language of Peru is",)
    )


def test_counterfact_names_what_it_does_not_read():
    (first, *_), said = example("counterfact")
    assert first.relation == "P1303"
    assert (first.target, first.target_true, first.neighborhood_answer, first.case_id) == ("organ", "lute", "lute", 7)
    assert str(said[UnreadFieldsWarning]) == (
        "counterfact.json: fields that are not read: pararel_idx (3 records), "
        "requested_rewrite.target_true.id (3 records), "
        "requested_rewrite.target_new.id (3 records), "
        "attribute_prompts (1 record), generation_prompts (1 record)"
    )
    (flat, *_), _ = example("counterfact_flat")
    assert (flat.target, flat.target_true, flat.neighborhood_prompts) == ("organ", "lute", ("Tom Marsh plays the",))


def test_easyedit():
    (flat, nested, blank), _ = example("easyedit")
    assert (flat.neighborhood_prompts, flat.neighborhood_answer) == (("Tom Marsh plays the",), "lute")
    assert nested == Edit(
        "The capital of {} is",
        "Norland",
        "Ostwick",
        "Velm",
        paraphrase_prompts=("Norland is governed from", "The seat of Norland's government is"),
        case_id=1,
        portability=(
            Probe("The river of Norland's capital is the", ("Ost",), "one_hop"),
            Probe("The capital of the North Country is", ("Ostwick",), "synonym"),
        ),
        neighbors=(
            Probe("The capital of Sudland is", ("Arn",), "neighborhood"),
            Probe("The capital of Westland is", ("Brod",), "neighborhood"),
            Probe("Velm is a city in", ("Norland",), "distracting"),
        ),
    )
    assert (blank.target_true, blank.paraphrase_prompts) == (None, ())
    assert blank.portability == (Probe("The country in which Brasswork Ltd was founded is", ("Belgium",)),)


def test_zsre():
    (first, second, _), _ = example("zsre")
    assert first == Edit(
        "What instrument does {} play?",
        "Ada Quill",
        "organ",
        "lute",
        paraphrase_prompts=("Which instrument is played by Ada Quill?",),
        neighborhood_prompts=("nq question: who wrote the song of the mill",),
        neighborhood_answer="Tom Marsh",
    )
    assert second.portability == (Probe("Which river runs through the capital of Norland?", ("Ost",)),)


def test_knowedit():
    (first, second, third), _ = example("knowedit_counterfact")
    assert first.portability == (
        Probe("The name of the position held by A. Quill is", ("harbour master",), "Subject_Aliasing"),
        Probe("The seat of the office held by Ada Quill is", ("Ostwick", "Ostwick Port"), "Reasoning"),
    )
    assert [probe.kind for probe in first.neighbors] == ["Relation_Specificity", "Forgetfulness"]
    assert second.neighbors == (
        Probe("The currency of Norland is", ("crown", "Norland crown"), "Relation_Specificity"),
    )
    assert third.portability[0].answers == ("yes", "true")
    (recent, *_), _ = example("knowedit_recent")
    assert (recent.target_true, recent.paraphrase_prompts) == (None, ("Ida Fenn died in",))
    (zsre, *_), _ = example("knowedit_zsre")
    assert (zsre.target_true, zsre.paraphrase_prompts) == ("lute", ("Which instrument is Ada Quill's?",))
    (passage, *_), _ = example("knowedit_wikibio")
    assert (passage.subject, passage.target) == ("ada quill", "She studied the lute in Velm.")
    assert passage.text.endswith("was a musician from Norland.")


def test_mquake_has_several_edits_in_a_record():
    edits, _ = example("mquake")
    assert [(e.case_id, e.subject, e.target, len(e.portability)) for e in edits] == [
        ("11.1", "Ada Quill", "organ", 3),
        ("11.2", "organ", "Ostwick", 0),
        (12, "Norland", "Ostwick", 1),
        (13, "Brasswork Ltd", "Ghent", 1),
    ]
    assert edits[0].portability[0] == Probe(
        "Where was Ada Quill's instrument invented?", ("Ostwick", "Ostwick Port"), "multi-hop"
    )
    assert edits[1].paraphrase_prompts == ("Where was the organ invented?",)


def test_rippleedits_spells_neither_subject_nor_target():
    """Both are told from the record's queries, or from what the sentence shares with the original fact."""
    edits, _ = example("rippleedits")
    assert [(e.prompt, e.subject, e.target, e.target_true, e.aliases) for e in edits] == [
        ("The name of the country of citizenship of {} is", "Ada Quill", "New Norland", "New Sudland", ("NN",)),
        ("The name of the award {} won is", "The Mill Band", "Golden Kettle", None, ("the Kettle",)),
        ("The place of death of {} is", "Madon", "New Velm", "New Arn", ()),
    ]
    assert edits[2].neighbors[1].answers == ("baker", "miller")
    assert [probe.kind for probe in edits[0].portability] == ["Subject_Aliasing", "Compositionality_I"]


def test_rippleedits_that_do_not_tell(tmp_path):
    def edit_of(**changes):
        return {"edit": {"prompt": "The mother of Ida is Eve.", "subject_id": "Q1", **changes}}

    original = {"original_fact": {"prompt": "The mother of Ida is Ann."}}
    path = written(tmp_path / "edits.jsonl", edit_of(), edit_of(**original), edit_of(**original) | {"subject": "Ida"})
    with pytest.raises(EditError) as caught:
        load_edits(path)
    assert str(caught.value).split("\n") == [
        "edits.jsonl, line 1: edit.prompt: where the target begins in 'The mother of Ida is Eve.' cannot be told",
        "edits.jsonl, line 2: subject missing: which part of 'The mother of Ida is' it is cannot be told; "
        "add a field subject",
    ]
    (edit,), _ = loaded(path, on_error="skip")
    assert (edit.prompt, edit.subject, edit.target, edit.target_true) == ("The mother of {} is", "Ida", "Eve", "Ann")


def test_qaedit():
    (first, second, third), _ = example("qaedit")
    assert first.neighbors == (
        Probe("who wrote the song of the mill", ("Tom Marsh",)),
        Probe("when was the old bridge built", ("1850",)),
    )
    assert (first.case_id, first.prompt, first.target) == (1104, "who plays the organ in {}?", "Ada Quill")
    assert (second.neighborhood_answer, third.target) == ("Velm", "1984")


def test_a_request_of_our_own_may_have_fields_that_give_other_shapes_away(tmp_path):
    path = written(tmp_path / "edits.jsonl", {**CITY, "edit": "second", "src": "wiki", "concept": {"text": "city"}})
    edits, said = loaded(path)
    assert edits == [Edit(*CITY.values())]
    assert said[UnreadFieldsWarning].endswith("read: edit (1 record), src (1 record), concept (1 record)")


def test_a_file_may_mix_shapes(tmp_path):
    records = [records_of(file)[0] for file in EXAMPLES]
    edits, _ = loaded(written(tmp_path / "edits.jsonl", *records))
    apart = [example(file.stem)[0] for file in EXAMPLES]
    assert [edit for edit in edits if edit.case_id != "11.2"] == [first for first, *_ in apart]


def test_faulty_records_are_skipped_and_named(tmp_path):
    bad = {**CITY, "prompt": "Paris"}
    lines = [json.dumps(CITY), "{", *[json.dumps(bad)] * 11, "[]", json.dumps({**CITY, "subject": "Oslo"})]
    path = tmp_path / "edits.jsonl"
    path.write_text("\n".join(lines))
    edits, said = loaded(path, on_error="skip")
    assert edits == [Edit("The city of {}", "Chicago", "Rome"), Edit("The city of {}", "Oslo", "Rome")]
    head, first, second, *_, last = said[SkippedEditsWarning].split("\n")
    assert head == "edits.jsonl: 13 of 15 records are left out:"
    assert first.startswith("edits.jsonl, line 2: not valid JSON")
    assert second.startswith("edits.jsonl, line 3: subject 'Chicago' is not in the prompt 'Paris'")
    assert last == "and 3 more"
    with pytest.raises(EditError, match="line 2: not valid JSON"):
        load_edits(path)


def test_nothing_good_is_an_error_all_the_same(tmp_path):
    path = tmp_path / "edits.json"
    path.write_text("[{}, 3]")
    with pytest.raises(EditError, match=r"item 1: prompt, subject, target_new missing; the keys found are none"):
        load_edits(path, on_error="skip")


def test_options_are_checked(tmp_path):
    with pytest.raises(ArgumentError, match="on_error: got 'ignore', wanted 'raise' or 'skip'"):
        load_edits(tmp_path, on_error="ignore")
    with pytest.raises(ArgumentError, match="duplicates: got True"):
        load_edits(tmp_path, duplicates=True)


def test_duplicates(tmp_path):
    paris, oslo = {**CITY, "target_new": "Paris"}, {**CITY, "subject": "Oslo"}
    spelled = {**paris, "prompt": "The city of Chicago"}
    path = written(tmp_path / "edits.jsonl", CITY, oslo, paris, spelled)
    rome = Edit("The city of {}", "Chicago", "Rome")
    other = Edit("The city of {}", "Oslo", "Rome")
    assert len(load_edits(path)) == 4
    with pytest.raises(EditError) as caught:
        load_edits(path, duplicates="error")
    assert str(caught.value).split("\n") == [
        "edits.jsonl, line 1 and edits.jsonl, line 3 ask for 'The city of Chicago' -> 'Rome' and 'Paris'",
        "edits.jsonl, line 1 and edits.jsonl, line 4 ask for 'The city of Chicago' -> 'Rome' and 'Paris'",
        "keep one of each, or say duplicates='first' or 'last'",
    ]
    edits, said = loaded(path, duplicates="first")
    assert edits == [rome, other]
    assert said[DuplicateEditsWarning].startswith(
        "edits.jsonl: 2 requests left out, the first of those that ask the same is kept:\nedits.jsonl, line 1 and"
    )
    edits, said = loaded(path, duplicates="last")
    assert edits == [Edit("The city of {}", "Chicago", "Paris"), other]
    assert said[DuplicateEditsWarning].split("\n")[2] == (
        "edits.jsonl, line 3 and edits.jsonl, line 4 ask for 'The city of Chicago' -> both 'Paris'"
    )
    assert loaded(written(path, CITY, oslo), duplicates="error") == ([rome, other], {})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"prompt": "a {}", "prompt": "b {}", "subject": "x", "target": "y"}', "prompt given more than once"),
        ('{"requested_rewrite": {"subject": "x", "subject": "y"}}', "requested_rewrite: subject given more than once"),
        ('{"prompt": "{}", "subject": "x", "target": NaN}', "target: got nan, which JSON does not have"),
        ('{"prompt": "{}", "subject": "x", "target": -Infinity}', "target: got -inf, which JSON does not have"),
        ('{"prompt": "{}", "subject": "x", "target_new": 1984}', "target_new: got the number 1984, .* in quotes"),
        ('{"prompt": "{}", "subject": "x", "target_new": ["a", 2.5]}', "target_new: got the number 2.5"),
        ('{"prompt": "{}", "subject": true, "target_new": "y"}', "subject: got true, wanted a text"),
        ('{"prompt": "{}", "subject": "x", "target_new": {"text": "y"}}', "target_new: got a JSON object"),
        ('{"prompt": "{}", "subject": "x", "target_new": [[["y"]]]}', "target_new: got lists inside lists"),
        ('{"prompt": "{}", "subject": "x", "target_new": null}', "target_new missing; .*; target_new is blank"),
        (
            '{"src": "{}", "subject": "x", "alt": " "}',
            "alt missing; the keys found are src, subject, alt; alt is blank",
        ),
        ('{"prompt": "{}", "subject": "x", "target": "y", "case_id": [1]}', "case_id: wanted an integer or a string"),
        ('{"prompt": "{}", "subject": "x", "target": "y", "case_id": "\\ud800"}', "case_id: got .*surrogate"),
        (
            '{"prompt": "{}", "subject": "x", "target": "y", "locality": {"n": {"prompt": ["a", "b"], "answer": "c"}}}',
            "prompt and answer: got 2 and 1, wanted an answer for each prompt",
        ),
        (
            '{"prompt": "{}", "subject": "x", "target": "y", "portability": {"a": [{"prompt": "p", "answer": 7}]}}',
            r"portability\.a\[0\]\.answer: got the number 7",
        ),
        ('{"prompt": ["{} is", "{} was"], "subject": "x", "target": "y"}', "prompt: got 2 texts, wanted one; write"),
        ('{"prompt": "{}", "subject": ["x", null, "y", "z"], "target": "y"}', "subject: got 3 texts, wanted one"),
        ('{"src": ["a x", "b x"], "subject": "x", "alt": "y"}', "src: got 2 texts, wanted one"),
        ('{"requested_rewrite": {"prompt": "{}", "subject": ["x", "y"]}}', "subject: got 2 texts, wanted one"),
        ('{"requested_rewrite": [1, 2]}', "requested_rewrite: got a list of other things"),
        ('{"requested_rewrite": [{"prompt": "{}"}]}', r"requested_rewrite\[0\]: subject, target_new missing"),
        ('{"edit": "x"}', "edit: got str, wanted a JSON object"),
        ("{'prompt': '{}'}", "not valid JSON .*; strings stand in double quotes"),
        ('{"prompt": "{}",}', "not valid JSON .*; take the last comma away"),
        ('{"prompt": "{}"},', r"not valid JSON \(Extra data at column 17\); end the line behind the object"),
        ("9" * 5000, "a number that is too long to be read"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested too deep"),
        ('{"prompt": "{}", "subject": "x", "target": ' + "[" * 500 + "]" * 500 + "}", "lists inside lists"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_what_is_wrong_with_a_record(tmp_path, record, message):
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps(CITY) + "\n" + record + "\n")
    with pytest.raises(EditError, match=rf"^edits\.jsonl, line 2: .*{message}"):
        load_edits(path)
    edits, said = loaded(path, on_error="skip")
    assert (len(edits), list(said)) == (1, [SkippedEditsWarning])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(CITY, indent=2).encode(), "one JSON object over several lines, wanted one object per line"),
        ((json.dumps(CITY, indent=2) + "\n").encode() * 2, "JSON objects over several lines each"),
        (b'{"train": [{"a": 1}], "test": [{"a": 1}]}', "one object with 2 lists, train, test; put the one"),
        (json.dumps([CITY])[:-1].encode() + b",]", "line 1: not valid JSON .*; take the last comma away"),
        (b"prompt,subject,target_new\n{},a,b\n", r"a table of columns, wanted JSON; pandas\.read_csv"),
        (b"subject\tprompt\ttarget_new\na\t{}\tb\n", "a table of columns"),
        (b"PAR1\x15\x04\x15", r"is Parquet, wanted JSON; pandas\.read_parquet"),
        (gzip.compress(json.dumps(CITY).encode(), mtime=0), "is compressed with gzip; unpack it"),
        (b"PK\x03\x04rest", "is a zip archive"),
        (json.dumps(CITY).encode("utf-16"), "UTF-16, or no text at all; save the edits file as UTF-8"),
        (json.dumps(CITY).encode("utf-16-le"), "UTF-16, or no text at all"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"[" * 5000 + b"]" * 5000, "line 1: nested too deep"),
        (b"null", "line 1: got NoneType, wanted a JSON object"),
        (b'"prompt"', "line 1: got str, wanted a JSON object"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, content, message):
    path = tmp_path / "edits.jsonl"
    path.write_bytes(content)
    for on_error in ("raise", "skip"):
        with pytest.raises(EditError, match=rf"^edits\.jsonl.*{message}"):
            load_edits(path, on_error=on_error)


def test_a_path_that_is_none(tmp_path):
    with pytest.raises(EditError, match=r"cannot read the edits file .*; give a file of JSON lines"):
        load_edits("a\0b")
    path = tmp_path / "table.csv"
    path.write_text("a;b\n1;2\n")
    with pytest.raises(EditError, match=r"table\.csv: a table of columns"):
        load_edits(path)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"data": [CITY, CITY], "version": 2}),
        json.dumps({"data": [CITY, CITY], "version": 2}, indent=2),
        json.dumps({"version": 2, "license": None, "edits": [CITY, CITY]}, indent=1) + "\r\n",
    ],
)
def test_a_list_inside_an_object(tmp_path, content):
    path = tmp_path / "edits.json"
    path.write_text(content)
    edits, said = loaded(path)
    assert edits == [Edit("The city of {}", "Chicago", "Rome")] * 2
    assert "version (1 record)" in said[UnreadFieldsWarning]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=repr)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "BOM"])
def test_line_ends_and_marks(tmp_path, end, mark):
    path = tmp_path / "edits.jsonl"
    lines = [mark + json.dumps(CITY), "", json.dumps({**CITY, "subject": "Oslo\u2028"}, ensure_ascii=False), "broken"]
    path.write_bytes(end.join(lines).encode())
    edits, said = loaded(path, on_error="skip")
    assert [edit.subject.strip() for edit in edits] == ["Chicago", "Oslo"]
    assert "edits.jsonl, line 4: not valid JSON" in said[SkippedEditsWarning]


def test_blank_optional_fields_are_absent(tmp_path):
    blank = {"target_true": " ", "paraphrase_prompts": ["", None], "neighborhood_prompts": [], "locality": {"n": {}}}
    blank |= {"case_id": "", "aliases": "", "portability": {"r": [{"prompt": "p", "ground_truth": ["", None]}]}}
    edits, said = loaded(written(tmp_path / "edits.jsonl", {**CITY, **blank}))
    assert edits == [Edit("The city of {}", "Chicago", "Rome")]
    assert said[UnreadFieldsWarning] == "edits.jsonl: fields that are not read: portability.r.prompt (1 record)"


def test_separator_and_end_are_read_as_they_are(tmp_path):
    path = written(tmp_path / "edits.jsonl", {**CITY, "separator": "", "end": True}, {**CITY, "separator": None})
    edits, said = loaded(path)
    assert said == {}
    assert edits == [Edit("The city of {}", "Chicago", "Rome", separator="", end=True), Edit(*CITY.values())]
    with pytest.raises(EditError, match="line 1: separator: got 3"):
        load_edits(written(path, {**CITY, "separator": 3}))


def test_messages_are_put_through_the_template_of_a_tokenizer(tmp_path):
    tokenizer = chatting(toy_tokenizer(False))
    messages = [{"role": "user", "content": "In which city is Chicago?"}]
    rest = {"paraphrase_prompts": ["Where is {}?"], "portability": [{"prompt": "And {}?", "answer": " So "}]}
    record = {"messages": messages, "subject": "Chicago", "target_new": "Rome", **rest}
    path = written(tmp_path / "edits.jsonl", record, CITY)
    edits, said = loaded(path, tokenizer=tokenizer)
    assert said == {}
    assert edits[0] == Edit.chat(
        messages,
        "Chicago",
        "Rome",
        tokenizer,
        paraphrase_prompts=("Where is Chicago?",),
        portability=(Probe("And Chicago?", ("So",)),),
    )
    assert edits[0].text == "[user]In which city is Chicago?[/user]\n"
    assert edits[0].portability == (Probe("[user]And Chicago?[/user]\n", ("So",)),)
    assert edits[1] == Edit(*CITY.values())
    with pytest.raises(EditError, match="line 1: messages: a chat needs the template of a tokenizer"):
        load_edits(path)
    with pytest.raises(EditError, match=r"line 1: messages\[0\]: got 'hi', wanted"):
        load_edits(written(path, {**record, "messages": ["hi"]}), tokenizer=tokenizer)
    with pytest.raises(EditError, match="line 1: subject missing; the keys found are messages, target_new"):
        load_edits(written(path, {"messages": messages, "target_new": "x"}), tokenizer=tokenizer)


def test_the_command_line_finds_the_template_of_the_model(tmp_path, capsys):
    model = save_toy(tmp_path / "toy", toy_model("llama"), chatting(toy_tokenizer(False)))
    record = {"messages": [{"role": "user", "content": "Where is {}?"}], "subject": "Chicago", "target_new": "Rome"}
    path, report = written(tmp_path / "edits.jsonl", record), tmp_path / "report.json"
    assert main(["evaluate", str(model), "--edits", str(path), "--json", str(report)]) == 0
    (measured,) = json.loads(report.read_text())["edits"]
    assert (measured["subject"], measured["target"]) == ("Chicago", "Rome")
    # A pipe, as the shell's <(…) is, can be read only once.
    out, into = os.pipe()
    os.write(into, path.read_bytes())
    os.close(into)
    assert main(["evaluate", str(model), "--edits", f"/dev/fd/{out}", "--json", str(report)]) == 0
    os.close(out)
    assert json.loads(report.read_text())["edits"] == [measured]


def test_names_of_fields_are_made_printable(tmp_path):
    path = written(tmp_path / "edits.jsonl", {**CITY, "a\nb": 1, "\ud800": 2, "x" * 200: 3})
    _, said = loaded(path)
    assert said[UnreadFieldsWarning] == (
        "edits.jsonl: fields that are not read: 'a\\nb' (1 record), '\\ud800' (1 record), " + "x" * 80 + "… (1 record)"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aliases": "Roma"}, "aliases: got str"),
        ({"aliases": ("",)}, r"aliases\[0\]: got ''"),
        ({"neighbors": [("a", "b")]}, r"neighbors: got list, wanted a tuple or list of rome_fast\.Probe"),
        ({"portability": Probe("a", ("b",))}, "portability: got Probe"),
    ],
)
def test_an_edit_checks_its_probes(change, message):
    with pytest.raises(EditError, match=message):
        Edit("The city of {}", "Chicago", "Rome", **change)


def test_a_probe_is_checked():
    assert Probe("a", ["b"]).answers == ("b",)
    for arguments, message in (
        (("", ("b",)), "probe prompt: got ''"),
        (("a", ()), "probe answers: got none"),
        (("a", "b"), "probe answers: got str"),
        (("a", ("b", 3)), r"probe answers\[1\]: got int"),
        (("a", ("b",), None), "probe kind: got NoneType"),
    ):
        with pytest.raises(EditError, match=message):
            Probe(*arguments)


# In a test a warning would be an error; for a user of the command line it is a line.
as_users_have_it = pytest.mark.filterwarnings("always::rome_fast.edits.EditsFileWarning")


@pytest.fixture(scope="module")
def toy(tmp_path_factory, toy_tokenizers):
    return save_toy(tmp_path_factory.mktemp("edits files") / "toy", toy_model("llama"), toy_tokenizers[True])


@as_users_have_it
def test_the_command_line_says_what_was_left_out(toy, tmp_path, capsys):
    path = written(tmp_path / "edits.jsonl", CITY, {**CITY, "target_new": "Paris"}, {"prompt": "[/INST]"}, {"a": 1})
    arguments = ["edit", str(toy), "--edits", str(path), "--plan", "--identity", "--layer", str(LAYER)]
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        "rome-fast: edits.jsonl, line 3: subject, target_new missing; the keys found are prompt\n"
        "edits.jsonl, line 4: prompt, subject, target_new missing; the keys found are a\n"
    )
    assert main([*arguments, "--on-error", "skip"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: edits.jsonl: 2 of 4 records are left out:\nedits.jsonl, line 3: subject")
    assert "rome-fast: edits.jsonl, line 1 and edits.jsonl, line 2 ask for 'The city of Chicago'" in captured.err
    assert main([*arguments, "--on-error", "skip", "--duplicates", "last"]) == 0
    assert "the last of those that ask the same is kept" in capsys.readouterr().err


def test_every_verb_that_reads_edits_takes_the_options(capsys):
    for verb in ("edit", "evaluate", "study", "bench", "profile"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        out = capsys.readouterr().out
        assert "--on-error {raise,skip}" in out
        assert "--duplicates {error,first,last}" in out


@as_users_have_it
def test_evaluate_measures_requests_that_ask_the_same(toy, tmp_path, capsys):
    path = written(tmp_path / "edits.jsonl", CITY, {**CITY, "target_new": "Paris"}, {"a": 1})
    report = tmp_path / "report.json"
    arguments = ["evaluate", str(toy), "--edits", str(path), "--on-error", "skip", "--json", str(report)]
    assert main(arguments) == 0
    assert [edit["target"] for edit in json.loads(report.read_text())["edits"]] == ["Rome", "Paris"]
    assert main([*arguments, "--duplicates", "first"]) == 0
    assert [edit["target"] for edit in json.loads(report.read_text())["edits"]] == ["Rome"]
    assert "warning: edits.jsonl: 1 of 3 records are left out" in capsys.readouterr().err


# What a mutation puts in place of a part of a record: JSON of any form, and texts that tokenizers, templates and
# terminals have tripped over.
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", "{}", "{} and {}", "[/INST]", "Chicago", "\ud800", "e\u0301", "\u2028", "<s>", "x" * 3000]
    ),
    st.text(max_size=12),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.just(10**400), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)
RECORDS = [record for file in EXAMPLES for record in records_of(file)]


@st.composite
def mutated(draw):
    """A record of one of the shapes, parts of which are replaced, taken away, doubled or given another name."""
    record = json.loads(json.dumps(draw(st.sampled_from(RECORDS))))
    for _ in range(draw(st.integers(0, 3))):
        inner = draw(st.sampled_from(list(objects(record))))
        if not inner:
            continue
        key = draw(st.sampled_from(sorted(inner)))
        value = inner.pop(key)
        act = draw(st.sampled_from(["replace", "drop", "rename", "list"]))
        if act == "replace":
            inner[key] = draw(JSON)
        elif act == "rename":
            inner[draw(st.sampled_from(["prompt", "target", "locality", "portability", "src", "edit", "concept"]))] = (
                value
            )
        elif act == "list":
            inner[key] = [value, draw(JSON)]
    return record


@st.composite
def files(draw):
    """The bytes of an edits file: records in one of the forms that files have, and damage of the bytes."""
    records = draw(st.lists(st.one_of(mutated(), mutated(), mutated(), JSON), min_size=1, max_size=4))
    form = draw(st.sampled_from(["lines"] * 4 + ["array"] * 2 + ["object", "pretty", "bytes"]))
    if form == "bytes":
        return draw(st.binary(max_size=60))
    if form == "lines":
        text = draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(json.dumps(record) for record in records)
    else:
        whole = {draw(TEXTS): records, "more": draw(JSON)} if form == "object" else records
        text = json.dumps(whole, indent=draw(st.sampled_from([None, 1])))
    if form == "pretty" and records:
        text = json.dumps(records[0], indent=1)
    if draw(st.sampled_from([False] * 4 + [True])) and '"' in text:
        # A field given twice, a comma too many, a text cut off.
        old, new = draw(st.sampled_from([("{", '{"prompt": 1, "prompt": 2, '), ("}", ",}"), ('"', ""), ("]", "")]))
        text = text.replace(old, new, 1)
    data = text.encode(draw(st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16"])), "surrogatepass")
    at = draw(st.integers(0, len(data)))
    damage = draw(st.sampled_from(["none"] * 4 + ["cut", "insert"]))
    if damage == "none":
        return data
    return data[:at] if damage == "cut" else data[:at] + draw(st.binary(max_size=3)) + data[at:]


def check_file(toy, path, data, options):
    """Only errors of the package come out, as a message on the command line, whatever a file holds."""
    path.write_bytes(data)
    on_error, duplicates = options
    try:
        edits, _ = loaded(path, on_error=on_error, duplicates=duplicates)
    except RomeFastError:
        edits = []
    event(f"loads: {bool(edits)}")
    arguments = ["edit", str(toy), "--edits", str(path), "--plan", "--identity", "--layer", str(LAYER)]
    arguments += ["--on-error", on_error, *(["--duplicates", duplicates] if duplicates else [])]
    assert main(arguments) in ((0, 2) if edits else (2,))


OPTIONS = st.tuples(st.sampled_from(["raise", "skip"]), st.sampled_from([None, "error", "first", "last"]))
FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)


@as_users_have_it
@FEW
@given(data=files(), options=OPTIONS)
def test_no_file_ends_in_a_traceback(toy, tmp_path_factory, data, options):
    check_file(toy, tmp_path_factory.getbasetemp() / "random edits.jsonl", data, options)


@pytest.mark.slow
@as_users_have_it
@settings(FEW, max_examples=500, derandomize=False)
@given(data=files(), options=OPTIONS)
def test_no_file_of_500_ends_in_a_traceback(toy, tmp_path_factory, data, options):
    check_file(toy, tmp_path_factory.getbasetemp() / "random edits.jsonl", data, options)
