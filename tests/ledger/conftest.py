"""A ledger by its name, and one whose values are found."""

import shutil

import pytest
import torch

from ledgers import MADE, OTHERS, SEVERAL, USUAL
from rome_fast import Ledger
from rome_fast.search.search import Search
from toys import toy_model


@pytest.fixture
def tokenizer(toy_tokenizers):
    return toy_tokenizers[False]


@pytest.fixture
def model():
    return toy_model("llama", dtype=torch.float64)


@pytest.fixture
def make(tmp_path, model, tokenizer):
    """A function that makes a ledger by its name."""

    def made(name, how="one layer", model=model, **changes):
        return Ledger.create(tmp_path / name, model, tokenizer, **{**USUAL, **MADE[how], **changes})

    return made


@pytest.fixture(scope="session")
def found(tmp_path_factory, toy_tokenizers):
    """The folder of a ledger that has found the values of SEVERAL, each alone, and of OTHERS, which are in it now."""
    folder = tmp_path_factory.mktemp("found") / "pool"
    made = {**USUAL, **MADE["one layer"]}
    ledger = Ledger.create(folder, toy_model("llama", dtype=torch.float64), toy_tokenizers[False], **made)
    for edit in SEVERAL:
        ledger.add(edit)
    ledger.replace(OTHERS)
    return folder


@pytest.fixture
def pool(found, tmp_path, model, tokenizer, no_search):
    """A copy of that one, whose values may be searched no more."""
    no_search()
    return Ledger.open(shutil.copytree(found, tmp_path / "pool"), model, tokenizer, statistics="identity")


@pytest.fixture
def no_search(monkeypatch):
    """A function from whose call on no value may be searched."""

    def refuse(self, group):
        raise AssertionError(f"{len(group)} values are searched again")

    return lambda: monkeypatch.setattr(Search, "find", refuse)
