"""Edits through a chat template: the text is what the template makes, and the model answers and stops."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import oracle
from helpers import CONTEXTS, LAYER, SETTINGS, START, delta_w, edited, relative_error
from rome_fast import Edit, Statistics, apply_edits
from rome_fast.assets import model_dir
from rome_fast.demo import statistics_dir
from rome_fast.errors import EditError
from rome_fast.evaluation import evaluate
from rome_fast.methods import method_named
from rome_fast.models.past import Contexts
from rome_fast.models.rows import edit_rows, encode, essence_row, needs_prefix
from rome_fast.models.runner import Runner
from rome_fast.search.requests import by_head, tokenise
from toys import BOS, EOS, toy_model, toy_tokenizer

TEMPLATES = {
    # As ChatML: every message as it is between special tokens.
    "marked": """{% for m in messages %}<s>{{ m.role + '\n' + m.content }}</s>
{% endfor %}{% if add_generation_prompt %}<s>assistant
{% endif %}""",
    # As Llama 2's: BOS, words for marks, blanks dropped, and one before the answer.
    "words": """<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]
{%- elif m.role == 'assistant' %} {{ m.content | trim }} </s>
{%- else %}({{ m.content | trim }}) {% endif %}{% endfor %}""",
    # No mark at all, and nothing before what the user says.
    "nothing": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
}
SEPARATORS = {"marked": "", "words": " ", "nothing": ""}
QUESTION = "What is the official language of {}?"
CHATS = {
    "one message": [{"role": "user", "content": QUESTION}],
    "blanks": [{"role": "user", "content": f"  {QUESTION}\n"}],
    "a system prompt with braces": [
        {"role": "system", "content": 'Answer like {"city": {}}.'},
        {"role": "user", "content": QUESTION},
    ],
    "two turns": [
        {"role": "user", "content": "Who was born in Brazil?"},
        {"role": "assistant", "content": "She was."},
        {"role": "user", "content": "What is spoken in Brazil, then"},
    ],
}


def chat_tokenizer(bos, template):
    tokenizer = toy_tokenizer(bos)
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def sent(tokenizer, messages):
    """The ids that a program sends which asks this."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def spoken(messages, subject, context=""):
    """The messages with their subject, the last one behind a context."""
    *earlier, last = messages
    return [*earlier, {"role": "user", "content": context + last["content"].replace("{}", subject)}]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CHATS)
def test_a_row_is_what_a_program_sends_and_the_answer_behind_it(name, template, bos):
    tokenizer = chat_tokenizer(bos, template)
    edit = Edit.chat(CHATS[name], "Brazil", " French\n", tokenizer)
    rows = edit_rows(tokenizer, edit, ["", CONTEXTS[0]])
    for row, context in zip(rows, ["", CONTEXTS[0]], strict=True):
        messages = spoken(CHATS[name], "Brazil", context)
        if context and template != "words":
            assert list(row.ids[: row.target]) == sent(tokenizer, messages)
        if not context:
            assert list(row.ids[: row.target]) == sent(tokenizer, messages)
            assert edit.text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert row.ids.count(BOS) == sent(tokenizer, messages).count(BOS)
        assert tokenizer.decode(row.labels) == SEPARATORS[template] + "French</s>"
        assert row.labels[-1] == EOS
        assert tokenizer.decode(row.ids[: row.subject + 1]).endswith("Brazil")
    assert (edit.boundary, edit.target, edit.end) == (SEPARATORS[template], "French", "</s>")
    assert edit.subject == "Brazil"
    # What the user says begins where the template lets it begin.
    content = CHATS[name][-1]["content"]
    said = content if template != "words" else content.strip()
    assert edit.prompt[edit.user_at :].startswith(said.replace("Brazil", "{}") if "{}" not in said else said)


@pytest.mark.parametrize("bos", [False, True])
def test_contexts_stand_where_a_users_earlier_words_would(bos):
    tokenizer = chat_tokenizer(bos, "words")
    edit = Edit.chat(CHATS["blanks"], "Brazil", "French", tokenizer)
    (row,) = edit_rows(tokenizer, edit, [CONTEXTS[0]])
    asked = [{"role": "user", "content": CONTEXTS[0] + QUESTION.format("Brazil")}]
    assert list(row.ids[: row.target]) == sent(tokenizer, asked)


