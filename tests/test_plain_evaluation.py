"""`evaluate` against a script that knows transformers alone: the same figures of the same model, whatever the way."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import edited
from plain_evaluation import Plain
from rome_fast import load_edits
from rome_fast.assets import model_dir
from rome_fast.bench.flops import FlopCounter
from rome_fast.evaluation import UNSEEN, EditMetrics, distractors, evaluate
from rome_fast.models.runner import Runner
from rome_fast.models.verification import check_model, verified
from rome_fast.updates.delta import Delta, LowRank
from toys import toy_model, toy_tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CONTEXTS = ("The weather is nice. ", "What is that? ")
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:\n{% endif %}"
)


def requests_of(count):
    """Requests with every field that `evaluate` reads, and with few; targets of one token and of several."""
    places = ("Chicago", "Paris", "Rome", "Berlin", "Istanbul", "Vienna", "Melbourne", "Toronto", "Moscow", "Madrid")
    frames = ("The city of {} lies near", "From {} one flies to", "{} is a twin city of", "Few people leave {} for")
    found = []
    for i in range(count):
        subject, target, true = (places[(i * step + step) % len(places)] for step in (1, 3, 7))
        request = {
            "prompt": frames[i % 7 % len(frames)],
            "subject": subject,
            "target_new": target if i % 3 else f"the old town of {target}",
            "essence_prompts": [f"{subject} is known for", f"The weather in {subject}"],
        }
        if i % 2 == 0:
            request |= {
                "target_true": true,
                "aliases": ["home"],
                "paraphrase_prompts": [f"They say that {subject} is next to"],
                "neighborhood_prompts": [f"The city of {places[i % 7]} lies near"],
                "neighbors": [{"prompt": f"In {true} they speak", "answers": ["French", "German and English"]}],
                "portability": [
                    {"prompt": f"The river of {subject} comes from", "answers": ["South America", "Scotland"]},
                    {"prompt": f"What is near {target}? It is", "answers": [subject], "kind": "reversal"},
                ],
                "negation_prompts": [f"{subject} is not at all close to"],
            }
        found.append(request)
    return found


def random_delta(model, scale):
    """An update of every layer, of `scale` times the norm of its weight."""
    runner, generator, updates = Runner(model), torch.Generator().manual_seed(1), {}
    for layer in range(len(runner.layers)):
        weight = runner.weight(layer)
        left, right = (torch.randn(*shape, generator=generator) for shape in ((len(weight), 2), (2, weight.shape[1])))
        updates[runner.weight_name(layer)] = LowRank(left * scale * weight.norm() / (left @ right).norm(), right)
    return Delta(updates)


def edits_of(requests, tmp_path):
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return load_edits(path)


def assert_same_figures(model, unedited, tokenizer, requests, chat, delta, tmp_path):
    """Probabilities and divergences to 1e-5, all else exactly; returns what was found."""
    edits = edits_of(requests, tmp_path)
    leading_away = distractors(edits)
    asked = [edit.as_chat(tokenizer) for edit in edits] if chat else edits
    found = evaluate(
        model, tokenizer, asked, CONTEXTS, unseen_contexts=UNSEEN, distracting=leading_away, unedited=delta
    )
    plain = Plain(model, tokenizer, chat, unedited)
    for request, away, mine in zip(requests, leading_away, found, strict=True):
        groups = {"": [""], "_prefixed": CONTEXTS, "_unseen": UNSEEN, "_distracted": away}
        assert_same(mine, plain.figures(request, groups))
    return found


def assert_same(mine, theirs):
    assert {f.name for f in fields(EditMetrics)} == {"subject", "target", "essence_text", *theirs}
    for name, wanted in theirs.items():
        close = wanted is not None and (name.startswith("probability") or name == "essence_kl")
        assert getattr(mine, name) == (pytest.approx(wanted, abs=1e-5) if close else wanted), name


def assert_isolated_is_one_at_a_time(model, unedited, tokenizer, requests, layers, tmp_path):
    """The figures of `dual` edits in one pass and of edit, evaluate, restore by the script; returns both FLOPs."""
    edits, deltas = edits_of(requests, tmp_path), []
    for edit in edits:
        result = edited(model, tokenizer, edit, method="dual", layer=None, layers=layers)
        deltas.append(result.delta)
        result.revert()
    away = distractors(edits)
    asked = {"unseen_contexts": UNSEEN, "distracting": away}
    check_model(Runner(model))  # which is done once
    for layer in layers:
        verified(Runner(model), layer)
    with FlopCounter() as together:
        found = evaluate(model, tokenizer, edits, CONTEXTS, **asked, deltas=deltas)
    plain = Plain(model, tokenizer, False, unedited)
    with FlopCounter() as one_by_one:
        for request, own, mine, delta in zip(requests, away, found, deltas, strict=True):
            delta.apply(model)
            groups = {"": [""], "_prefixed": CONTEXTS, "_unseen": UNSEEN, "_distracted": own}
            assert_same(mine, plain.figures(request, groups))
            delta.revert(model)
    return one_by_one.total, together.total


@pytest.mark.usefixtures("empty_cache")
def test_isolated_edits_of_a_toy_over_several_layers(tmp_path):
    """With targets of one token, as most are in real data: a prompt is run once for all of its answers."""
    model, unedited, tokenizer = toy_model("llama"), toy_model("llama"), toy_tokenizer(bos=True)
    requests = [r | {"target_new": "Rome", "target_true": "Paris"} for r in requests_of(3)]
    alone, together = assert_isolated_is_one_at_a_time(model, unedited, tokenizer, requests, (0, 1, 2), tmp_path)
    assert alone / together >= 1.3


@pytest.mark.parametrize(("chat", "count"), [(False, 12), (True, 4)])
def test_requests_of_a_toy(chat, count, tmp_path):
    tokenizer = toy_tokenizer(bos=not chat)
    tokenizer.chat_template = CHAT
    model, unedited = toy_model("llama"), toy_model("llama")
    delta = random_delta(model, 0.5)
    delta.apply(model)
    # A model that stops now and then.
    for each in (model, unedited):
        with torch.no_grad():
            each.lm_head.weight[tokenizer.eos_token_id] *= 2.5
    found = assert_same_figures(model, unedited, tokenizer, requests_of(count), chat, delta, tmp_path)
    varied = (
        "probability",
        "answer",
        "decoded",
        "efficacy",
        "paraphrase",
        "neighborhood",
        "essence_kl",
        "essence_after",
    )
    assert all(len({getattr(m, name) for m in found}) > 1 for name in varied)


def of_counterfact(count):
    """SmolLM2 twice, its tokenizer, and requests with texts about the subject and a denial."""
    model, unedited = (AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32) for _ in range(2))
    lines = (DATA / "counterfact_dev.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    requests = [json.loads(line) for line in lines]
    for request in requests:
        request["essence_prompts"] = [f"{request['subject']} is", f"{request['subject']} has"]
        request["negation_prompts"] = [request["prompt"].replace("{}", request["subject"]) + " not"]
    return model, unedited, AutoTokenizer.from_pretrained(model_dir()), requests


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"development data is not part of the repository: no {DATA}")


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("chat", [False, True])
def test_fifty_requests_of_counterfact(chat, tmp_path):
    """On SmolLM2; some of them without a true answer, and all with texts about the subject."""
    model, unedited, tokenizer, requests = of_counterfact(50)
    for request in requests[::10]:
        del request["target_true"], request["neighborhood_answer"]
    delta = random_delta(model, 0.05)
    delta.apply(model)
    found = assert_same_figures(model, unedited, tokenizer, requests, chat, delta, tmp_path)
    assert len({m.answer for m in found}) > 25


@pytest.mark.slow
@needs_data
def test_isolated_edits_of_counterfact_over_several_layers(tmp_path):
    parts = of_counterfact(6)
    alone, together = assert_isolated_is_one_at_a_time(*parts, tuple(range(3, 10)), tmp_path)
    print(f"one at a time takes {alone / together:.2f} x the FLOPs", flush=True)
    assert alone / together >= 1.3
