"""Is a model what the package takes it for? Found out by running it on a few tokens, before anything is done with it.

Layers that are run one by one must give the logits of the model's own forward: the same kernels on the same shapes, so
to the bit wherever kernels are deterministic, and a forgotten scale or cap shows in any dtype. Two more things are not
required but decide how an edit is made: whether a row can go on from the attention keys and values of a context of
another length, and whether what is added to the output of a layer's down-projection arrives in the layer's output as
it is.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ModelError
from . import attention, fused
from .batches import is_out_of_memory
from .fused import LikeLlama
from .past import ContextPast, Contexts, EmptyPast, FrozenPast, Recorder, attention_mask
from .runner import Runner, any_shape, evaluating

_TIME, _CONTEXTS = 8, (5, 1)  # tokens of the two rows, and of them those that are taken for a context
_TOKEN = 4  # where something is added
_EXACT = 1e-5  # of logits; in 16 bit a quarter of the spacing of numbers, which is less than a forgotten soft cap
# Other kernels on other shapes. Of a layer's output, its rounding; of what the layer adds to its input, more.
_ROUNDING, _OF_UPDATE, _OF_UPDATE_IN_HALF = 2.0, 1e-4, 0.05
_ADDED = 4.0  # times as long as the output it arrives in, so that rounding it matters little


@dataclass(frozen=True)
class Verified:
    """What holds of a model and one of its layers. Errors are ‖got - wanted‖ / ‖wanted‖."""

    model: str  # its class and type
    layer: int
    weight: str  # the parameter that an edit of the layer changes
    logits_error: float  # of layers run one by one, against the model's own forward
    shares_past: bool  # rows go on from the keys and values of contexts; otherwise every row is run as a whole
    past_error: float | None  # of what layers add to their input then, in the worst one; None where one cannot do it
    attends_apart: bool  # attention reads that past where it lies; otherwise a row's keys are joined to it
    runs_fused: bool  # so all layers above this one can be run together, see `rome_fast.models.fused`
    adds_unchanged: bool  # δ is added to the layer's output; otherwise the layer is run again in every step
    value_error: float  # of what arrives there

    def __str__(self) -> str:
        past = "not possible" if self.past_error is None else f"off by {self.past_error:.1e}"
        rows = "rows go on from the past of a context" if self.shares_past else "every row is run as a whole"
        rows += ", which attention can read where it lies" if self.attends_apart else ""
        rows += ", in layers that can be run together" if self.runs_fused else ""
        value = "δ is added to the layer's output" if self.adds_unchanged else "the layer is run again with δ"
        return (
            f"{self.model}, layer {self.layer}, {self.weight}\n"
            f"logits of layers run one by one: off by {self.logits_error:.1e}\n"
            f"a shared past: {past}; {rows}\n"
            f"the value of one token: off by {self.value_error:.1e} in the output of its layer; {value}"
        )


@dataclass
class _Known:
    """What is known of a model as long as `state` is the same."""

    state: Any
    logits_error: float
    past_error: float | None
    shares_past: bool
    attends_apart: bool
    like_llama: Mapping[int, LikeLlama]  # layers that can be run together
    value_errors: dict[int, float] = field(default_factory=dict)

    def fused_above(self, layer: int, layers: int) -> Mapping[int, LikeLlama]:
        """What is known of the layers above one of so many; nothing where one of them cannot be run together."""
        above = range(layer + 1, layers)
        return self.like_llama if all(number in self.like_llama for number in above) else {}


_KNOWN: WeakKeyDictionary[PreTrainedModel, _Known] = WeakKeyDictionary()


def verified(runner: Runner, layer: int) -> Verified:
    """Check that a model can be edited in a layer, and how: four passes over sixteen tokens, the first time only.

    Raises ModelError, which says what was found, for a model that is no causal language model, whose layers cannot be
    run one by one, or whose layer has no down-projection that all tokens go through.
    """
    (found,) = verified_each(runner, [layer])
    return found


@torch.no_grad()
def verified_each(runner: Runner, layers: Sequence[int]) -> list[Verified]:
    """The same of several layers, in as many passes."""
    weights = [runner.weight_name(layer) for layer in layers]
    known, states = _known(runner)
    missing = [layer for layer in layers if layer not in known.value_errors]
    if missing:
        states = _entering(_plain(runner), max(missing)) if states is None else states
        for layer in missing:
            known.value_errors[layer] = _value_error(_plain(runner), layer, states[layer])
    allowed = 4 * torch.finfo(runner.dtype).eps + _EXACT
    return [
        Verified(
            runner.decoder.name,
            layer,
            weight,
            known.logits_error,
            known.shares_past,
            known.past_error,
            known.attends_apart,
            bool(known.fused_above(layer, len(runner.layers))),
            known.value_errors[layer] <= allowed,
            known.value_errors[layer],
        )
        for layer, weight in zip(layers, weights, strict=True)
    ]


def reads_past_apart(runner: Runner, found: Verified) -> bool:
    """Whether attention is to read a shared past where it lies: it can, and is none the slower for it."""
    config = runner.model.config.get_text_config()
    return found.attends_apart and attention.pays(config, runner.device, runner.dtype)


def fused_layers(runner: Runner, found: Verified) -> Mapping[int, LikeLlama]:
    """The layers above the one looked at, where they are to be run together: all of them can be."""
    if not (fused.ENABLED and found.runs_fused and reads_past_apart(runner, found)):
        return {}
    return _known(runner)[0].fused_above(found.layer, len(runner.layers))


def all_fused_layers(runner: Runner, found: Verified) -> Mapping[int, LikeLlama]:
    """All layers of the model, where they are to be run together: all of them can be."""
    if not (fused.ENABLED and found.runs_fused and reads_past_apart(runner, found)):
        return {}
    return _known(runner)[0].fused_above(-1, len(runner.layers))


def shared_out(runner: Runner, layers: tuple[int, ...]) -> tuple[int, ...]:
    """These layers if what an edit adds can be shared out among them, otherwise the last one alone.

    Where what an MLP adds is normalised or scaled before it arrives, no share of it can be told beforehand.
    """
    found = verified_each(runner, layers)
    return layers if len(found) == 1 or all(each.adds_unchanged for each in found) else layers[-1:]


def check_shared_out(runner: Runner, layers: tuple[int, ...]) -> None:
    """ModelError for several layers that what an edit adds cannot be shared out among."""
    if shared_out(runner, layers) != layers:
        raise ModelError(
            f"layers: got {', '.join(map(str, layers))}, wanted one: in {runner.decoder.name}, what a layer's MLP adds "
            "is normalised or scaled before it arrives, so that no share of it can be told beforehand"
        )


def take_for_verified(runner: Runner, found: Verified) -> None:
    """Take a model without data, on the meta device, for what was found of another one of its architecture."""
    like_llama = _heard(runner) if found.runs_fused else {}
    errors = found.logits_error, found.past_error
    known = _Known(_state(runner), *errors, found.shares_past, found.attends_apart, like_llama)
    known.value_errors.update(dict.fromkeys(range(len(runner.layers)), found.value_error))
    _KNOWN[runner.model] = known


def check_model(runner: Runner) -> None:
    """Raise ModelError for a model whose layers, run one by one, are not the model.

    A model whose logits are no numbers can be measured, which finds just that.
    """
    with suppress(_NotFinite):
        _known(runner)


class _NotFinite(ModelError):
    """Nothing can be compared."""


@torch.no_grad()
def _known(runner: Runner) -> tuple[_Known, list[Tensor] | None]:
    """What is known of the model, and what enters each layer where that was found out just now."""
    model, states = runner.model, None
    state = _state(runner)
    found = _KNOWN.get(model)
    if found is None or found.state != state:
        found, states = _examine(_plain(runner), state)
        _KNOWN[model] = found
    return found, states


def _state(runner: Runner) -> Any:
    """What was found holds for weights of any values, but not for another dtype, kernel, setting or module."""
    modules = tuple(type(module) for module in runner.model.modules())
    return runner.dtype, runner.device, str(vars(runner.model.config)), modules


def _plain(runner: Runner) -> Runner:
    """Products as the model's own forward takes them."""
    return runner.computing_in(runner.dtype)


