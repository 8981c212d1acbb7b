"""Where weights live: safetensors checkpoints on disk, and as much of one in memory as a budget allows."""

from .checkpoint import (
    FOLDER,
    Checkpoint,
    Link,
    change,
    changing,
    check_link,
    load_tensors,
    recover,
    restore_tensors,
    save_tensors,
    write_edited,
    write_new,
)
from .header import Header, TensorEntry, read_header
from .names import stored_name, stored_runs
from .plan import Placement, parse_bytes, place
from .reader import OnRead
from .stream import Parts, Stream, align_, explain_rates
from .turns import Task

__all__ = [
    "FOLDER",
    "Checkpoint",
    "Header",
    "Link",
    "OnRead",
    "Parts",
    "Placement",
    "Stream",
    "Task",
    "TensorEntry",
    "align_",
    "change",
    "changing",
    "check_link",
    "explain_rates",
    "load_tensors",
    "parse_bytes",
    "place",
    "read_header",
    "recover",
    "restore_tensors",
    "save_tensors",
    "stored_name",
    "stored_runs",
    "write_edited",
    "write_new",
]
