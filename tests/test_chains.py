"""Edits of edited checkpoints: recorded one after another, checked, and undone last to first or all at once."""

import json
import shutil
import signal

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import END, LAYER, MIDDLE, START
from on_disk import digests, forks, killed_at_line, lines_executed
from rome_fast.errors import ArgumentError, CheckpointError
from rome_fast.updates import chains
from test_checkpoints import contents, edit_checkpoint, edit_in_place, save
from toys import LAYERS

NAME = "model.layers.{}.mlp.down_proj.weight"
OLD = ("rome_fast.json", "rome_fast_delta.safetensors", "rome_fast_originals.safetensors")
FILES = ("record.json", "delta.safetensors", "originals.safetensors")


@pytest.fixture
def source(tmp_path, toy_tokenizers):
    return save(tmp_path / "source", "llama", toy_tokenizers[True], shards=True)


@pytest.fixture
def chain(tmp_path, source):
    """Three edits, the first two at one layer, and the bytes of the checkpoint before each of them and at the end."""
    edit_checkpoint(source, tmp_path / "one", END)
    edit_checkpoint(tmp_path / "one", tmp_path / "two", MIDDLE, memory=250_000)
    shutil.copytree(tmp_path / "two", tmp_path / "out")
    edit_in_place(tmp_path / "out", START, layer=2)
    return tmp_path / "out", [contents(tmp_path / name) for name in ("source", "one", "two", "out")]


def test_three_edits_and_three_reverts(chain):
    out, states = chain
    report = chains.verify(out)
    assert report["edited"] == [NAME.format(LAYER), NAME.format(2)]
    assert [(e["place"], e["edited"]) for e in report["chain"]] == [
        ("rome_fast/0001", [NAME.format(LAYER)]),
        ("rome_fast/0002", [NAME.format(LAYER)]),
        ("rome_fast/0003", [NAME.format(2)]),
    ]
    assert [r["edits"][0]["subject"] for r in chains.records(out)] == ["Paris", "Istanbul", "Chicago"]
    originals = [load_file(out / f"rome_fast/{n:04}/originals.safetensors") for n in (1, 2)]
    one = chains.records(out)[0]["sha256"][NAME.format(LAYER)]
    for held, which in zip(originals, ("original", "edited"), strict=True):
        assert chains.tensor_sha256(held[NAME.format(LAYER)]) == one[which]
    for state, layer in zip(reversed(states[:-1]), (2, LAYER, LAYER), strict=True):
        assert chains.revert(out) == [NAME.format(layer)]
        assert contents(out) == state
        chains.verify(out)
    with pytest.raises(CheckpointError, match="it was not edited by rome_fast"):
        chains.revert(out)


def test_all_in_one(chain):
    out, states = chain
    assert chains.revert(out, all=True) == [NAME.format(LAYER), NAME.format(2)]
    assert contents(out) == states[0]
    assert not (out / "rome_fast").exists()