def _examine(runner: Runner, state: Any) -> tuple[_Known, list[Tensor]]:
    """What is to be known of the model, and what enters each layer."""
    ids, name = _tokens(runner), runner.decoder.name
    with evaluating(runner.model):
        with any_shape(runner.device):
            own = getattr(runner.model(input_ids=ids, use_cache=False), "logits", None)
        if own is None:
            raise ModelError(f"model: {name} has no language-model head; load it with AutoModelForCausalLM")
        if not bool(torch.isfinite(own).all()):
            raise _NotFinite(f"model: the logits of {name} are not finite in {runner.dtype}; load it in float32")
        shared = max(_CONTEXTS)
        if not _error(own[:1, :shared], own[1:, :shared]) <= 32 * torch.finfo(own.dtype).eps + _EXACT:
            raise ModelError(
                f"model: {name} is no causal language model: later tokens change the logits of earlier ones"
            )
        exact = _EXACT if runner.dtype.itemsize >= 4 else torch.finfo(runner.dtype).eps / 4
        recorder = Recorder()
        try:
            states, error = _one_by_one(runner, ids, own, recorder)
            shares = error <= exact
        except _FAULTS as fault:
            _pass_on(fault)
            shares = False
        if not shares:
            # A cache of its own kind may be what is missing, as in recurrent layers.
            try:
                states, error = _one_by_one(runner, ids, own, None)
            except _FAULTS as fault:
                _pass_on(fault)
                reason = f"{type(fault).__name__}: {fault}"
                raise ModelError(f"model: {name} cannot be run layer by layer ({reason})") from fault
            if not error <= exact:
                raise ModelError(f"model: the layers of {name}, run one by one, miss its own logits by {error:.1e}")
            return _Known(state, error, None, False, False, {}), states
        try:
            past_error, shares, apart, like_llama = _past_error(runner, ids, states, recorder)
        except _FAULTS as fault:
            _pass_on(fault)
            past_error, shares, apart, like_llama = None, False, False, {}
    return _Known(state, error, past_error, shares, apart, like_llama), states


