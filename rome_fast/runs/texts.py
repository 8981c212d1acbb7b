"""Text files that a user names."""

from pathlib import Path

from ..errors import ArgumentError


def read_text(file: Path) -> str:
    """A UTF-8 file; ArgumentError for one that cannot be read."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ArgumentError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{file}: is not UTF-8 text (byte {error.start}); convert it") from error


def read_sentences(file: Path) -> list[str]:
    """The lines of a UTF-8 file that are not blank; ArgumentError where there is none."""
    if sentences := [line for line in read_text(file).splitlines() if line.strip()]:
        return sentences
    raise ArgumentError(f"{file}: holds no sentence, wanted one a line")
