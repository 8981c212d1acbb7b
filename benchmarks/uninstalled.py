"""Import rome_fast from this checkout where it is not installed: `kernels/` is its subpackage by installation only.

A machine with a GPU often has its own torch and no network. Import this module before rome_fast; it does nothing where
the package is installed.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "rome_fast.kernels"


class KernelsFinder:
    """Finds the kernels where they lie in a checkout; asked after every other finder."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != KERNELS:
            return None
        folder = ROOT / "kernels"
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if importlib.util.find_spec("rome_fast") is None:
    sys.path.insert(0, str(ROOT))
if KernelsFinder not in sys.meta_path:
    sys.meta_path.append(KernelsFinder)

if __name__ == "__main__":
    # `python benchmarks/uninstalled.py VERB …` is `python -m rome_fast VERB …`.
    from rome_fast.cli import main

    sys.exit(main())
