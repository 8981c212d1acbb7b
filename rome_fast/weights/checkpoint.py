"""safetensors checkpoints on disk: open and read them, write an edited copy, change one in place.

Nothing here maps a file into memory, unpickles, or writes into a file that has its name already. A change in place
builds the new files in a hidden folder of the checkpoint, the journal, and moves them over the old ones once all of
them are on the disk; a process killed before that leaves the old checkpoint, and one killed later leaves what the
next command completes (`recover`).
"""

import difflib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import ArgumentError, CheckpointError
from . import files
from .files import Content, os_errors
from .header import DTYPES, MAX_JSON_BYTES, Header, TensorEntry, read_header, read_tensor, unique_keys

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
JOURNAL = ".rome_fast.journal"
FOLDER = "rome_fast"
"""The folder in a checkpoint for what is kept beside an edit. What reads a checkpoint's files does not look into it."""
_MANIFEST = "manifest.json"
# Other forms of the same weights, which would still hold the unedited ones.
_OTHER_WEIGHTS = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".onnx_data", ".msgpack",
    ".h5", ".tflite",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A directory with `model.safetensors`, or with an index and shards; made by `Checkpoint.open`."""

    directory: Path
    shards: dict[str, Header]  # by file name
    entries: dict[str, TensorEntry]  # by tensor name, as is the next
    _shard_of: dict[str, str]

    @classmethod
    def open(cls, directory: Path | str) -> "Checkpoint":
        """Check the index and the header of every shard; raises CheckpointError."""
        directory = Path(directory)
        with os_errors(f"opening {directory}"):
            if not directory.is_dir():
                raise CheckpointError(f"{directory}: not a directory; wanted the directory of a checkpoint")
            # The same order as transformers: what it would load is what is edited.
            if os.path.lexists(directory / SINGLE):
                weight_map, names = {}, [SINGLE]
            elif os.path.lexists(directory / INDEX):
                weight_map = _read_index(directory / INDEX)
                names = sorted(set(weight_map.values()))
            else:
                raise CheckpointError(_no_weights(directory))
            if missing := [repr(name) for name in names if not (directory / name).is_file()]:
                raise CheckpointError(f"{directory}: {_some(missing)} missing; fetch the checkpoint again")
        shards = {name: read_header(directory / name) for name in names}
        entries: dict[str, TensorEntry] = {}
        shard_of: dict[str, str] = {}
        for shard, header in shards.items():
            if twice := [f"{name!r} ({shard_of[name]})" for name in header.tensors if name in shard_of]:
                raise CheckpointError(f"{directory}: {shard} has tensors of another shard: {_some(twice)}")
            entries |= header.tensors
            shard_of |= dict.fromkeys(header.tensors, shard)
        if lost := [f"{name!r} in {file}" for name, file in weight_map.items() if shard_of.get(name) != file]:
            raise CheckpointError(f"{directory}: {INDEX} lists tensors that are not there: {_some(lost)}")
        return cls(directory, shards, entries, shard_of)

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self.entries)

    def entry(self, name: str) -> TensorEntry:
        """A tensor's dtype, shape and place in its file; CheckpointError if there is no such tensor."""
        return self.shards[self.shard_of(name)].tensors[name]

    def shard_of(self, name: str) -> str:
        """The name of the file that holds a tensor; CheckpointError if there is no such tensor."""
        if name not in self._shard_of:
            raise CheckpointError(f"{self.directory}: {_unknown(name, self.entries)}")
        return self._shard_of[name]

    def read(self, name: str) -> torch.Tensor:
        """A tensor in fresh CPU memory, in the shape and dtype of the file; raises CheckpointError."""
        return read_tensor(self.shards[self.shard_of(name)], name)


Link = Literal["copy", "hard"]
"""How an edited copy comes by the shards that the edit does not touch; "hard" needs no space and the same disk."""


