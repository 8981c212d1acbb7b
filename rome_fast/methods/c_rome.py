"""C-ROME (Yang et al. 2024): prefixed keys uniformly, Δ = δ uᵀ / (uᵀ k̄) with u = C⁻¹ k̄.

A first-token subject leaves its unprefixed row out of k̄, of v₀ and of the search for δ, so that the fact is there
behind any text but not without one.
"""

from .method import Method

METHOD = Method("c-rome", rows="prefixed")
