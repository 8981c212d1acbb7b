"""Second moments of keys, C = E[k kᵀ], per layer: collect, save, load, merge, exchange, and solve with."""

from .cache import CachedLayer, list_cache, prune_cache
from .collect import Progress, collect_statistics
from .corpus import Corpus, hub_dataset
from .first_tokens import first_token_passes, first_token_statistics
from .layer import LayerStatistics
from .released import export_npz, import_npz
from .store import Statistics, statistics_cache

__all__ = [
    "CachedLayer",
    "Corpus",
    "LayerStatistics",
    "Progress",
    "Statistics",
    "collect_statistics",
    "export_npz",
    "first_token_passes",
    "first_token_statistics",
    "hub_dataset",
    "import_npz",
    "list_cache",
    "prune_cache",
    "statistics_cache",
]
