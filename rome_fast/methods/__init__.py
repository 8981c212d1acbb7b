"""Editing methods: pure functions from keys and values to the factors of an update."""

from .rome import FIRST_TOKEN_WEIGHT, METHODS, Factors, RomeVariant, close, hold_first_tokens, residual, variant

__all__ = [
    "FIRST_TOKEN_WEIGHT",
    "METHODS",
    "Factors",
    "RomeVariant",
    "close",
    "hold_first_tokens",
    "residual",
    "variant",
]