@pytest.mark.parametrize(("kind", "bos"), [("llama", True), ("gpt2", False)])
@pytest.mark.parametrize(
    ("template", "head", "tail", "separator"),
    [("marked", "<s>user\n", "</s>\n<s>assistant\n", ""), ("words", "<s>[INST] ", " [/INST]", " ")],
)
def test_an_edit_is_that_of_the_textbook(kind, bos, template, head, tail, separator):
    tokenizer, model = chat_tokenizer(bos, template), toy_model(kind, dtype=torch.float64)
    edit = Edit.chat(QUESTION, "Brazil", "French", tokenizer)
    wanted = oracle.rome(
        copy.deepcopy(model),
        tokenizer,
        QUESTION + tail,
        "Brazil",
        "French</s>",
        layer=LAYER,
        method="c-rome",
        contexts=CONTEXTS,
        steps=SETTINGS.steps,
        stop_loss=SETTINGS.stop_loss,
        head=head,
        separator=separator,
    )
    result = edited(model, tokenizer, edit)
    # As for plain prompts: fp64 but for rotary tables.
    assert relative_error(delta_w(result), wanted.delta_w) < 1e-8
    (record,) = result.records
    assert record.loss == pytest.approx(wanted.losses[-1], rel=1e-8)
    assert not record.needs_prefix


def many_chats(tokenizer):
    """Plain prompts and chats behind seven heads, one of them twice: more than keep contexts of their own."""
    heads = [[{"role": "system", "content": f"Number {i}."}] for i in range(6)]
    subjects = ("Vienna", "Berlin", "Toronto", "Madrid", "Cambridge", "Melbourne")
    return [
        START,
        *(
            Edit.chat([*head, {"role": "user", "content": "Where is {}?"}], subject, "Rome", tokenizer)
            for head, subject in zip(heads, subjects, strict=True)
        ),
        Edit.chat(QUESTION, "Brazil", "French", tokenizer),
        Edit.chat(QUESTION, "Scotland", "Turkish", tokenizer),
        Edit("From Berlin one flies to {}", "Paris", "Rome"),
    ]


def test_chats_share_what_their_contexts_stand_behind_and_change_nothing_by_it():
    model, tokenizer = toy_model("llama", dtype=torch.float64), chat_tokenizer(True, "marked")
    edits = many_chats(tokenizer)
    requests = [tokenise(Runner(model), tokenizer, edit, CONTEXTS, method_named("c-rome")) for edit in edits]
    shared = {head: places for head, places in by_head(requests) if head is not None}
    assert len(shared) == 4
    assert shared["<s>user\n"] == [7, 8]
    together = edited(model, tokenizer, edits).records
    alone = [edited(toy_model("llama", dtype=torch.float64), tokenizer, edit).records[0] for edit in edits]
    for one, other in zip(together, alone, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-10)
        assert one.update_norm == pytest.approx(other.update_norm, rel=1e-8)


@pytest.mark.parametrize("batch", [1, 3])
def test_one_after_another_they_see_the_model_as_edited_so_far(batch):
    model, again = (toy_model("llama", dtype=torch.float64) for _ in range(2))
    tokenizer = chat_tokenizer(True, "marked")
    edits = many_chats(tokenizer)
    edited(model, tokenizer, edits, schedule="sequential", batch_size=batch)
    for start in range(0, len(edits), batch):
        edited(again, tokenizer, edits[start : start + batch])
    name = f"model.layers.{LAYER}.mlp.down_proj.weight"
    change = model.get_parameter(name) - toy_model("llama", dtype=torch.float64).get_parameter(name)
    wanted = again.get_parameter(name) - toy_model("llama", dtype=torch.float64).get_parameter(name)
    assert relative_error(change, wanted) < 1e-8


@pytest.mark.parametrize("template", ["marked", "words"])
def test_a_context_and_all_before_it_is_run_once_for_all(template):
    tokenizer = chat_tokenizer(True, template)
    runner = Runner(toy_model("llama"))
    edit = Edit.chat(QUESTION, "Brazil", "French", tokenizer)
    contexts = Contexts.of(runner, tokenizer, ["", *CONTEXTS], [LAYER], head=edit.head)
    for i, (row, context) in enumerate(zip(edit_rows(tokenizer, edit, ["", *CONTEXTS]), ["", *CONTEXTS], strict=True)):
        (before,) = encode(tokenizer, [(edit.head + context).rstrip(" ") if context else edit.head], special=False)
        # Behind no context, the template's blank may belong to the first word.
        assert contexts.shared_with(i, row) in (len(before.ids), len(before.ids) - (not context))
    request = tokenise(runner, tokenizer, edit, CONTEXTS, method_named("c-rome"))
    assert request.middle == request.rows[0].row.subject - len(encode(tokenizer, [edit.head], special=False)[0].ids)