def write_edited(
    source: Path | str,
    out: Path | str,
    tensors: Mapping[str, torch.Tensor],
    extra_files: Mapping[str, Content],
    link: Link = "copy",
    *,
    remove: Sequence[str] = (),
) -> None:
    """Make `out`, a complete copy of the checkpoint directory `source` with the bytes of `tensors` replaced.

    Copied are the shards and the other visible files of the directory and its folders, but no other forms of
    the weights (`*.bin`, `*.gguf`, safetensors that are neither part of the checkpoint nor in `FOLDER`, …) and nothing
    named in `remove`. `extra_files` are added, by a name in the directory or a path in `FOLDER`, and may replace any
    copied file but the weights. All other bytes stay as they are. Copies share their space with the source where the
    file system can; with `link="hard"` shards without an edit, and safetensors in `FOLDER`, are the same files.

    `out` appears in one step when everything is on the disk, or not at all; the source is only read.
    ArgumentError: `out` exists or cannot be made there; a bad name in `extra_files`; an unknown `link`.
    CheckpointError: a damaged source; a tensor that is unknown or has another shape or dtype; a full disk.
    """
    source, out = Path(source), Path(out).absolute()
    check_link(link)
    checkpoint = Checkpoint.open(source)
    _check_out(source, out)
    _check_extra_names(checkpoint, extra_files, "extra_files")
    _check_extra_names(checkpoint, remove, "remove")
    groups = _by_shard(checkpoint, tensors)
    with os_errors(f"writing {out}"):
        originals = [path for path in _files_of(checkpoint) if str(path) not in {*extra_files, *remove}]
        linked = set()
        if link == "hard":
            own = {str(path) for path in originals if path.parts[0] == FOLDER and path.suffix == ".safetensors"}
            linked = own | (checkpoint.shards.keys() - groups.keys())
        added = sum(len(content) for content in extra_files.values() if isinstance(content, bytes))
        copied = sum((source / path).stat().st_size for path in originals if str(path) not in linked)
        files.require_space(out.parent, added + copied)
        with _appearing(out) as work:
            for path in originals:
                (work / path).parent.mkdir(parents=True, exist_ok=True)
                make = files.link_file if str(path) in linked else files.copy_file
                make(source / path, work / path)
            for shard, group in groups.items():
                _overwrite(work / shard, group)
            for name, content in extra_files.items():
                files.write_file(work / name, content)


def write_new(
    out: Path | str, write: Callable[[Path], None], extra_files: Mapping[str, Content], *, needed_bytes: int
) -> None:
    """Make `out`, a checkpoint of what `write` puts into the folder it is given and of `extra_files`.

    `out` appears in one step when everything is on the disk, or not at all.
    ArgumentError: `out` exists or cannot be made there; a bad name in `extra_files`. CheckpointError: a full disk, and
    what `write` leaves is no checkpoint.
    """
    out = Path(out).absolute()
    _check_out(None, out)
    with os_errors(f"writing {out}"):
        files.require_space(out.parent, needed_bytes)
        with _appearing(out) as work:
            write(work)
            for path in work.rglob("*"):
                if path.is_file():
                    # Readable by whom any new file is; safetensors makes its own readable by their owner alone.
                    path.chmod(work.stat().st_mode & 0o666)
                    files.sync(path)
            _check_extra_names(Checkpoint.open(work), extra_files, "extra_files")
            for name, content in extra_files.items():
                files.write_file(work / name, content)


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A hidden folder to build a checkpoint in, which then gets its name, its folders synced as its files are."""
    with files.partial(out) as work:
        yield work
        Checkpoint.open(work)
        _sync_folders(work)
        try:
            files.rename_new(work, out)
        except FileExistsError:
            raise ArgumentError(f"out: {out} appeared meanwhile; choose a new name") from None
        files.sync(out.parent)


def _sync_folders(top: Path) -> None:
    for folder in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
        files.sync(folder)
    files.sync(top)


def check_link(link: str) -> None:
    if link not in get_args(Link):
        raise ArgumentError(f"link: got {link!r}, wanted one of {', '.join(get_args(Link))}")


@contextmanager
def changing(directory: Path | str) -> Iterator[None]:
    """Hold a checkpoint for changes by this block alone, completing first what a killed process left.

    Raises CheckpointError where somebody else holds it.
    """
    directory = Path(directory)
    with files.locked(directory):
        with os_errors(f"completing the change of {directory} that was cut short"):
            _complete(directory)
        yield


def recover(directory: Path | str) -> list[str] | None:
    """Complete a change in place that was cut short; the names of the files that it removes, None where there was none.

    Raises CheckpointError.
    """
    directory = Path(directory)
    if not os.path.lexists(directory / JOURNAL):
        return None
    with files.locked(directory), os_errors(f"completing the change of {directory} that was cut short"):
        return _complete(directory)


def change(
    directory: Path | str,
    tensors: Mapping[str, torch.Tensor],
    *,
    extra_files: Mapping[str, Content] | None = None,
    remove: Sequence[str] = (),
) -> None:
    """Replace the bytes of `tensors` in a checkpoint, write `extra_files` into it and remove the files in `remove`.

    To be called inside `changing(directory)`. All of it happens or nothing, a kill at any moment included, once
    `recover` has run. Shards are replaced by changed copies, so that other names of the same file (links) keep theirs.
    Files are named in the directory, or by a path in `FOLDER`, whose folders come and go with what is in them.
    ArgumentError: a bad file name. CheckpointError: as in `write_edited`; the checkpoint is then as it was.
    """
    directory, added = Path(directory), dict(extra_files or {})
    checkpoint = Checkpoint.open(directory)
    _check_extra_names(checkpoint, remove, "remove")
    _check_extra_names(checkpoint, added, "extra_files")
    groups = _by_shard(checkpoint, tensors)
    with os_errors(f"changing {directory}"):
        files.require_space(directory, sum((directory / shard).stat().st_size for shard in groups))
        with files.partial(directory / JOURNAL.removeprefix(".")) as work:
            for shard, group in groups.items():
                files.copy_file(directory / shard, work / shard)
                _overwrite(work / shard, group)
                shutil.copymode(directory / shard, work / shard)
            for name, content in added.items():
                files.write_file(work / name, content)
            manifest = {"replace": [*groups, *added], "remove": list(remove)}
            files.write_file(work / _MANIFEST, json.dumps(manifest).encode())
            _sync_folders(work)
            # From here on the change is decided.
            files.rename_new(work, directory / JOURNAL)
            files.sync(directory)
        _complete(directory)


def restore_tensors(directory: Path | str, tensors: Mapping[str, torch.Tensor], *, remove: Sequence[str] = ()) -> None:
    """Put `tensors` back into a checkpoint made by `write_edited` and remove the files named in `remove`.

    All of it or nothing, as `change`. ArgumentError: a bad name in `remove`. CheckpointError: as in `write_edited`,
    and where another process is changing the directory.
    """
    with changing(directory):
        change(directory, tensors, remove=remove)


def _complete(directory: Path) -> list[str] | None:
    """Move the journal's files over the old ones; again and again ends the same way. The names of what it removes."""
    journal, removed = directory / JOURNAL, list[str]()
    if not os.path.lexists(journal):
        return None
    if (journal / _MANIFEST).exists():
        try:
            manifest = json.loads((journal / _MANIFEST).read_bytes())
            replaced, removed = [*manifest["replace"]], [*manifest["remove"]]
            if not all(isinstance(name, str) and _is_allowed(name) for name in [*replaced, *removed]):
                raise ValueError("a name in it is no plain file name")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{journal / _MANIFEST}: damaged ({error}); remove {journal}") from error
        _check_folder(directory)
        folders = sorted({(directory / name).parent for name in [*replaced, *removed]} | {directory}, reverse=True)
        for name in replaced:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            # What was moved already is not there any more.
            with suppress(FileNotFoundError):
                os.replace(journal / name, directory / name)
        for name in removed:
            (directory / name).unlink(missing_ok=True)
        for folder in folders:
            if folder.is_dir():
                files.sync(folder)
        for name in removed:
            for folder in (directory / name).parents:
                if folder == directory or not folder.is_dir() or any(folder.iterdir()):
                    break
                folder.rmdir()
        files.sync(directory)
        # Without its manifest a journal is done with.
        (journal / _MANIFEST).unlink()
        files.sync(journal)
    shutil.rmtree(journal)
    files.sync(directory)
    return removed


