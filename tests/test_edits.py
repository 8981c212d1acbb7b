"""Requests and the files they are read from: the accepted shapes, and a message for every kind of fault."""

import dataclasses
import json

import pytest

from rome_fast.edits import Edit, UnreadFieldsWarning, find_conflicts, load_edits
from rome_fast.errors import EditError

TWIN = {"prompt": "{} is a twin city of", "subject": "Chicago", "target_new": "Istanbul"}
TWIN_EDIT = Edit(prompt="{} is a twin city of", subject="Chicago", target="Istanbul")


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def load_one(tmp_path, record):
    (edit,) = load_edits(write_lines(tmp_path / "edits.jsonl", record))
    return edit


def test_text_fills_the_subject_in():
    assert TWIN_EDIT.text == "Chicago is a twin city of"
    assert Edit("In {}, they speak", "Peru", "Welsh").text == "In Peru, they speak"


def test_a_full_text_becomes_a_template():
    edit = Edit("The mother tongue of Lyon's mayor is", "Lyon", "Dutch")
    assert edit.prompt == "The mother tongue of {}'s mayor is"
    assert edit.text == "The mother tongue of Lyon's mayor is"


def test_white_space_around_the_target_is_dropped_and_the_rest_is_kept_as_it_is():
    edit = Edit(" {} is in\n", " Lyon ", " Italy\n")
    assert (edit.prompt, edit.subject, edit.target) == (" {} is in\n", " Lyon ", "Italy")
    assert edit.text == "  Lyon  is in\n"
    assert Edit("{}is in", "Oslo ", "Italy").text == Edit("Oslo is in", "Oslo ", "Italy").text == "Oslo is in"
    # Blanks that the prompt does not have are none of the subject's.
    assert Edit("Oslo, where is it?", " Oslo ", "Italy").prompt == "{}, where is it?"


def test_lists_become_tuples_so_that_an_edit_can_be_hashed():
    edit = Edit("{} is in", "Lyon", "Italy", paraphrase_prompts=["Where is Lyon?"])
    assert edit.paraphrase_prompts == ("Where is Lyon?",)
    assert edit == dataclasses.replace(edit)
    assert len({edit, dataclasses.replace(edit)}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "Paris is in"}, r"subject 'Lyon' is not in the prompt 'Paris is in'"),
        ({"prompt": "Lyon and Lyon are in"}, "more than once"),
        ({"prompt": "{} and {} are in"}, r"got 2 '\{\}'"),
        ({"prompt": "  "}, "prompt: got '  '"),
        ({"prompt": None}, "prompt: got NoneType, wanted a string"),
        ({"subject": ""}, "subject: got ''"),
        ({"subject": 7}, "subject: got int"),
        ({"target": " \n"}, "target: got"),
        ({"target": ["Italy"]}, "target: got list"),
        ({"target": "\ud800"}, "surrogate"),
        ({"target_true": ""}, "target_true: got ''"),
        ({"target_true": 3}, "target_true: got int"),
        ({"neighborhood_answer": 3}, "neighborhood_answer: got int"),
        ({"paraphrase_prompts": "Where is Lyon?"}, "paraphrase_prompts: got str, wanted a tuple or list"),
        ({"neighborhood_prompts": ["ok", 3]}, r"neighborhood_prompts\[1\]: got int"),
        ({"neighborhood_prompts": ("ok", "")}, r"neighborhood_prompts\[1\]: got ''"),
        ({"case_id": 1.5}, "case_id: got 1.5"),
        ({"case_id": True}, "case_id: got True"),
    ],
)
def test_an_unusable_request_is_refused(change, message):
    with pytest.raises(EditError, match=message):
        Edit(**{"prompt": "{} is in", "subject": "Lyon", "target": "Italy", **change})


