"""Where weights live: safetensors checkpoints on disk."""

from .checkpoint import Checkpoint, load_tensors, restore_tensors, save_tensors, write_edited
from .header import Header, TensorEntry, read_header

__all__ = [
    "Checkpoint",
    "Header",
    "TensorEntry",
    "load_tensors",
    "read_header",
    "restore_tensors",
    "save_tensors",
    "write_edited",
]
