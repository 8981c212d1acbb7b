"""The package layout and the build of the native kernels; everything else stands in pyproject.toml.

`kernels/` is installed as `rome_fast.kernels`, because a top-level package `kernels` would shadow the one of
that name on the package index, which transformers probes for.
"""

import shutil
import subprocess
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

LIBRARY = "librome_fast_native.so"


class BuildWithKernels(build_py):
    """Builds the native kernels into their package, which for an editable install is the folder of their sources."""

    library: Path | None = None  # where it is, once built

    def run(self) -> None:
        super().run()
        package = Path("kernels") if self.editable_mode else Path(self.build_lib, "rome_fast", "kernels")
        target = package / "native" / LIBRARY
        build = Path(self.get_finalized_command("build").build_temp, "native").absolute()
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        # What an earlier build left may not fit these sources or this folder.
        target.unlink(missing_ok=True)
        shutil.rmtree(build, ignore_errors=True)
        try:
            subprocess.run(["cmake", "-S", ".", "-B", build, *generator, "-DBUILD_TESTING=OFF"], check=True)
            subprocess.run(["cmake", "--build", build], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"rome_fast: no native kernels; second moments and 16-bit updates are slower on a CPU ({error})")
            return
        shutil.copy2(build / LIBRARY, target)
        self.library = target


class AnyPython(bdist_wheel):
    """The library is called through ctypes: with it, a wheel depends on the platform, but not on Python's version."""

    def get_tag(self) -> tuple[str, str, str]:
        if self.get_finalized_command("build_py").library is None:
            return super().get_tag()
        self.root_is_pure = False
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages(include=["rome_fast", "rome_fast.*"]),
        *(f"rome_fast.{name}" for name in find_packages(include=["kernels", "kernels.*"])),
    ],
    package_dir={"rome_fast.kernels": "kernels"},
    package_data={"rome_fast": ["py.typed"], "rome_fast.bench": ["requests.jsonl", "gpus/*.json"]},
    # What MANIFEST.in adds is for source distributions only.
    include_package_data=False,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": AnyPython},
)