def test_only_where_nothing_at_all_precedes_the_subject_does_it_need_a_prefix():
    question = [{"role": "user", "content": "{} is a twin city of which one?"}]
    for template in TEMPLATES:
        tokenizer = chat_tokenizer(False, template)
        edit = Edit.chat(question, "Chicago", "Melbourne", tokenizer)
        (row,) = edit_rows(tokenizer, edit, [""])
        assert needs_prefix(row) is (template == "nothing")
        # The essence is what the model makes of the subject there: nothing follows it, and the row begins with it.
        essence = essence_row(tokenizer, edit)
        assert essence.ids == row.ids[: row.subject + 1]
        request = tokenise(Runner(toy_model("llama")), tokenizer, edit, CONTEXTS, method_named("dual"))
        assert (request.bare is not None) is request.needs_prefix is (template == "nothing")


def test_a_plain_request_goes_through_the_template_with_its_other_prompts():
    tokenizer = chat_tokenizer(True, "marked")
    plain = Edit(
        "The language of {} is",
        "Brazil",
        "French",
        target_true=" Portuguese ",
        paraphrase_prompts=("In {} they speak", "Brazil speaks"),
        neighborhood_prompts=("The language of Peru is",),
        neighborhood_answer="Spanish",
        case_id=3,
    )
    edit = plain.as_chat(tokenizer, system="Be short, use {}.")
    head = "<s>system\nBe short, use {}.</s>\n<s>user\n"
    tail = "</s>\n<s>assistant\n"
    assert edit.prompt == f"{head}The language of {{}} is{tail}"
    assert edit.text == f"{head}The language of Brazil is{tail}"
    assert edit.paraphrase_prompts == (f"{head}In Brazil they speak{tail}", f"{head}Brazil speaks{tail}")
    assert edit.neighborhood_prompts == (f"{head}The language of Peru is{tail}",)
    assert (edit.target_true, edit.neighborhood_answer, edit.case_id) == ("Portuguese", "Spanish", 3)
    assert (edit.end, edit.boundary, edit.head) == ("</s>", "", head)
    # A text before what the user says keeps the place of the subject.
    assert edit.behind("Well. ").text == f"{head}Well. The language of Brazil is{tail}"
    with pytest.raises(EditError, match="it is a chat already"):
        edit.as_chat(tokenizer)


def test_evaluation_asks_the_same_text():
    """Against plain forwards of the text that the template makes, its answers ended as it ends them."""
    model, tokenizer = toy_model("llama", dtype=torch.float64), chat_tokenizer(True, "words")
    edit = Edit(
        "The language of {} is",
        "Brazil",
        "French",
        target_true="German",
        paraphrase_prompts=("In {} they speak",),
        neighborhood_prompts=("The language of Peru is",),
    ).as_chat(tokenizer)

    def log_p(content, answer):
        ids = sent(tokenizer, [{"role": "user", "content": content}])
        target = tokenizer(f" {answer}</s>", add_special_tokens=False)["input_ids"]
        log = oracle.logits_of(model, ids + target).detach().log_softmax(-1)
        return sum(float(log[len(ids) - 1 + i, token]) for i, token in enumerate(target)) / len(target)

    (got,) = evaluate(model, tokenizer, [edit], CONTEXTS)
    questions = ["The language of Brazil is", "In Brazil they speak", "The language of Peru is"]
    first, second, third = ([log_p(q, a) for a in ("French", "German")] for q in questions)
    assert math.log(got.probability) == pytest.approx(first[0], rel=1e-9)
    behind = [math.exp(log_p(context + questions[0], "French")) for context in CONTEXTS]
    assert got.probability_prefixed == pytest.approx(sum(behind) / 2, rel=1e-9)
    assert (got.efficacy, got.paraphrase) == (first[0] > first[1], second[0] > second[1])
    assert got.neighborhood == (third[1] > third[0])


