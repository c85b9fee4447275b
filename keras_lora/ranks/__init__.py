"""The ranks that adapters need: what they have learned, and adapters of a lower rank."""

from keras_lora.ranks.allocating import allocate_ranks
from keras_lora.ranks.factors import take_ranks
from keras_lora.ranks.report import RankReport, RankRow, rank_report
from keras_lora.ranks.shrinking import ShrinkReport, ShrunkRow, check_shrinkable, shrink_adapter

__all__ = [
    "RankReport",
    "RankRow",
    "ShrinkReport",
    "ShrunkRow",
    "allocate_ranks",
    "check_shrinkable",
    "rank_report",
    "shrink_adapter",
    "take_ranks",
]
