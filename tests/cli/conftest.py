"""Folders to work in."""

import json

import pytest

from commands import EDIT
from helpers import CONTEXTS
from toys import SENTENCES, save_toy, toy_model


@pytest.fixture
def toy(tmp_path, toy_tokenizers, monkeypatch, empty_cache):
    """A folder to work in, with a model, a corpus and an edits file."""
    monkeypatch.chdir(tmp_path)
    save_toy("model", toy_model("gpt2"), toy_tokenizers[False])
    (tmp_path / "corpus.txt").write_text("\n\n".join(SENTENCES))
    (tmp_path / "edits.jsonl").write_text(json.dumps(EDIT) + "\n")
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES[:3]) + "\n")
    return tmp_path


@pytest.fixture
def contexts(toy):
    (toy / "contexts.txt").write_text("".join(f"{context}\n" for context in CONTEXTS))
    return toy
