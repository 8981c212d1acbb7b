"""Causal tracing against the definition, one state restored at a time by the model's own forward."""

import csv
import json
import math
import re
import shutil
from contextlib import closing

import pytest
import torch

from rome_fast.cli import main
from rome_fast.errors import ArgumentError, ModelError
from rome_fast.models.runner import Runner
from rome_fast.opening import checkpoints
from rome_fast.trace import ROLES, average, causal_trace, draw_noise, embedding_deviation, roles_of
from rome_fast.trace.causal import layer_passes, predicted
from toys import HIDDEN, LAYERS, save_toy, toy_model, toy_tokenizer

ATTENTION = {"gpt2": "attn", "gptj": "attn"}  # "self_attn" in all others
LAYERS_OF = {"gpt2": "transformer.h", "gptj": "transformer.h"}
DOWN = {"gpt2": "mlp.c_proj", "gptj": "mlp.fc_out"}
EMBEDDED = {"gpt2": "transformer.drop", "gptj": "transformer.drop"}  # what enters layer 0


def parts(model, layer):
    """The modules of a layer whose outputs are a state, what an MLP adds and what attention adds."""
    kind = model.config.model_type
    module = model.get_submodule(f"{LAYERS_OF.get(kind, 'model.layers')}.{layer}")
    return {
        "state": module,
        "mlp": module.get_submodule(DOWN.get(kind, "mlp.down_proj")),
        "attention": module.get_submodule(ATTENTION.get(kind, "self_attn")),
    }


def first(output):
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def naive_probabilities(model, ids, subject, noise, restored=()):
    """(vocabulary,) behind the last token: one row, one forward; `restored` are (module, token, value)."""
    handles = []
    embedded = model.get_submodule(EMBEDDED.get(model.config.model_type, "model.embed_tokens"))

    def corrupt(_module, _args, output):
        out = output.clone()
        if noise is not None:
            out[0, subject.start : subject.stop] += noise.to(out)
        return out

    handles.append(embedded.register_forward_hook(corrupt))
    for module, token, value in restored:

        def restore(_module, _args, output, token=token, value=value):
            out = first(output).clone()
            out[0, token] = value
            return (out, *output[1:]) if isinstance(output, tuple) else out

        handles.append(module.register_forward_hook(restore))
    try:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return logits.softmax(-1)


@torch.no_grad()
def naive_trace(model, ids, subject, noise, window):
    """(clean, corrupted, effects by kind) from one forward for every token, layer, kind and sample."""
    seen = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, output, key=(kind, layer): seen.update({key: first(output)[0]}))
        for layer in range(LAYERS)
        for kind, module in parts(model, layer).items()
    ]
    clean = naive_probabilities(model, ids, subject, None)
    for handle in handles:
        handle.remove()
    seen = {key: value.clone() for key, value in seen.items()}
    answer = int(clean.argmax())
    corrupted = sum(float(naive_probabilities(model, ids, subject, one)[answer]) for one in noise) / len(noise)
    effects = {kind: torch.zeros(LAYERS, len(ids), dtype=torch.float64) for kind in ("state", "mlp", "attention")}
    for kind, effect in effects.items():
        for layer in range(LAYERS):
            span = [layer]
            if kind != "state":
                span = [near for near in range(LAYERS) if -window / 2 <= near - layer < window / 2]
            for token in range(len(ids)):
                values = [(parts(model, near)[kind], token, seen[kind, near][token]) for near in span]
                total = sum(float(naive_probabilities(model, ids, subject, one, values)[answer]) for one in noise)
                effect[layer, token] = total / len(noise) - corrupted
    return answer, float(clean[answer]), corrupted, effects


