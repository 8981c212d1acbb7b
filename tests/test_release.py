"""A model, and with it the memory of a GPU, is free as soon as nobody has it: nothing of ours holds it in a cycle."""

import gc
import weakref

import pytest

from helpers import CONTEXTS, END, MIDDLE, START, edited
from rome_fast import collect_statistics
from rome_fast.evaluation import evaluate
from toys import SENTENCES, toy_model

USES = {
    "edit": lambda model, tokenizer: edited(model, tokenizer, [START, MIDDLE, END], measure=True),
    "edit of several layers": lambda model, tokenizer: edited(
        model, tokenizer, [START, END], method="dual", layer=None, layers=(0, 1, 2)
    ),
    "statistics": lambda model, tokenizer: collect_statistics(model, tokenizer, SENTENCES[:4], [1], tokens=60),
    "evaluation": lambda model, tokenizer: evaluate(model, tokenizer, [START, END], CONTEXTS),
}


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("use", USES)
def test_a_model_is_free_with_its_last_user(use, toy_tokenizers):
    gc.collect()
    gc.disable()
    try:
        model = toy_model("llama")
        alive = weakref.ref(model)
        USES[use](model, toy_tokenizers[False])
        del model
        assert alive() is None
    finally:
        gc.enable()
