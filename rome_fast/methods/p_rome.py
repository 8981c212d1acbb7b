"""ROME with the unprefixed key on both sides (Gupta et al. 2024, "Rebuilding ROME"): Δ = δ uᵀ / (uᵀ k_u)."""

from .method import Column, Method

METHOD = Method("p-rome", rows="all", columns=(Column(left="unprefixed", at="unprefixed"),))
