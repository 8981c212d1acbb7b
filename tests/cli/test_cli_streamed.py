"""What is said of weights that are read while they run: how many, how fast, and how fast they could be."""

import pytest

from commands import FEW, QUICK, read, run
from rome_fast.opening import checkpoints
from rome_fast.weights import explain_rates

LINE = " GB read, ahead of the layers at "


@pytest.fixture
def little(contexts, monkeypatch):
    """A folder to work in, in a process that itself takes nothing: budgets of toys are smaller than it."""
    monkeypatch.setattr(checkpoints, "anonymous_bytes", lambda: 0)
    return contexts


def test_every_verb_that_streams_says_its_rates(little, capsys):
    usual = ("--memory", "400kB", "--layers", 0, 1)
    edited = ("--edits", "edits.jsonl", *QUICK, *FEW, "--out", "edited", *usual)
    for verb in (
        ("edit", "model", *edited, "--json", "said.json"),
        ("statistics", "model", "--corpus", "corpus.txt", "--out", "statistics", *usual, "--json", "said.json"),
        ("evaluate", "model", "--edits", "edits.jsonl", "--memory", "400kB", "--json", "said.json"),
    ):
        run(*verb)
        rates = read(little / "said.json")["streaming"]
        assert LINE in capsys.readouterr().out, verb[0]
        assert rates["bytes_read"] > 400_000
        assert 0 < rates["share"] == pytest.approx(rates["achieved"] / rates["source"])
        assert rates["copies"] is None  # on a CPU nothing is copied
    run("evaluate", "model", "--edits", "edits.jsonl")
    assert LINE not in capsys.readouterr().out


def test_a_line_for_people():
    rates = {
        "bytes_read": 26e9,
        "seconds_waited": 3.04,
        "achieved": 9e9,
        "source": 12e9,
        "copies": 50e9,
        "share": 0.75,
    }
    assert explain_rates(rates) == (
        "weights: 26.00 GB read, ahead of the layers at 9.00 GB/s, 75% of what there is (the files give 12.00 GB/s, "
        "copies 50.00 GB/s); 3.0 s of waiting for them"
    )
    few = rates | {"bytes_read": 1e7, "achieved": None, "source": None, "copies": None, "share": None}
    assert explain_rates(few) == "weights: 0.01 GB read; 3.0 s of waiting for them"
