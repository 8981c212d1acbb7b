"""Architectures: any decoder of transformers, none of them by its name."""

from .decoder import Decoder, is_transposed, oriented

__all__ = ["Decoder", "is_transposed", "oriented"]