@forks
@pytest.mark.parametrize("all", [False, True])
def test_kill_9_at_any_moment_of_a_revert(all, chain, tmp_path):
    out, states = chain
    new = states[0 if all else 2]
    kept = shutil.copytree(out, tmp_path / "kept")

    def revert():
        chains.revert(out, all=all)

    lines, found = lines_executed(revert), {"old": 0, "new": 0}
    assert contents(out) == new
    # More of them towards the end, where files are moved and removed.
    for line in [*range(1, lines, max(1, lines // 5)), *range(lines - 90, lines, 18)]:
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        assert killed_at_line(revert, line) in (0, -signal.SIGKILL)
        chains.verify(out)
        now = {name: content for name, content in contents(out).items() if not name.startswith(".")}
        assert now in (states[3], new)
        found["new" if now == new else "old"] += 1
    assert min(found.values()) > 0


def test_a_revert_cut_short_needs_no_second_one(chain, monkeypatch):
    """The next command completes it; where that is another revert, it does not undo one edit more."""
    out, states = chain
    with monkeypatch.context() as patch:
        patch.setattr("rome_fast.weights.checkpoint._complete", lambda _: None)
        chains.revert(out)
    assert chains.revert(out) == []
    assert contents(out) == states[2]
    edit_in_place(out, START, layer=2)
    with monkeypatch.context() as patch:
        patch.setattr("rome_fast.weights.checkpoint._complete", lambda _: None)
        edit_in_place(out, START, layer=3)
    # What was cut short was no revert.
    assert chains.revert(out) == [NAME.format(3)]
    assert len(chains.edits_of(out)) == 3


def test_a_chain_with_a_link_missing(chain):
    out, _ = chain
    shutil.rmtree(out / "rome_fast/0002")
    message = "rome_fast/0002: the record of an edit is missing"
    with pytest.raises(CheckpointError, match=message):
        chains.verify(out)
    before = contents(out)
    with pytest.raises(CheckpointError, match=f"{message}; .*; nothing was changed"):
        chains.revert(out, all=True)
    assert contents(out) == before
    assert chains.revert(out) == [NAME.format(2)]


@pytest.mark.parametrize(
    ("number", "name", "message"),
    [
        (1, "record.json", r"0001/record\.json: it cannot be read"),
        (1, "originals.safetensors", r"0001/originals\.safetensors"),
        (2, "delta.safetensors", r"0002/delta\.safetensors"),
        (3, "originals.safetensors", r"0003/originals\.safetensors"),
    ],
)
def test_verify_reads_every_file_of_every_link(number, name, message, chain):
    out, _ = chain
    path = out / f"rome_fast/{number:04}" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=message):
        chains.verify(out)


def test_originals_of_a_link_that_are_not_what_the_one_before_left(chain):
    """With a hash of their own that fits them."""
    out, _ = chain
    folder = out / "rome_fast/0002"
    originals = load_file(folder / "originals.safetensors")
    originals[NAME.format(LAYER)][0, 0] += 1
    save_file(originals, folder / "originals.safetensors")
    record = json.loads((folder / "record.json").read_text())
    record["sha256"][NAME.format(LAYER)]["original"] = chains.tensor_sha256(originals[NAME.format(LAYER)])
    (folder / "record.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"0002/originals.safetensors: .* is not what the edit before left"):
        chains.verify(out)


def test_weights_that_changed_since_take_no_further_edit(chain):
    """Trained and saved over it, for one: no link could be undone. It is found before any work is done."""
    out, _ = chain
    (shard,) = [path for path in out.glob("model*.safetensors") if NAME.format(2) in load_file(path)]
    tensors = load_file(shard)
    tensors[NAME.format(2)][0, 0] += 1
    save_file(tensors, shard, {"format": "pt"})
    for where in ({"out": out.parent / "more"}, {"out": None, "in_place": True}):
        with pytest.raises(CheckpointError, match=r"layers.2.* changed after the edits recorded in it, .*remove"):
            edit_checkpoint(out, edits=END, statistics="not looked at", **where)
    shutil.rmtree(out / "rome_fast")
    edit_in_place(out, END)
    assert len(chains.edits_of(out)) == 1


def test_what_others_do_with_a_folder_of_ours(chain, tmp_path):
    """It is loaded, saved over with the same weights, and copied; a name that is no number is not ours to judge."""
    out, _ = chain
    model = AutoModelForCausalLM.from_pretrained(out)
    edited = chains.records(out)[2]["sha256"][NAME.format(2)]["edited"]
    assert chains.tensor_sha256(model.get_parameter(NAME.format(2)).detach()) == edited
    model.save_pretrained(out, max_shard_size="100KB")
    (out / "rome_fast" / "notes").mkdir()
    (out / "rome_fast" / "notes" / "mine.txt").write_text("mine")
    assert len(chains.verify(out)["chain"]) == 3
    edit_checkpoint(out, tmp_path / "four", END)
    assert (tmp_path / "four/rome_fast/notes/mine.txt").read_text() == "mine"
    chains.revert(tmp_path / "four", all=True)
    (left,) = (path for path in (tmp_path / "four/rome_fast").rglob("*") if path.is_file())
    assert left.name == "mine.txt"


# Beside the weights, as before there were chains


def lay_beside(directory):
    for old, new in zip(OLD, FILES, strict=True):
        (directory / "rome_fast/0001" / new).rename(directory / old)
    shutil.rmtree(directory / "rome_fast")


@pytest.fixture
def old(tmp_path, source):
    edit_checkpoint(source, tmp_path / "old", END)
    lay_beside(tmp_path / "old")
    return tmp_path / "old"


def test_an_edit_that_lies_beside_the_weights(old, source):
    (link,) = chains.verify(old)["chain"]
    assert (link["place"], link["edited"]) == ("rome_fast.json", [NAME.format(LAYER)])
    assert chains.revert(old) == [NAME.format(LAYER)]
    assert contents(old) == contents(source)


@pytest.mark.parametrize("where", ["copy", "in place"])
def test_it_moves_to_the_folder_when_another_edit_is_added(where, old, source, tmp_path):
    out = old if where == "in place" else tmp_path / "out"
    edit_checkpoint(old, None if where == "in place" else out, MIDDLE, in_place=where == "in place")
    assert not any((out / name).exists() for name in OLD)
    assert [link["place"] for link in chains.verify(out)["chain"]] == ["rome_fast/0001", "rome_fast/0002"]
    assert [r["edits"][0]["subject"] for r in chains.records(out)] == ["Paris", "Istanbul"]
    assert digests(out / "rome_fast/0001").keys() == set(FILES)
    chains.revert(out, all=True)
    assert contents(out) == contents(source)


def test_a_revert_of_an_old_edit_that_was_cut_short(old, source, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("rome_fast.weights.checkpoint._complete", lambda _: None)
        chains.revert(old)
    assert chains.revert(old) == []
    assert contents(old) == contents(source)


def test_in_place_of_what_is_no_directory(tmp_path):
    with pytest.raises(ArgumentError, match=r"in_place: got .*nowhere, wanted the directory of a checkpoint"):
        edit_in_place(tmp_path / "nowhere", layer=LAYERS)


def test_other_weights_in_a_folder_edited_in_place_are_named(source, tmp_path):
    """A copy leaves them behind; in place they stay, unedited."""
    shutil.copy(next(source.glob("model-*")), source / "consolidated.safetensors")
    edit_checkpoint(source, tmp_path / "out", END)
    assert not (tmp_path / "out/consolidated.safetensors").exists()
    with pytest.warns(UserWarning, match=r"source: consolidated\.safetensors will not be edited; .*remove it unless"):
        edit_in_place(source, END)
