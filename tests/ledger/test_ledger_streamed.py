"""Ledgers of checkpoints that are read while they run, under the least budget: the bytes of a model in memory."""

import gc
import json
import shutil
import threading

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import CONTEXTS, END, LAYER, MIDDLE, SETTINGS, START
from on_disk import bits, digests
from rome_fast import Ledger, collect_statistics
from rome_fast.cli import main
from rome_fast.errors import ArgumentError, CheckpointError, CollapseError
from rome_fast.opening import checkpoints
from rome_fast.report.edit_data import read_run
from rome_fast.updates import chains
from rome_fast.updates.delta import Delta
from toys import SENTENCES, save_toy, toy_model

MADE = {
    "one layer": {"method": "c-rome", "layer": LAYER},
    "spread": {"method": "dual", "layers": [0, 1, 2]},
    "memit": {"method": "memit", "layers": [0, 1]},
}
USUAL = {"statistics": "identity", "contexts": CONTEXTS, "settings": SETTINGS, "guard": "off", "unconverged": "write"}
# START begins with its subject, which has a value of its own in `dual`.
EDITS = (START, MIDDLE, END)

pytestmark = pytest.mark.usefixtures("empty_cache", "no_process")


@pytest.fixture
def no_process(monkeypatch):
    """As if the process itself took nothing: else all that is free is given back before every layer of a toy."""
    monkeypatch.setattr("rome_fast.weights.stream.anonymous_bytes", lambda: 0)


@pytest.fixture
def source(tmp_path, toy_tokenizers):
    return save_toy(tmp_path / "model", toy_model("llama"), toy_tokenizers[False], max_shard_size="100KB")


def least(source, how="one layer", identity=True):
    """The smallest budget that is accepted: one block at a time."""
    layers = MADE[how].get("layers", [LAYER])
    with pytest.raises(ArgumentError, match="memory: got 1 bytes, wanted at least") as caught:
        checkpoints.outline(source, memory=1, layer=layers, identity=identity)
    return int(str(caught.value).split("at least ")[1].split(":")[0].replace(",", ""))


def resident(source):
    return AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)


def streamed(folder, source, how="one layer", **options):
    ledger = Ledger.open(folder, source, memory=least(source, how), device="cpu", **options)
    assert ledger._working.runner.stream is not None
    return ledger


def bytes_of(delta):
    return {f"{n}.{s}": bits(getattr(u, s)) for n, u in delta.updates.items() for s in ("left", "right")}


@pytest.mark.parametrize("how", MADE)
def test_everything_has_the_bytes_of_a_model_in_memory(how, source, tmp_path):
    made = USUAL | MADE[how]
    if how == "spread":
        made["statistics"] = collect_statistics(*resident(source), SENTENCES, MADE[how]["layers"], 600).with_ridge(1e-3)
    ledgers = {
        "resident": Ledger.create(tmp_path / "resident", *resident(source), **made),
        "streamed": Ledger.create(tmp_path / "streamed", source, memory=least(source, how), device="cpu", **made),
    }
    before = digests(source)
    for name, ledger in ledgers.items():
        assert (ledger._working.runner.stream is None) == (name == "resident")
        ids = ledger.add(EDITS[:2])
        ledger.add(EDITS[2], tags=["later"])
        ledger.replace(type(END)(END.prompt, END.subject, "Berlin"))
        ledger.remove(ids[0])
        ledger.close().save(tmp_path / f"{name}.delta")
        ledger.to_lora(tmp_path / f"{name} adapter", at=1)
        ledger.write(source, tmp_path / f"{name} out", at=2)
        place = shutil.copytree(source, tmp_path / f"{name} place")
        ledger.write(place, in_place=True, tags=["later"])
        ledger.write(place, in_place=True)
        assert len(chains.verify(place)["chain"]) == 1
    assert ledgers["resident"].base.differences(ledgers["streamed"].base) == []
    assert digests(source) == before
    for what in ("{}/values", "{}.delta", "{} adapter", "{} out", "{} place"):
        one, two = (contents(tmp_path / what.format(name)) for name in ledgers)
        assert one == two
        assert one
    # Made either way, opened the other way.
    statistics = {"statistics": made["statistics"]}
    wanted = bytes_of(ledgers["resident"].close())
    assert bytes_of(streamed(tmp_path / "resident", source, how, **statistics).close()) == wanted
    assert bytes_of(Ledger.open(tmp_path / "streamed", *resident(source), **statistics).close()) == wanted


