"""ENCORE (Gupta et al. 2025, 2502.01636): Δ = R Kᵀ (λ C + α I + K_p K_pᵀ + K Kᵀ)⁻¹, layer by layer as in MEMIT.

Beside what earlier batches asked for, the norm of the update itself is held, by α as published. That is MEMIT with
C + (α / λ) I in place of C.
"""

from dataclasses import replace

from .memit_history import METHOD as _MEMIT_HISTORY

METHOD = replace(_MEMIT_HISTORY, name="encore", norm_penalty=20.0)
