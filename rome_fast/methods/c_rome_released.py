"""C-ROME as its code was released (Yang et al. 2024): k̄ on both sides, while the value aimed at is the unprefixed one.

Δ = (W k_u + δ − W k̄) uᵀ / (uᵀ k̄) with u = C⁻¹ k̄. For a first token the value at the end is that of another key
altogether, so that the model survives and the edit does not take.
"""

from .method import Column, Method

METHOD = Method("c-rome-released", rows="all", columns=(Column(residual="to_unprefixed_value"),))