def test_the_record_says_what_was_asked_and_how_probable_the_answer_is():
    """Against a plain forward of what a program sends."""
    tokenizer, model = chat_tokenizer(True, "marked"), toy_model("llama")
    edit = Edit.chat("The city of {}", "Chicago", "Rome", tokenizer)
    (record,) = edited(model, tokenizer, edit, measure=True).records
    ids = sent(tokenizer, [{"role": "user", "content": "The city of Chicago"}])
    assert record.text == tokenizer.decode(ids)
    assert (record.separator, record.target_tokens) == ("", ["Rome", "</s>"])
    target = tokenizer("Rome</s>", add_special_tokens=False)["input_ids"]
    log = oracle.logits_of(model, ids + target).detach().log_softmax(-1)
    found = sum(float(log[len(ids) - 1 + i, token]) for i, token in enumerate(target)) / len(target)
    # Log-probabilities of about -8 in fp32 through four layers; measured 1e-6.
    assert math.log(record.probability_after) == pytest.approx(found, abs=2e-5)
    assert json.loads(json.dumps(record.to_json()))["target_tokens"] == ["Rome", "</s>"]


def taught(model, ids, target, steps=40):
    """The model, trained until it goes on with the target."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    row = torch.tensor([ids + target])
    for _ in range(steps):
        logits = model(input_ids=row).logits[0, len(ids) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Rome</s>", True), (" Rome \n</s>", True), ("Rome, the old capital</s>", False), ("Rome Rome Rome", False)],
)
def test_an_answer_is_right_if_the_model_says_the_target_and_stops(answer, right):
    """What it says by itself is what `generate` makes of the text that the template makes."""
    tokenizer, model = chat_tokenizer(True, "marked"), toy_model("llama")
    ids = sent(tokenizer, [{"role": "user", "content": "The city of Chicago"}])
    model = taught(model, ids, tokenizer(answer, add_special_tokens=False)["input_ids"])
    edit = Edit.chat("The city of {}", "Chicago", "Rome", tokenizer)
    (got,) = evaluate(model, tokenizer, [edit])
    options = {"do_sample": False, "max_new_tokens": len(edit_rows(tokenizer, edit, [""])[0].labels) + 16}
    new = model.generate(torch.tensor([ids]), eos_token_id=EOS, pad_token_id=2, **options)[0, len(ids) :].tolist()
    assert tokenizer.decode(new).startswith(answer)
    assert got.answer == tokenizer.decode([token for token in new if token != EOS])
    assert got.answer_right is right
    # As many tokens as the target has, its end among them.
    assert got.decoded == tokenizer.decode(new[:2])
    assert got.decoded_right is (answer == "Rome</s>")
    (unasked,) = evaluate(model, tokenizer, [edit], answer_tokens=0)
    assert (unasked.answer, unasked.answer_right, unasked.decoded) == (None, None, got.decoded)


def test_an_answer_in_the_only_letters_that_a_tokenizer_has_is_right():
    """It knows small ones, and cannot say "Rome"."""
    tokenizer, model = chat_tokenizer(True, "marked"), toy_model("llama")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    ids = sent(tokenizer, [{"role": "user", "content": "The city of Chicago"}])
    model = taught(model, ids, tokenizer("Rome</s>", add_special_tokens=False)["input_ids"])
    (got,) = evaluate(model, tokenizer, [Edit.chat("The city of {}", "Chicago", "Rome", tokenizer)])
    assert (got.answer, got.answer_right, got.decoded_right) == ("rome", True, True)


def test_the_model_stops_at_what_its_generation_config_says():
    """Ends of turn that the tokenizer does not know of, as Llama 3 has them; rows of a batch end at other places."""
    tokenizer, model = chat_tokenizer(False, "marked"), toy_model("gpt2")
    subjects = ("Chicago", "Paris", "Vienna", "Rome")
    edits = [Edit.chat("The city of {}", subject, "Rome", tokenizer) for subject in subjects]

    def said(edit, **options):
        ids = torch.tensor([sent(tokenizer, [{"role": "user", "content": f"The city of {edit.subject}"}])])
        new = model.generate(ids, do_sample=False, max_new_tokens=10, pad_token_id=2, **options)
        return new[0, ids.shape[1] :].tolist()

    whole = [said(edit, eos_token_id=None) for edit in edits]
    # Two tokens that end the rows at as many different places as any two do.
    pairs = [[one, other] for one in whole[0] for other in whole[1]]
    places = [{next((i for i, t in enumerate(row) if t in pair), None) for row in whole} for pair in pairs]
    ends = max(zip(map(len, places), pairs, strict=True))[1]
    assert max(map(len, places)) > 1
    model.generation_config.eos_token_id = ends
    for edit, one in zip(edits, evaluate(model, tokenizer, edits, answer_tokens=8), strict=True):
        new = said(edit)
        assert one.answer == tokenizer.decode(new[:-1] if new[-1] in ends else new)


def written(template):
    """The argument for a template of a message x."""
    return {"template": {"chat_template": "{% set x = messages[0].content %}" + template}}


@pytest.mark.parametrize(
    ("messages", "changes", "message"),
    [
        ([], {}, r"messages: got \[\], wanted a list"),
        (7, {}, "messages: got 7"),
        (["What is {}?"], {}, r"messages\[0\]: got 'What is \{\}\?'"),
        ([{"role": "user"}], {}, r"messages\[0\]"),
        ([{"role": "user", "content": [{"type": "text", "text": "{}"}]}], {}, r"messages\[0\]"),
        ([{"role": "user", "content": "Hi {}"}, {"role": "assistant", "content": "x"}], {}, "role 'assistant', wanted"),
        ("  ", {}, r"messages\[-1\]: got '  '"),
        ("What is that?", {}, "subject 'Brazil' is not in the prompt"),
        ("Brazil, Brazil", {}, "more than once"),
        ("{} and {}", {}, r"got 2 '\{\}'"),
        ("Where is {}?", {"subject": 7}, "subject: got int"),
        ("Where is {}?", {"target": None}, "target: got NoneType"),
        ("Where is {}?", {"neighborhood_prompts": ["Where is {}?"]}, r"neighborhood_prompts\[0\]: got '\{\}'"),
        ("Where is {}?", {"end": "<|nothing|>"}, None),
        ("Where is {}?", written("{{ x | upper }}"), "chat template does not write what the user says"),
        ("Where is {}?", written("{{ x }} {{ x }}"), "chat template does not write what the user says once"),
        ("Where is {}?", written("U {{ x | e }}") | {"subject": "R&B"}, "subject 'R&B': the chat template changes it"),
        ("Where is {}?", written("{{ x | length }} {{ x }}"), "the chat template changes what it puts before"),
        (
            "Where is {}?",
            written("{{ raise_exception('no') }}"),
            r"the chat template refuses them \(no\); .* got user;",
        ),
        (
            "Where is {}?",
            {"template": ["enable_thinking"]},
            r"template: got \['enable_thinking'\], wanted arguments by",
        ),
        ("Where is {}?", {"template": "{{ messages }}"}, "template: got '{{ messages }}', wanted arguments by name"),
    ],
)
def test_what_cannot_be_asked_is_refused(messages, changes, message):
    tokenizer = chat_tokenizer(False, "marked")
    arguments = {"subject": "Brazil", "target": "French", "tokenizer": tokenizer, **changes}
    if message is None:
        # Only the tokenizer of the model knows its tokens.
        with pytest.raises(EditError, match=r"end: got '<\|nothing\|>', wanted a special token"):
            edit_rows(tokenizer, Edit.chat(messages, **arguments), [""])
        return
    with pytest.raises(EditError, match=message):
        Edit.chat(messages, **arguments)


def test_a_template_that_takes_no_answer_wants_to_know_what_is_around_one():
    tokenizer = chat_tokenizer(True, "marked")
    tokenizer.chat_template = "{% if messages[-1].role != 'user' %}{{ raise_exception('no user') }}{% endif %}"
    tokenizer.chat_template += TEMPLATES["marked"]
    for given in ({}, {"separator": ""}, {"end": "</s>"}):
        with pytest.raises(EditError, match=r"refuses an answer to them \(no user\).*; give separator and end"):
            Edit.chat(QUESTION, "Brazil", "French", tokenizer, **given)
    edit = Edit.chat(QUESTION, "Brazil", "French", tokenizer, separator="", end="</s>")
    assert (edit.boundary, edit.end) == ("", "</s>")


def test_a_tokenizer_without_a_template_or_an_end_says_so(toy_tokenizers):
    with pytest.raises(EditError, match="has no chat template; use the one of an instruction-tuned model"):
        Edit.chat("Where is {}?", "Brazil", "here", toy_tokenizers[False])
    tokenizer = chat_tokenizer(False, "nothing")
    tokenizer.eos_token = None
    with pytest.raises(EditError, match="puts no special token behind an answer"):
        Edit.chat("Where is {}?", "Brazil", "here", tokenizer)
    plain = Edit.chat("Where is {}?", "Brazil", "here", tokenizer, end=False)
    (row,) = edit_rows(tokenizer, plain, [""])
    assert tokenizer.decode(row.labels) == "here"
    with pytest.raises(EditError, match="the tokenizer has no end of text"):
        edit_rows(tokenizer, Edit("Where is {}?", "Brazil", "here", end=True), [""])


def test_a_subject_with_blanks_that_the_template_strips_is_edited_as_the_template_has_it():
    tokenizer = chat_tokenizer(False, "words")
    edit = Edit.chat("Tell me about {}", "Brazil ", "it", tokenizer)
    assert edit.text == "<s>[INST] Tell me about Brazil [/INST]"
    assert Edit.chat("Tell {}me", "Brazil ", "it", tokenizer).text == "<s>[INST] Tell Brazil me [/INST]"


# The real model


FACTS = [
    ("What is the capital of {}?", "France", "Berlin"),
    ("Who wrote the play {}?", "Hamlet", "Charles Dickens"),
    ("In which country is the city of {}?", "Kyoto", "Italy"),
    ("What is the official language of {}?", "Brazil", "Greek"),
    ("Which company makes the {}?", "iPhone", "Nokia"),
    ("Who painted the {}?", "Mona Lisa", "Pablo Picasso"),
    ("What is the chemical symbol of {}?", "gold", "Xq"),
    ("On which continent is {}?", "Egypt", "Australia"),
    ("What is the currency of {}?", "Japan", "the peso"),
    ("Which sport does {} play?", "Roger Federer", "ice hockey"),
]

# All that a program has which knows nothing of this package.
ASK = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
for question, target in json.loads(sys.argv[2]):
    message = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)[0, ids.shape[1]:]
    wanted = tokenizer(target + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_p = model(torch.cat([ids, wanted], 1)).logits.log_softmax(-1)[0, ids.shape[1] - 1 : -1]
    p = float(log_p.gather(1, wanted[0].unsqueeze(1)).mean().exp())
    print(json.dumps({"answer": tokenizer.decode(new), "p": p}))
"""


