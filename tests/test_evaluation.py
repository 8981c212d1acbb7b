"""Probabilities, perplexity and greedy decoding against plain forwards; the metrics against arithmetic by hand."""

import copy
import math
from dataclasses import replace

import pytest
import torch

import oracle
from helpers import CONTEXTS, END, MIDDLE, START, all_bits, changed, edited, merging_tokenizer, rounding_of_log_p
from rome_fast import Edit, Probe
from rome_fast.errors import ArgumentError, EditError, RomeFastError
from rome_fast.evaluation import (
    bootstrap,
    distractors,
    evaluate,
    greedy_completion,
    intervals,
    score,
    sentence_perplexity,
    summarise,
)
from rome_fast.models.runner import Runner
from toys import KINDS, SENTENCES, toy_model

PAIRS = [
    ("The city of Chicago", " Rome"),
    ("The capital of France is ", "Paris"),
    ("The weather is nice. Steve Jobs was the founder of", " telephones, tablets and computers"),
    ("Rome", " was not built in a day"),
    ("The city of Chicago", "Paris"),
]


# Each kind with <s> or without, as the real ones have it, and one of either sort the other way round.
KINDS_AND_BOS = [*((kind, kind in ("llama", "mistral")) for kind in KINDS), ("llama", False), ("gpt2", True)]


ALLOWED, ALLOWED_64 = (rounding_of_log_p(dtype) for dtype in (torch.float32, torch.float64))


def mean_log(p):
    return sum(map(math.log, p)) / len(p)


# Score


@pytest.mark.parametrize(("kind", "bos"), KINDS_AND_BOS)
def test_score_is_the_geometric_mean_of_the_tokens_probabilities(kind, bos, toy_tokenizers):
    model, tokenizer = toy_model(kind), toy_tokenizers[bos]
    for (text, target), got in zip(PAIRS, score(Runner(model), tokenizer, PAIRS), strict=True):
        p = oracle.target_probability(model, tokenizer, text, target, separator="")
        assert got.log_probability == pytest.approx(mean_log(p), abs=ALLOWED)
        assert got.probability == pytest.approx(math.prod(p) ** (1 / len(p)), rel=ALLOWED)


