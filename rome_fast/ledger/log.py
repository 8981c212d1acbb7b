"""An append-only file of JSON lines, each with a checksum over itself and the line before it.

A line counts once it is whole and synced. What a killed writer left of one, at the end of the file, is no line: readers
do not see it, and the next writer cuts it off.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..weights.files import atomic_write, os_errors, sync

_CHECK = "check"


class Log:
    """The lines of one file, read anew whenever they are asked for; writers have to keep each other out."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> list[dict[str, Any]]:
        """All lines, the oldest first, without their checksums; CheckpointError where one is damaged."""
        return self._read()[0]

    def append(self, fields: Mapping[str, Any]) -> None:
        """Add a line and sync it. Raises CheckpointError; the file then ends as before, perhaps with a torn line."""
        _, size, check = self._read()
        with os_errors(f"writing {self.file}"):
            descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND)
            try:
                os.ftruncate(descriptor, size)
                rest = memoryview(_line(fields, check))
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def restart(self, fields: Mapping[str, Any] | None = None) -> None:
        """Replace the file, in one step, by one of this line only, or of none."""
        atomic_write(self.file, b"" if fields is None else _line(fields, ""))
        sync(self.file.parent)

    def _read(self) -> tuple[list[dict[str, Any]], int, str]:
        """The lines, how many bytes they take, and the checksum of the last."""
        with os_errors(f"reading {self.file}"):
            data = self.file.read_bytes()
        found: list[dict[str, Any]] = []
        size, check = 0, ""
        # What follows the last line end is nothing, or torn.
        for number, line in enumerate(data.split(b"\n")[:-1], 1):
            fields = _parsed(line)
            if fields is None or fields.pop(_CHECK) != (check := _check(fields, check)):
                raise CheckpointError(
                    f"{self.file}, line {number}: damaged, or not behind the line before it; restore the file from a "
                    "copy, or cut it off before that line to go on from the state that this leaves"
                )
            found.append(fields)
            size += len(line) + 1
        return found, size, check


def _line(fields: Mapping[str, Any], before: str) -> bytes:
    return (_dumped({**fields, _CHECK: _check(fields, before)}) + "\n").encode()


def _check(fields: Mapping[str, Any], before: str) -> str:
    return hashlib.sha256((before + _dumped(fields)).encode()).hexdigest()


def _dumped(fields: Mapping[str, Any]) -> str:
    # Sorted, so that what is read back gives the same text.
    return json.dumps(fields, ensure_ascii=False, sort_keys=True, allow_nan=False)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) and _CHECK in fields else None
