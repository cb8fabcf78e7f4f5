"""Search for what should train: short fits from the same weights, and a driver that decides what to try next."""

from lightning_peft.search.space import LAYER_RANGES, block_modules, coarse_levels
from lightning_peft.search.subset_search import SubsetSearch
from lightning_peft.search.trials import SearchResult, Trial, non_dominated

__all__ = ["LAYER_RANGES", "SearchResult", "SubsetSearch", "Trial", "block_modules", "coarse_levels", "non_dominated"]