def test_score_in_float64(toy_tokenizers):
    model, tokenizer = toy_model("gpt2", dtype=torch.float64), toy_tokenizers[False]
    for (text, target), got in zip(PAIRS, score(Runner(model), tokenizer, PAIRS), strict=True):
        assert got.log_probability == pytest.approx(
            mean_log(oracle.target_probability(model, tokenizer, text, target, separator="")), abs=ALLOWED_64
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_score_does_not_depend_on_its_company(side, toy_tokenizers, monkeypatch):
    runner, tokenizer = Runner(toy_model("llama", dtype=torch.float64)), copy.deepcopy(toy_tokenizers[True])
    tokenizer.padding_side = side
    together = score(runner, tokenizer, PAIRS)
    alone = [score(runner, tokenizer, [pair])[0] for pair in PAIRS]
    for one, other in zip(together, alone, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=ALLOWED_64)
    assert score(runner, tokenizer, []) == []


def test_is_argmax_wants_every_token(toy_tokenizers):
    """The model's own greedy continuation leads; with another last token it does not, though all others do."""
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    text, ids = writable_continuation(model, tokenizer)
    own = tokenizer.decode(ids)
    other = tokenizer.decode([*ids[:-1], tokenizer("Rome")["input_ids"][0]])
    scores = score(Runner(model), tokenizer, [(text, own), (text, other)])
    assert [s.is_argmax for s in scores] == [True, False]


def naive_greedy(model, ids, count):
    """Append the most probable token, `count` times, by whole forwards."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(oracle.logits_of(model, ids)[-1].argmax()))
    return ids[len(ids) - count :]


def writable_continuation(model, tokenizer):
    """A text whose greedy continuation begins with a blank and is read back as the same tokens."""
    with torch.no_grad():
        for text in SENTENCES:
            words = text.split()
            for end in range(2, len(words)):
                prompt = " ".join(words[:end])
                ids = tokenizer(prompt)["input_ids"]
                new = naive_greedy(model, ids, 3)
                written = tokenizer.decode(new)
                plain = written.isascii() and written.startswith(" ") and written.strip() == written[1:]
                if plain and tokenizer(prompt + written)["input_ids"] == ids + new:
                    return prompt, new
    raise AssertionError("the toy continues no text in a way that can be written down")


# Perplexity


@pytest.mark.parametrize(("kind", "bos"), KINDS_AND_BOS)
def test_sentence_perplexity_is_that_of_the_oracle(kind, bos, toy_tokenizers):
    model, tokenizer = toy_model(kind), toy_tokenizers[bos]
    sentences = [*SENTENCES[:3], "Rome is"]
    wanted = oracle.sentence_perplexity(model, tokenizer, sentences)
    assert sentence_perplexity(Runner(model), tokenizer, sentences) == pytest.approx(wanted, rel=ALLOWED)


def test_perplexity_does_not_depend_on_batches(toy_tokenizers, monkeypatch):
    runner, tokenizer = Runner(toy_model("llama", dtype=torch.float64)), toy_tokenizers[True]
    wanted = sentence_perplexity(runner, tokenizer, SENTENCES)
    assert sentence_perplexity(runner, tokenizer, SENTENCES[::-1]) == pytest.approx(wanted, rel=ALLOWED_64)
    alone = [sentence_perplexity(runner, tokenizer, [sentence]) for sentence in SENTENCES]
    assert sum(alone) / len(alone) == pytest.approx(wanted, rel=ALLOWED_64)


def test_sentences_of_one_token_have_no_perplexity(toy_tokenizers):
    runner, tokenizer = Runner(toy_model("gpt2")), toy_tokenizers[False]
    wanted = sentence_perplexity(runner, tokenizer, [SENTENCES[0]])
    assert sentence_perplexity(runner, tokenizer, ["Rome", SENTENCES[0], ""]) == wanted
    for sentences in (["Rome"], [""], []):
        with pytest.raises(ArgumentError, match="sentences: got none of at least two tokens"):
            sentence_perplexity(runner, tokenizer, sentences)


def test_a_sentence_longer_than_the_model_is_cut(toy_tokenizers):
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    ids = tokenizer(" ".join(SENTENCES))["input_ids"][: model.config.n_positions]
    log_p = oracle.logits_of(oracle.double_copy(model), ids).log_softmax(-1)
    nll = -log_p[range(len(ids) - 1), ids[1:]].mean()
    got = sentence_perplexity(Runner(model), tokenizer, [" ".join(SENTENCES)])
    assert got == pytest.approx(float(nll.exp()), rel=ALLOWED)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_the_perplexity_of_a_destroyed_model_is_infinite(value, toy_tokenizers):
    model = toy_model("gpt2")
    with torch.no_grad():
        model.get_parameter("transformer.h.1.mlp.c_proj.weight").mul_(value)
        model.lm_head.weight.mul_(1e4)
    assert sentence_perplexity(Runner(model), toy_tokenizers[False], SENTENCES[:2]) == math.inf


# Greedy decoding


@pytest.mark.parametrize(("kind", "bos"), KINDS_AND_BOS)
def test_greedy_completion_is_argmax_by_whole_forwards(kind, bos, toy_tokenizers):
    model, tokenizer = toy_model(kind), toy_tokenizers[bos]
    texts = ["The city of Chicago", "Rome was not built ", "The city of Paris", "Snow"]
    counts = [4, 2, 4, 1]
    got = greedy_completion(Runner(model), tokenizer, texts, counts)
    for text, count, completion in zip(texts, counts, got, strict=True):
        ids = tokenizer(text)["input_ids"]
        assert completion == tokenizer.decode(naive_greedy(model, ids, count))


def test_generation_settings_of_the_model_have_no_part_in_greedy_completion(toy_tokenizers):
    """Qwen2 ships a repetition penalty, others a temperature: with either this would not be greedy decoding."""
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    texts = ["The city of Chicago", "In Paris, in Rome, in Paris, in Rome, in Paris, in"]
    plain = greedy_completion(Runner(model), tokenizer, texts, [12, 12])
    for name, value in {
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "temperature": 0.3,
        "top_p": 0.5,
        "num_beams": 3,
        "do_sample": True,
        "bad_words_ids": [[5], [6]],
        "max_length": 10,
    }.items():
        setattr(model.generation_config, name, value)
        assert greedy_completion(Runner(model), tokenizer, texts, [12, 12]) == plain, name
        setattr(model.generation_config, name, None)


def test_greedy_completion_goes_on_behind_an_end_of_text(toy_tokenizers):
    """As many tokens as asked for, EOS being a token like any other: argmax by whole forwards again."""
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    ids = tokenizer("The city of Chicago")["input_ids"]
    first = naive_greedy(model, ids, 1)[0]
    model.generation_config.eos_token_id = first
    (got,) = greedy_completion(Runner(model), tokenizer, ["The city of Chicago"], [4])
    assert got == tokenizer.decode(naive_greedy(model, ids, 4))


# Metrics


CASE = Edit(
    "The city of {} lies in",
    "Chicago",
    "Rome",
    target_true="Paris",
    paraphrase_prompts=("One finds the city of Chicago in", "Chicago lies in", "Chicago is in"),
    neighborhood_prompts=("The city of Berlin lies in", "The city of Vienna lies in"),
    neighborhood_answer="Europe",
    case_id=7,
)


@pytest.mark.parametrize(("kind", "bos"), [("llama", True), ("gpt2", False)])
def test_metrics_by_hand(kind, bos, toy_tokenizers):
    model, tokenizer = toy_model(kind), toy_tokenizers[bos]
    result = edited(model, tokenizer, replace(CASE, prompt="The city of {}"))
    # What is in the residual stream at the subject, and rounding with it, grows with the update.
    allowed = (1 + result.records[0].update_norm / result.records[0].weight_norm) * ALLOWED

    def log_p(text, target):
        return mean_log(oracle.target_probability(model, tokenizer, text, target))

    def wins(texts, mine, other):
        return sum(log_p(text, mine) > log_p(text, other) for text in texts) / len(texts)

    (got,) = evaluate(model, tokenizer, [CASE], CONTEXTS)
    assert (got.subject, got.target) == ("Chicago", "Rome")
    assert got.probability == pytest.approx(math.exp(log_p(CASE.text, "Rome")), rel=allowed)
    prefixed = [math.exp(log_p(context + CASE.text, "Rome")) for context in CONTEXTS]
    assert got.probability_prefixed == pytest.approx(sum(prefixed) / len(prefixed), rel=allowed)
    assert got.efficacy == wins([CASE.text], "Rome", "Paris")
    assert got.efficacy_prefixed == wins([c + CASE.text for c in CONTEXTS], "Rome", "Paris")
    assert got.paraphrase == wins(CASE.paraphrase_prompts, "Rome", "Paris")
    assert got.paraphrase_prefixed == wins([c + p for c in CONTEXTS for p in CASE.paraphrase_prompts], "Rome", "Paris")
    assert got.neighborhood == wins(CASE.neighborhood_prompts, "Europe", "Rome")

    def decoded(text):
        return tokenizer.decode(naive_greedy(model, tokenizer(text)["input_ids"], 1))

    assert got.decoded == decoded(CASE.text)
    assert got.decoded_right is (decoded(CASE.text).strip() == "Rome")
    assert got.decoded_right_prefixed == (decoded(CONTEXTS[0] + CASE.text).strip() == "Rome")
    assert got.argmax is got.decoded_right
    assert got.argmax_prefixed == sum(decoded(c + CASE.text).strip() == "Rome" for c in CONTEXTS) / len(CONTEXTS)


def test_distractors_name_the_true_answer_and_another_subject():
    twin = replace(CASE, subject="Chicago ", target_true=None)
    other = replace(CASE, subject="Berlin", target_true=" Oslo ")
    frame = "People were just talking about {}. ".format
    assert distractors([CASE, twin, other]) == [
        [frame("Paris"), frame("Berlin")],
        [frame("Berlin")],
        [frame("Oslo"), frame("Chicago")],
    ]
    assert distractors([twin]) == [[]]
    assert distractors([]) == []


def test_distracting_texts_are_each_requests_own(toy_tokenizers):
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    own = [["Paris is nice. ", "It rained. "], []]
    got, alone = evaluate(model, tokenizer, [CASE, START], CONTEXTS[:1], distracting=own)
    texts = [text + CASE.text for text in own[0]]
    found = [math.exp(mean_log(oracle.target_probability(model, tokenizer, text, "Rome"))) for text in texts]
    assert got.probability_distracted == pytest.approx(sum(found) / 2, rel=ALLOWED)
    true = [math.exp(mean_log(oracle.target_probability(model, tokenizer, text, "Paris"))) for text in texts]
    assert got.efficacy_distracted == sum(a > b for a, b in zip(found, true, strict=True)) / 2
    said = tokenizer.decode(naive_greedy(model, tokenizer(texts[0])["input_ids"], 1)).strip()
    assert got.decoded_right_distracted == (said == "Rome")
    assert alone.probability_distracted is None
    assert [got, alone] != evaluate(model, tokenizer, [CASE, START], CONTEXTS[:1])
    # The others are as they are without.
    with_none = evaluate(model, tokenizer, [CASE, START], CONTEXTS[:1], distracting=[[], []])
    assert with_none == evaluate(model, tokenizer, [CASE, START], CONTEXTS[:1])


def test_an_interval_is_that_of_the_means_of_resampled_requests():
    """Of n draws with share p it deviates by √(p (1 - p) / n), of which 1.96 on either side are 95 %."""
    mean, low, high = bootstrap([1.0] * 60 + [0.0] * 140)
    assert mean == pytest.approx(0.3)
    width = 1.96 * math.sqrt(0.3 * 0.7 / 200)
    # The 2.5 % quantile of 4000 draws deviates by √(0.025 · 0.975 / 4000) / 0.058 = 4 % of that, and means lie 1 / 200
    # apart.
    allowed = 3 * 0.04 * width / 1.96 + 1 / 200
    assert (low, high) == (pytest.approx(0.3 - width, abs=allowed), pytest.approx(0.3 + width, abs=allowed))
    assert bootstrap([0.25]) == (0.25, 0.25, 0.25)
    assert bootstrap([1.0, 0.0]) == bootstrap([1.0, 0.0])
    with pytest.raises(ValueError, match="values: got none"):
        bootstrap([])


def test_many_values_are_resampled_in_bounded_memory(monkeypatch):
    values = [i / 7 for i in range(50)]
    wanted = bootstrap(values)
    monkeypatch.setattr("rome_fast.evaluation.resampling._ELEMENTS", 1000)
    assert bootstrap(values) == wanted


def test_shares_are_shares(toy_tokenizers):
    """Of four paraphrases with known winners."""
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    texts = [" ".join(sentence.split()[:4]) for sentence in SENTENCES]
    p = {t: [oracle.target_probability(model, tokenizer, t, w)[0] for w in ("Rome", "Paris")] for t in texts}
    won = [text for text in texts if p[text][0] > p[text][1]]
    lost = [text for text in texts if p[text][0] < p[text][1]]
    case = replace(
        CASE, paraphrase_prompts=(won[0], lost[0], lost[1], lost[2]), neighborhood_prompts=(*won[:3], lost[0])
    )
    (got,) = evaluate(model, tokenizer, [replace(case, neighborhood_answer=None)])
    assert got.paraphrase == 0.25
    # The true target answers for the neighbours, unless they have an answer of their own.
    assert got.neighborhood == 0.25


def test_the_true_target_is_the_neighbours_answer_where_they_have_none(toy_tokenizers):
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    own, borrowed = evaluate(
        model,
        tokenizer,
        [replace(CASE, neighborhood_answer="Paris"), replace(CASE, neighborhood_answer=None)],
    )
    assert own.neighborhood == borrowed.neighborhood


def test_neighbours_with_answers_of_their_own(toy_tokenizers):
    """The best spelling of each one's answer stands against the target; prompts with a common answer count along."""
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    texts = [" ".join(sentence.split()[:4]) for sentence in SENTENCES]
    words = ("Rome", "Paris", "French", "Berlin")
    p = {t: {w: oracle.target_probability(model, tokenizer, t, w)[0] for w in words} for t in texts}
    held = [t for t in texts if p[t]["Paris"] > p[t]["Rome"]]
    lost = [t for t in texts if max(p[t]["Paris"], p[t]["French"]) < p[t]["Rome"]]
    by_second = [t for t in texts if p[t]["Paris"] < p[t]["Rome"] < p[t]["Berlin"]]
    neighbors = (Probe(held[0], ("Paris",)), Probe(lost[0], ("Paris", "French")), Probe(lost[1], ("French",)))
    neighbors += (Probe(by_second[0], ("Paris", "Berlin")),)
    (got,) = evaluate(model, tokenizer, [replace(CASE, neighborhood_prompts=(), neighbors=neighbors)])
    assert got.neighborhood == 2 / 4
    both = replace(CASE, neighborhood_prompts=(lost[0],), neighborhood_answer="Paris", neighbors=neighbors)
    (got,) = evaluate(model, tokenizer, [both])
    assert got.neighborhood == 2 / 5


def test_portability_is_the_share_of_probes_whose_answer_leads_in_any_spelling(toy_tokenizers):
    model, tokenizer = toy_model("llama"), toy_tokenizers[True]
    texts = [" ".join(sentence.split()[:n]) for sentence in SENTENCES for n in (3, 4, 5)]
    said = {text: tokenizer.decode(naive_greedy(model, tokenizer(text)["input_ids"], 1)) for text in texts}
    text, word = next((text, word) for text, word in said.items() if word[0] == " " and word[1:].isalpha())
    assert word.strip() not in ("x", "Paris")
    probes = [Probe(text, answers) for answers in (("Paris", word.strip()), ("Paris",), (f"{word.strip()} x", "x"))]
    (got,) = evaluate(model, tokenizer, [replace(CASE, portability=probes)])
    assert got.portability == 1 / 3
    (none,) = evaluate(model, tokenizer, [CASE])
    assert none.portability is None
    assert summarise([got, none])["portability"] == 1 / 3


def test_reversal_is_the_portability_of_the_probes_of_that_kind(toy_tokenizers):
    model, tokenizer = toy_model("llama"), toy_tokenizers[True]
    texts = [" ".join(sentence.split()[:n]) for sentence in SENTENCES for n in (3, 4, 5)]
    said = {text: tokenizer.decode(naive_greedy(model, tokenizer(text)["input_ids"], 1)) for text in texts}
    text, word = next((text, word) for text, word in said.items() if word[0] == " " and word[1:].isalpha())
    kinds = ("reversal", "Reversed_Relation", "inverse", "Reasoning", "")
    probes = [Probe(text, (word.strip(),), kind) for kind in kinds] + [Probe(text, ("Paris x",), "Reverse")]
    (got,) = evaluate(model, tokenizer, [replace(CASE, portability=probes)])
    assert (got.reversal, got.portability) == (3 / 4, 5 / 6)
    (none,) = evaluate(model, tokenizer, [replace(CASE, portability=probes[3:5])])
    assert (none.reversal, none.portability) == (None, 1)


def test_negation_is_the_share_of_denials_that_the_target_does_not_follow(toy_tokenizers):
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    text, ids = writable_continuation(model, tokenizer)
    edit = Edit("{} is", "Chicago", tokenizer.decode(ids).strip(), negation_prompts=(text, "{} is not", "It never was"))
    (got,) = evaluate(model, tokenizer, [edit])
    assert got.negation == 2 / 3
    assert edit.negation_prompts[1] == "Chicago is not"
    assert evaluate(model, tokenizer, [START])[0].negation is None


def kl_of_next(before, after, ids):
    p, q = (oracle.logits_of(oracle.double_copy(model), ids)[-1].log_softmax(-1) for model in (before, after))
    return float((p.exp() * (p - q)).sum())


@pytest.mark.parametrize(("kind", "bos"), [("llama", True), ("gpt2", False)])
def test_essence_compares_what_is_said_of_the_subject_before_and_after(kind, bos, toy_tokenizers):
    """Neutral texts where a request has none of its own, without the one that asks for the fact itself."""
    model, before, tokenizer = toy_model(kind), toy_model(kind), toy_tokenizers[bos]
    delta = edited(model, tokenizer, replace(CASE, prompt="The city of {}")).delta
    own = replace(CASE, essence_prompts=("The old town of {}", "Chicago was not built", "{} is"))
    cases = {
        own: ["The old town of Chicago", "Chicago was not built", "Chicago is"],
        CASE: ["Chicago is", "Chicago has"],
        Edit("{} is", " Chicago {", "Rome"): ["Chicago { has"],
    }
    weights = all_bits(model)
    for edit, got in zip(cases, evaluate(model, tokenizer, list(cases), unedited=delta), strict=True):
        rows = [tokenizer(text)["input_ids"] for text in cases[edit]]
        wanted = sum(kl_of_next(before, model, ids) for ids in rows) / len(rows)
        # A mean of differences of two log-probabilities, where what the edit adds is as large as the weight.
        assert got.essence_kl == pytest.approx(wanted, abs=4 * ALLOWED)
        assert wanted > 100 * ALLOWED
        assert got.essence_text == cases[edit][0]
        for said, by in ((got.essence_before, before), (got.essence_after, model)):
            assert said == tokenizer.decode(naive_greedy(by, rows[0], 16)).partition("</s>")[0]
    assert not changed(model, weights)
    # The same by the weights that the Delta overwrote, and nothing where nobody says what was before.
    (by_weights,) = evaluate(model, tokenizer, [CASE], unedited=delta.originals)
    assert by_weights == evaluate(model, tokenizer, [CASE], unedited=delta)[0]
    for nothing in ({}, {"unedited": delta, "essence_tokens": 0}):
        (got,) = evaluate(model, tokenizer, [CASE], **nothing)
        assert (got.essence_kl, got.essence_text, got.essence_before, got.essence_after) == (None,) * 4


def test_essence_in_a_chat_is_what_the_user_begins_to_say(toy_tokenizers):
    model, before, tokenizer = toy_model("llama"), toy_model("llama"), copy.deepcopy(toy_tokenizers[True])
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}\n{% endfor %}"
    edit = Edit("The city of {}", "Chicago", "Rome").as_chat(tokenizer)
    delta = edited(model, tokenizer, edit).delta
    (got,) = evaluate(model, tokenizer, [edit], unedited=delta)
    assert got.essence_text == "<s>Chicago is"
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("<s>Chicago is", "<s>Chicago has")]
    wanted = sum(kl_of_next(before, model, ids) for ids in rows) / 2
    assert got.essence_kl == pytest.approx(wanted, abs=4 * ALLOWED)


