"""MEMIT (Meng et al. 2023, equation 14): Δ = R Kᵀ (λ C + K Kᵀ)⁻¹, layer by layer.

By the identity of Woodbury that is R (λ I + Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹, which needs no more than the factor of C. λ is the
published one for GPT-J; C is the mean over tokens, as there. At the i-th of n layers, R is what is still missing of δ
at the last layer, behind the prompt alone, divided by the n − i + 1 layers left.
"""

from .method import Column, Method

METHOD = Method(
    "memit",
    rows="all",
    columns=(Column(left="halves", at="halves"),),
    penalty=15_000.0,
    spread=True,
    arrival="prompt",
)
