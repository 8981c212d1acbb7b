"""Near keys among edits, against cosines worked out by hand and in float64."""

import pytest
import torch

from helpers import END, MIDDLE, START, edited, rounding
from rome_fast import Edit
from rome_fast.closing import neighbours
from rome_fast.closing.neighbours import tell_nearest
from rome_fast.records import Record
from toys import D_FF, toy_model


def record(number):
    figures = dict.fromkeys(("loss", "denominator", "numerator_norm", "update_norm", "weight_norm", "missed"), 0.0)
    usual = {"method": "dual", "layer": 1, "steps": 1, "drafted": 0, "converged": True, **figures}
    return Record("{} is", f"Subject {number}", "Rome", **usual, needs_prefix=False, collapsed=False)


def test_the_nearest_key_by_hand():
    """(1, 0), (0, 2) and (3, 4): the third has cosines 3/5 and 4/5 with the others, which have 0 with each other."""
    records = [record(i) for i in range(3)]
    tell_nearest(records, [torch.tensor(key) for key in ([1.0, 0.0], [0.0, 2.0], [3.0, 4.0])])
    assert [r.nearest for r in records] == [2, 2, 1]
    # Two products and their sum, two norms and two quotients in float32.
    assert [r.nearest_cosine for r in records] == pytest.approx([0.6, 0.8, 0.8], rel=rounding(torch.float32, 8))


@pytest.mark.parametrize("at_once", [1, 3, 1024])
def test_many_keys_are_compared_in_parts(at_once, monkeypatch):
    monkeypatch.setattr(neighbours, "_AT_ONCE", at_once)
    keys = torch.randn(8, 16, dtype=torch.float64)
    records = [record(i) for i in range(8)]
    tell_nearest(records, list(keys.float()))
    cosines = torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=2)
    cosines.fill_diagonal_(-1)
    assert [r.nearest for r in records] == cosines.argmax(1).tolist()
    # Of two unit vectors: the error of a sum of sixteen products, in which no term is above 1.
    allowed = rounding(torch.float32, 3 * 16)
    assert [r.nearest_cosine for r in records] == pytest.approx(cosines.amax(1).tolist(), abs=allowed)


@pytest.mark.filterwarnings("ignore:.*met in part")
@pytest.mark.parametrize("schedule", ["joint", "sequential"])
def test_an_edit_names_the_one_of_the_same_subject(schedule, toy_tokenizers):
    """Those of one subject behind the same words have one key: their cosine is 1 to rounding, the others' is not."""
    same = Edit(END.prompt + " by", END.subject, "Paris")
    result = edited(toy_model("llama"), toy_tokenizers[True], [END, START, same, MIDDLE], schedule=schedule)
    records = result.records
    assert [records[0].nearest, records[2].nearest] == [2, 0]
    if schedule == "joint":
        assert records[0].nearest_cosine == pytest.approx(1, rel=rounding(torch.float32, 3 * D_FF))
    assert records[1].nearest_cosine < 0.99
    assert result.report()["edits"][0]["nearest"] == 2


def test_an_edit_alone_has_none(toy_tokenizers):
    (alone,) = edited(toy_model("llama"), toy_tokenizers[True], START).records
    assert (alone.nearest, alone.nearest_cosine) == (None, None)
