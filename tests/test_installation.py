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


def copy_of_sources(folder):
    """What a wheel is made of, without anything that was built in the repository."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("kernels", "rome_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


@pytest.fixture
def sources(tmp_path):
    return copy_of_sources(tmp_path / "sources")


@pytest.fixture(scope="module")
def with_kernels(tmp_path_factory):
    """(path of a wheel with kernels, folder of the sources it was built from): building it takes longest here."""
    sources = copy_of_sources(tmp_path_factory.mktemp("built") / "sources")
    return wheel(sources)[0], sources


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


def install(path, folder, python=sys.executable):
    """What the wheel holds, as pip of that Python lays it out in `folder`."""
    options = ("--no-deps", "--no-index", "--no-compile", "--target", str(folder))
    command = [python, "-m", "pip", "install", *options, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def said_by(code, folder, python=sys.executable):
    """What a program says that finds the package in `folder` only, away from the repository."""
    done = subprocess.run(
        [python, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": str(folder), "ROME_FAST_KERNELS": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


SUM = """
import torch, rome_fast
from rome_fast.kernels import native, second_moment_
print(rome_fast.__file__, native.obstacle() is None, second_moment_(torch.zeros(1, 1), torch.ones(3, 1)).item())
"""


@needs_cmake
def test_a_wheel_with_kernels_fits_every_python_and_its_kernels_pass_their_test(with_kernels, tmp_path):
    path, sources = with_kernels
    python, abi, platform = path.stem.split("-")[-3:]
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".cpp", ".h"))]
        library = ctypes.CDLL(archive.extract(LIBRARY, tmp_path))
    assert library.rome_fast_native_version() == native.VERSION
    install(path, tmp_path / "installed")
    where, has_kernels, total = said_by(SUM, tmp_path / "installed")
    assert Path(where).is_relative_to(tmp_path)
    assert (has_kernels, total) == ("True", "3.0")
    # The test of its own, in C++, from what is built already.
    (build,) = sources.glob("build/temp*/native")
    shutil.copytree(ROOT / "tests" / "native", sources / "tests" / "native")
    for command in (["cmake", "-DBUILD_TESTING=ON", "."], ["cmake", "--build", "."], ["ctest", "--output-on-failure"]):
        done = subprocess.run(command, cwd=build, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert "100% tests passed, 0 tests failed out of 1" in done.stdout


# Without a compiler is the same to a reader of the wheel: seldom asked, `make acceptance` does.
@pytest.mark.parametrize("lacking", ["cmake", pytest.param("a compiler", marks=[needs_cmake, pytest.mark.slow])])
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
    install(path, tmp_path / "installed")
    where, has_kernels, total = said_by(SUM, tmp_path / "installed")
    assert Path(where).is_relative_to(tmp_path)
    assert (has_kernels, total) == ("False", "3.0")


def another_python():
    """Python 3.12 with pip, or 3.11 where this is another one; skips the test where there is none."""
    version = "3.12" if sys.version_info[:2] == (3, 11) else "3.11"
    of_pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for python in (f"python{version}", *map(str, of_pyenv.glob(f"{version}.*/bin/python"))):
        # Not every program of that name on a PATH runs.
        if (
            shutil.which(python)
            and not subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode
        ):
            return python
    pytest.skip(f"no python{version} with pip is on this machine")


LOAD = f"""
import compileall, ctypes, importlib.metadata
library = ctypes.CDLL("./{LIBRARY}")
print(compileall.compile_dir("rome_fast", quiet=1), library.rome_fast_native_version())
print(importlib.metadata.version("rome-fast"))
"""


@needs_cmake
def test_the_same_wheel_is_for_another_version_of_python(with_kernels, tmp_path):
    """As far as that goes without torch, which no test fetches: all of it compiles, and the kernels load."""
    python, path = another_python(), with_kernels[0]
    install(path, tmp_path / "installed", python)
    assert said_by(LOAD, tmp_path / "installed", python) == ["True", str(native.VERSION), path.stem.split("-")[1]]
