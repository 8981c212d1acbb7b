"""The package layout; everything else stands in pyproject.toml.

`kernels/` is installed as `rome_fast.kernels`, because a top-level package `kernels` would shadow the one of
that name on the package index, which transformers probes for.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["rome_fast", "rome_fast.*"]),
        *(f"rome_fast.{name}" for name in find_packages(include=["kernels", "kernels.*"])),
    ],
    package_dir={"rome_fast.kernels": "kernels"},
    package_data={"rome_fast": ["py.typed"], "rome_fast.bench": ["requests.jsonl"]},
)
