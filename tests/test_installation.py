"""The wheel and the native kernels in it: built through cmake where there is one, left out where there is none."""

import ctypes
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from rome_fast.kernels import native

ROOT = Path(__file__).parents[1]
COMPILERS = ("c++", "g++", "clang++")
LIBRARY = f"rome_fast/kernels/native/{native.LIBRARY.name}"

pytest.importorskip("setuptools", "77", reason="without setuptools a wheel is built in isolation, with downloads")
needs_cmake = pytest.mark.skipif(
    not (shutil.which("cmake") and any(map(shutil.which, COMPILERS))), reason="needs cmake and a C++ compiler"
)


@pytest.fixture
def sources(tmp_path):
    """A copy of what a wheel is made of, without anything that was built in the repository."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("kernels", "rome_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def wheel(sources, **environment):
    """(path of the wheel, what its build said)"""
    out = sources / "wheels"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(out), str(sources)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = out.glob("*.whl")
    return path, done.stdout + done.stderr


@needs_cmake
def test_a_wheel_with_kernels_fits_every_python_and_its_kernels_pass_their_test(sources, tmp_path):
    path, _ = wheel(sources)
    python, abi, platform = path.stem.split("-")[-3:]
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".cpp", ".h"))]
        library = ctypes.CDLL(archive.extract(LIBRARY, tmp_path))
    assert library.rome_fast_native_version() == native.VERSION
    # The test of its own, in C++, from what is built already.
    (build,) = sources.glob("build/temp*/native")
    shutil.copytree(ROOT / "tests" / "native", sources / "tests" / "native")
    for command in (["cmake", "-DBUILD_TESTING=ON", "."], ["cmake", "--build", "."], ["ctest", "--output-on-failure"]):
        done = subprocess.run(command, cwd=build, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert "100% tests passed, 0 tests failed out of 1" in done.stdout


@pytest.mark.parametrize("lacking", ["cmake", pytest.param("a compiler", marks=needs_cmake)])
def test_without_the_tools_the_wheel_has_no_kernels_and_says_what_is_slower(sources, tmp_path, lacking):
    tools = tmp_path / "tools"
    tools.mkdir()
    if lacking == "a compiler":
        (tools / "cmake").symlink_to(str(shutil.which("cmake")))
    # One left by an earlier build must not go into the wheel.
    stale = sources / "build" / "lib" / LIBRARY
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of another version")
    path, said = wheel(sources, PATH=str(tools), CXX="")
    assert path.stem.endswith("-py3-none-any")
    (line,) = (line for line in said.splitlines() if "rome_fast: no native kernels" in line)
    assert "second moments and 16-bit updates are slower on a CPU" in line
    with zipfile.ZipFile(path) as archive:
        assert LIBRARY not in archive.namelist()
        assert "rome_fast/kernels/native/__init__.py" in archive.namelist()
