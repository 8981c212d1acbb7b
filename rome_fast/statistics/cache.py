"""What is in the cache of statistics, and removing what nobody can use."""

import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArgumentError, CheckpointError, StatisticsError
from ..models.fingerprint import Fingerprint
from ..weights import read_header
from ..weights.files import lock_directory, os_errors
from .snapshots import PATTERN
from .store import FIRST_TOKENS, FORMAT, statistics_cache


@dataclass(frozen=True)
class CachedLayer:
    """One file of the cache."""

    file: Path
    size_bytes: int
    layer: int = -1
    tokens: int = 0
    model: str = ""  # its fingerprint
    width: int = 0  # d_ff
    first_tokens: bool = False  # C₁ of the vocabulary in place of C of a corpus
    problem: str = ""  # why it cannot be used; then the fields above are unknown


def list_cache() -> list[CachedLayer]:
    """All layers in the cache, by folder and layer; only headers are read."""
    files = (file for kind in ("layer", "first-tokens") for file in statistics_cache().glob(f"*/{kind}-*.safetensors"))
    return sorted(map(_cached, files), key=lambda entry: (entry.file.parent, entry.layer, entry.first_tokens))


def prune_cache(names: Iterable[str] = ()) -> list[Path]:
    """Remove the named folders of the cache, or by default damaged files and what interrupted runs left.

    Returns what was removed; snapshots of a run that is still at work, and folders with such, are not. Raises
    ArgumentError, before anything is removed, for a name that is not in the cache, CheckpointError where something
    cannot be removed.
    """
    cache = statistics_cache()
    removed: list[Path] = []
    names = list(names)
    if names:
        known = sorted(folder.name for folder in cache.glob("*/"))
        if unknown := [name for name in names if name not in known]:
            raise ArgumentError(
                f"prune: got {', '.join(unknown)}, wanted some of {', '.join(known) or 'nothing'} in {cache}"
            )
        removed = [cache / name for name in names]
    else:
        removed = [entry.file for entry in list_cache() if entry.problem]
        removed += sorted(cache.glob(f"*/{PATTERN}"))
        removed += sorted(cache.glob("*/.*.partial"))
    with ExitStack() as locks:
        removed = [path for path in removed if not _at_work(path, locks)]
        for path in removed:
            with os_errors(f"removing {path}"):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    for folder in cache.glob("*/"):
        with suppress(OSError):
            folder.rmdir()
    return removed


def _at_work(path: Path, locks: ExitStack) -> bool:
    """Whether a process is writing there; where none is, none begins to until `locks` are given back."""
    folders = [path, *path.glob("rank-*/"), *path.glob(f"{PATTERN}/rank-*/"), *path.glob(".*.partial/")]
    for folder in folders:
        if folder.is_dir():
            with os_errors(f"locking {folder}"):
                lock = lock_directory(folder)
            if lock is None:
                return True
            locks.callback(os.close, lock)
    return False


def _cached(file: Path) -> CachedLayer:
    size = file.stat().st_size
    try:
        header = read_header(file)
        if header.metadata.get("format") not in (FORMAT, FIRST_TOKENS):
            raise StatisticsError("not second moments of rome_fast")
        fingerprint = Fingerprint.from_json(header.metadata["fingerprint"])
        return CachedLayer(
            file,
            size,
            int(header.metadata["layer"]),
            int(header.metadata["tokens"]),
            str(fingerprint),
            fingerprint.key_size,
            header.metadata["format"] == FIRST_TOKENS,
        )
    except (CheckpointError, StatisticsError, KeyError, ValueError, TypeError) as error:
        return CachedLayer(file, size, problem=str(error) or type(error).__name__)
