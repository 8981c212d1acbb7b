"""Second moments of keys, C = E[k kᵀ], per layer: collect, save, load, merge, exchange, and solve with."""

from .cache import CachedLayer, list_cache, prune_cache
from .choice import Choice
from .collect import TOKENS_PER_DIMENSION, Progress, collect_statistics
from .corpus import Corpus, hub_dataset
from .first_tokens import first_token_passes, first_token_statistics
from .layer import LayerStatistics
from .released import export_npz, import_npz
from .store import (
    Statistics,
    StatisticsWarning,
    cache_folder,
    likely_choice,
    likely_layers,
    statistics_cache,
    tuned_choice,
    usual_layers,
)

__all__ = [
    "TOKENS_PER_DIMENSION",
    "CachedLayer",
    "Choice",
    "Corpus",
    "LayerStatistics",
    "Progress",
    "Statistics",
    "StatisticsWarning",
    "cache_folder",
    "collect_statistics",
    "export_npz",
    "first_token_passes",
    "first_token_statistics",
    "hub_dataset",
    "import_npz",
    "likely_choice",
    "likely_layers",
    "list_cache",
    "prune_cache",
    "statistics_cache",
    "tuned_choice",
    "usual_layers",
]
