"""AlphaEdit (Fang et al. 2025, 2410.02355): Δ = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + L₂ I)⁻¹, layer by layer as in MEMIT.

P projects on the eigenvectors of C with eigenvalues below a threshold, K_p are the keys of all earlier batches. With
[K_p K] in place of K and zeros in place of the earlier residuals that is R (L₂ I + Kᵀ P K)⁻¹ Kᵀ P. Threshold and L₂ are
those of its configuration for Llama-3-8B.
"""

from .method import Column, Method

METHOD = Method(
    "alphaedit",
    rows="all",
    columns=(Column(left="halves", at="halves"),),
    penalty=10.0,
    null_space=2e-2,
    remembers=True,
    spread=True,
    arrival="prompt",
)