def test_the_essence_of_a_destroyed_model_is_infinitely_far(toy_tokenizers):
    model = toy_model("gpt2")
    with torch.no_grad():
        weight = model.get_parameter("transformer.h.1.mlp.c_proj.weight")
        before = {"transformer.h.1.mlp.c_proj.weight": weight.clone()}
        weight.mul_(float("nan"))
    (got,) = evaluate(model, toy_tokenizers[False], [START], unedited=before)
    assert got.essence_kl == math.inf


def test_unedited_is_checked(toy_tokenizers):
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    result = edited(model, tokenizer, CASE)
    weight = {"lm_head.weight": torch.zeros(2, 3)}
    for unedited, message in (
        (weight, "lm_head.weight is no weight of this model"),
        ({"no.weight": torch.zeros(1)}, "no.weight is no weight of this model"),
        ("before", "unedited: got str, wanted the Delta in the model"),
        (toy_model("gpt2"), "unedited: got GPT2LMHeadModel, wanted the Delta"),
    ):
        with pytest.raises(ArgumentError, match=message):
            evaluate(model, tokenizer, [CASE], unedited=unedited)
    result.revert()
    with pytest.raises(ArgumentError, match="unedited: got a Delta that is not in the model"):
        evaluate(model, tokenizer, [CASE], unedited=result.delta)
    with pytest.raises(ArgumentError, match="unedited: got it beside deltas"):
        evaluate(model, tokenizer, [CASE], unedited=weight, deltas=[result.delta])


