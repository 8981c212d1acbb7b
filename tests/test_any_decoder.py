"""Models of every kind: run layer by layer, edited, restored and streamed, against their own forward.

What an edit should do is found here by hooks on the model's own forward, one row at a time, with no code of the
package but the edit itself.
"""

import os
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from helpers import all_bits, changed, relative_error
from rome_fast import Edit, ValueSettings, apply_edits, collect_statistics, verify
from rome_fast.errors import ArgumentError, ModelError
from rome_fast.evaluation import RowUpdates, edited_perplexities, greedy_completion, sentence_perplexity
from rome_fast.models.past import ContextPast, Contexts, attention_mask
from rome_fast.models.runner import Runner
from rome_fast.opening import checkpoints
from rome_fast.updates.delta import Delta, LowRank
from toys import SENTENCES, save_toy
from zoo import KINDS, zoo_model

EDIT = Edit("The city of {}", "Chicago", "Rome")
CONTEXTS = ("The weather is nice. ", "What is that? ", "I think that he came late. ")
SETTINGS = ValueSettings(steps=5, stop="loss", weight_decay=1e-3, clamp=3.0)

# One for each way in which a model can differ from the Llama-like ones.
QUICK = (
    "gemma2",  # a norm behind the MLP, caps of scores and logits, a scaled embedding
    "olmo2",  # a norm behind the MLP and none before
    "granite",  # what a layer adds is multiplied, as are embedding and logits
    "cohere2",  # attention and MLP side by side, logits scaled, windows in some layers
    "opt",  # positions learned, with an offset; no module around the MLP
    "gpt_neox",  # side by side, biases everywhere
    "openai-gpt",  # layers return lists; norms behind
    "bloom",  # distances in place of positions, which padding would change: whole rows
    "lfm2",  # convolutions in some layers: whole rows
    "qwen2_moe",  # an expert of all tokens behind a gate, run on tokens in one long row
    "deepseek_v2",  # experts in one tensor that are many in files; latent attention
    "apertus",  # buffers with values of their own
    "jamba",  # a state space in most layers; every other one has routed experts only
)
ROUTED = "has routed experts only"
REFUSED = {
    **dict.fromkeys(("qwen3_moe", "mixtral", "olmoe", "phimoe", "granitemoe", "gpt_oss", "minimax"), ROUTED),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), "has no MLP with a down-projection"),
    "gemma3n_text": "cannot be run layer by layer",
}


def tokens(tokenizer, text):
    return tokenizer(text)["input_ids"]


def own_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@contextmanager
def at_projection(model, name, subject, added=None):
    """Yields a list that gets (key, value) at the subject in every forward; `added` is put onto the value."""
    seen = []

    def hook(_module, args, output):
        keys, values = args[0].reshape(-1, args[0].shape[-1]), output.clone().view(-1, output.shape[-1])
        if added is not None:
            values[subject] += added
        seen.append((keys[subject].clone(), values[subject].clone()))
        return values.view(output.shape)

    handle = model.get_submodule(name.removesuffix(".weight")).register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


class Rows:
    """The rows of the edit, and what the model's own forward makes of them."""

    def __init__(self, tokenizer, name):
        self.name = name
        prompts = [tokens(tokenizer, context + EDIT.prompt.format(EDIT.subject)) for context in ("", *CONTEXTS)]
        # Without the BOS that some tokenizers put before any text.
        target = tokenizer(f" {EDIT.target}", add_special_tokens=False)["input_ids"]
        self.rows = [(ids, target) for ids in prompts]
        self.essence = tokens(tokenizer, EDIT.subject)

    def run(self, model, added=None):
        """Keys (rows, d_ff), values (rows, d), mean NLL of the target, log-probabilities behind the bare subject."""
        found, losses = [], []
        for prompt, target in self.rows:
            with at_projection(model, self.name, len(prompt) - 1, added) as seen:
                logits = own_logits(model, [*prompt, *target[:-1]]).log_softmax(-1)
            found += seen
            scored = logits[len(prompt) - 1 :]
            losses.append(-scored[torch.arange(len(target)), target].mean())
        with at_projection(model, self.name, len(self.essence) - 1, added):
            essence = own_logits(model, self.essence)[-1].log_softmax(-1)
        keys, values = (torch.stack(column) for column in zip(*found, strict=True))
        return keys, values, float(torch.stack(losses).mean()), essence