def test_json_lines(tmp_path):
    full = {
        **TWIN,
        "target_true": "Warsaw",
        "paraphrase_prompts": ["Chicago is twinned with"],
        "neighborhood_prompts": ["Boston is a twin city of", "Taipei is a twin city of"],
        "neighborhood_answer": "Kyoto",
        "case_id": 16,
    }
    spelled = {"prompt": "Lyon is in", "subject": "Lyon", "target": "Italy", "target_true": None}
    assert load_edits(write_lines(tmp_path / "edits.jsonl", TWIN, full, spelled)) == [
        TWIN_EDIT,
        Edit(
            prompt="{} is a twin city of",
            subject="Chicago",
            target="Istanbul",
            target_true="Warsaw",
            paraphrase_prompts=("Chicago is twinned with",),
            neighborhood_prompts=("Boston is a twin city of", "Taipei is a twin city of"),
            neighborhood_answer="Kyoto",
            case_id=16,
        ),
        Edit(prompt="{} is in", subject="Lyon", target="Italy"),
    ]


def test_a_json_array_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "edits.json"
    path.write_text("\ufeff\n" + json.dumps([TWIN, TWIN], indent=2), encoding="utf-8")
    assert load_edits(str(path)) == [TWIN_EDIT, TWIN_EDIT]


def test_counterfact(tmp_path):
    record = {
        "case_id": 3,
        "pararel_idx": 1,
        "requested_rewrite": {
            "prompt": "{} is a twin city of",
            "relation_id": "P190",
            "target_new": {"str": "Istanbul", "id": "Q406"},
            "target_true": {"str": "Warsaw", "id": "Q270"},
            "subject": "Chicago",
        },
        "paraphrase_prompts": ["Chicago is twinned with", "Chicago's twin is"],
        "neighborhood_prompts": ["Boston is a twin city of"],
        "attribute_prompts": [],
    }
    with pytest.warns(UnreadFieldsWarning, match=r"read: pararel_idx \(1 record\), requested_rewrite\.relation_id"):
        edit = load_one(tmp_path, record)
    assert edit == Edit(
        prompt="{} is a twin city of",
        subject="Chicago",
        target="Istanbul",
        target_true="Warsaw",
        paraphrase_prompts=("Chicago is twinned with", "Chicago's twin is"),
        neighborhood_prompts=("Boston is a twin city of",),
        neighborhood_answer="Warsaw",
        case_id=3,
    )


@pytest.mark.parametrize(
    "locality",
    [
        {"locality_prompt": "Boston is a twin city of", "locality_ground_truth": "Kyoto"},
        {"locality": {"neighborhood": {"prompt": "Boston is a twin city of", "ground_truth": "Kyoto"}}},
        {"locality": {"neighborhood": {"prompt": ["Boston is a twin city of"], "ground_truth": ["Kyoto"]}}},
    ],
    ids=["flat", "nested", "nested lists"],
)
def test_easyedit(tmp_path, locality):
    record = {
        "prompt": "Chicago is a twin city of",
        "subject": "Chicago",
        "target_new": "Istanbul",
        "ground_truth": "Warsaw",
        "rephrase_prompt": "Chicago is twinned with",
        **locality,
    }
    assert load_one(tmp_path, record) == Edit(
        prompt="{} is a twin city of",
        subject="Chicago",
        target="Istanbul",
        target_true="Warsaw",
        paraphrase_prompts=("Chicago is twinned with",),
        neighborhood_prompts=("Boston is a twin city of",),
        neighborhood_answer="Kyoto",
    )


