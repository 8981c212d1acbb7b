"""EMMET (Gupta et al. 2024, 2403.14236): many edits as equality constraints, Δ = R (Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹.

Keys are averaged as MEMIT does it. Its code adds a small multiple of the identity to the matrix that is inverted, for
edits whose keys are nearly dependent; here these are held by the guard. Given several layers, it goes through them as
MEMIT does.
"""

from .method import Column, Method

METHOD = Method("emmet", rows="all", columns=(Column(left="halves", at="halves"),), arrival="prompt")