def check_layers(model, tokenizer, shares_past):
    """Largest error of logits of layers run one by one: whole rows, and rows behind contexts of several lengths."""
    runner = Runner(model)
    rows = [tokens(tokenizer, sentence) for sentence in SENTENCES[:3]]
    packed = runner.pack(rows)
    with torch.no_grad():
        logits = runner.head(runner.run(runner.embed(packed.ids), 0, len(runner.layers)))
        errors = [relative_error(logits[i, : len(ids)], own_logits(model, ids)) for i, ids in enumerate(rows)]
        if shares_past:
            contexts = Contexts.of(runner, tokenizer, CONTEXTS, [1])
            count, behind = len(CONTEXTS), tokens(tokenizer, " Rome was not built in a day")
            seen = torch.arange(int(contexts.lengths.max())) < contexts.lengths.unsqueeze(1)
            positions = contexts.lengths.unsqueeze(1) + torch.arange(len(behind))
            hidden = runner.run(
                runner.embed(torch.tensor([behind] * count), positions),
                0,
                len(runner.layers),
                positions=positions,
                mask=attention_mask(seen, len(behind), runner.dtype),
                past=ContextPast(contexts, torch.arange(count)),
            )
            for i, before in enumerate(contexts.ids):
                wanted = own_logits(model, [*before, *behind])[len(before) :]
                errors.append(relative_error(runner.head(hidden[i]), wanted))
    return max(errors)


def check_edit(model, tokenizer, layer):
    """The edit does what its record says, and nothing else. Returns the edited weight and the name of it."""
    before = all_bits(model)
    result = apply_edits(
        model,
        EDIT,
        tokenizer=tokenizer,
        method="c-rome",
        statistics="identity",
        layer=layer,
        contexts=CONTEXTS,
        settings=SETTINGS,
        guard="off",
        unconverged="write",
    )
    ((name, update),) = result.delta.updates.items()
    edited = model.get_parameter(name).detach().clone()
    rows = Rows(tokenizer, name)
    assert changed(model, before) == [name]
    _, values_after, loss_after, _ = rows.run(model)
    result.revert()
    assert changed(model, before) == []
    keys, values, loss_before, essence = rows.run(model)
    # C = I: u is along k̄.
    mean = keys.mean(0)
    assert 1 - torch.cosine_similarity(update.right[0], mean, dim=0) < 1e-5
    # The forward's value is W k + δ uᵀk / uᵀk̄ behind every context; in the mean over them that is W k̄ + δ.
    assert relative_error(values_after - values, keys @ update.right.T @ update.left.T) < 1e-3
    delta = (update.left @ update.right @ mean.unsqueeze(1)).squeeze(1)
    assert relative_error((values_after - values).mean(0), delta) < 1e-3
    # The record's loss is that of a forward with δ in the values.
    _, _, nll, after = rows.run(model, delta)
    divergence = float((after.exp() * (after - essence)).sum())
    decay = SETTINGS.weight_decay * float(delta.norm() / values.mean(0).norm() ** 2)
    loss = nll + SETTINGS.kl_factor * divergence + decay
    assert result.records[0].loss == pytest.approx(loss, rel=1e-4, abs=1e-4)
    assert loss_after < loss_before
    return name, edited


def check_streamed(directory, model, tokenizer, layer, name, edited):
    """Edited whole, edited in memory and edited under a budget: the same bytes in the file."""
    source = save_toy(directory / "source", model, tokenizer)
    size = (source / "model.safetensors").stat().st_size

    def memory():
        for share in (0.5, 0.65, 0.8, 1.0):
            try:
                if checkpoints.outline(source, memory=int(share * size), layer=layer, identity=True).placement:
                    return int(share * size)
            except ArgumentError:
                continue
        raise AssertionError("no budget below the size of the model streams it")

    files = []
    for out, budget in (("whole", None), ("streamed", memory())):
        result = apply_edits(
            source,
            EDIT,
            method="c-rome",
            statistics="identity",
            layer=layer,
            contexts=CONTEXTS,
            settings=SETTINGS,
            guard="off",
            unconverged="write",
            memory=budget,
            out=directory / out,
        )
        assert list(result.delta.updates) == [name]
        assert torch.equal(result.model.get_parameter(name), edited)
        files.append((directory / out / "model.safetensors").read_bytes())
    assert files[0] == files[1] != (source / "model.safetensors").read_bytes()


def check_kind(kind, directory, tokenizer):
    """All of it; returns what was found out about the model."""
    model = zoo_model(kind)
    layer = Runner(model).decoder.nearest_site(1)
    found = verify(model, layer)
    # Sums of the same numbers by other kernels, over four layers.
    assert check_layers(model, tokenizer, found.shares_past) < 1e-5
    name, edited = check_edit(model, tokenizer, layer)
    assert found.weight == name
    check_streamed(directory, model, tokenizer, layer, name, edited)
    return found