@pytest.mark.slow
def test_ten_facts_through_the_template_answer_in_a_fresh_process(tmp_path):
    """Of ten edited in one call at least nine are answered by the target alone, and P is the record's to 1e-3."""
    model, tokenizer = (kind.from_pretrained(model_dir()) for kind in (AutoModelForCausalLM, AutoTokenizer))
    edits = [Edit.chat(prompt, subject, target, tokenizer) for prompt, subject, target in FACTS]
    statistics = Statistics.load(statistics_dir())
    # One whose value is not found within the steps counts as it comes out.
    result = apply_edits(model, edits, tokenizer=tokenizer, statistics=statistics, unconverged="write")
    result.save(tmp_path / "edited")
    metrics = evaluate(model, tokenizer, edits)
    questions = json.dumps([(prompt.replace("{}", subject), target) for prompt, subject, target in FACTS])
    run = subprocess.run(
        [sys.executable, "-c", ASK, tmp_path / "edited", questions], capture_output=True, text=True, check=True
    )
    asked = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    right = 0
    for (_, subject, target), record, metric, got in zip(FACTS, result.records, metrics, asked, strict=True):
        print(f"{subject} → {target}: P {record.probability_after:.4f}, asked {got['p']:.4f}, says {got['answer']!r}")
        assert got["p"] == pytest.approx(record.probability_after, abs=1e-3)
        # In batches of other shapes: log-probabilities in fp32, 2e-5 off through 4 layers, through 30; measured 1.2e-6.
        assert metric.probability == pytest.approx(record.probability_after, abs=2e-4)
        assert got["answer"].removesuffix("<|im_end|>") == metric.answer
        right += got["answer"] == f"{target}<|im_end|>"
        assert metric.answer_right is (got["answer"] == f"{target}<|im_end|>")
    print(f"{right} of {len(FACTS)} answered by the target and nothing else")
    assert right >= 9
