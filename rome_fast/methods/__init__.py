"""Editing methods, one file each, and the closed form that they share.

A new method is one file that says what it is, and its line in `METHODS`.
"""

from ..errors import ArgumentError
from . import alphaedit, c_rome, c_rome_released, dual, emmet, encore, memit, memit_history, p_rome, rome
from .closed_form import (
    FIRST_TOKEN_WEIGHT,
    Cost,
    Factors,
    close,
    cost_of,
    hold_first_tokens,
    project_on_null_space,
    raised_factor,
)
from .method import Column, Keys, Method

DEFAULT_METHOD = "dual"

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD
    for module in (rome, c_rome_released, c_rome, p_rome, dual, emmet, memit, memit_history, encore, alphaedit)
}


def method_named(name: str | Method) -> Method:
    """One of METHODS, or a method as it is given; ArgumentError for a name that is none of them."""
    if isinstance(name, Method):
        return name
    if not isinstance(name, str) or name not in METHODS:
        raise ArgumentError(f"method: got {name!r}, wanted one of {', '.join(METHODS)}")
    return METHODS[name]


__all__ = [
    "DEFAULT_METHOD",
    "FIRST_TOKEN_WEIGHT",
    "METHODS",
    "Column",
    "Cost",
    "Factors",
    "Keys",
    "Method",
    "close",
    "cost_of",
    "hold_first_tokens",
    "method_named",
    "project_on_null_space",
    "raised_factor",
]
