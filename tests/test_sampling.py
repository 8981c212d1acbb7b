"""Stratified samples against counting, and figures by age against the groups one by one."""

from dataclasses import replace

import pytest

from rome_fast import Edit
from rome_fast.errors import ArgumentError
from rome_fast.evaluation import by_age, intervals, stratified_sample
from rome_fast.evaluation.metrics import EditMetrics

KINDS = (("P1", 7), ("P2", 2), (None, 4), ("P3", 1))


def of_kinds(*counts):
    return [
        Edit(f"{{}} of {relation} is", f"s{i}", "Rome", relation=relation) for relation, n in counts for i in range(n)
    ]


def sizes(edits):
    return [sum(edit.relation == relation for edit in edits) for relation, _ in KINDS]


@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        # Of 14: 7/14, 2/14, 4/14, 1/14 of the count, the rest by the largest remainder.
        (14, [7, 2, 4, 1]),
        (7, [4, 1, 2, 0]),  # 3.5, 1, 2, 0.5: of equal remainders the first
        (5, [3, 1, 1, 0]),  # 2.5, 0.71, 1.43, 0.36: one left to 0.71, one to 0.5
        (10, [5, 1, 3, 1]),  # 5, 1.43, 2.86, 0.71
        (1, [1, 0, 0, 0]),
    ],
)
def test_every_relation_has_its_share(count, wanted):
    edits = of_kinds(*KINDS)
    got = stratified_sample(edits, count)
    assert sizes(got) == wanted
    assert [edits.index(edit) for edit in got] == sorted({edits.index(edit) for edit in got})
    # The order of the file has a part in which of equal remainders is first, and in nothing else.
    assert got == stratified_sample(edits, count, seed=0)


def test_other_seeds_draw_others():
    edits = of_kinds(("P1", 40), ("P2", 40))
    drawn = [stratified_sample(edits, 8, seed) for seed in range(4)]
    assert all(len(set(own)) == 8 and [e.relation for e in own] == ["P1"] * 4 + ["P2"] * 4 for own in drawn)
    assert len({tuple(own) for own in drawn}) == 4


def test_without_a_relation_the_template_is_the_stratum():
    edits = [Edit(f"{{}} {verb}", f"s{i}", "Rome") for verb in ("is", "has") for i in range(6)]
    got = stratified_sample(edits, 4)
    assert [edit.prompt for edit in got] == ["{} is"] * 2 + ["{} has"] * 2
    # A relation that is called as a template is another stratum.
    named = [*edits[:6], *(replace(edit, relation="{} is") for edit in edits[:6])]
    assert [edit.relation for edit in stratified_sample(named, 2)] == [None, "{} is"]


@pytest.mark.parametrize("count", [0, -1, 15, 2.0, True, "3", None])
def test_counts_that_cannot_be(count):
    with pytest.raises(ArgumentError, match=f"sample: got {count!r} of 14 requests, wanted a whole number from 1"):
        stratified_sample(of_kinds(*KINDS), count)
    with pytest.raises(ArgumentError, match="sample: got 1 of 0 requests"):
        stratified_sample([], 1)


def metrics_of(values):
    nothing = dict.fromkeys(("efficacy", "paraphrase", "neighborhood", "answer", "answer_right"))
    return [EditMetrics("s", "t", value, value > 0.5, "x", False, **nothing) for value in values]


def test_ages_are_fifths_in_order():
    metrics = metrics_of([i / 13 for i in range(13)])
    groups = by_age(metrics)
    assert [(group.first, group.last) for group in groups] == [(1, 2), (3, 5), (6, 7), (8, 10), (11, 13)]
    for group in groups:
        own = metrics[group.first - 1 : group.last]
        assert group.figures == intervals(own)
        assert group.figures["probability"].mean == pytest.approx(sum(m.probability for m in own) / len(own))
    assert groups[0].to_json()["figures"]["probability"]["low"] == groups[0].figures["probability"].low
    assert [(g.first, g.last) for g in by_age(metrics_of([0.1, 0.2]))] == [(1, 1), (2, 2)]
    assert by_age([]) == []
    with pytest.raises(ArgumentError, match="groups: got 0"):
        by_age(metrics, 0)
