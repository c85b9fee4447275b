"""What a conversion says of each layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvertedLayer:
    """What became of a layer's factors in a KerasHub file.

    Attributes:
        path: The layer's path in the model.
        file_rank: The rank in the file.
        rank: The rank in the model.
        error: `|dW - dW_file| / |dW_file|` in the Frobenius norm; 0 where nothing was truncated.

    Example:

    >>> ConvertedLayer("attention/query", file_rank=1, rank=2, error=0.0).rank
    2
    """

    path: str
    file_rank: int
    rank: int
    error: float
