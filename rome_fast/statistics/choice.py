"""What `rome-fast tune` found for a model, kept in the folder of its statistics."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from ..errors import CheckpointError, StatisticsError
from ..models.fingerprint import Fingerprint
from ..models.runner import Runner
from ..search.values import ValueSettings
from ..weights.files import atomic_write, os_errors

CHOICE_FILE = "tuned.json"
FORMAT = "rome_fast choice 1"


@dataclass(frozen=True)
class Choice:
    """The layer and settings to edit one model with."""

    layer: int
    settings: ValueSettings
    fingerprint: Fingerprint  # of the model at that layer
    made: str  # date and time in UTC, ISO 8601: of several, the last one counts
    figures: dict[str, Any] = field(default_factory=dict)  # what was measured with them, for the reader

    def may_be_of(self, config: PretrainedConfig) -> bool:
        """Whether this was found for a model of these sizes, which is all that can be said before weights are read."""
        text = config.get_text_config()
        return self.fingerprint.shape[1:3] == (text.num_hidden_layers, text.hidden_size)

    def is_of(self, runner: Runner) -> bool:
        """Whether this was found for the very model, edited since or not."""
        # Sizes first: a fingerprint reads from every layer up to its own.
        if not self.may_be_of(runner.model.config):
            return False
        return self.fingerprint.matches(Fingerprint.of(runner, self.layer), but_for_edits=True)

    def save(self, directory: Path) -> None:
        """Replace the folder's choice in one step; CheckpointError where that fails."""
        document = {
            "format": FORMAT,
            "layer": self.layer,
            "settings": asdict(self.settings),
            "fingerprint": json.loads(self.fingerprint.to_json()),
            "made": self.made,
            "figures": self.figures,
        }
        with os_errors(f"writing {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
        atomic_write(directory / CHOICE_FILE, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, directory: Path) -> "Choice | None":
        """The choice of a folder of statistics, None where there is none; StatisticsError for a damaged one."""
        file = directory / CHOICE_FILE
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}")
            return cls(
                layer=int(found["layer"]),
                settings=ValueSettings(**found["settings"]),
                fingerprint=Fingerprint.from_json(json.dumps(found["fingerprint"])),
                made=str(found["made"]),
                figures=dict(found["figures"]),
            )
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
        except (KeyError, ValueError, TypeError) as error:
            raise StatisticsError(
                f"statistics: {file} is no choice of rome-fast tune ({error}); remove it, or run rome-fast tune again"
            ) from error


def cached_choices(cache: Path) -> list[Choice]:
    """All choices in a cache of statistics, the last one first."""
    found = []
    for file in sorted(cache.glob(f"*/{CHOICE_FILE}")):
        try:
            choice = Choice.load(file.parent)
        except (CheckpointError, StatisticsError):
            continue  # one that cannot be read is of a model that nobody can name
        if choice is not None:
            found.append(choice)
    return sorted(found, key=lambda choice: choice.made, reverse=True)
