"""Renaming and copying files."""

import errno
import os

import pytest

from rome_fast.weights import files as files_module
from rome_fast.weights.files import copy_file, rename_new


class Unsupported:
    @staticmethod
    def renameat2(*_: object) -> int:
        files_module.ctypes.set_errno(errno.EINVAL)
        return -1


@pytest.mark.parametrize("library", [None, object(), Unsupported()])
def test_rename_new_never_replaces_content(library, tmp_path, monkeypatch):
    if library is not None:
        monkeypatch.setattr(files_module.ctypes, "CDLL", lambda *_, **__: library)
    for name in ("new", "full"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("full")
    for target in ("full", "file", "link"):
        with pytest.raises(FileExistsError):
            rename_new(tmp_path / "new", tmp_path / target)
    with pytest.raises(FileNotFoundError):
        rename_new(tmp_path / "new", tmp_path / "no" / "x")
    rename_new(tmp_path / "new", tmp_path / "fresh")
    assert {p.name for p in tmp_path.iterdir()} == {"fresh", "full", "file", "link"}
    assert os.listdir(tmp_path / "fresh") == ["new"]
    assert os.listdir(tmp_path / "full") == ["full"]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("already", [0, 1000])
def test_copy_goes_on_where_the_kernel_gave_up(code, already, tmp_path, monkeypatch):
    content = os.urandom(300_000)
    (tmp_path / "a").write_bytes(content)
    real, calls = os.copy_file_range, []

    def give_up(source: int, target: int, count: int) -> int:
        calls.append(count)
        if already and len(calls) == 1:
            return real(source, target, already)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", give_up)
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == content


def test_copy_without_copy_file_range(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "copy_file_range")
    (tmp_path / "a").write_bytes(b"content")
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"content"


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.EINVAL])
def test_copies_share_space_where_they_can(code, tmp_path, monkeypatch):
    """A file system that shares extents is asked first; one that cannot, says so in one of several ways."""
    content, asked = os.urandom(100_000), []
    (tmp_path / "a").write_bytes(content)

    def share(target: int, request: int, source: int) -> None:
        asked.append(request)
        os.pwrite(target, os.pread(source, len(content), 0), 0)

    monkeypatch.setattr(files_module.fcntl, "ioctl", share)
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    copy_file(tmp_path / "a", tmp_path / "shared")
    assert asked == [0x40049409]

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files_module.fcntl, "ioctl", refuse)
    copy_file(tmp_path / "a", tmp_path / "copied")
    assert (tmp_path / "shared").read_bytes() == (tmp_path / "copied").read_bytes() == content
