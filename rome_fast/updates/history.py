"""The edits in the weights of a model in memory, and what each weight was before each of them."""

from torch import Tensor
from transformers import PreTrainedModel

from .delta import Applied, applied_to


class History:
    """The last edits of a model that lead, one after another, to its weights as they are.

    An edit whose weights were changed by something else since is no longer part of it, and none before that one is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._applied = applied_to(model)
        self._found: dict[str, tuple[int, Tensor]] = {}
        broken = [i for i in range(len(self._applied)) if not self._holds(i)]
        self._start = broken[-1] + 1 if broken else 0

    @property
    def edits(self) -> list[Applied]:
        return self._applied[self._start :]

    @property
    def names(self) -> list[str]:
        """The parameters that any of the edits changed."""
        return sorted({name for edit in self.edits for name in edit.delta.updates})

    def before(self, index: int, name: str) -> Tensor:
        """A parameter as it was before `edits[index]`, in the dtype that it has now; with `len(edits)`, as it is."""
        parameter = self._model.get_parameter(name).detach()
        following = self._next(self._start + index, name)
        original = parameter if following is None else self._original(following, name)
        assert original is not None  # for the type checker: an edit without its originals is none of `edits`
        return original.to(parameter.dtype)

    def _next(self, index: int, name: str) -> int | None:
        """The first edit, not before `index`, that changed a parameter."""
        return next((i for i in range(index, len(self._applied)) if name in self._applied[i].delta.updates), None)

    def _holds(self, index: int) -> bool:
        """Whether an edit's originals are known and what it left is what the next edit found, or what is there now."""
        edit = self._applied[index]
        for name in edit.delta.updates:
            original, following = self._original(index, name), self._next(index + 1, name)
            later = self._model.get_parameter(name) if following is None else self._original(following, name)
            if original is None or later is None:
                return False
            if not edit.delta.leaves(self._model, name, later, original, edit.bits_after[name]):
                return False
        return True

    def _original(self, index: int, name: str) -> Tensor | None:
        """What an edit found; where that was not kept, what the one before it leaves once it is made again."""
        edit = self._applied[index]
        live = edit.live()
        if name in edit.originals:
            return edit.originals[name]
        if live is not None and name in live.originals:
            return live.originals[name]
        # Edits are asked for in their order, so that mostly one step is made again.
        at, weight = self._found.get(name, (index + 1, None))
        if at > index:
            kept = [i for i in range(index) if name in self._applied[i].originals]
            if not kept:
                return None
            at, weight = kept[-1], self._applied[kept[-1]].originals[name]
        while at < index and weight is not None:
            made = self._applied[at]
            weight = made.delta.added_to(self._model, name, weight)
            if not made.delta.leaves(self._model, name, weight, weight, made.bits_after[name]):
                return None
            at = self._next(at + 1, name) or index
        if weight is not None:
            self._found[name] = (index, weight)
        return weight
