"""What a ledger is bound to: its model, tokenizer and statistics, and how it is made."""

import json
import shutil

import pytest
import torch

from helpers import (
    CONTEXTS,
    LAYER,
)
from ledgers import MADE, SEVERAL, USUAL, bytes_of, of_pool, values_of
from rome_fast import Edit, Ledger, Statistics
from rome_fast.errors import ArgumentError, CheckpointError, StatisticsError
from toys import toy_model

pytestmark = pytest.mark.usefixtures("empty_cache")


def test_ledgers_of_another_base_or_made_otherwise_are_refused(make, pool, tmp_path, tokenizer):
    other = make("other", model=toy_model("llama", dtype=torch.float64, seed=1))
    for refused in (lambda: pool.merge(other), lambda: pool.diff(other)):
        with pytest.raises(ArgumentError, match=r"wanted a ledger of llama-4x48x80-[0-9a-f]{12}"):
            refused()
    with pytest.raises(ArgumentError, match="made alike: method differ"):
        pool.merge(make("rome", method="rome"))
    with pytest.raises(ArgumentError, match="made alike: contexts differ"):
        pool.merge(make("contexts", contexts=CONTEXTS[:1]))
    with pytest.raises(ArgumentError, match="the ledger itself"):
        pool.merge(pool.folder)
    with pytest.raises(CheckpointError, match=r"it is no ledger, as it has no ledger.json"):
        pool.merge(tmp_path)
    with pytest.raises(ArgumentError, match="prefer: got 'ours'"):
        pool.merge(other, prefer="ours")
    same = Ledger.open(pool.folder)
    with pytest.raises(ArgumentError, match=r"wanted llama-4x48x80-.*another model, or was edited or trained since"):
        Ledger.open(pool.folder, toy_model("llama", dtype=torch.float64, seed=1), tokenizer)
    with pytest.raises(ArgumentError, match="got it in float32, wanted float64"):
        Ledger.open(pool.folder, toy_model("llama"), tokenizer)
    with pytest.raises(ArgumentError, match="model: got None, wanted the base model"):
        same.close()


def test_an_edited_model_is_no_base(pool, tokenizer):
    model = toy_model("llama", dtype=torch.float64)
    ledger = Ledger.open(pool.folder, model, tokenizer, statistics="identity")
    with torch.no_grad():
        model.get_parameter(f"model.layers.{LAYER}.mlp.down_proj.weight")[3, 5] += 1e-9
    for act in (ledger.close, ledger.apply, lambda: Ledger.open(pool.folder, model, tokenizer)):
        with pytest.raises(ArgumentError, match=r"layers.1.mlp.down_proj.weight differ from those of the base"):
            act()


def test_layers_that_values_depend_on_are_those_of_the_base(pool, tokenizer):
    """One above those that are edited, as where somebody else has edited it."""
    model = toy_model("llama", dtype=torch.float64)
    ledger = Ledger.open(pool.folder, model, tokenizer, statistics="identity")
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.down_proj.weight").add_(1e-6)
    for act in (
        ledger.close,
        lambda: ledger.add(Edit("{} is", "Rome", "Paris")),
        lambda: Ledger.open(pool.folder, model, tokenizer),
    ):
        with pytest.raises(ArgumentError, match="model: layers above layer 1 differ from those of the base"):
            act()
    other = Ledger.create(pool.folder.parent / "other", model, tokenizer, **{**USUAL, **MADE["one layer"]})
    with pytest.raises(ArgumentError, match="made alike: whole differ"):
        pool.merge(other)


def test_another_tokenizer_is_refused(make, pool, model, toy_tokenizers):
    """Rows that were kept stand behind the contexts' tokens of that time."""
    with pytest.raises(ArgumentError, match="tokenizer: got one that cuts the contexts of this ledger into other tok"):
        Ledger.open(pool.folder, model, toy_tokenizers[True])
    other = Ledger.create(pool.folder.parent / "bos", model, toy_tokenizers[True], **{**USUAL, **MADE["one layer"]})
    with pytest.raises(ArgumentError, match="made alike: tokens differ"):
        pool.merge(other)
    # Ledgers from before there was one say nothing of it.
    file = pool.folder / "ledger.json"
    document = json.loads(file.read_text())
    del document["tokens"]
    file.write_text(json.dumps(document))
    assert Ledger.open(pool.folder, model, toy_tokenizers[True]).merge(other) == []


@pytest.mark.usefixtures("empty_cache")
def test_statistics_are_looked_for_where_they_were(make, model, tokenizer, toy_statistics, pool, tmp_path):
    toy_statistics(model, False).save(tmp_path / "statistics")
    ledger = make("with a folder", statistics=Statistics.load(tmp_path / "statistics"))
    ids = sorted(of_pool(pool, SEVERAL[:2]), key=lambda entry: entry.id)
    ledger._store.append("add", [], None, None, added=ids, values=values_of(pool, SEVERAL[:2]))
    assert bytes_of(Ledger.open(ledger.folder, model, tokenizer).close()) == bytes_of(ledger.close())
    # Others that lie there now are not taken for them.
    toy_statistics(model, False).with_ridge(1e-3).save(tmp_path / "statistics")
    with pytest.raises(StatisticsError, match="make them"):
        Ledger.open(ledger.folder, model, tokenizer).close()
    shutil.rmtree(tmp_path / "statistics")
    with pytest.raises(StatisticsError, match="make them"):
        Ledger.open(ledger.folder, model, tokenizer).close()
