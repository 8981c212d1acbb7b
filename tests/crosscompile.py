"""Run a kernel's host function on CPU tensors and compile what it would launch, for a GPU that is not there.

The arguments are specialised by triton itself, exactly as in a launch, so the binary is the one a user gets.
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget

SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Compiled:
    """One kernel as compiled for one architecture."""

    name: str
    instructions: tuple[str, ...]
    registers: int
    spills: int  # instructions that store registers to the stack or load them from it
    shared: int  # bytes, static and dynamic
    ptx: str


class _Driver:
    """What triton asks of a GPU before it compiles; every architecture is a device of its own."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


class _Recorder:
    """Stands where a jitted kernel stands: compiles instead of launching."""

    def __init__(self, kernel: Any, found: list[Compiled], folder: Path) -> None:
        self.kernel, self.found, self.folder = kernel, found, folder

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_only(*args: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            self.found.append(_examine(self.kernel.__name__, compiled, self.folder))

        return compile_only


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def _examine(name: str, compiled: Any, folder: Path) -> Compiled:
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = _tool("cuobjdump", "--dump-resource-usage", str(binary))
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    assert {"REG", "STACK", "SHARED", "LOCAL"} <= numbers.keys(), usage
    # A stack alone is no spill (an unused byte gets eight); without one there is nowhere to spill to.
    code = _tool("nvdisasm", "-c", str(binary)) if numbers["STACK"] + numbers["LOCAL"] else ""
    ptx = compiled.asm["ptx"]
    return Compiled(
        name,
        tuple(i for i in _INSTRUCTIONS if i in ptx),
        numbers["REG"],
        len(re.findall(r"\b(?:STL|LDL)\b", code)),
        numbers["SHARED"] + compiled.metadata.shared,
        ptx,
    )


@contextmanager
def compiling_for(capability: int, module: ModuleType, folder: Path) -> Iterator[list[Compiled]]:
    """Within the block, kernels of `module` are compiled for `capability` and recorded, not run."""
    found: list[Compiled] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", _Driver(capability))
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            patch.setattr(module, name, _Recorder(getattr(module, name), found, folder))
        yield found
