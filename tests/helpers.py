"""What several test files share: the usual requests, contexts and settings, and comparison bit for bit."""

from importlib.metadata import version

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rome_fast import Edit, ValueSettings, apply_edits

LAYER = 1
CONTEXTS = ("The weather is nice. ", "What is that? ")
# The released stop rule, which never fires within so few steps: every edit then costs the same.
SETTINGS = ValueSettings(steps=4, stop="loss")

# The subject at the start, in the middle and at the end; "Rome" is one token of the toys, "Melbourne" several.
START = Edit("{} is a twin city of", "Chicago", "Melbourne")
MIDDLE = Edit("The strait in the middle of {} is called the", "Istanbul", "Rome")
END = Edit("From Berlin one flies to {}", "Paris", "Rome, the old capital")


def edited(model, tokenizer, edits, **changes):
    """`apply_edits` with the settings of the tests, for whatever `changes` does not say."""
    usual = {
        "tokenizer": tokenizer,
        "statistics": "identity",
        "layer": LAYER,
        "contexts": CONTEXTS,
        "settings": SETTINGS,
        "guard": "off",
        "unconverged": "write",
        "measure": False,
    }
    return apply_edits(model, edits, **(usual | changes))


def delta_w(result_or_delta):
    """(d, d_ff) float64: the update of the one weight that a Delta, or the result of an edit, changes."""
    (update,) = getattr(result_or_delta, "delta", result_or_delta).updates.values()
    return update.left.double() @ update.right.double()


def relative_error(got, wanted):
    """‖got - wanted‖ / ‖wanted‖; 0 where both are zero."""
    got, wanted = got.detach().double(), wanted.detach().double()
    difference = float((got - wanted).norm())
    return difference / float(wanted.norm()) if difference else 0.0


def bits(tensor):
    """The bytes of a tensor, so that NaN equals NaN and -0.0 does not equal 0.0."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).clone()


def all_bits(model):
    """The bytes of every parameter and buffer, by name."""
    return {name: bits(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def changed(model, before):
    """The names of what is no longer as it was when `before = all_bits(model)` was taken."""
    after = all_bits(model)
    assert after.keys() == before.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def broken_interpreter():
    """Why the installed triton cannot interpret kernels, or None: up to 3.6 it relies on what numpy 2.4 took away."""

    def release(package):
        major, minor, *_ = version(package).split(".")
        return int(major), int(minor)

    if release("triton") <= (3, 6) and release("numpy") >= (2, 4):
        return "triton <= 3.6 cannot interpret any loop with numpy >= 2.4"
    return None


def merging_tokenizer(*merges):
    """BPE over whole strings, without a pre-tokenizer: a token may cover both sides of a blank."""
    alphabet = [chr(code) for code in range(32, 127)]
    made = ["".join(pair) for pair in merges]
    vocabulary = {token: i for i, token in enumerate(alphabet + made)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, list(merges))))
