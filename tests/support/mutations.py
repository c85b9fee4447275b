"""Ways to damage the directory of an adapter: a hypothesis strategy of functions of a directory.

No mutation makes another valid adapter: if the files are still readable, they have the values that
were saved. A mutation that renews the digest breaks another rule. Some write to the parent of the
directory, as the target of a link."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from support.bad_values import (
    BAD_DTYPES,
    BAD_JSON,
    BAD_KEYS,
    BAD_OFFSETS,
    BAD_SHAPES,
    LENGTHS,
    NAMES,
    NOT_FINITE,
)

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter.safetensors"

Mutation = Callable[[Path], None]
Header = dict[str, Any]
Edit = Callable[[Header, bytearray], None]


def read_header(file: Path) -> tuple[Header, bytearray]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])


def write_header(file: Path, header: Header | bytes, data: bytes | bytearray) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def keys(header: Header) -> list[str]:
    return sorted(set(header) - {"__metadata__"})


def digest(header: Header, data: bytes | bytearray) -> str:
    """The digest as the format defines it, without the code of the package."""
    sha256 = hashlib.sha256(header["__metadata__"]["config"].encode() + b"\n")
    for key in keys(header):
        entry = header[key]
        name = NAMES.get(entry["dtype"], entry["dtype"])
        sha256.update(json.dumps([key, name, entry["shape"]]).encode() + b"\n")
        sha256.update(data[slice(*entry["data_offsets"])])
    return sha256.hexdigest()


def edited(edit: Edit, *, sealed: bool) -> Mutation:
    """A mutation of the header and the tensors, under a new digest if `sealed`."""

    def mutate(directory: Path) -> None:
        file = directory / TENSORS_FILE
        header, data = read_header(file)
        edit(header, data)
        if sealed:
            header["__metadata__"]["digest"] = digest(header, data)
        write_header(file, header, data)

    return mutate


def pick(header: Header, index: int) -> str:
    return keys(header)[index % len(keys(header))]


def set_field(index: int, field: str, value: object) -> Edit:
    def edit(header: Header, _: bytearray) -> None:
        header[pick(header, index)][field] = value

    return edit


def set_not_finite(index: int, element: int, kind: int) -> Edit:
    def edit(header: Header, data: bytearray) -> None:
        filled = [k for k in keys(header) if np.prod(header[k]["shape"]) > 0]
        entry = header[filled[index % len(filled)]]
        values = NOT_FINITE[entry["dtype"]]
        start, stop = entry["data_offsets"]
        size = values.itemsize
        at = start + size * (element % ((stop - start) // size))
        data[at : at + size] = values[kind].tobytes()

    return edit


def rename(index: int, name: str) -> Edit:
    def edit(header: Header, _: bytearray) -> None:
        header[name] = header.pop(pick(header, index))

    return edit


def remove(index: int) -> Edit:
    def edit(header: Header, _: bytearray) -> None:
        del header[pick(header, index)]

    return edit


def overlap(first: int, second: int) -> Edit:
    def edit(header: Header, _: bytearray) -> None:
        entry = header[pick(header, second)]
        header[pick(header, first)]["data_offsets"] = entry["data_offsets"]

    return edit


def add_tensor(name: str) -> Edit:
    def edit(header: Header, data: bytearray) -> None:
        header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}

    return edit


def set_metadata(field: str, value: object) -> Edit:
    def edit(header: Header, _: bytearray) -> None:
        header["__metadata__"][field] = value

    return edit


def drop_metadata(field: str | None) -> Edit:
    def edit(header: Header, _: bytearray) -> None:
        del (header["__metadata__"] if field else header)[field or "__metadata__"]

    return edit


def truncate(name: str, position: int) -> Mutation:
    def mutate(directory: Path) -> None:
        file = directory / name
        os.truncate(file, position % file.stat().st_size)

    return mutate


def flip(name: str, bits: list[int]) -> Mutation:
    def mutate(directory: Path) -> None:
        data = bytearray((directory / name).read_bytes())
        for bit in bits:
            data[bit // 8 % len(data)] ^= 1 << bit % 8
        (directory / name).write_bytes(data)

    return mutate


def overwrite(name: str, content: bytes, position: int = 0) -> Mutation:
    """Put bytes over those at a position."""

    def mutate(directory: Path) -> None:
        data = bytearray((directory / name).read_bytes())
        at = position % len(data)
        data[at : at + len(content)] = content
        (directory / name).write_bytes(data)

    return mutate


def replace(name: str, content: bytes) -> Mutation:
    def mutate(directory: Path) -> None:
        (directory / name).write_bytes(content)

    return mutate


def duplicate_key(index: int, changed: bool) -> Mutation:
    """An entry of the header twice: equal ones, or the first with another shape."""

    def mutate(directory: Path) -> None:
        file = directory / TENSORS_FILE
        header, data = read_header(file)
        key = pick(header, index)
        entry = header[key] | ({"shape": [1]} if changed else {})
        text = f"{{{json.dumps(key)}:{json.dumps(entry)},{json.dumps(header)[1:]}"
        write_header(file, text.encode(), data)

    return mutate


def repeat_in_json(directory: Path) -> None:
    file = directory / CONFIG_FILE
    config = json.loads(file.read_bytes())
    key = min(config)
    entry = f"{json.dumps(key)}: {json.dumps(config[key])}"
    file.write_text(f"{{{entry}, {json.dumps(config)[1:]}")


def add_to_json(directory: Path) -> None:
    file = directory / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"unknown": [1, None]}))


def swap_files(directory: Path) -> None:
    config, tensors = directory / CONFIG_FILE, directory / TENSORS_FILE
    content = config.read_bytes()
    config.write_bytes(tensors.read_bytes())
    tensors.write_bytes(content)


def directory_as_file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_bytes(b"a file")


def link(name: str, target: str) -> Mutation:
    """The file as a link: the content stays, wherever the target is."""

    def mutate(directory: Path) -> None:
        file = directory / name
        goal = directory / target
        if goal != file:
            goal.write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(target)

    return mutate


def special(name: str, make: Callable[[Path], None]) -> Mutation:
    def mutate(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return mutate


def mutations() -> st.SearchStrategy[Mutation]:
    """Functions that damage the adapter in a directory, in place."""
    files = st.sampled_from([TENSORS_FILE, CONFIG_FILE])
    index = st.integers(0, 9)
    position = st.integers(0, 2**16)
    return st.one_of(
        st.builds(truncate, files, position),
        st.builds(flip, files, st.lists(st.integers(0, 2**19), min_size=1, max_size=3)),
        st.builds(overwrite, files, st.binary(min_size=1, max_size=64), position),
        st.builds(replace, files, st.binary(max_size=256)),
        _lengths().map(lambda n: overwrite(TENSORS_FILE, n.to_bytes(8, "little"))),
        st.sampled_from(BAD_JSON).map(lambda data: replace(CONFIG_FILE, data)),
        st.sampled_from(BAD_JSON).map(_header_of),
        st.builds(duplicate_key, index, st.booleans()),
        st.builds(edited, _unsealed_edits(), sealed=st.just(False)),
        st.builds(edited, _sealed_edits(), sealed=st.just(True)),
        _on_the_disk(files),
    )


def _lengths() -> st.SearchStrategy[int]:
    return st.one_of(st.sampled_from(LENGTHS), st.integers(0, 4096), st.integers(0, 2**64 - 1))


def _header_of(text: bytes) -> Mutation:
    def mutate(directory: Path) -> None:
        file = directory / TENSORS_FILE
        write_header(file, text, read_header(file)[1])

    return mutate


def _unsealed_edits() -> st.SearchStrategy[Edit]:
    index = st.integers(0, 9)
    shapes = st.lists(st.integers(0, 12), max_size=4)
    offsets = st.lists(st.integers(0, 512), min_size=2, max_size=2)
    wild_offsets = st.sampled_from(BAD_OFFSETS)
    fields = st.sampled_from(["config", "digest", "format_version", "unknown"])
    values = st.one_of(st.none(), st.integers(), st.sampled_from(["", "1", "2", "{}", "0" * 64]))
    return st.one_of(
        st.builds(set_field, index, st.just("dtype"), st.sampled_from(sorted(NAMES))),
        st.builds(set_field, index, st.just("shape"), shapes),
        st.builds(set_field, index, st.just("data_offsets"), offsets | wild_offsets),
        st.builds(set_field, index, st.just("unknown"), values),
        st.builds(set_not_finite, index, st.integers(0, 99), st.integers(0, 3)),
        st.builds(rename, index, st.sampled_from(["other", "z/z"])),
        st.builds(remove, index),
        st.builds(add_tensor, st.sampled_from(["other", "z/z"])),
        st.builds(set_metadata, fields, values),
        st.builds(drop_metadata, st.sampled_from(["config", "digest", "format_version", None])),
    )


def _sealed_edits() -> st.SearchStrategy[Edit]:
    index = st.integers(0, 9)
    return st.one_of(
        st.builds(set_not_finite, index, st.integers(0, 99), st.integers(0, 3)),
        st.builds(set_field, index, st.just("dtype"), st.sampled_from(BAD_DTYPES)),
        st.builds(set_field, index, st.just("shape"), st.sampled_from(BAD_SHAPES)),
        st.builds(rename, index, st.sampled_from(BAD_KEYS)),
        st.builds(add_tensor, st.sampled_from(BAD_KEYS)),
        st.builds(overlap, st.just(0), st.just(1)),
        st.builds(
            set_metadata,
            st.just("config"),
            st.sampled_from(["[]", '{"a":NaN}', '{"a":1e999}', '{"a":1,"a":1}', "{ }", "", "{"]),
        ),
        st.builds(
            set_metadata, st.just("format_version"), st.sampled_from(["0", "2", "1.0", "", 1])
        ),
    )


def _on_the_disk(files: st.SearchStrategy[str]) -> st.SearchStrategy[Mutation]:
    targets = st.sampled_from(["../outside", "inside", CONFIG_FILE, TENSORS_FILE])
    makers = st.sampled_from([lambda file: None, os.mkfifo, Path.mkdir, Path.touch])
    whole = [swap_files, directory_as_file, shutil.rmtree, repeat_in_json, add_to_json]
    return st.one_of(
        st.sampled_from(whole), st.builds(link, files, targets), st.builds(special, files, makers)
    )