def prompt_of(tokenizer):
    ids = tokenizer("The strait in the middle of Istanbul is called")["input_ids"]
    return ids, range(len(ids) - 6, len(ids) - 3)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.float64), ("qwen3", torch.float32), ("gpt2", torch.float64), ("gptj", torch.float32)],
)
def test_effects_are_those_of_one_restored_state_at_a_time(kind, dtype):
    model, tokenizer = toy_model(kind, dtype=dtype), toy_tokenizer(False)
    ids, subject = prompt_of(tokenizer)
    noise = draw_noise((2, len(subject), HIDDEN), 0.5, seed=3)
    answer, clean, corrupted, effects = naive_trace(model, ids, subject, noise, window=2)
    found = causal_trace(Runner(model), ids, subject, noise, window=2)
    # Of probabilities up to 1: the same operations, but in rows of other shapes, whose products are added up in another
    # order. That is some epsilons, 2^-23 or 2^-52, amplified by a few layers.
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    assert found.answer == answer
    assert found.clean == pytest.approx(clean, abs=bound)
    assert found.corrupted == pytest.approx(corrupted, abs=bound)
    assert set(found.effects) == set(effects)
    for name, effect in effects.items():
        assert float(effect.abs().max()) > 1e-3  # or nothing was restored
        assert float((found.effects[name] - effect).abs().max()) < bound, name


def test_odd_window_and_a_subject_that_ends_the_prompt():
    model, tokenizer = toy_model("llama", dtype=torch.float64), toy_tokenizer(True)
    ids = tokenizer("The old capital, Rome")["input_ids"]
    subject = range(len(ids) - 1, len(ids))
    noise = draw_noise((1, 1, HIDDEN), 0.5, seed=0)
    *_, effects = naive_trace(model, ids, subject, noise, window=3)
    found = causal_trace(Runner(model), ids, subject, noise, window=3)
    for name, effect in effects.items():
        assert float((found.effects[name] - effect).abs().max()) < 1e-12, name


def test_batches_do_not_change_effects(monkeypatch):
    """One restored thing at a time, or all of them together."""
    model, tokenizer = toy_model("gpt2", dtype=torch.float64), toy_tokenizer(False)
    ids, subject = prompt_of(tokenizer)
    noise = draw_noise((3, len(subject), HIDDEN), 0.5, seed=0)
    together = causal_trace(Runner(model), ids, subject, noise, window=3)
    for tokens in (1, 3 * len(ids) * 7):
        monkeypatch.setattr("rome_fast.trace.causal._BATCH_TOKENS", {"cpu": tokens})
        found = causal_trace(Runner(model), ids, subject, noise, window=3)
        for kind, effect in together.effects.items():
            assert float((found.effects[kind] - effect).abs().max()) < 1e-12


def test_only_layers_that_can_change_are_run(monkeypatch):
    model, tokenizer = toy_model("llama"), toy_tokenizer(False)
    ids, subject = prompt_of(tokenizer)
    noise = draw_noise((3, len(subject), HIDDEN), 0.5, seed=0)
    run, passes = Runner.run, []

    def counting(self, hidden, start, stop, **arguments):
        passes.append(hidden.shape[0] * hidden.shape[1] * (stop - start))
        return run(self, hidden, start, stop, **arguments)

    monkeypatch.setattr(Runner, "run", counting)
    causal_trace(Runner(model), ids, subject, noise, window=2)
    assert sum(passes) == layer_passes(LAYERS, len(ids), subject.start, 3, ("state", "mlp", "attention"), 2)
    whole_runs = len(ids) * 3 * LAYERS * (len(ids) - subject.start) * LAYERS * 3
    assert sum(passes) < 0.7 * whole_runs


def test_a_streamed_model_has_the_same_effects(tmp_path):
    model, tokenizer = toy_model("llama"), toy_tokenizer(False)
    source = save_toy(tmp_path / "toy", model, tokenizer)
    ids, subject = prompt_of(tokenizer)
    noise = draw_noise((2, len(subject), HIDDEN), 0.5, seed=0)
    wanted = causal_trace(Runner(model), ids, subject, noise, window=2)
    with pytest.raises(ArgumentError, match="wanted at least") as failed:
        checkpoints.outline(source, memory=1, identity=True)
    least = int(re.search(r"at least ([\d,]+)", str(failed.value))[1].replace(",", ""))
    with closing(checkpoints.outline(source, memory=least, identity=True).stream()) as stream:
        found = causal_trace(Runner(stream.model, stream), ids, subject, noise, window=2)
    for kind, effect in wanted.effects.items():
        assert torch.equal(found.effects[kind], effect)