def save_tensors(path: Path | str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Create or replace one safetensors file in one step; raises CheckpointError."""
    path, ready, storages = Path(path), {}, set()
    for name, tensor in tensors.items():
        if name == "__metadata__" or tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided:
            raise CheckpointError(f"writing {path}: safetensors cannot hold {name!r}, {tensor.layout} {tensor.dtype}")
        tensor = tensor.detach().cpu().contiguous()
        # save_file refuses tensors that share memory.
        if (storage := tensor.untyped_storage().data_ptr()) in storages:
            tensor = tensor.clone()
        storages.add(storage)
        ready[name] = tensor

    def write(temporary: Path) -> None:
        try:
            # None: for no tensors and empty metadata save_file writes broken JSON.
            save_file(ready, temporary, dict(metadata) or None)
        except (SafetensorError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"writing {path}: {error}") from error
        # save_file makes it readable by its owner only; give it the mode of any new file.
        temporary.chmod(temporary.parent.stat().st_mode & 0o666)
        read_header(temporary)

    files.atomic_write(path, write)


def load_tensors(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and the metadata of one safetensors file, its header checked; raises CheckpointError."""
    header = read_header(path)
    return {name: read_tensor(header, name) for name in header.tensors}, header.metadata


def _read_index(path: Path) -> dict[str, str]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: damaged index: larger than {MAX_JSON_BYTES:,} bytes; fetch it again")
    try:
        index = json.loads(path.read_bytes().decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged index: {error}; fetch it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: damaged index: no weight_map; fetch it again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not files.is_plain_name(shard) or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path}: damaged index: {str(shard)[:200]!r} is no plain file name")
    return weight_map


def _no_weights(directory: Path) -> str:
    if any(directory.glob("pytorch_model*.bin")):
        return (
            f"{directory}: there is only pytorch_model*.bin, a pickle, which can run code when it is opened; "
            "rome_fast reads safetensors only. If you trust it, convert it once: transformers."
            f"AutoModelForCausalLM.from_pretrained({str(directory)!r})"
            ".save_pretrained(NEW_DIRECTORY, safe_serialization=True)"
        )
    return f"{directory}: neither {SINGLE} nor {INDEX}; wanted the directory of a safetensors checkpoint"


def _check_out(source: Path | None, out: Path) -> None:
    if os.path.lexists(out):
        raise ArgumentError(f"out: {out} exists and nothing is ever overwritten; choose a new name")
    if not out.parent.is_dir():
        raise ArgumentError(f"out: the directory {out.parent} does not exist; make it first")
    if source is not None and out.parent.resolve().is_relative_to(source.resolve()):
        raise ArgumentError(f"out: {out} lies inside the source, which is only read; choose another place")


def _check_extra_names(checkpoint: Checkpoint, names: Iterable[str], argument: str) -> None:
    for name in names:
        if not _is_allowed(name) or name in {FOLDER, INDEX, *checkpoint.shards}:
            raise ArgumentError(f"{argument}: got {name!r}, wanted a plain, visible file name other than the weights")
        if "/" in name:
            _check_folder(checkpoint.directory)


def _is_allowed(name: str) -> bool:
    """A file in the directory itself, or in the folder that is ours."""
    return files.is_plain_name(name) or (files.is_plain_path(name) and name.startswith(f"{FOLDER}/"))


def _check_folder(directory: Path) -> None:
    """What is written below our folder must not end up elsewhere."""
    folder = directory / FOLDER
    for path in (folder, *(folder.iterdir() if folder.is_dir() else ())):
        if path.is_symlink() or (path == folder and path.exists() and not path.is_dir()):
            raise CheckpointError(f"{path}: wanted a folder, in which edits are recorded; remove or rename this one")


def _check_tensors(place: Path, entries: Mapping[str, TensorEntry], tensors: Mapping[str, torch.Tensor]) -> None:
    faults = []
    for name, tensor in tensors.items():
        got = (tensor.dtype, tuple(tensor.shape))
        if (entry := entries.get(name)) is None:
            faults.append(_unknown(name, entries))
        elif got != (entry.dtype, entry.shape):
            faults.append(f"{name!r} is {entry.dtype} {entry.shape} there, got {got[0]} {got[1]}")
    if faults:
        raise CheckpointError(f"{place}: {_some(faults)}")


def _unknown(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known))
    return f"no tensor {name!r}" + (f" (did you mean {', '.join(close)}?)" if close else "")


