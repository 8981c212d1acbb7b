"""Writing files so that a crash, a full disk or a second writer leaves the old state or the new, no mixture.

Everything is built in a hidden sibling directory `.<name>.<random>.partial`, synced, and renamed into place.
Its writer holds a lock on that directory, which the system drops when the process dies: one that can be
locked belongs to nobody, and the next writer of the same target removes it. (A process id in the name would
say less: another container or host cannot judge it, and containers use the same ids again and again.)
POSIX only; on a file system without locks a dead writer's directory stays until it is removed by hand.
"""

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError

Content = bytes | Callable[[Path], None]
"""What goes into a file: its bytes, or a function that writes it at the path given."""

_CHUNK_BYTES = 64 << 20
_FICLONE = 0x40049409  # of Linux: share the source's extents until one of the files is written
_NOT_SUPPORTED = {
    errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTTY, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV,
}  # fmt: skip
_REMEDIES = {
    errno.ENOSPC: "; free some space and run again",
    errno.EDQUOT: "; free some space and run again",
    errno.EFBIG: "; raise the file size limit (ulimit -f) or choose another file system",
}


@contextmanager
def os_errors(doing: str) -> Iterator[None]:
    """Turn an OSError inside the block into a CheckpointError that begins with `doing` (verb and path)."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename is not None else ""
        remedy = _REMEDIES.get(error.errno or 0, "")
        raise CheckpointError(f"{doing}: {error.strerror or error}{where}{remedy}") from error


def is_plain_name(name: str) -> bool:
    """True for the name of a visible file in the directory itself: no separator, drive or leading dot."""
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\:\0")


def is_plain_path(name: str) -> bool:
    """True for the path of a visible file below the directory itself, plain names with `/` between them."""
    return all(map(is_plain_name, name.split("/")))


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex; raises CheckpointError."""
    with os_errors(f"reading {path}"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(directory: Path, needed: int) -> None:
    """Raise CheckpointError if the file system of `directory` has fewer than `needed` bytes free."""
    if (free := shutil.disk_usage(directory).free) < needed:
        raise CheckpointError(f"{directory}: {needed:,} bytes needed, {free:,} free; make room first")


def check_writable(directory: Path) -> None:
    """Raise CheckpointError unless the directory, or the first one above it that is there, can be written to."""
    place = directory.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    with os_errors(f"writing {directory}"):
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def sync(path: Path) -> None:
    """Force a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def copy_file(source: Path, target: Path) -> None:
    """Copy and sync the bytes (following symlinks), as shared extents or in the kernel where possible."""
    with open(source, "rb") as reader, open(target, "wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
            reader.seek(0, os.SEEK_END)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
        try:
            while os.copy_file_range(reader.fileno(), writer.fileno(), _CHUNK_BYTES):
                pass
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NOT_SUPPORTED:
                raise
        # Both files stand where the kernel stopped: this copies the rest, if there is any.
        shutil.copyfileobj(reader, writer, _CHUNK_BYTES)
        writer.flush()
        os.fsync(writer.fileno())
        if os.fstat(reader.fileno()).st_size != os.fstat(writer.fileno()).st_size:
            raise CheckpointError(f"{source} changed while it was copied; run again when it is at rest")


def link_file(source: Path, target: Path) -> None:
    """Give a file (following symlinks) a second name; CheckpointError where the two are on different file systems."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise CheckpointError(
                f"link: {source} cannot have a hard link at {target} ({error.strerror}); copy it"
            ) from error
        raise


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Nobody else changes the directory in this block; CheckpointError where somebody does already."""
    with os_errors(f"locking {directory}"):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _lock(descriptor) is False:
            raise CheckpointError(f"{directory}: another process is changing it; run again when that is done")
        yield
    finally:
        os.close(descriptor)


def lock_directory(directory: Path) -> int | None:
    """A descriptor that holds the lock on a directory until it is closed, or None where another process has it.

    On a file system without locks everybody gets one. Raises OSError for a directory that is not there.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    if _lock(descriptor) is False:
        os.close(descriptor)
        return None
    return descriptor


def write_file(path: Path, content: Content) -> None:
    """Write and sync a file that nobody else can see yet, in a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    sync(path)


def atomic_write(path: Path, content: Content) -> None:
    """Create or replace `path`: readers see the old file or the complete new one; raises CheckpointError."""
    with os_errors(f"writing {path}"), partial(path) as work:
        write_file(work / path.name, content)
        os.replace(work / path.name, path)
        sync(path.parent)


@contextmanager
def partial(target: Path) -> Iterator[Path]:
    """A new, locked, hidden directory beside `target` to build it in; removed at the end unless renamed."""
    _remove_abandoned(target)
    path, lock = _claim(target)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def rename_new(source: Path, target: Path) -> None:
    """Rename a directory that is not empty; FileExistsError if there is anything at `target`.

    Where the system has no exclusive rename the plain one is used. It replaces an empty directory but nothing
    else, so that even there only one of two writers wins and nothing is lost.
    """
    with suppress(AttributeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        at_cwd, no_replace = -100, 1
        if rename(at_cwd, os.fsencode(source), at_cwd, os.fsencode(target), no_replace) == 0:
            return
        if (code := ctypes.get_errno()) not in _NOT_SUPPORTED:
            raise OSError(code, os.strerror(code), str(target))
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        raise


def _claim(target: Path) -> tuple[Path, int]:
    while True:
        path = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
        path.mkdir()
        # Before it is locked another writer may take it for abandoned and remove it; then begin again.
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            if _lock(descriptor) is not False and path.exists():
                return path, descriptor
            os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """True: locked; False: somebody else holds the lock; None: the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_abandoned(target: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.partial")
    for name in filter(pattern.fullmatch, os.listdir(target.parent)):
        with suppress(OSError):
            descriptor = os.open(target.parent / name, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if _lock(descriptor):
                    shutil.rmtree(target.parent / name, ignore_errors=True)
            finally:
                os.close(descriptor)
