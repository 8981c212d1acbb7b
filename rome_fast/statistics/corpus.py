"""Where texts come from: files, folders of files, data sets. Everything is read as it is wanted, never whole."""

import importlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArgumentError

MAX_CHARACTERS = 1 << 20
"""Longer documents are cut, so that no more than this is tokenised at once."""

_JSON_LINES = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class Corpus:
    """Texts in files: JSON lines (*.jsonl, *.ndjson, *.json), or plain text with blank lines between documents."""

    files: tuple[Path, ...]
    field: str = "text"  # of a JSON object

    @classmethod
    def open(cls, *places: str | Path, field: str = "text") -> "Corpus":
        """Files, and folders with all their visible files (recursively, sorted by path), in the order given.

        Raises ArgumentError for a place that is not there and a folder without a file.
        """
        files: list[Path] = []
        for place in map(Path, places):
            if place.is_dir():
                found = [file for file in place.rglob("*") if file.is_file() and not _hidden(file.relative_to(place))]
                if not found:
                    raise ArgumentError(f"corpus: the folder {place} holds no file; wanted text or JSON lines in it")
                files += sorted(found, key=lambda file: file.relative_to(place).parts)
            else:
                # Also finds out, before a model is loaded, whether it can be read.
                _open(place).close()
                files.append(place)
        if not files:
            raise ArgumentError("corpus: got no file, wanted at least one")
        return cls(tuple(files), field)

    def __iter__(self) -> Iterator[str]:
        """The documents. Raises ArgumentError for a file that cannot be read, is not UTF-8 or not JSON lines."""
        for file in self.files:
            yield from self._json_lines(file) if file.suffix.lower() in _JSON_LINES else _paragraphs(file)

    def _json_lines(self, file: Path) -> Iterator[str]:
        for number, line in enumerate(_lines(file), 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[self.field]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ArgumentError(
                    f'{file}, line {number}: wanted a JSON object with a "{self.field}" field on every line'
                ) from error
            if not isinstance(text, str):
                raise ArgumentError(
                    f'{file}, line {number}: got {type(text).__name__} as "{self.field}", wanted a string'
                )
            yield text


def hub_dataset(name: str, split: str = "train") -> Iterable[Any]:
    """A data set of the Hugging Face hub, streamed: `owner/name`, or `owner/name:config` where it has several.

    Raises ArgumentError where the package `datasets` is missing or cannot deliver that data set.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ArgumentError(
            f"dataset: {name} needs the package datasets, which is not installed; pip install datasets"
        ) from error
    repository, _, config = name.partition(":")
    try:
        streamed: Iterable[Any] = datasets.load_dataset(repository, config or None, split=split, streaming=True)
    # The package raises nearly anything: its own errors, those of the hub, of the network and of file formats.
    except Exception as error:
        raise ArgumentError(
            f"dataset: got {name!r}, split {split!r}, which cannot be loaded ({type(error).__name__}: {error}); "
            "wanted owner/name or owner/name:config"
        ) from error
    return streamed


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _open(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise ArgumentError(f"{file}: cannot be read ({error.strerror})") from error


def _lines(file: Path) -> Iterator[str]:
    offset = 0
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ArgumentError(
                    f"{file}: is not UTF-8 text (byte {offset + error.start}, line {number}); convert it"
                ) from error
            offset += len(line)
            text = text.removeprefix("\ufeff") if number == 1 else text
            yield text.removesuffix("\n").removesuffix("\r")


def _paragraphs(file: Path) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for line in _lines(file):
        if line.strip():
            lines.append(line)
            size += len(line)
        if lines and (not line.strip() or size >= MAX_CHARACTERS):
            yield "\n".join(lines)
            lines, size = [], 0
    if lines:
        yield "\n".join(lines)