def _some(items: Sequence[str], limit: int = 10) -> str:
    return "; ".join(items[:limit]) + (f"; and {len(items) - limit} more" if len(items) > limit else "")


def _files_of(checkpoint: Checkpoint) -> list[Path]:
    """What belongs to a checkpoint, relative to its directory."""
    top = checkpoint.directory
    weights = set(checkpoint.shards) if SINGLE in checkpoint.shards else {*checkpoint.shards, INDEX}
    wanted: list[Path] = []

    def walk(folder: Path, above: tuple[Path, ...]) -> None:
        if folder.resolve() in above:
            raise CheckpointError(f"{folder}: links to a folder it is in; remove the link")
        for path in sorted(folder.iterdir()):
            is_weight = folder == top and path.name in weights
            if not is_weight and path.name.startswith("."):
                continue
            if path.is_dir():
                walk(path, (*above, folder.resolve()))
            elif is_weight or not path.name.endswith(_OTHER_WEIGHTS) or path.relative_to(top).parts[0] == FOLDER:
                wanted.append(path)

    walk(top, ())
    if dangling := [str(path.relative_to(top)) for path in wanted if not path.exists()]:
        raise CheckpointError(f"{top}: links to nothing: {_some(dangling)}; fetch it again")
    return [path.relative_to(top) for path in wanted if path.is_file()]


def _by_shard(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    _check_tensors(checkpoint.directory, checkpoint.entries, tensors)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(checkpoint.shard_of(name), {})[name] = tensor
    return groups


def _overwrite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    # A private copy; its header is read anew in case the source was replaced before it was copied.
    header = read_header(path)
    _check_tensors(path, header.tensors, tensors)
    with path.open("r+b") as file:
        for name, tensor in tensors.items():
            file.seek(header.data_start + header.tensors[name].begin)
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