def test_every_faulty_line_is_named_in_one_message(tmp_path):
    path = tmp_path / "edits.jsonl"
    lines = [
        json.dumps(TWIN),
        "",
        '{"prompt": ',
        json.dumps({**TWIN, "prompt": "Boston is in"}),
        json.dumps({"prompt": "{} is in"}),
        "3",
        json.dumps({**TWIN, "target": "Rome"}),
        json.dumps({"requested_rewrite": "no"}),
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(EditError) as caught:
        load_edits(path)
    first, second, third, fourth, fifth, sixth = str(caught.value).split("\n")
    assert first.startswith("edits.jsonl, line 3: not valid JSON (Expecting value at column 12)")
    assert second.startswith("edits.jsonl, line 4: subject 'Chicago' is not in the prompt 'Boston is in'")
    assert third == "edits.jsonl, line 5: subject, target_new missing; the keys found are prompt"
    assert fourth == "edits.jsonl, line 6: got int, wanted a JSON object"
    assert fifth.startswith("edits.jsonl, line 7: target_new and target give the same thing differently")
    assert sixth == "edits.jsonl, line 8: requested_rewrite: got str, wanted a JSON object"


def test_at_most_ten_faults_are_listed(tmp_path):
    with pytest.raises(EditError) as caught:
        load_edits(write_lines(tmp_path / "edits.jsonl", *[{**TWIN, "subject": "Rome", "prompt": "x"}] * 13))
    lines = str(caught.value).split("\n")
    assert len(lines) == 11
    assert lines[9].startswith("edits.jsonl, line 10:")
    assert lines[10] == "and 3 more"


def test_a_line_separator_inside_a_string_is_no_line_end(tmp_path):
    """str.splitlines cuts at U+2028, which JSON allows inside a string."""
    path = tmp_path / "edits.jsonl"
    record = {**TWIN, "paraphrase_prompts": ["Chicago\u2028is twinned with"]}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\r\nbroken", encoding="utf-8")
    with pytest.raises(EditError, match=r"^edits\.jsonl, line 2: not valid JSON[^\n]*$"):
        load_edits(path)


def test_faults_of_an_array_are_named_by_item_or_line(tmp_path):
    path = tmp_path / "edits.json"
    path.write_text(json.dumps([TWIN, "text"]))
    with pytest.raises(EditError, match=r"edits\.json, item 2: got str, wanted a JSON object"):
        load_edits(path)
    path.write_text('[\n{"prompt": "x"},\n{"prompt" 3}]')
    with pytest.raises(EditError, match=r"edits\.json, line 3: not valid JSON"):
        load_edits(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"[]", "array is empty"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
)
def test_a_file_without_requests_is_refused(tmp_path, content, message):
    path = tmp_path / "edits.jsonl"
    path.write_bytes(content)
    with pytest.raises(EditError, match=message):
        load_edits(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(EditError, match=r"none\.jsonl \(No such file or directory\)"):
        load_edits(tmp_path / "none.jsonl")
    with pytest.raises(EditError, match="Is a directory"):
        load_edits(tmp_path)


def test_requests_are_compared_by_their_text_to_the_character():
    """Another blank, and it is another prompt; another way to part one text into template and subject is not."""
    one = Edit("The city of {} is", "Chicago", "Rome")
    find_conflicts(
        [one, Edit("The city of {} is ", "Chicago", "Paris"), Edit("The city of {} is\n", "Chicago", "Oslo")]
    )
    find_conflicts([one, Edit("The {} of Chicago is", "city", "Paris")])
    with pytest.raises(EditError, match=r"edits\[0\] and edits\[1\] ask for"):
        find_conflicts([one, Edit("The city of {}is", "Chicago ", "Paris")])


def test_conflicting_requests_are_named():
    other = Edit("{} is a twin city of", "Boston", "Istanbul")
    find_conflicts([TWIN_EDIT, other])
    clash = Edit("Chicago is a twin city of", "Chicago", "Rome", case_id=4)
    with pytest.raises(EditError) as caught:
        find_conflicts([TWIN_EDIT, other, clash, TWIN_EDIT])
    first, second = str(caught.value).split("\n")
    assert first == (
        "edits[0] and edits[2] (case_id 4) ask for 'Chicago is a twin city of' -> 'Istanbul' and -> 'Rome'; keep one"
    )
    assert second.startswith("edits[0] and edits[3] both ask for 'Chicago is a twin city of' -> 'Istanbul'; drop")
