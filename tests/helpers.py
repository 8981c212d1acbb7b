"""What several test files share: the usual requests, contexts and settings, comparison bit for bit, bounds of rounding.

A bound follows from the number of roundings and the precision they are made in. What one machine showed is no bound:
another one sums in another order.
"""

from importlib.metadata import version

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rome_fast import Edit, ValueSettings, apply_edits
from toys import D_FF, HIDDEN, LAYERS

LAYER = 1
CONTEXTS = ("The weather is nice. ", "What is that? ")
# The released stop rule, which never fires within so few steps: every edit then costs the same.
SETTINGS = ValueSettings(steps=4, stop="loss")

# Roundings on the longest way from a token to its logits in a toy: in each layer sums over the hidden state for two
# norms and four products, over the key, over a head and over a row of at most 80 tokens; the last norm and the head.
FORWARD = LAYERS * (6 * HIDDEN + D_FF + 12 + 80) + 2 * HIDDEN

# The subject at the start, in the middle and at the end; "Rome" is one token of the toys, "Melbourne" several.
START = Edit("{} is a twin city of", "Chicago", "Melbourne")
MIDDLE = Edit("The strait in the middle of {} is called the", "Istanbul", "Rome")
END = Edit("From Berlin one flies to {}", "Paris", "Rome, the old capital")


def edited(model, tokenizer, edits, **changes):
    """`apply_edits` with the settings of the tests, for whatever `changes` does not say."""
    usual = {
        "method": "c-rome",
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


def rounding(dtype, terms, condition=1.0):
    """4 √n u κ: four standard deviations of the relative error left by n roundings to `dtype`, which point everywhere.

    κ is the condition of what is computed from their result. Most of the n are made within sums, of which each touches
    a part only, so that a tenth of it is usual; a mistake is a thousand times as large.
    """
    return 4 * terms**0.5 * condition * torch.finfo(dtype).eps / 2


def rounding_of_log_p(dtype):
    """The absolute error of a log-probability of a toy, and so the relative one of a probability or a perplexity.

    Logits have a standard deviation of 1.4, and log p is the difference of one and the logarithm of a sum of all.
    """
    return 2 * rounding(dtype, FORWARD)


def rounding_of_edit(dtype, condition=1.0):
    """The relative error of ΔW of a toy, and of what is computed from its δ; C has that `condition`.

    A gradient takes a forward pass and a backward one, twice as long. Adam divides each of its d components by its own
    size; the smallest is a d-th of the others, and off by d times as much: √d in the norm of all. C⁻¹ magnifies the
    rounding of a key by √cond(C): a key has the spread of C in each direction, its rounding has not.
    """
    return rounding(dtype, 3 * FORWARD, HIDDEN**0.5) + rounding(dtype, FORWARD, (condition - 1) ** 0.5)


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
