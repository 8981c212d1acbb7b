"""Values that are found on the model with all that is in the ledger in it."""

import json
from dataclasses import replace

import pytest
import torch

from helpers import CONTEXTS, END, MIDDLE, SETTINGS, START, all_bits, changed
from ledgers import MADE, OTHERS, USUAL, bytes_of, copy_of_base
from rome_fast import Edit, Ledger
from rome_fast.cli import main
from rome_fast.closing.rebasing import rebased
from rome_fast.errors import ArgumentError
from rome_fast.methods import method_named
from rome_fast.models.runner import Runner
from rome_fast.search.requests import tokenise
from rome_fast.search.search import Clock, Search
from toys import save_toy, toy_model

# The subject of START is a first token, with a value of its own in `dual`.
LATER = (START, Edit("{} is a company that makes", "Apple", "telephones, tablets and computers"))

pytestmark = [
    pytest.mark.usefixtures("empty_cache"),
    # Few edits of a toy are met but in part.
    pytest.mark.filterwarnings("ignore::rome_fast.closing.judging.SharedKeyWarning"),
]


def value_of(ledger, id):
    return ledger._store.values(ledger.log(), [id])[id]


@pytest.mark.parametrize("how", ["one layer", "spread"])
def test_it_is_that_of_a_search_with_the_update_in_the_model(how, make, tokenizer):
    ledger, plain = make("edited", how), make("base", how, model=copy_of_base())
    for each in (ledger, plain):
        each.add([MIDDLE, END])
    update = ledger.close()
    assert bytes_of(update) == bytes_of(plain.close())
    ids = ledger.add(LATER, on="edited")
    plain.add(LATER)
    assert [ledger.entry(id).found_on for id in ids] == ["edited", "edited"]
    assert {entry.found_on for entry in plain.entries()} == {"base"}

    model, method = copy_of_base(), method_named(MADE[how]["method"])
    runner, layers = Runner(model), ledger.base.layers
    search = Search(runner, tokenizer, layers, method, CONTEXTS, SETTINGS, Clock())
    update.apply(model)
    solved = search.find([tokenise(runner, tokenizer, edit, CONTEXTS, method) for edit in LATER], merge=False)
    update.revert(model)
    for id, wanted in zip(ids, rebased(runner, search, solved, update), strict=True):
        found, without = value_of(ledger, id), value_of(plain, id)
        assert torch.equal(found.value.delta, wanted.value.delta)
        assert not torch.equal(found.value.delta, without.value.delta)
        assert (found.bare is None) == (wanted.bare is None)
        if found.bare is not None:
            assert torch.equal(found.bare.value.delta, wanted.bare.value.delta)
    assert bytes_of(ledger.close()) != bytes_of(plain.close())


def test_the_model_is_as_it_was(make, model, tokenizer):
    ledger = make("edited", "spread")
    ledger.add([MIDDLE, END])
    base = all_bits(model)
    ledger.apply()
    assert changed(model, base)
    before = all_bits(model)
    ledger.add(LATER, on="edited")
    assert not changed(model, before)
    ledger.apply()
    assert changed(model, before)
    opened = Ledger.open(ledger.folder, copy_of_base(), tokenizer, statistics="identity")
    assert bytes_of(opened.close()) == bytes_of(ledger.close())


def test_with_nothing_in_it_they_are_the_bases(make):
    ledger, plain = make("edited", "spread"), make("base", "spread", model=copy_of_base())
    (id,) = ledger.add(END, on="edited")
    plain.add(END)
    assert ledger.entry(id).found_on == "base"
    # What is replaced is no part of the update.
    (id,) = ledger.replace(OTHERS[2], on="edited")
    plain.replace(OTHERS[2])
    assert ledger.entry(id).found_on == "base"
    assert bytes_of(ledger.close()) == bytes_of(plain.close())


def test_a_value_stays_when_what_it_was_found_with_goes(make, no_search):
    ledger = make("edited", "spread")
    gone = ledger.add(MIDDLE)
    (id,) = ledger.add(END, on="edited")
    delta = value_of(ledger, id).value.delta
    ledger.remove(gone)
    no_search()
    ledger.remove(id)
    ledger.add(END)
    assert ledger.entry(id).found_on == "edited"
    assert torch.equal(value_of(ledger, id).value.delta, delta)


def test_facts_that_were_never_made_together_before_are_found_on_the_way(make):
    """What is left of three facts of one subject has a value of its own, which the update to find others on needs."""
    ledger = make("edited", "spread")
    ids = ledger.add([replace(END, prompt=f"{word} {END.prompt}") for word in ("Often", "Today", "Then")])
    ledger.remove(ids[0])
    (id,) = ledger.add(MIDDLE, on="edited")
    assert ledger.entry(id).found_on == "edited"
    before = bytes_of(ledger.close())
    assert [event.number for event in ledger.log()] == list(range(1, len(ledger.log()) + 1))
    again = Ledger.open(ledger.folder, copy_of_base(), ledger._model.tokenizer, statistics="identity")
    assert bytes_of(again.close()) == before


def test_what_is_refused(make, no_search, tmp_path, toy_tokenizers, monkeypatch):
    ledger = make("edited", "spread")
    no_search()
    for put in (ledger.add, ledger.replace):
        with pytest.raises(ArgumentError, match="on: got 'model', wanted one of 'base', 'edited'"):
            put(END, on="model")
    assert not ledger.log()
    source = save_toy(tmp_path / "model", toy_model("llama"), toy_tokenizers[False], max_shard_size="100KB")
    monkeypatch.setattr("rome_fast.weights.stream.anonymous_bytes", lambda: 0)
    streamed = Ledger.create(tmp_path / "streamed", source, memory="100MB", **USUAL, **MADE["spread"] | {"layer": None})
    with pytest.raises(ArgumentError, match="open the ledger without memory"):
        streamed.add(END, on="edited")


def test_on_the_command_line(tmp_path, toy_tokenizers, capsys):
    source, ledger = save_toy(tmp_path / "model", toy_model("llama"), toy_tokenizers[False]), str(tmp_path / "facts")
    made = ["--identity", "--layers", "0", "1", "--settings", "steps=2", "--unconverged", "write", "--guard", "off"]
    assert main(["ledger", "create", ledger, str(source), *made]) == 0
    for number, (edit, on) in enumerate(((END, "base"), (MIDDLE, "edited"))):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps({"prompt": edit.prompt, "subject": edit.subject, "target_new": edit.target}))
        assert main(["ledger", "add", ledger, "--edits", str(file), "--on", on]) == 0
    assert [entry.found_on for entry in sorted(Ledger.open(ledger).entries(), key=lambda e: e.event)] == [
        "base",
        "edited",
    ]
    capsys.readouterr()
    assert main(["ledger", "show", ledger, Ledger.open(ledger).entries(subject=MIDDLE.subject)[0].id]) == 0
    assert "edited" in capsys.readouterr().out
