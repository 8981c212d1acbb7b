"""Times in turns, and tables that are complete after every row."""

import csv

import pytest
import torch

import measure

CPU = torch.device("cpu")


def test_times_are_taken_in_turns_and_sorted():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.side_by_side(runs, CPU, budget=0.0, least=3)
    assert "".join(order) == "ab" + "ab" * 3
    assert {t.runs for t in times.values()} == {3}
    spread = measure.Times.of([0.005, 0.001, 0.002, 0.003, 0.004, 0.006])
    assert (spread.median, spread.low, spread.high) == (3.5, 2.0, 5.0)


def test_outside_a_repository_the_commit_is_told_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("COMMIT", "0123abc")
    assert measure.commit() != "0123abc"
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    assert measure.commit() == "0123abc"
    monkeypatch.delenv("COMMIT")
    assert measure.commit() == ""


def test_a_table_is_complete_after_every_row_and_replaces_an_older_one(tmp_path):
    file = tmp_path / "folder" / "table.csv"
    for attempt in (1, 2):
        table = measure.Table(file, {"device": "cpu"})
        assert file.exists() == (attempt == 2)
        for number in (1, 2):
            table.add({"attempt": attempt, "ms": number / 3})
            with file.open(newline="") as lines:
                rows = list(csv.DictReader(lines))
            assert [row["ms"] for row in rows] == ["0.33333", "0.66667"][:number]
            assert {(row["attempt"], row["device"]) for row in rows} == {(str(attempt), "cpu")}
    assert measure.read_rows(file) == rows
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        table.add({"other": 1})