def contents(place):
    """Of every safetensors file its tensors and metadata, whose order is anyone's; not of a record, which has times."""
    found = {}
    for file in [place] if place.is_file() else place.rglob("*"):
        name = str(file.relative_to(place))
        if file.is_file() and file.name != "record.json":
            found[name] = file.read_bytes()
        if file.suffix in (".safetensors", ".delta"):
            with safe_open(file, "pt") as opened:
                tensors = {key: bits(opened.get_tensor(key)) for key in opened.keys()}  # noqa: SIM118
                found[name] = opened.metadata(), tensors
    return found


def test_what_is_in_memory_meanwhile_and_afterwards(source, tmp_path):
    """Of the layers, the weights that are edited and at most one block, the one in use."""
    gc.collect()
    threads = threading.active_count()
    made = USUAL | MADE["spread"]
    ledger = Ledger.create(tmp_path / "ledger", source, memory=least(source, "spread"), device="cpu", **made)
    for name, arguments in (("add", [EDITS]), ("close", []), ("to_lora", [tmp_path / "adapter"])):
        getattr(ledger, name)(*arguments)
        layers = ledger._working.runner.layers
        held = {
            (index, name)
            for index, layer in enumerate(layers)
            for name, p in layer.named_parameters()
            # Norms of 48 numbers stay as well.
            if not p.is_meta and p.untyped_storage().nbytes() > 512
        }
        edited = {(index, "mlp.down_proj.weight") for index in MADE["spread"]["layers"]}
        assert edited <= held
        assert len({index for index, _ in held - edited}) <= 1
    assert threading.active_count() > threads
    del ledger, layers
    gc.collect()
    assert threading.active_count() == threads


def test_what_the_ledger_wrote_is_taken_out_of_what_is_read(source, tmp_path):
    ledger = Ledger.create(
        tmp_path / "ledger", source, memory=least(source), device="cpu", **USUAL, **MADE["one layer"]
    )
    ledger.add(EDITS[:2])
    wanted, original = bytes_of(ledger.close()), digests(source)
    ledger.write(source, in_place=True)
    # What is open goes on with what it began with, and so does what is opened now.
    for opened in (ledger, streamed(ledger.folder, source, statistics="identity")):
        assert bytes_of(opened.close()) == wanted
    opened.remove(subject=EDITS[0].subject)
    opened.write(source, in_place=True)
    assert len(chains.verify(source)["chain"]) == 1
    with pytest.raises(CheckpointError, match=r"down_proj.weight in .* are not what was edited; give the checkpoint"):
        opened.write(source, tmp_path / "out", at=1)
    chains.revert(source)
    assert digests(source) == original


def test_it_is_not_put_into_a_model_that_is_not_there(source, tmp_path):
    ledger = Ledger.create(
        tmp_path / "ledger", source, memory=least(source), device="cpu", **USUAL, **MADE["one layer"]
    )
    ledger.add(EDITS[0])
    with pytest.raises(ArgumentError, match="model: the ledger's own is read from its checkpoint while it runs"):
        ledger.apply()
    model, _ = resident(source)
    delta, (name,) = ledger.apply(model), ledger.base.weights
    assert bits(model.get_parameter(name)) == bits(delta.edited(resident(source)[0])[name])


def test_the_guard_reads_the_contexts_through_the_same_layers(source, tmp_path, monkeypatch):
    """The same figures as in memory, and the same error, after which nothing was written and the base is as it was."""
    made = {**USUAL, **MADE["one layer"], "guard": "raise"}
    ledger = Ledger.create(tmp_path / "ledger", *resident(source), **made)
    ledger.add(EDITS)
    wanted = ledger.write(source, tmp_path / "whole")
    opened = streamed(ledger.folder, source, statistics="identity")
    before = bytes_of(opened.close())
    assert opened.write(source, tmp_path / "read").report["context_nll"] == wanted.report["context_nll"]
    assert wanted.report["context_nll"]["before"] > 0
    monkeypatch.setattr("rome_fast.closing.effect.DRIFT_LIMIT", -100.0)
    for target in ({"out": tmp_path / "out"}, {"in_place": True}):
        contents = digests(source)
        with pytest.raises(CollapseError, match="mean NLL of the contexts"):
            opened.write(source, **target)
        assert digests(source) == contents
    assert not (tmp_path / "out").exists()
    assert bytes_of(opened.close()) == before


