"""MEMIT that is held to what earlier batches asked for: Δ = R Kᵀ (λ C + K_p K_pᵀ + K Kᵀ)⁻¹.

The keys K_p of all earlier batches are columns with a residual of zero, as AlphaEdit's cache has them without its null
space; of batches made one after the other, it is this that keeps the earlier ones (2605.26670, 2502.01636).
"""

from dataclasses import replace

from .memit import METHOD as _MEMIT

METHOD = replace(_MEMIT, name="memit-history", remembers=True)
