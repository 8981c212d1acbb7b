"""Every error that rome_fast raises on purpose.

A message names the argument, what came, what was wanted and the remedy. Each class also derives from the builtin that
a caller would expect, so `except ValueError` keeps working for code that does not know this package.
"""

import reprlib

_REPR = reprlib.Repr()
_REPR.maxstring = 200


def quoted(text: object) -> str:
    """As a message quotes what a user wrote: of a text that is very long, both ends."""
    return _REPR.repr(text)


class RomeFastError(Exception):
    """Base of the family: catch this one to catch everything rome_fast raises on purpose."""


class EditError(RomeFastError, ValueError):
    """A request cannot be carried out as written (template, subject, target, edits file)."""


class ArgumentError(RomeFastError, ValueError):
    """An argument other than a request is unusable (method, layer, dtype, output path)."""


class ModelError(RomeFastError, ValueError):
    """The model or its tokenizer cannot be edited (architecture, non-finite weights, no offsets)."""


class StatisticsError(RomeFastError, ValueError):
    """Second-moment statistics are missing, unusable or belong to another model, layer or width."""


class CheckpointError(RomeFastError, OSError):
    """A checkpoint, delta or statistics file is missing, damaged or cannot be written."""


class CollapseError(RomeFastError, RuntimeError):
    """The guard found an edit that would collapse the model; nothing was written."""


class ConvergenceError(RomeFastError, RuntimeError):
    """The optimisation of a value failed (non-finite loss, or the target was never reached)."""


class DistributedError(RomeFastError, RuntimeError):
    """Another process of the same run has ended early."""