# Of layers that are called in a way they were not made for.
_FAULTS = (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError, RuntimeError)


def _pass_on(fault: Exception) -> None:
    """Running out of memory, a RuntimeError as well, says nothing of the model."""
    if is_out_of_memory(fault):
        raise fault


def _tokens(runner: Runner) -> Tensor:
    """(2, _TIME) token ids, the first ones the same in both rows."""
    # Special tokens are at the ends of a vocabulary.
    generator = torch.Generator("cpu").manual_seed(0)
    low, high = runner.vocab_size // 8, runner.vocab_size // 2
    ids = torch.randint(low, max(high, low + 1), (2, _TIME), generator=generator, device="cpu")
    ids[1, : max(_CONTEXTS)] = ids[0, : max(_CONTEXTS)]
    return ids.to(runner.device)


def _one_by_one(runner: Runner, ids: Tensor, own: Tensor, past: Recorder | None) -> tuple[list[Tensor], float]:
    """What enters each layer and, last, leaves the last one; and how far the logits of that are off."""
    states = [runner.embed(ids)]
    for layer in range(len(runner.layers)):
        states.append(runner.run(states[-1], layer, layer + 1, past=past))
    return states, _error(runner.head(states[-1]), own)


def _past_error(
    runner: Runner, ids: Tensor, states: list[Tensor], recorder: Recorder
) -> tuple[float, bool, bool, Mapping[int, LikeLlama]]:
    """Error of a past, whether rows can go on from one, whether it can be attended to where it lies, and in which
    layers that can be run together.

    Every layer is run behind a padded past, on what really enters it, so that faults do not drown in rounding.
    """
    lengths = torch.tensor(_CONTEXTS, device=runner.device)
    longest, width = max(_CONTEXTS), _TIME - min(_CONTEXTS)
    recorded = Recorder()
    recorded.keys = {layer: keys[:, :, :longest] for layer, keys in recorder.keys.items()}
    recorded.values = {layer: values[:, :, :longest] for layer, values in recorder.values.items()}
    contexts = Contexts(
        tuple(tuple(row[:n]) for row, n in zip(ids.tolist(), _CONTEXTS, strict=True)),
        lengths,
        recorded,
        0,
        0,
        states[0][:, :longest],
    )
    row = torch.arange(2, device=runner.device)
    joined = FrozenPast(ContextPast(contexts, row), {}, {}, lengths, torch.zeros_like(lengths), apart=False)
    mask = attention_mask(joined.seen, width, runner.dtype)
    positions = lengths.unsqueeze(1) + torch.arange(width, device=runner.device)
    row = row.unsqueeze(1)
    at, real = positions.clamp(max=_TIME - 1), positions < _TIME
    embedded = runner.embed(ids[row, at], positions)
    shares = _error(embedded[real], states[0][row, at][real]) <= _EXACT
    slack = _OF_UPDATE if runner.dtype.itemsize >= 4 else _OF_UPDATE_IN_HALF

    def right(got: Tensor, wanted: Tensor, unchanged: Tensor) -> bool:
        """Whether the error of what was made of something is rounding."""
        update, off = ((wanted - x).double().norm() for x in (unchanged, got))
        return bool(off <= _ROUNDING * torch.finfo(runner.dtype).eps / 2 * wanted.double().norm() + slack * update)

    def missed(layer: int, past: FrozenPast) -> tuple[Tensor, bool]:
        """Error of what a layer adds to its input, and whether that is rounding."""
        rest, wanted = states[layer][row, at], states[layer + 1][row, at]
        got = runner.run(rest, layer, layer + 1, positions=positions, mask=mask, past=past)
        error = (got - wanted)[real].double().norm() / (wanted - rest)[real].double().norm()
        return error, right(got[real], wanted[real], rest[real])

    def differs(layer: int, past: FrozenPast) -> bool:
        """Whether output or gradient of a layer that is run as `past` says are not its own, at the last positions."""
        rest = states[layer][row, at]
        outer = torch.linspace(-1, 1, rest.numel(), device=rest.device).view(rest.shape).to(rest)
        last = (runner.max_length - width + torch.arange(width, device=rest.device)).expand(2, -1)
        both = []
        for each in (past, replace(past, fused={})):
            with torch.enable_grad():
                leaf = rest.clone().requires_grad_()
                out = runner.run(leaf, layer, layer + 1, positions=last, mask=mask, past=each)
                both.append((out.detach(), *torch.autograd.grad(out, leaf, outer)))
        (got, got_gradient), (wanted, gradient) = both
        return not (right(got, wanted, rest) and right(got_gradient, gradient, outer))

    layers = range(len(states) - 1)
    errors, exact = zip(*(missed(layer, joined) for layer in layers), strict=True)
    shares = shares and all(exact)
    past = replace(joined, apart=True)
    found: dict[int, LikeLlama] = {}
    kinds: dict[tuple[type, ...], LikeLlama] = {}  # what the last layer of these modules was found to be

    def together(layer: int, like: LikeLlama, *, compared: bool) -> bool:
        """Whether a layer can be run so; its gradient is looked at where that of another one was not `compared`."""
        alone, module = replace(past, fused={layer: like}), runner.layers[layer]
        streamed = runner.stream is not None
        try:
            if fused.layers_like_llama(alone.fused, [module], layer, runner.dtype, streamed=streamed) is None:
                return False
            return missed(layer, alone)[1] and (compared or not differs(layer, alone))
        except _FAULTS as fault:
            _pass_on(fault)
            return False

    def attends(layer: int) -> bool:
        """Whether attention of a layer is right apart, or that of all of it as it is run together."""
        kind = tuple(map(type, runner.layers[layer].modules()))
        if kind in kinds:
            like = kinds[kind].of_layer(layer)
            if together(layer, like, compared=True):
                found[layer] = like
                return True
        apart, asked = missed(layer, past)[1], attention.asked_last()
        heard = None if asked is None else fused.like_llama(runner.layers[layer], asked, streamed=bool(runner.stream))
        if heard is not None and heard == heard.of_layer(layer) and together(layer, heard, compared=False):
            found[layer] = kinds[kind] = heard
        return apart

    try:
        apart = shares and all(map(attends, layers))
    except _FAULTS as fault:
        _pass_on(fault)
        apart = False
    return float(max(errors)), shares, apart, found if apart else {}