def test_a_checkpoint_without_a_budget_is_loaded_as_a_whole(source, tmp_path):
    made = USUAL | MADE["one layer"]
    ledger = Ledger.create(tmp_path / "ledger", source, device="cpu", dtype="bfloat16", **made)
    assert (ledger.base.dtype, ledger._working.runner.stream) == ("bfloat16", None)
    assert ledger.base.model == str(source)
    ledger.add(EDITS[0])
    wanted = bytes_of(ledger.apply())
    # From a checkpoint in float32: in the dtype of the ledger, which under a budget it is not.
    assert bytes_of(Ledger.open(ledger.folder, source, statistics="identity", device="cpu").close()) == wanted
    with pytest.raises(ArgumentError, match="model: got it in float32, wanted bfloat16, in which this ledger was made"):
        streamed(ledger.folder, source)
    with pytest.raises(ArgumentError, match=r"dtype: got torch.bfloat16 with a budget of memory"):
        Ledger.create(tmp_path / "other", source, device="cpu", dtype="bfloat16", memory=least(source), **made)
    assert not (tmp_path / "other").exists()


def test_what_is_refused(source, tmp_path, toy_tokenizers):
    made = USUAL | MADE["one layer"]
    folder = Ledger.create(tmp_path / "ledger", *resident(source), **made).folder
    with pytest.raises(ArgumentError, match="memory: got a budget without a model"):
        Ledger.open(folder, memory="1GiB")
    for act, place in ((Ledger.open, folder), (Ledger.create, tmp_path / "new")):
        with pytest.raises(ArgumentError, match="memory: got a budget for a model that is in memory already"):
            act(place, *resident(source), memory="1GiB")
    with pytest.raises(ArgumentError, match="memory: got '8 apples'"):
        Ledger.open(folder, source, memory="8 apples")
    for seed, layers in ((1, 4), (0, 1)):
        other = toy_model("llama", seed=seed)
        other.config.num_hidden_layers, other.model.layers = layers, other.model.layers[:layers]
        place = save_toy(tmp_path / f"other {seed} {layers}", other, toy_tokenizers[False])
        with pytest.raises(ArgumentError, match=rf"model: got llama-{layers}x48x80-.*, wanted llama-4x48x80-"):
            Ledger.open(folder, place, memory=200_000, device="cpu")


def test_from_the_command_line(source, tmp_path, capsys):
    """Under a budget, and from where the base is now."""
    changes = {"settings": {"steps": SETTINGS.steps, "stop": "loss"}}
    ledger = Ledger.create(tmp_path / "ledger", *resident(source), **{**USUAL, **MADE["one layer"], **changes})
    ledger.add(EDITS[:2])
    wanted = bytes_of(ledger.close())
    (tmp_path / "contexts.json").write_text(json.dumps(CONTEXTS))
    lines = [json.dumps({"prompt": e.prompt, "subject": e.subject, "target_new": e.target}) for e in EDITS[:2]]
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))
    budget = ("--memory", least(source), "--device", "cpu")
    made = ("--identity", "--method", "c-rome", "--layer", LAYER, "--guard", "off", "--unconverged", "write")
    steps = ("--settings", f"steps={SETTINGS.steps}", "stop=loss", "--contexts", tmp_path / "contexts.json")
    folder, moved = tmp_path / "other", tmp_path / "moved"

    def run(*arguments):
        status = main(["ledger", *map(str, arguments)])
        captured = capsys.readouterr()
        return captured.out if status == 0 else captured.err

    assert "an empty ledger" in run("create", folder, source, *made, *steps, *budget)
    assert run("add", folder, "--edits", tmp_path / "edits.jsonl", *budget).endswith("2 edits\n")
    source.rename(moved)
    assert f"the base is no longer at {source}, where it was" in run("write", folder, "--out", tmp_path / "out")
    assert "moved exists already" in run("write", folder, "--out", moved)
    run("write", folder, "--delta", tmp_path / "delta", "--model", moved, *budget)
    assert bytes_of(Delta.load(tmp_path / "delta")) == wanted
    printed = run("write", folder, "--out", tmp_path / "out", "--model", moved, *budget, "--report", tmp_path / "page")
    assert "mean NLL of the contexts: " in printed
    page = read_run(tmp_path / "page")
    assert page.conditions["unasked"] == "read in parts"
    assert all(0 < record.probability_after < 1 for record in page.records)
    assert "memory: got '8 apples'" in run("write", folder, "--in-place", "--model", moved, "--memory", "8 apples")
