"""A long run in parts, each a file that appears whole or not at all, so that a killed run goes on where it was."""

import json
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..weights.files import atomic_write

CONDITIONS = "conditions.json"


class Parts:
    """The folder of one run. Raises ArgumentError where it belongs to another run, or to something else.

    `what` is the verb; `conditions` are everything that its figures depend on.
    """

    def __init__(self, directory: Path, what: str, conditions: dict[str, Any]) -> None:
        self.directory = directory
        self.conditions = conditions = json.loads(json.dumps({"run": what, **conditions}))
        file = directory / CONDITIONS
        if directory.exists() and not file.exists() and any(directory.iterdir()):
            raise ArgumentError(
                f"out: {directory} exists and is not of an earlier run of rome-fast {what}; choose another"
            )
        if file.exists():
            old = json.loads(file.read_text(encoding="utf-8"))
            if other := [key for key, value in conditions.items() if old.get(key) != value]:
                raise ArgumentError(
                    f"out: {directory} is of a run of rome-fast {what} with other {', '.join(other)}; give another "
                    "folder, or the arguments of that run"
                )
        (directory / "parts").mkdir(parents=True, exist_ok=True)
        if not file.exists():
            self.write(CONDITIONS, conditions)

    def get(self, name: str) -> Any:
        """What was kept under a name; None where nothing was."""
        file = self._file(name)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def keep(self, name: str, value: Any) -> Any:
        """Keep a JSON value; returns it as `get` will."""
        text = json.dumps(value, ensure_ascii=False)
        atomic_write(self._file(name), text.encode())
        return json.loads(text)

    def write(self, name: str, value: Any) -> Path:
        """A file for readers, beside the parts."""
        file = self.directory / name
        atomic_write(file, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
        return file

    def _file(self, name: str) -> Path:
        return self.directory / "parts" / f"{name}.json"
