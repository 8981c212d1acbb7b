"""Causal tracing: which hidden states carry what a model says of a subject.

Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 2 and appendix B. For a prompt behind
which the model gives its answer o the probability P(o), h_t^(l) being the output of layer l at token t:

    corrupted    h_i^(0) + ε with ε ~ N(0, ν²) in place of h_i^(0), at every token i of the subject         P*(o)
    restored     the same, but one thing at (t, l) is as in the clean run                            P*,clean(o)
    effect       IE(t, l) = P*,clean(o) - P*(o), the mean over several samples of ε; AIE: its mean over requests

h^(0) is what enters the first layer; ν is three times the standard deviation of its elements over the tokens of all
subjects. (The released code takes word embeddings alone, which differ where positions are learned, as in GPT-2.)
What is restored is one of three kinds: a "state" h_t^(l); or what the "mlp" adds at t, the output of the
down-projection that an edit changes, or the "attention", each in a window of layers l - w/2 .. l + w/2 - 1 (w = 10, cut
at the first and last layer), since later layers make up for one that fails.

Cost, for L layers, T tokens of which T' from the first of the subject on, S samples: layers below the first restored
one are as in the corrupted run, and so is everything before the subject, where nothing was corrupted. A state is
restored by L - l - 1 layers on T tokens, a window by L - max(0, l - w/2), so that all of a request takes about
S · T' · (L² / 2) · 3 + a little layers on T tokens, half of whole runs. The rows that are restored at several layers
run together: those of a lower layer are joined on their way up by those of the next.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ModelError
from ..models.runner import Runner, evaluating

Kind = Literal["state", "mlp", "attention"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WINDOW = 10
NOISE = 3.0

# Tokens of rows that run together; a GPU wants many.
_BATCH_TOKENS = {"cuda": 32_768, "cpu": 2048}
_ATTENTION = re.compile(r"(.*_)?(attn|attention)")


@dataclass(frozen=True)
class Traced:
    """Causal trace of one prompt. Probabilities are those of the answer, means over samples where there is noise."""

    answer: int  # token id
    clean: float
    corrupted: float
    effects: dict[Kind, Tensor]  # (layers, tokens) fp64 on the CPU: IE; 0 before the subject


@dataclass(frozen=True)
class _Restored:
    """One thing that is as in the clean run."""

    kind: Kind
    layer: int  # l
    token: int  # t
    start: int  # of the layers that have to run
    outputs: range  # layers whose mlp or attention is restored


@dataclass(frozen=True)
class _Run:
    """Everything a trace needs of some rows that ran as a whole."""

    states: list[Tensor]  # L + 1 of (rows, T, d): what enters each layer, and what the last one gives
    outputs: dict[Kind, dict[int, Tensor]]  # by layer (rows, T, d)


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The module of a layer that mixes tokens; None where none has such a name."""
    return next((child for name, child in layer.named_children() if _ATTENTION.fullmatch(name)), None)


def kinds_of(runner: Runner) -> tuple[Kind, ...]:
    """What can be restored in this model: without an attention that can be told by its name, not that."""
    has_attention = any(attention_of(layer) is not None for layer in runner.layers)
    return tuple(kind for kind in KINDS if kind != "attention" or has_attention)


@torch.no_grad()
def embedding_deviation(runner: Runner, rows: Sequence[Sequence[int]], subjects: Sequence[range]) -> float:
    """Standard deviation of the elements of what enters layer 0 at the tokens of the subjects."""
    parts = []
    for ids, subject in zip(rows, subjects, strict=True):
        entering = runner.embed(runner.pack([ids]).ids)[0]
        parts.append(entering[subject.start : subject.stop].double().flatten())
    return float(torch.cat(parts).std())