def _heard(runner: Runner) -> Mapping[int, LikeLlama]:
    """What there is to know of layers to run them together, without a comparison, which takes data."""
    found = {}
    with evaluating(runner.model):
        hidden = torch.zeros(1, 1, runner.hidden_size, dtype=runner.dtype, device=runner.device)
        nothing = hidden.new_zeros(1, 1, 1, 1), torch.zeros(1, 1, dtype=torch.int64, device=runner.device)
        for layer in range(len(runner.layers)):
            runner.run(hidden, layer, layer + 1, mask=nothing[0], positions=nothing[1], past=EmptyPast())
            asked = attention.asked_last()
            like = None if asked is None else fused.like_llama(runner.layers[layer], asked)
            found.update({} if like is None else {layer: like})
    return found


def _entering(runner: Runner, last: int) -> list[Tensor]:
    """What enters each layer up to the last one."""
    with evaluating(runner.model):
        states = [runner.embed(_tokens(runner))]
        for layer in range(last):
            states.append(runner.run(states[-1], layer, layer + 1))
        return states


def _value_error(runner: Runner, layer: int, entering: Tensor) -> float:
    """How much of something added to the value of one token is not in the output of the layer."""
    with evaluating(runner.model):
        out = runner.run(entering, layer, layer + 1)
        generator = torch.Generator("cpu").manual_seed(0)
        added = torch.randn(out.shape[-1], generator=generator, device="cpu").to(out)
        added *= _ADDED * out[:, _TOKEN].norm() / added.norm()
        at = torch.full((2,), _TOKEN, device=out.device)
        moved = runner.run_adding(entering, layer, added.expand(2, -1), at) - out
        arrived = moved[:, _TOKEN].clone()
        moved[:, _TOKEN] = 0
        if not float(moved.norm()) <= _EXACT * float(added.norm()):
            raise ModelError(
                f"model: in layer {layer} of {runner.decoder.name}, the value of one token reaches others at once"
            )
        return _error(arrived, added.expand(2, -1))


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())