def test_layers_without_one_of_the_kinds_have_no_part_in_its_windows(monkeypatch):
    """As layers with routed experts only: what they add is that of the corrupted run."""
    model, tokenizer = toy_model("llama", dtype=torch.float64), toy_tokenizer(False)
    ids, subject = prompt_of(tokenizer)
    noise = draw_noise((1, len(subject), HIDDEN), 0.5, seed=0)
    projection = Runner.projection

    def projection_of_some(self, layer):
        if layer == 1:
            raise ModelError("layer 1 has routed experts only")
        return projection(self, layer)

    monkeypatch.setattr(Runner, "projection", projection_of_some)
    found = causal_trace(Runner(model), ids, subject, noise, ("mlp",), window=1)
    *_, effects = naive_trace(model, ids, subject, noise, window=1)
    assert found.effects["mlp"][1].abs().max() < 1e-12
    for layer in (0, 2, 3):
        assert float((found.effects["mlp"][layer] - effects["mlp"][layer]).abs().max()) < 1e-12


def test_deviation_is_that_of_what_enters_the_first_layer():
    model, tokenizer = toy_model("gpt2", dtype=torch.float64), toy_tokenizer(False)
    rows = [tokenizer(text)["input_ids"] for text in ("Istanbul is a city", "He lives in Chicago")]
    subjects = [range(0, 2), range(2, 4)]
    transformer = model.transformer
    entering = [
        transformer.wte(torch.tensor(row))[subject.start : subject.stop] + transformer.wpe.weight[list(subject)]
        for row, subject in zip(rows, subjects, strict=True)
    ]
    assert embedding_deviation(Runner(model), rows, subjects) == pytest.approx(
        float(torch.cat(entering).detach().std())
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": range(5, 50)}, "subject: got tokens 5 .. 49 of"),
        ({"noise": torch.zeros(2, 1, HIDDEN)}, "noise: got (2, 1, 48), wanted (samples, 3, hidden size)"),
        ({"window": 0}, "window: got 0, wanted at least 1 layer"),
        ({"kinds": ("mlp", "heads")}, "kinds: got heads, wanted some of state, mlp, attention"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    tokenizer = toy_tokenizer(False)
    ids, subject = prompt_of(tokenizer)
    arguments = {"subject": subject, "noise": torch.zeros(2, 3, HIDDEN), "window": 10} | changes
    with pytest.raises(ArgumentError, match=re.escape(message)):
        causal_trace(Runner(toy_model("llama")), ids, **arguments)


def test_roles():
    assert roles_of(7, range(1, 4)) == [None, *ROLES[:3], "first subsequent token", "further tokens", "last token"]
    assert roles_of(4, range(2, 3)) == [None, None, "last subject token", "last token"]
    assert roles_of(2, range(0, 2)) == ["first subject token", "last subject token"]


def test_average_over_requests_is_of_the_mean_over_their_tokens():
    one = torch.tensor([[0.0, 1, 2, 4, 6, 8, 9]], dtype=torch.float64)  # first, middle twice, last, subsequent, last
    two = torch.tensor([[5.0, 7.0]], dtype=torch.float64)  # last of the subject, last
    found = average([one, two], [range(1, 5), range(0, 1)])
    mean = dict(zip(ROLES, found.mean[0].tolist(), strict=True))
    assert mean["first subject token"] == 1
    assert mean["middle subject tokens"] == 3
    assert mean["last subject token"] == (6 + 5) / 2
    assert mean["last token"] == (9 + 7) / 2
    assert math.isnan(mean["further tokens"])
    assert found.requests == (1, 1, 2, 1, 0, 2)
    # Of two numbers: half of their difference.
    assert found.error[0, ROLES.index("last token")] == pytest.approx(1)
    assert found.error[0, 0].isnan()


@pytest.fixture
def place(tmp_path, empty_cache):
    """A checkpoint and requests: some that it answers as they say, one without an answer, one it does not know."""
    model, tokenizer = toy_model("llama"), toy_tokenizer(False)
    save_toy(tmp_path / "toy", model, tokenizer)
    runner = Runner(model)
    rows = []
    for subject in ("Istanbul", "Steve Jobs", "Chicago", "Vienna"):
        answer = tokenizer.decode([predicted(runner, tokenizer(f"The museum of {subject} is in")["input_ids"])])
        row = {"prompt": "The museum of {} is in", "subject": subject, "target_new": "Rome"}
        true = {"Chicago": None, "Vienna": "Berlin"}.get(subject, answer)
        rows.append(row if true is None else row | {"target_true": true})
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def trace(place, *arguments):
    report = place / "report.json"
    command = ["trace", str(place / "toy"), "--edits", str(place / "edits.jsonl"), "--out", str(place / "out")]
    assert main([*command, "--window", "2", "--json", str(report), *arguments]) == 0
    return json.loads(report.read_text())


def test_the_command_traces_what_the_model_knows(place, capsys, monkeypatch):
    report = trace(place, "--samples", "2")
    said = capsys.readouterr().out
    known = report["requests"]
    subjects = [row["subject"] for row in known]
    assert "Chicago" in subjects
    assert "Vienna" not in subjects
    assert f"{len(known)} requests whose answer the model knows" in said
    assert "restored runs" in said
    assert (place / "out" / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    with (place / "out" / "effects.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 3 * LAYERS * sum(count > 0 for count in report["requests_with_role"])
    row = next(r for r in rows if (r["kind"], r["layer"], r["role"]) == ("mlp", "1", "last subject token"))
    effects = [each["effects"]["mlp"][1][each["subject_tokens"][1] - 1] for each in known]
    assert float(row["average_indirect_effect"]) == pytest.approx(sum(effects) / len(effects), rel=1e-5)
    # The same command finds everything there; another seed is another trace.
    monkeypatch.setattr("rome_fast.trace.command.causal_trace", None)
    assert trace(place, "--samples", "2")["requests"] == known
    command = ["trace", str(place / "toy"), "--edits", str(place / "edits.jsonl"), "--out", str(place / "out")]
    assert main([*command, "--window", "2", "--samples", "2", "--seed", "1"]) == 2
    assert "is of a run of rome-fast trace with other seed" in capsys.readouterr().err


def test_a_repeated_trace_has_the_same_noise(place, monkeypatch, capsys):
    # Drawing takes longest.
    monkeypatch.setattr("rome_fast.trace.command.can_draw", lambda: False)
    once = ("--count", "1", "--samples", "1")
    first = trace(place, *once)
    assert "no heat map: it wants matplotlib" in capsys.readouterr().out
    shutil.rmtree(place / "out")
    again = trace(place, *once)
    assert again["requests"] == first["requests"]
    shutil.rmtree(place / "out")
    other = trace(place, *once, "--seed", "7")
    assert other["requests"][0]["clean"] == first["requests"][0]["clean"]
    assert other["requests"][0]["corrupted"] != first["requests"][0]["corrupted"]


def test_a_model_that_knows_nothing_of_it_is_told_of(place, capsys):
    (place / "edits.jsonl").write_text(
        json.dumps({"prompt": "{} is in", "subject": "Vienna", "target_new": "Rome", "target_true": "Moscow"}) + "\n"
    )
    command = ["trace", str(place / "toy"), "--edits", str(place / "edits.jsonl"), "--out", str(place / "out")]
    assert main(command) == 2
    assert "answers none of 1 requests with their target_true" in capsys.readouterr().err
    assert not (place / "out").exists()
