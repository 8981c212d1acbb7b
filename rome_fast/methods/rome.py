"""ROME as released (Meng et al. 2022, equation 2; the code's keys): Δ = δ uᵀ / (uᵀ k_u) with u = C⁻¹ k̄.

k̄ is the mean over prefixed and unprefixed rows, k_u the unprefixed key. Where the two differ widely, as for a subject
that is the first token, the denominator becomes small and the update destroys the model (Yang et al. 2024,
"Understanding the Collapse of LLMs in Model Editing").
"""

from .method import Column, Method

METHOD = Method("rome", rows="all", columns=(Column(left="mean", at="unprefixed"),))
