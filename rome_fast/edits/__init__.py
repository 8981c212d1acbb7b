"""What a user asks for, and the file shapes it is read from."""

from .edit import Edit, Probe, asked_edits, checked_edits, find_conflicts
from .reading import (
    DuplicateEditsWarning,
    EditsFileWarning,
    SkippedEditsWarning,
    UnreadFieldsWarning,
    load_edits,
)

__all__ = [
    "DuplicateEditsWarning",
    "Edit",
    "EditsFileWarning",
    "Probe",
    "SkippedEditsWarning",
    "UnreadFieldsWarning",
    "asked_edits",
    "checked_edits",
    "find_conflicts",
    "load_edits",
]
