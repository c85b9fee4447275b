"""The signatures of a SavedModel, read off its protocol buffer without TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

Tensors = dict[str, tuple[str, int]]  # name -> tensor name in the graph, TF_DataType


class Signature(NamedTuple):
    inputs: Tensors
    outputs: Tensors


def read_signatures(meta_graph: bytes) -> Iterator[tuple[str, Signature]]:
    """The `signature_def` map, field 5 of a `MetaGraphDef`, read off the wire format."""
    for number, entry in _fields(meta_graph):
        if number == 5:
            pair = dict(_fields(entry))
            sides: dict[int, Tensors] = {1: {}, 2: {}}
            for side, item in _fields(pair.get(2, b"")):
                if side in sides:
                    named = dict(_fields(item))
                    info = dict(_fields(named.get(2, b"")))
                    if 1 in info:
                        sides[side][named[1].decode()] = info[1].decode(), info.get(2, 0)
            name = pair[1].decode()
            if name != "__saved_model_init_op":  # only for the loader
                yield name, Signature(sides[1], sides[2])


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer message."""
    position = 0

    def varint() -> int:
        nonlocal position
        result = shift = 0
        while True:
            byte = message[position]
            position += 1
            result |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return result

    while position < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        elif key & 7 == 2:
            length = varint()
            yield key >> 3, message[position : position + length]
            position += length
        else:
            position += {1: 8, 5: 4}[key & 7]