def draw_noise(shape: tuple[int, ...], deviation: float, seed: int) -> Tensor:
    """ε in fp64 on the CPU, so that it is the same wherever the model runs."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return deviation * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


@torch.no_grad()
def predicted(runner: Runner, ids: Sequence[int]) -> int:
    """The most probable token behind a row."""
    with evaluating(runner.model):
        hidden = runner.run(runner.embed(runner.pack([ids]).ids), 0, len(runner.layers))
        return int(runner.exact_logits(hidden[:, -1]).argmax())


@torch.no_grad()
def causal_trace(
    runner: Runner,
    ids: Sequence[int],
    subject: range,
    noise: Tensor,  # (samples, tokens of the subject, d)
    kinds: Sequence[Kind] = KINDS,
    window: int = WINDOW,
) -> Traced:
    """Trace the most probable token behind a prompt of token ids; `subject` are the places of the subject's tokens.

    Raises ArgumentError for a subject or noise that does not fit the prompt, and for a kind that the model has not.
    """
    if not 0 <= subject.start < subject.stop <= len(ids):
        raise ArgumentError(f"subject: got tokens {subject.start} .. {subject.stop - 1} of {len(ids)}")
    if noise.dim() != 3 or noise.shape[1] != len(subject) or not len(noise):
        raise ArgumentError(f"noise: got {tuple(noise.shape)}, wanted (samples, {len(subject)}, hidden size)")
    if window < 1:
        raise ArgumentError(f"window: got {window}, wanted at least 1 layer")
    if unknown := [kind for kind in kinds if kind not in kinds_of(runner)]:
        raise ArgumentError(f"kinds: got {', '.join(unknown)}, wanted some of {', '.join(kinds_of(runner))}")
    with evaluating(runner.model):
        entering = runner.embed(runner.pack([ids]).ids)
        corrupted_entering = entering.repeat(len(noise), 1, 1)
        corrupted_entering[:, subject.start : subject.stop] += noise.to(entering)
        clean, corrupted = _run(runner, entering, kinds), _run(runner, corrupted_entering, ())
        probabilities = _probabilities(runner, clean.states[-1])
        answer = int(probabilities[0].argmax())
        base = float(_probabilities(runner, corrupted.states[-1])[:, answer].mean())
        effects: dict[Kind, Tensor] = {
            kind: torch.zeros(len(runner.layers), len(ids), dtype=torch.float64, device="cpu") for kind in kinds
        }
        for some in _batches(runner, len(ids), len(noise), _things(runner, kinds, subject.start, len(ids), window)):
            restored = _run_restored(runner, some, clean, corrupted)
            found = _probabilities(runner, restored)[:, answer].view(len(some), len(noise)).mean(1)
            for thing, probability in zip(some, found.tolist(), strict=True):
                effects[thing.kind][thing.layer, thing.token] = probability - base
    return Traced(answer, float(probabilities[0, answer]), base, effects)


def layer_passes(layers: int, tokens: int, first: int, samples: int, kinds: Sequence[Kind], window: int) -> int:
    """How many tokens go through how many layers, in all, for one trace whose subject begins at token `first`."""
    starts = sum(layers - _span(kind, layer, layers, window)[0] for kind in kinds for layer in range(layers))
    return tokens * ((1 + samples) * layers + samples * (tokens - first) * starts)


def _span(kind: Kind, layer: int, layers: int, window: int) -> tuple[int, range]:
    """The first layer that has to run, and those whose outputs are restored."""
    if kind == "state":
        return layer + 1, range(0)
    outputs = range(max(0, layer - window // 2), min(layers, layer + (window + 1) // 2))
    return outputs.start, outputs


def _things(runner: Runner, kinds: Sequence[Kind], first: int, tokens: int, window: int) -> list[_Restored]:
    """Everything that is restored one after the other, that of the lowest layers first."""
    layers = len(runner.layers)
    things = [
        _Restored(kind, layer, token, *_span(kind, layer, layers, window))
        for kind in kinds
        for layer in range(layers)
        for token in range(first, tokens)
    ]
    return sorted(things, key=lambda thing: thing.start)


def _batches(runner: Runner, tokens: int, samples: int, things: Sequence[_Restored]) -> Iterator[Sequence[_Restored]]:
    budget = _BATCH_TOKENS.get(runner.device.type, _BATCH_TOKENS["cpu"])
    together = max(1, budget // (tokens * samples))
    for start in range(0, len(things), together):
        yield things[start : start + together]


def _run(runner: Runner, hidden: Tensor, kinds: Sequence[Kind]) -> _Run:
    """Rows (rows, T, d) through all layers, with what enters each of them and what the kinds add."""
    states = [hidden]
    outputs: dict[Kind, dict[int, Tensor]] = {kind: {} for kind in kinds if kind != "state"}
    for layer in range(len(runner.layers)):
        with ExitStack() as stack:
            for kind, by_layer in outputs.items():
                if (module := _module(runner, kind, layer)) is not None:
                    stack.enter_context(_keeping(module, by_layer, layer, hidden.shape[:2]))
            states.append(runner.run(states[-1], layer, layer + 1))
    return _Run(states, outputs)


def _run_restored(runner: Runner, things: Sequence[_Restored], clean: _Run, corrupted: _Run) -> Tensor:
    """The last layer's output (things · samples, T, d); samples of one thing are neighbours."""
    layers, samples = len(runner.layers), len(corrupted.states[0])
    device = runner.device
    tokens = torch.tensor([thing.token for thing in things for _ in range(samples)], device=device)
    hidden = corrupted.states[0][:0]
    joined = 0
    for layer in range(things[0].start, layers + 1):
        # Those that begin here come behind those on their way, which keeps all in their order.
        count = sum(thing.start == layer for thing in things)
        if count:
            entering = corrupted.states[layer].repeat(count, 1, 1)
            places = range(joined * samples, (joined + count) * samples)
            states = [i for i in places if things[i // samples].kind == "state"]
            if states:
                at = torch.tensor([i - places.start for i in states], device=device)
                token = tokens[torch.tensor(states, device=device)]
                entering[at, token] = clean.states[layer][0, token]
            hidden = torch.cat([hidden, entering])
            joined += count
        if layer == layers:
            break
        with ExitStack() as stack:
            for kind, outputs in clean.outputs.items():
                rows = [
                    i
                    for i in range(joined * samples)
                    if things[i // samples].kind == kind and layer in things[i // samples].outputs
                ]
                module = _module(runner, kind, layer)
                if rows and module is not None:
                    at = torch.tensor(rows, device=device)
                    values = outputs[layer][0, tokens[at]]
                    stack.enter_context(_overwriting(module, at * hidden.shape[1] + tokens[at], values))
            hidden = runner.run(hidden, layer, layer + 1)
    return hidden


def _module(runner: Runner, kind: Kind, layer: int) -> nn.Module | None:
    """What adds to the state there; None where a layer has none of that kind."""
    if kind == "attention":
        return attention_of(runner.layers[layer])
    try:
        return runner.projection(layer)
    except ModelError:
        return None


def _probabilities(runner: Runner, hidden: Tensor) -> Tensor:
    """(rows, vocabulary) fp32 | fp64, behind the last token."""
    return runner.exact_logits(hidden[:, -1]).softmax(-1)


def _tensor_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _keeping(module: nn.Module, outputs: dict[int, Tensor], layer: int, shape: torch.Size) -> Iterator[None]:
    """Keep the module's output, as (*shape, d), under its layer."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs[layer] = _tensor_of(output).reshape(*shape, -1)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _overwriting(module: nn.Module, places: Tensor, values: Tensor) -> Iterator[None]:
    """Put values (n, d) at places (n,) of the module's output, taken as (rows · T, d), for the length of the block."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        changed = _tensor_of(output).clone()
        changed.view(-1, changed.shape[-1])[places] = values
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
