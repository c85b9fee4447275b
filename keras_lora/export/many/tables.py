"""Many adapters as rows of a few tables, so that a request takes the rows that it needs.

An adapter's factors and its values of heads and biases are *pieces*. All pieces of one width share
a table: of `A` `(d, r)` each of the `r` columns is a row of width `d`, so adapters of every rank
lie there one after the other and nothing is padded. `places[slot, piece]` is the first row and
the number of rows. Slot 0 is the base. Row 0 of a table of factors is zero, and stands for an
adapter that does not have the factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

NAMES, PLACES = "names", "places"


@dataclass(frozen=True)
class Piece:
    """A part that adapters have: a factor, whose shape is None at the rank, or a whole value.

    Attributes:
        key: Its name in an adapter's files.
        shape: Its shape; None stands for a rank.

    Example:

    >>> piece = Piece("up/lora_b", (None, 12, 64))
    >>> piece.width, piece.rows(np.zeros((8, 12, 64))).shape, piece.at(2)
    (768, (8, 768), (2, 12, 64))
    """

    key: str
    shape: tuple[int | None, ...]

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of one row, unfolded."""
        return tuple(size for size in self.shape if size is not None)

    @property
    def width(self) -> int:
        return math.prod(self.inner)

    @property
    def is_factor(self) -> bool:
        return None in self.shape

    def at(self, rank: int) -> tuple[int, ...]:
        """The shape of a value, a factor's at this rank."""
        return tuple(rank if size is None else size for size in self.shape)

    def rows(self, value: Array) -> Array:
        """A value as rows, the rank first."""
        axis = self.shape.index(None) if self.is_factor else 0
        rows = np.moveaxis(value, axis, 0) if self.is_factor else value
        return rows.reshape(-1, self.width)


class Tables:
    """Tables to which adapters are added, one after the other; the base comes first."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)
        self.names: list[str] = []
        self._places: list[Array] = []
        factors = {piece.width for piece in pieces if piece.is_factor}
        self._rows = {w: np.zeros((int(w in factors), w), "float32") for w in widths(pieces)}

    @classmethod
    def of(cls, pieces: Sequence[Piece], tensors: Mapping[str, Array]) -> Tables:
        """The inverse of `tensors`."""
        tables = cls(pieces)
        tables.names = [name.decode() for name in tensors[NAMES].tolist()]
        tables._places = list(tensors[PLACES])
        tables._rows = {width: np.array(tensors[rows_key(width)]) for width in tables._rows}
        return tables

    def add(self, name: str, values: Mapping[str, Array]) -> None:
        """Add an adapter, with these values by key; of what it lacks, it has the base's."""
        # The base itself has no factors: the place of those is the zero row.
        base = self._places[0] if self._places else np.zeros((len(self.pieces), 2), "int32")
        places = base.copy()
        for index, piece in enumerate(self.pieces):
            if piece.key in values:
                places[index] = self._put(piece, values[piece.key])
        self.names.append(name)
        self._places.append(places)

    def tensors(self) -> dict[str, Array]:
        """What is stored, by key; see the module."""
        rows = {rows_key(width): table for width, table in self._rows.items()}
        names = np.array([name.encode() for name in self.names], dtype=object)
        return {NAMES: names, PLACES: np.stack(self._places), **rows}

    def _put(self, piece: Piece, value: Array) -> tuple[int, int]:
        new, table = piece.rows(value), self._rows[piece.width]
        first = len(table)
        # In place: all adapters together may be larger than the base.
        table.resize((first + len(new), piece.width), refcheck=False)
        table[first:] = new
        return first, len(new)


def widths(pieces: Sequence[Piece]) -> list[int]:
    return sorted({piece.width for piece in pieces})


def rows_key(width: int) -> str:
    return f"rows/{width}"
