"""Editing methods: pure functions from keys and values to the factors of an update."""

from .rome import METHODS, Factors, RomeVariant, close, residual, variant

__all__ = ["METHODS", "Factors", "RomeVariant", "close", "residual", "variant"]
