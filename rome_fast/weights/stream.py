"""A transformers model whose weights come from a checkpoint while it runs, under a budget of memory.

The model is a skeleton: its modules do the maths, on parameters that point into a buffer while a layer runs and are
on the meta device otherwise, so that a weight that is not there can only be an error. Rows of the input embedding are
read as they are asked for; the head and every layer are read as a whole, in one go, ahead of their use.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import CheckpointError, ModelError
from .checkpoint import Checkpoint
from .header import Header, TensorEntry
from .memory import anonymous_bytes, give_back
from .names import Run
from .plan import ALIGNMENT, Block, Part, Piece, Placement, aligned
from .reader import Files, Loader, OnRead, ReadAhead, view
from .turns import Task, Turns

_CHUNK_BYTES = 4 << 20
# Share of the budget from which on the allocator may keep nothing for itself. Letting go costs some 10 ms a layer.
_TIGHT = 0.75


class Stream:
    """Where the weights of a skeleton live, from the making of it until `close`.

    `layers` are those of `model`; `placement` says which of `parts.blocks` stay in memory on `device`. A forward pass
    of the model or of any layer finds its weights in place. Raises CheckpointError, also later, where reading fails.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: nn.ModuleList,
        parts: "Parts",
        placement: Placement,
        device: torch.device,
        on_read: OnRead | None,
    ) -> None:
        self.model, self.layers, self.placement = model, layers, placement
        self._parts = parts
        files = {part.header.path: part.header for place in parts.places.values() for part in place.parts}
        self._files = Files(files.values())
        self._loader = Loader(self._files, device)
        self._hooks: list[Any] = []
        self._bound: Block | None = None
        self._reader: ReadAhead | None = None
        self._turns: Turns | None = None
        self._initial_bytes = 0
        self._by_rows = True
        try:
            # Among them the edited one, which is written to: it shares memory with nothing that is read again.
            for name in parts.always:
                self._bind(name, self._read_whole(name))
            for index in sorted(placement.resident):
                block = parts.blocks[index]
                memory = self._loader.load(block)
                self._initial_bytes += block.size
                for piece in block.pieces:
                    self._bind(piece.parameter, view(memory, piece))
            if parts.tied and len(parts.blocks) - 1 in placement.resident:
                self._bind(parts.embedding, self.model.get_parameter(parts.blocks[-1].pieces[0].parameter).data)
                self._by_rows = False
            self._loader.finish()
            self._streamed = [
                block for i, block in enumerate(parts.blocks) if i not in placement.resident and block.pieces
            ]
            if self._streamed:
                self._reader = ReadAhead(self._loader, placement.buffer_bytes, on_read)
            self._hook(device)
        except BaseException:
            self.close()
            raise

    @property
    def bytes_read(self) -> int:
        """Of layers and head, until now."""
        return self._initial_bytes + (self._reader.bytes_read if self._reader else 0)

    @property
    def seconds_waited(self) -> float:
        """For which the computation stood still because a block was not there yet."""
        return self._reader.seconds_waited if self._reader else 0.0

    @property
    def rates(self) -> dict[str, Any]:
        """What was read until now and how fast, in bytes per second, for a report.

        `achieved` is while layers were read ahead, `source` that of the files alone (a disk, or the system's cache),
        `copies` that of one copy from pinned memory with nothing beside it, None where nothing is copied; `share` is
        the first of these over the slower of the other two.
        """
        rates, reader = self._loader.rates, self._reader
        achieved = reader.bytes_read / reader.seconds_reading if reader and reader.seconds_reading else None
        limits = [rate for rate in (rates.reading, rates.copying) if rate is not None]
        return {
            "bytes_read": self.bytes_read,
            "seconds_waited": self.seconds_waited,
            "achieved": achieved,
            "source": rates.reading,
            "copies": rates.copying,
            "share": achieved / min(limits) if achieved is not None and limits else None,
        }

    def expect_steps(self, start: int, stop: int) -> None:
        """Announce passes forward through layers start .. stop - 1, the head, and backward, again and again."""
        up = [self._parts.blocks[i] for i in range(start, stop)]
        order = [block for block in [*up, self._parts.blocks[-1], *reversed(up)] if block in self._streamed]
        if self._reader is not None and order:
            self._reader.expect(_again_and_again(order))

    def expect_passes(self, stop: int) -> None:
        """Announce passes forward through layers 0 .. stop - 1, again and again."""
        order = [block for block in self._parts.blocks[:stop] if block in self._streamed]
        if self._reader is not None and order:
            self._reader.expect(_again_and_again(order))

    def in_turn(self, tasks: Sequence[Task], most: int) -> None:
        """Run computations that need the model, as many at a time as hold on to `most` bytes, on each reading of it."""
        self._turns = Turns(tasks, most, len(self._parts.blocks))
        try:
            self._turns.run()
        finally:
            self._turns = None

    def elements(self, name: str, index: Tensor) -> Tensor:
        """Some elements, by flat index, of a parameter wherever it is; on the CPU in its dtype."""
        parameter = self.model.get_parameter(name)
        if name in self._parts.always or name not in self._parts.places:
            return parameter.detach().reshape(-1)[index.to(parameter.device)].cpu()
        place = self._parts.places[name]
        out = torch.empty(len(index), dtype=place.dtype, device="cpu")
        size = place.dtype.itemsize
        raw = out.view(torch.uint8).numpy().data
        for i, at in enumerate(index.tolist()):
            part = next(part for part in reversed(place.parts) if part.offset <= at * size)
            begin = part.entry.begin + at * size - part.offset
            self._files.read(part.header, begin, [raw[i * size : (i + 1) * size]])
        return out

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight once, a large embedding in several parts; each is valid until the next is asked for."""
        for name in self._parts.always:
            yield name, self.model.get_parameter(name).detach()
        for index, block in enumerate(self._parts.blocks):
            self.take(index)
            for piece in block.pieces:
                yield piece.parameter, self.model.get_parameter(piece.parameter).detach()
        if not self._parts.tied:
            name = self._parts.embedding
            header, entry = self._parts.whole(name)
            width = (entry.end - entry.begin) // max(entry.shape[0], 1)
            step = max(1, _CHUNK_BYTES // max(width, 1))
            for start in range(0, entry.shape[0], step):
                count = min(step, entry.shape[0] - start)
                rows = torch.empty(count, *entry.shape[1:], dtype=entry.dtype, device="cpu")
                raw = rows.view(-1).view(torch.uint8).numpy().data
                self._files.read(header, entry.begin + start * width, [raw])
                yield name, rows

    def close(self) -> None:
        """Stop reading and let go of everything but the weights an edit may have changed."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        if self._reader is not None:
            self._reader.close()
        self._loader.close()
        for block in self._parts.blocks:
            self._unbind(block)
        self._files.close()

    def _hook(self, device: torch.device) -> None:
        for index, block in enumerate(self._parts.blocks):
            if block not in self._streamed:
                continue
            module = self.layers[index] if index < len(self.layers) else self.model.get_output_embeddings()

            def take(_module: nn.Module, _args: Any, index: int = index) -> None:
                self.take(index)

            self._hooks.append(module.register_forward_pre_hook(take))
        if self._by_rows:
            name = self._parts.embedding
            _, entry = self._parts.whole(name)
            # In its place stands one number: it has a shape, a dtype and a device, but no weight.
            nothing = torch.full((1,) * len(entry.shape), torch.nan, dtype=entry.dtype, device=device)
            self._bind(name, nothing.expand(entry.shape))

            def look_up(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                ids, inverse = torch.unique(args[0], return_inverse=True)
                self._bind(name, self._rows(name, ids.tolist()).to(device))
                return (inverse, *args[1:])

            def forget(_module: nn.Module, _args: Any, _output: Tensor) -> None:
                self._bind(name, nothing.expand(entry.shape))

            embedding = self.model.get_input_embeddings()
            self._hooks.append(embedding.register_forward_pre_hook(look_up))
            self._hooks.append(embedding.register_forward_hook(forget, always_call=True))

    def take(self, index: int) -> None:
        """Have the weights of a block (a layer, or behind them the head) in place, until another is taken."""
        block = self._parts.blocks[index]
        if self._reader is None or block not in self._streamed:
            return

        if self._turns is not None and self._bound is not block:
            self._turns.wait(index)

        def following() -> Iterator[Block]:
            at = self._streamed.index(block)
            return _again_and_again([*self._streamed[at + 1 :], *self._streamed[: at + 1]])

        if self._bound is not None and self._bound is not block:
            self._unbind(self._bound)
        if self._loader.device.type == "cpu" and anonymous_bytes() > _TIGHT * self.placement.budget_bytes:
            give_back()
        memory = self._reader.take(block, following)
        self._bound = block
        for piece in block.pieces:
            self._bind(piece.parameter, view(memory, piece))

    def _read_whole(self, name: str) -> Tensor:
        block = Block.of(name, [self._parts.places[name]])
        return view(self._loader.load(block), block.pieces[0])

    def _rows(self, name: str, ids: Sequence[int]) -> Tensor:
        header, entry = self._parts.whole(name)
        rows = torch.empty(len(ids), *entry.shape[1:], dtype=entry.dtype, device="cpu")
        width = (entry.end - entry.begin) // entry.shape[0]
        raw = rows.view(-1).view(torch.uint8).numpy().data
        for i, row in enumerate(ids):
            if not 0 <= row < entry.shape[0]:
                raise ModelError(f"tokenizer: got token {row}, wanted ids below the model's {entry.shape[0]}")
            self._files.read(header, entry.begin + row * width, [raw[i * width : (i + 1) * width]])
        return rows

    def _bind(self, name: str, tensor: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        self.model.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def _unbind(self, block: Block) -> None:
        for piece in block.pieces:
            empty = torch.empty(piece.shape, dtype=piece.dtype, device="meta")
            self._bind(piece.parameter, empty)
        if block is self._bound:
            self._bound = None


class Parts:
    """The weights of a skeleton, sorted by how they are kept.

    `blocks` are the layers and, last, the head; `always` are names of weights that stay in memory: the edited ones and
    what is small; `embedding` is the name of the one that is read by rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: nn.ModuleList,
        checkpoint: Checkpoint,
        stored: Mapping[str, Sequence[Run]],
        edited: Collection[str],
    ) -> None:
        self.places: dict[str, Piece] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        name_of = {id(parameter): name for name, parameter in reversed(parameters.items())}
        faults = []
        for name, parameter in parameters.items():
            shape, parts = tuple(parameter.shape), []
            for run in stored[name_of[id(parameter)]]:
                if run.entry.dtype != parameter.dtype:
                    faults.append(f"{run.tensor} is {run.entry.dtype}, config.json says {parameter.dtype}")
                offset = run.row * math.prod(shape[-1:]) * run.entry.dtype.itemsize
                parts.append(Part(checkpoint.shards[checkpoint.shard_of(run.tensor)], run.entry, offset))
            self.places[name] = Piece(name, parameter.dtype, shape, tuple(parts))
            stored_shape = parts[0].entry.shape
            fits = stored_shape == shape if len(parts) == 1 else self.places[name].nbytes == parameter.nbytes
            if not fits:
                faults.append(f"{run.tensor} has shape {stored_shape}, config.json says {shape}")
        if faults:
            raise CheckpointError(
                f"{checkpoint.directory}: {'; '.join(faults[:5])}{' …' if len(faults) > 5 else ''}; save it with "
                "transformers in one dtype, or load it as a whole (with more memory)"
            )
        head = _name_of_weight(model, model.get_output_embeddings())
        embedding = _name_of_weight(model, model.get_input_embeddings())
        self.tied = parameters[head] is parameters[embedding]
        self.embedding = embedding
        in_layers = set()
        self.blocks = []
        for index, layer in enumerate(layers):
            own = [name_of[id(parameter)] for parameter in layer.parameters()]
            in_layers.update(own)
            self.blocks.append(Block.of(f"layer {index}", [self.places[n] for n in own if n not in edited]))
        self.blocks.append(Block.of("the head", [self.places[head]]))
        unique = set(name_of.values())
        self.always = sorted({*edited} | (unique - in_layers - {head, embedding}))

    def whole(self, name: str) -> tuple[Header, TensorEntry]:
        """Where a parameter lies that is one tensor of the files."""
        (part,) = self.places[name].parts
        return part.header, part.entry

    @property
    def always_bytes(self) -> int:
        return sum(aligned(self.places[name].nbytes) for name in self.always)


def align_(model: nn.Module) -> None:
    """Move weights on the CPU to aligned memory, where they are not.

    transformers maps files into memory, where a tensor begins at any byte. The results of some CPU kernels depend on
    that in the last bit, and an edit should not depend on how its model came into memory.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def _name_of_weight(model: PreTrainedModel, module: Any) -> str:
    for name, candidate in model.named_modules():
        if candidate is module:
            return f"{name}.weight"
    raise ModelError(f"model: {type(model).__name__} has no input embedding or head that can be read by itself")


def _again_and_again(blocks: Sequence[Block]) -> Iterator[Block]:
    """The blocks in their order without end; one that follows itself is there already and not named again."""
    if len(set(blocks)) == 1:
        yield blocks[0]
        return
    last = None
    for block in cycle(blocks):
        if block is not last:
            yield block
        last = block


def explain_rates(rates: Mapping[str, Any]) -> str:
    """What `Stream.rates` says, as a line for people."""

    def gigabytes(name: str) -> str:
        return f"{rates[name] / 1e9:.2f} GB/s"

    line = f"weights: {rates['bytes_read'] / 1e9:.2f} GB read"
    if rates["share"] is not None:
        limits = f"the files give {gigabytes('source')}"
        if rates["copies"] is not None:
            limits += f", copies {gigabytes('copies')}"
        line += f", ahead of the layers at {gigabytes('achieved')}, {rates['share']:.0%} of what there is ({limits})"
    return f"{line}; {rates['seconds_waited']:.1f} s of waiting for them"
