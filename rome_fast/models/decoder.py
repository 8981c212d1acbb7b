"""Any decoder of transformers: where its layers are, how they are called, and which weight of a layer an edit changes.

How layers are called is asked of the model itself. Its own forward runs with stand-ins in the place of its layers: what
enters the first is the embedding, what each is called with are its arguments, and what the last one returns goes
through the model's own norm, scale, cap and head. Whether all of this is right is not believed but checked, by
`rome_fast.models.verification`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from typing import Any, cast
from weakref import proxy

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError

# Parts of a layer that mix positions: what they project to the hidden size is no memory of the MLP.
_MIXERS = ("attn", "attention", "mixer", "mamba", "conv", "rglru", "temporal")
_INNER = ("gate", "up", "router", "q_", "k_", "v_")  # as wide as the hidden state by chance
_PAST = ("cache", "past_key_values", "layer_past", "past_key_value")  # what releases of transformers call it

_FORMS: tuple["Form", ...] = ((Tensor, 0), (tuple, 2), (tuple, 1), (tuple, 3), (list, 2))  # to be tried

Arguments = dict[str, Any]
Form = tuple[type, int]
"""Of what a layer returns: a sequence that begins with the hidden states, and its length; 0 for a plain tensor."""
Answer = Callable[[int, Tensor, Arguments], Any]
"""What a stand-in returns for (index of the layer, hidden states, the other arguments)."""


class Decoder:
    """The layers of a causal language model. Raises ModelError for a model without a list of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.name = f"{type(model).__name__} ({model.config.model_type!r})"
        config = model.config.get_text_config()
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(f"model: {self.name} is an encoder with a decoder, wanted a model that is a decoder only")
        self.path = self._find_layers(config.num_hidden_layers)
        self.layers = cast(nn.ModuleList, model.get_submodule(self.path))
        self._base = self._find_base()
        held = (vars(module).get("config") for layer in self.layers for module in layer.modules())
        of_parts = {id(config): config for config in held if isinstance(config, PretrainedConfig)}
        self.configs = list(of_parts.values())  # that parts of layers look at
        self._arguments = [list(signature(layer.forward).parameters) for layer in self.layers]
        self._sites = [_down_projection(layer, config.hidden_size) for layer in self.layers]
        self._form: Form | None = None  # of what layers return, once one was run
        self._takes_mask: bool | None = None  # whether the model takes a mask of four dimensions, once it was tried
        self._answer: Answer = _nothing
        self._stand_ins = nn.ModuleList(_StandIn(self, index) for index in range(len(self.layers)))

    def _find_layers(self, count: int) -> str:
        """Path of the list of layers: of those as long as the config says, the one with most weights."""
        found = {
            path: sum(p.numel() for p in module.parameters())
            for path, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count and "vision" not in path
        }
        if not found:
            raise ModelError(f"model: {self.name} has no list of {count} layers, wanted a decoder of transformers")
        return max(found, key=found.__getitem__)

    def _find_base(self) -> nn.Module:
        """The innermost module that holds the layers and takes embeddings."""
        path = self.path
        while path:
            path = path.rpartition(".")[0]
            module = self.model.get_submodule(path)
            if "inputs_embeds" in signature(module.forward).parameters:
                return module
        raise ModelError(f"model: {self.name} takes no inputs_embeds, wanted a decoder of transformers")

    def has_site(self, layer: int) -> bool:
        """Whether a layer has a down-projection that every token goes through."""
        return self._sites[layer] is not None

    def nearest_site(self, layer: int) -> int:
        """The layer nearest to this one that can be edited; this one where none can."""
        return min(filter(self.has_site, range(len(self.layers))), key=lambda i: abs(i - layer), default=layer)

    def sites_of(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Those of some layers, ascending, that can be edited, and in any case the one nearest to the last."""
        last = self.nearest_site(layers[-1])
        return (*(layer for layer in layers if layer < last and self.has_site(layer)), last)

    def module_name(self, layer: int) -> str:
        """Dotted path of the MLP's down-projection. Raises ModelError for a layer without one."""
        site = self._sites[layer]
        if site is not None:
            return f"{self.path}.{layer}.{site}"
        experts = any("expert" in name for name, _ in self.layers[layer].named_parameters())
        has = "routed experts only, each of which sees some tokens" if experts else "no MLP with a down-projection"
        others = [i for i in range(len(self.layers)) if self.has_site(i)]
        remedy = f"wanted one of the layers {_ranges(others)}" if others else "so the model cannot be edited"
        raise ModelError(f"model: layer {layer} of {self.name} has {has}; {remedy}")

    def projection(self, layer: int) -> nn.Module:
        """The down-projection module of a layer."""
        return self.model.get_submodule(self.module_name(layer))

    def weight_name(self, layer: int) -> str:
        """Name of its parameter."""
        return self.module_name(layer) + ".weight"

    def with_past(self, layer: int, arguments: Arguments, past: Any) -> Arguments:
        """The arguments of a layer with attention keys and values of a past; None for none.

        Raises ModelError for a layer that takes none.
        """
        known = self._arguments[layer]
        name = next((name for name in _PAST if name in known), None)
        if name is None:
            if past is None:
                return arguments
            raise ModelError(f"model: layer {layer} of {self.name} takes no attention keys and values of a past")
        return arguments | {name: past} | ({"use_cache": past is not None} if "use_cache" in known else {})

    @torch.no_grad()
    def embed(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """Hidden states (rows, time, d) that enter the first layer."""
        entering: list[Tensor] = []

        def note(_index: int, hidden: Tensor, _arguments: Arguments) -> Any:
            entering.append(hidden)
            raise _Known

        with self._standing_in(note), suppress(_Known):
            self._base(**_accepted(self._base, input_ids=ids, position_ids=positions, use_cache=False))
        return entering[0]

    @torch.no_grad()
    def calls(self, hidden: Tensor, positions: Tensor | None, mask: Tensor | None) -> list[Arguments]:
        """Keyword arguments of every layer for hidden states of this shape (rows, time, d) and dtype.

        `positions` (rows, time) count from 0 and `mask` (rows, 1, time, past + time) is the model's own unless given.
        """
        found: list[Arguments] = []
        if mask is not None and positions is None:
            # Some models count from a mask, and in another way from one that was made for them.
            positions = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
        given = {"position_ids": positions, "attention_mask": mask, "use_cache": False}
        given = _accepted(self._base, inputs_embeds=self._blank(hidden), **given)
        errors = []
        for form in _FORMS if self._form is None else [self._form]:

            def note(index: int, entering: Any, arguments: Arguments, form: Form = form) -> Any:
                found.append(arguments)
                if index + 1 == len(self.layers):
                    raise _Known
                return _in_form(entering, form)

            try:
                with self._standing_in(note), suppress(_Known):
                    self._base(**given)
                return found
            except Exception as error:  # a guess was wrong: whatever comes of that
                errors.append(error)
                found.clear()
        raise errors[0]

    def see(self, output: Any) -> None:
        """Keep in mind the form of what layers return."""
        self._form = type(output), 0 if isinstance(output, Tensor) else len(output)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (…, vocabulary) of the last layer's hidden states (…, d), which `run` has made."""
        rows = hidden.reshape(-1, 1, hidden.shape[-1])
        out = _in_form(rows, self._form or _FORMS[0])
        given = {"inputs_embeds": self._blank(rows), "use_cache": False}
        with self._standing_in(lambda _index, _entering, _arguments: out):
            logits = None if self._takes_mask is False else self._logits_of(given | _whole_mask(rows))
            if logits is None:
                logits = self._logits_of(given)
        return cast(Tensor, logits).reshape(*hidden.shape[:-1], -1)

    def _logits_of(self, given: Arguments) -> Tensor | None:
        """Logits of the model's own forward; None where it takes no mask that is given, which is kept in mind."""
        masked = "attention_mask" in given
        try:
            logits: Tensor = self.model(**_accepted(self.model, **given)).logits
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
            if not masked or self._takes_mask:
                raise
            self._takes_mask = False
            return None
        self._takes_mask = self._takes_mask or masked
        return logits

    def _blank(self, hidden: Tensor) -> Tensor:
        """In the place of embeddings where only their shape counts; some are narrower than hidden states."""
        return hidden.new_zeros(*hidden.shape[:2], self.model.get_input_embeddings().get_parameter("weight").shape[1])

    @contextmanager
    def _standing_in(self, answer: Answer) -> Iterator[None]:
        """In this block, layers do nothing but return the answer."""
        path, _, name = self.path.rpartition(".")
        owner = self.model.get_submodule(path)
        self._answer = answer
        setattr(owner, name, self._stand_ins)
        try:
            yield
        finally:
            setattr(owner, name, self.layers)
            self._answer = _nothing

    def answer(self, index: int, args: Sequence[Any], kwargs: Arguments) -> Any:
        """What the stand-in of a layer returns when it is called so."""
        names = self._arguments[index]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        return self._answer(index, arguments.pop(names[0]), arguments)


def _nothing(_index: int, _hidden: Tensor, _arguments: Arguments) -> Any:
    raise RuntimeError("a stand-in was called outside of its block")


class _Known(Exception):
    """What was asked of a model is known; the rest of its forward need not run."""


class _StandIn(nn.Module):
    """In the place of a layer; some models read attributes of their layers."""

    def __init__(self, decoder: Decoder, index: int) -> None:
        super().__init__()
        # None a part of it; and without a cycle, in which a model outlives its last user until garbage is looked for.
        self.__dict__ |= {"_decoder": proxy(decoder), "_index": index, "_layer": decoder.layers[index]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._decoder.answer(self._index, args, kwargs)


def _in_form(hidden: Any, form: Form) -> Any:
    """Hidden states as a layer returns them."""
    kind, length = form
    return kind([hidden, *[None] * (length - 1)]) if length else hidden


def _whole_mask(rows: Tensor) -> Arguments:
    """Mask and positions of rows of one token each.

    A model that makes its own mask may ask first whether there is anything to mask, which waits for the device.
    """
    positions = torch.zeros(len(rows), 1, dtype=torch.int64, device=rows.device)
    return {"attention_mask": rows.new_zeros(len(rows), 1, 1, 1), "position_ids": positions}


def is_transposed(model: nn.Module, weight_name: str) -> bool:
    """Whether a projection's weight is stored (d_ff, d), as that of a Conv1D."""
    return isinstance(model.get_submodule(weight_name.removesuffix(".weight")), Conv1D)


def oriented(model: nn.Module, weight_name: str, weight: Tensor) -> Tensor:
    """A projection's weight, stored as the model stores its parameter of that name, as a (d, d_ff) view."""
    return weight.T if is_transposed(model, weight_name) else weight


def _down_projection(layer: nn.Module, width: int) -> str | None:
    """Path of the last linear map to the hidden size in a layer that is neither of a mixer nor of routed experts."""
    found = None
    for path, module in layer.named_modules():
        parts = path.split(".")
        if (
            isinstance(module, nn.Linear | Conv1D)
            and module.weight.shape[isinstance(module, Conv1D)] == width
            and not any(word in path for word in _MIXERS)
            and "experts" not in parts
            and not parts[-1].startswith(_INNER)
        ):
            found = path
    return found


def _accepted(module: nn.Module, **arguments: Any) -> Arguments:
    """Those arguments that a module's forward knows by name and that are given."""
    known = signature(module.forward).parameters
    return {name: value for name, value in arguments.items() if name in known and value is not None}


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as "0 .. 2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} .. {run[-1]}" for run in runs)
