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


@pytest.mark.parametrize(
    ("prompt", "target", "separator"),
    [
        ("{} is in", "Rome", " "),
        ("Q: {}\nA:", "Rome", " "),
        ("Q: {}\nA:\n", "Rome", ""),
        ("{} is in ", "Rome", ""),
        ("{} is in\u00a0", "Rome", ""),
        ("Is {} (", "Rome", ""),
        ("{} (1890)", "Rome", " "),
        ("{} is in", "(Rome)", " "),
        ("{} costs $", "5", ""),
        ("{} costs", "$5", " "),
        ("{} costs", "-5", " "),
        ("{} is Rome", "-based", ""),
        ("{} is Rome", ", Italy", ""),
        ('He says "{}" is "', "Rome", ""),
        ('He says "{}"', "loudly", " "),
        ("{} is in", '"Rome"', " "),
        ('[{"city": "{} is in', 'Rome"', " "),
        ('[{"name":"{}","city":"', "Rome", ""),
        ("L'{} c'est l'", "Italie", ""),
        ("{} is the boys'", "hometown", " "),
        ("« {} »", "Rome", " "),
        ("„{}“", "Rom", " "),
        ("{} heißt „", "Rom", ""),
        ("**Question:** {}? **Answer:**", "Rome", " "),
        ("http://{}/", "rome", ""),
        ("{} is well-", "known", ""),
        ("{}_", "rome", ""),
        ("{}=", "5", ""),
        ("{} wrote C++", "and C", " "),
        ("{}<|im_end|>", "Rome", ""),
        ("{} </s>", "Rome", ""),
        ("[INST] {} [/INST]", "Rome", ""),
        ("{} [see 1]", "Rome", " "),
        ("{}的首都是", "柏林", ""),
        ("问：{}的首都？答：", "柏林", ""),
        ("{}的首都是", "Berlin", ""),
        ("The capital of {} is", "柏林", ""),
        ("{}の首都は", "東京", ""),
        ("เมืองหลวงของ{}คือ", "กรุงเทพ", ""),
        ("រាជធានីនៃ{}គឺ", "ភ្នំពេញ", ""),
        ("{}의 수도는", "서울", " "),
        ("عاصمة {} هي", "باريس", " "),
        ("עיר הבירה של {} היא", "\u200fפריז", " "),
        ("{} की राजधानी", "दिल्ली", " "),
        ("The mood of {} is", "🌙", " "),
        ("{} feels 👩‍🚀️", "great", " "),
        ("{} is in Andre\u0301", "Rome", " "),
    ],
)
def test_the_boundary_of_prompt_and_target(prompt, target, separator):
    edit = Edit(prompt.replace("{}", "Lyon", 1), "Lyon", target)
    assert edit.boundary == separator
    assert edit.continuation(edit.text, edit.target) == separator + target
    assert dataclasses.replace(edit, target=f" {target}\n").target == target


@pytest.mark.parametrize("separator", ["", " ", "\n", " -> "])
def test_a_separator_decides_and_takes_everything_as_it_is(separator):
    edit = Edit("{} is in\n", "Lyon", " Rome ", separator=separator)
    assert (edit.target, edit.boundary) == (" Rome ", separator)
    assert edit.continuation("Where? ", "Paris\n") == f"{separator}Paris\n"


def test_braces_stand_for_the_subject_where_there_is_one_and_for_themselves_in_it():
    edit = Edit("{} is in", "Lyon", "{}", paraphrase_prompts=["Where is {}?", "Lyon lies in", "{}, {}:"])
    assert edit.paraphrase_prompts == ("Where is Lyon?", "Lyon lies in", "Lyon, Lyon:")
    assert edit.target == "{}"
    # A subject's own.
    edit = Edit("The {} literal of", "{} literal", "Python", paraphrase_prompts=["What is the {} literal?", "Of {}:"])
    assert (edit.prompt, edit.text) == ("The {} of", "The {} literal of")
    assert edit.paraphrase_prompts == ("What is the {} literal?", "Of {} literal:")
    assert dataclasses.replace(edit, case_id=3).paraphrase_prompts == edit.paraphrase_prompts
    assert Edit("{} is a dict", "a{}b", "x").text == "a{}b is a dict"


# é in one code point and in two, and what else looks like what it is not.
ONE, TWO = "Andr\u00e9", "Andre\u0301"


@pytest.mark.parametrize(
    ("prompt", "subject", "found"),
    [
        (f"The works of {ONE} are", TWO, ONE),
        (f"The works of {TWO} are", ONE, TWO),
        (f"{TWO}s works by {ONE}, Andre", f"{ONE}s", f"{TWO}s"),
        ("\u1112\u1161\u11ab\u1100\u116e\u11a8 is in", "한국", "\u1112\u1161\u11ab\u1100\u116e\u11a8"),
        ("The city of Ｒｏｍｅ is", "Rome", "Ｒｏｍｅ"),
        ("New\u00a0York is in", "New York", "New\u00a0York"),
        ("\u03a9hm's law", "\u2126hm", "\u03a9hm"),
    ],
)
def test_a_subject_in_another_normal_form_is_edited_as_the_prompt_spells_it(prompt, subject, found):
    edit = Edit(prompt, subject, "Rome")
    assert (edit.subject, edit.text) == (found, prompt)


@pytest.mark.parametrize(
    ("prompt", "subject", "message"),
    [
        ("The city of paris is", "Paris", "not in the prompt 'The city of paris is', only with other capitals or inv"),
        ("The co\u00adoperative is", "cooperative", "only with other capitals or invisible characters"),
        (f"The works of {ONE} and {TWO} are", "Andr\u00e9\u200d", "only with other capitals or invisible characters"),
        (f"The works of {TWO} and {TWO} are", ONE, "more than once"),
        # An accent more is another letter.
        (f"The works of {ONE}\u0323 are", ONE.replace("\u00e9", "E\u0301"), r"is not in the prompt"),
    ],
)
def test_what_only_looks_like_the_subject_is_named(prompt, subject, message):
    with pytest.raises(EditError, match=message):
        Edit(prompt, subject, "Rome")


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
        (
            {"neighborhood_prompts": ["{} is in"]},
            r"neighborhood_prompts\[0\]: got '\{\}' in .*, wanted a full",
        ),
        ({"separator": 3}, "separator: got 3"),
        ({"end": None}, "end: got None"),
        ({"end": ""}, "end: got ''"),
        ({"user_at": "x"}, "user_at: got 'x'"),
        ({"slot": 3}, "slot: got 3, where there is no"),
        ({"slot": -1}, "slot: got -1, wanted a place in the prompt"),
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
    with pytest.warns(UnreadFieldsWarning, match=r"read: pararel_idx \(1 record\), requested_rewrite\.target_true"):
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
        relation="P190",
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


def test_long_texts_are_quoted_by_their_ends():
    """A document taken for a subject must not fill the terminal."""
    long = "A" * 3000 + " end"
    with pytest.raises(EditError) as told:
        Edit("Paris is in", long, "Rome")
    assert len(str(told.value)) < 400
    assert "AAA end' is not in the prompt 'Paris is in'" in str(told.value)
    with pytest.raises(EditError, match="more than once") as told:
        Edit(f"Paris {long} Paris", "Paris", "Rome")
    assert len(str(told.value)) < 400
