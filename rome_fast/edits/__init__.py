"""What a user asks for, and the file shapes it is read from."""

from .edit import Edit, find_conflicts
from .reading import load_edits

__all__ = ["Edit", "find_conflicts", "load_edits"]