@pytest.fixture
def no_process(monkeypatch):
    """As if the process itself took nothing: budgets of toys are smaller than it."""
    monkeypatch.setattr(checkpoints, "anonymous_bytes", lambda: 0)


@pytest.mark.parametrize("kind", QUICK)
def test_a_kind_of_each_trait(kind, tmp_path, toy_tokenizers, no_process):
    check_kind(kind, tmp_path, toy_tokenizers[False])


@pytest.mark.parametrize("kind", ["mixtral", "mamba", "gemma3n_text"])
def test_what_cannot_be_edited_says_why(kind):
    with pytest.raises(ModelError, match=rf"model: .*{re.escape(kind.split('_')[0])}.*{REFUSED[kind]}"):
        verify(zoo_model(kind))


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_next", "recurrent_gemma", "bloom"])
def test_statistics_are_those_of_keys_in_the_models_own_forward(kind, toy_tokenizers):
    """Rows of several lengths together, also where a layer runs its MLP on all of their tokens in one row."""
    model, tokenizer = zoo_model(kind), toy_tokenizers[False]
    entry = collect_statistics(model, tokenizer, SENTENCES[:6], [2], max_length=64).layers[2]
    keys = []
    module = model.get_submodule(verify(model, 2).weight.removesuffix(".weight"))
    handle = module.register_forward_hook(lambda _module, args, _output: keys.append(args[0].flatten(0, -2)))
    for sentence in SENTENCES[:6]:
        own_logits(model, tokens(tokenizer, sentence))
    handle.remove()
    wanted = torch.cat(keys).double()
    assert entry.tokens == len(wanted)
    assert relative_error(entry.moment, wanted.T @ wanted / len(wanted)) < 1e-5


@pytest.mark.parametrize("kind", ["gemma2", "qwen2_moe", "granite", "bloom", "lfm2"])
def test_many_edits_in_one_pass_are_each_of_them_alone(kind, toy_tokenizers):
    """Where an edit's value does not arrive unchanged, its layer is run for it; generation carries it as well."""
    model, tokenizer = zoo_model(kind), toy_tokenizers[False]
    runner, name = Runner(model), verify(model, 1).weight
    generator = torch.Generator().manual_seed(0)
    weight, deltas = runner.weight(1), []
    for _ in range(3):
        left, right = (torch.randn(shape, generator=generator) for shape in ((len(weight), 1), (1, weight.shape[1])))
        deltas.append(Delta({name: LowRank(left * weight.norm() / (left @ right).norm(), right)}))
    updates = RowUpdates.of(runner, deltas)
    together = edited_perplexities(runner, tokenizer, SENTENCES[:3], updates)
    texts = greedy_completion(runner, tokenizer, [SENTENCES[0][:20]] * 3, [4] * 3, updates, [0, 1, 2])
    for i, delta in enumerate(deltas):
        delta.apply(model)
        assert together[i] == pytest.approx(sentence_perplexity(runner, tokenizer, SENTENCES[:3]), rel=1e-4)
        assert texts[i] == greedy_completion(runner, tokenizer, [SENTENCES[0][:20]], [4])[0]
        delta.revert(model)
    assert len({round(p, 2) for p in together}) == 3


@pytest.mark.slow
def test_every_kind(tmp_path, toy_tokenizers, no_process):
    """The table of the documentation: writes it anew where `ROME_FAST_WRITE_MODELS` names the file."""
    lines, faults = [], {}
    for kind in sorted(KINDS):
        try:
            found = check_kind(kind, tmp_path / kind, toy_tokenizers[False])
            rows = "behind a shared past" if found.shares_past else "whole"
            value = "added to the layer's output" if found.adds_unchanged else "layer run again"
            lines.append(f"| {kind} | {found.weight.partition(f'.{found.layer}.')[2]} | {rows} | {value} |")
        except ModelError as error:
            lines.append(f"| {kind} | refused: {REFUSED.get(kind)} | | |")
            if kind not in REFUSED or REFUSED[kind] not in str(error):
                faults[kind] = str(error)
        except Exception as error:  # all of them are told together
            faults[kind] = f"{type(error).__name__}: {error}"
    assert not faults
    assert len(lines) - len(REFUSED) >= 80
    if page := os.environ.get("ROME_FAST_WRITE_MODELS"):
        head, _, rest = Path(page).read_text(encoding="utf-8").partition("<!-- table -->\n")
        _, _, tail = rest.partition("<!-- end of the table -->\n")
        table = "\n".join(["| model type | edited weight of a layer | rows | value |", "|---|---|---|---|", *lines])
        marked = f"<!-- table -->\n\n{table}\n\n<!-- end of the table -->\n"
        Path(page).write_text(head + marked + tail, encoding="utf-8")