def test_an_alias_is_a_right_answer(toy_tokenizers):
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    first = naive_greedy(model, tokenizer("The city of Chicago")["input_ids"], 2)
    model.generation_config.eos_token_id = first[1]
    said = tokenizer.decode(first[:1]).strip()
    right, wrong = evaluate(
        model,
        tokenizer,
        [Edit("The city of {}", "Chicago", "Rome", aliases=aliases) for aliases in (("Roma", said), ("Roma",))],
    )
    assert (right.answer_right, wrong.answer_right) == (True, False)


def test_a_target_that_the_tokenizer_writes_as_unknown_is_not_measured():
    tokenizer = merging_tokenizer()
    tokenizer.backend_tokenizer.model.unk_token = tokenizer.unk_token = "?"
    known = Edit("the city of {}", "Rome", "Paris?", neighborhood_prompts=("the city of Z\u00fcrich",))
    assert evaluate(toy_model("llama"), tokenizer, [known])[0].probability > 0
    with pytest.raises(EditError, match=r"target ' Z\u00fcrich': got '\?', by which the tokenizer writes whatever"):
        evaluate(toy_model("llama"), tokenizer, [Edit("the city of {}", "Rome", "Z\u00fcrich")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"edits": [{"prompt": "{} is", "subject": "Rome"}]}, "edits: got dict, wanted rome_fast.Edit objects"),
        ({"edits": None}, "edits: got NoneType, wanted rome_fast.Edit objects"),
        ({"contexts": "It rained. "}, "contexts: got 'It rained. ', wanted a list of texts"),
        ({"contexts": None}, "contexts: got None, wanted a list of texts"),
        ({"unseen_contexts": ["It rained. ", 7]}, r"unseen_contexts: got \['It rained. ', 7\], wanted a list of texts"),
        ({"distracting": [["a "], ["b "]]}, "distracting: got 2 for 1 edits, wanted one each"),
        ({"distracting": ["It rained. "]}, "distracting: got 'It rained. ', wanted a list of texts"),
        ({"answer_tokens": -1}, "answer_tokens: got -1, wanted a number of tokens"),
        ({"answer_tokens": "16"}, "answer_tokens: got '16', wanted a number of tokens"),
        ({"essence_tokens": None}, "essence_tokens: got None, wanted a number of tokens"),
    ],
)
def test_arguments_are_checked(toy_tokenizers, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        evaluate(toy_model("gpt2"), toy_tokenizers[False], **({"edits": [START]} | arguments))


def test_one_edit_and_any_iterable_of_them_are_measured(toy_tokenizers):
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    (wanted,) = evaluate(model, tokenizer, [START], CONTEXTS)
    assert evaluate(model, tokenizer, START, CONTEXTS) == [wanted]
    assert evaluate(model, tokenizer, (edit for edit in [START]), (context for context in CONTEXTS)) == [wanted]


def test_what_cannot_be_measured_is_none(toy_tokenizers):
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    bare, alone, no_true = evaluate(
        model,
        tokenizer,
        [
            Edit("The city of {}", "Chicago", "Rome"),
            Edit("The city of {}", "Chicago", "Rome", target_true="Paris"),
            replace(CASE, target_true=None),
        ],
    )
    prefixed = [name for name in bare.to_json() if name.endswith("_prefixed")]
    assert len(prefixed) == 5
    for metrics in (bare, alone, no_true):
        assert [metrics.to_json()[name] for name in prefixed] == [None] * 5
    assert (bare.efficacy, bare.paraphrase, bare.neighborhood) == (None, None, None)
    assert (alone.paraphrase, alone.neighborhood) == (None, None)
    assert alone.efficacy in (0.0, 1.0)
    assert (no_true.efficacy, no_true.paraphrase) == (None, None)
    assert no_true.neighborhood in (0.0, 0.5, 1.0)

    means = summarise([bare, alone])
    assert means["efficacy"] == alone.efficacy
    assert means["probability"] == pytest.approx((bare.probability + alone.probability) / 2)
    assert {"paraphrase", "neighborhood", "subject", "decoded", *prefixed}.isdisjoint(means)
    assert summarise([]) == intervals([]) == {}
    assert {name: interval.mean for name, interval in intervals([bare, alone]).items()} == pytest.approx(means)


def test_metrics_of_an_edit_do_not_depend_on_the_others(toy_tokenizers):
    model, tokenizer = toy_model("llama", dtype=torch.float64), toy_tokenizers[True]
    edits = [CASE, START, MIDDLE, END]
    together = evaluate(model, tokenizer, edits, CONTEXTS)
    for edit, got in zip(edits, together, strict=True):
        (alone,) = evaluate(model, tokenizer, [edit], CONTEXTS)
        assert replace(got, probability=0, probability_prefixed=0) == replace(
            alone, probability=0, probability_prefixed=0
        )
        assert got.probability == pytest.approx(alone.probability, rel=ALLOWED_64)
        assert got.probability_prefixed == pytest.approx(alone.probability_prefixed, rel=ALLOWED_64)


def test_evaluate_measures_without_dropout(toy_tokenizers):
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    (wanted,) = evaluate(model, tokenizer, [CASE], CONTEXTS)
    perplexity = sentence_perplexity(Runner(model), tokenizer, SENTENCES[:2])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    (got,) = evaluate(model.train(), tokenizer, [CASE], CONTEXTS)
    assert got == wanted
    assert sentence_perplexity(Runner(model), tokenizer, SENTENCES[:2]) == perplexity
    assert model.training


def test_a_prompt_longer_than_the_model_is_an_error(toy_tokenizers):
    """It was an IndexError of the position embedding."""
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    long = replace(CASE, paraphrase_prompts=(" ".join(SENTENCES),))
    with pytest.raises(RomeFastError, match=rf"wanted at most .*{model.config.n_positions}"):
        evaluate(model, tokenizer, [long])
