"""KerasHub's `.lora.h5` files that are changed or damaged: refused, with the reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest
from support.keras_hub_files import LAYER, A, B, backbone, write_good

from keras_lora.checks import AdapterFileError
from keras_lora.exchange.keras_hub.h5 import read_keras_hub_lora, write_keras_hub_arrays

pytest_plugins = ["support.keras_hub_files"]


def replaced(key: str, value: Any) -> Callable[[Any], None]:
    def change(h5: Any) -> None:
        if key in h5:
            del h5[key]
        if value is not None:
            h5[key] = value

    return change


def group_for_b(h5: Any) -> None:
    del h5[B]
    h5.create_group(B)


def virtual(h5: Any) -> None:
    del h5[A]
    layout = h5py.VirtualLayout((11, 3, 2), "float32")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "a", (11, 3, 2))
    h5.create_virtual_dataset(A, layout)


def stored_elsewhere(h5: Any) -> None:
    del h5[A]
    h5.create_dataset(A, (11, 3, 2), "float32", external=[("/etc/passwd", 0, 264)])


def bomb(h5: Any) -> None:
    del h5[A]
    h5.create_dataset(A, (2**40, 2), "float32", chunks=(1024, 2), compression="gzip")


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "no lora": (replaced("lora", None), "/lora is missing"),
    "lora is an array": (replaced("lora", np.zeros(3)), "/lora is a Dataset, expected a Group"),
    "no rank": (replaced("lora/vars/rank", None), r"/lora/vars has keys \[\]"),
    "an alpha": (replaced("lora/vars/alpha", 4), "has keys .*'alpha', 'rank'.*expected .*'rank'"),
    "rank 0": (replaced("lora/vars/rank", 0), "rank is 0, expected a positive integer"),
    "rank 3": (replaced("lora/vars/rank", 3), "/lora/5: factors of shapes"),
    "ranks": (replaced("lora/vars/rank", [2, 2]), r"rank is \[2, 2\], expected"),
    "float rank": (replaced("lora/vars/rank", 2.0), "rank has dtype float64"),
    "text rank": (replaced("lora/vars/rank", "2"), "rank has dtype object"),
    "no layers": (replaced(LAYER, None), "/lora has no layers"),
    "name": (replaced("lora/query/vars/x", 1), "/lora/query: not the number of a layer"),
    "zeros": (replaced("lora/05/vars/x", 1), "/lora/05: not the number of a layer"),
    "no b": (replaced(B, None), r"/lora/5/vars has keys \['lora_kernel_a'\]"),
    "layer's alpha": (replaced(f"{LAYER}/vars/alpha", 4.0), "/lora/5/vars has keys .*'alpha'"),
    "a group for b": (group_for_b, "lora_kernel_b is a Group, expected a Dataset"),
    "a scalar": (replaced(A, np.float32(1)), r"factors of shapes \(\) and \(2, 7\)"),
    "empty": (replaced(A, h5py.Empty("float32")), "/lora/5"),
    "b of one axis": (replaced(B, np.zeros(2)), r"\(2,\), expected \(\.\.\., 2\) and \(2"),
    "b of three axes": (replaced(B, np.zeros((2, 7, 1))), r"\(2, 7, 1\), expected"),
    "NaN": (replaced(A, np.full((11, 3, 2), np.nan)), "lora_kernel_a has values that are not"),
    "infinity": (replaced(B, np.full((2, 7), np.inf)), "lora_kernel_b has values that are not"),
    "integers": (replaced(B, np.ones((2, 7), "int32")), "lora_kernel_b has dtype int32"),
    "text": (replaced(B, [["x"] * 7] * 2), "lora_kernel_b has dtype object"),
    "soft link": (replaced(B, h5py.SoftLink(f"/{A}")), "lora_kernel_b is a link"),
    "external link": (replaced(B, h5py.ExternalLink("other.h5", B)), "lora_kernel_b is a link"),
    "linked layer": (replaced(LAYER, h5py.ExternalLink("other.h5", LAYER)), "/lora/5 is a link"),
    "linked lora": (replaced("lora", h5py.ExternalLink("other.h5", "lora")), "/lora is a link"),
    "virtual": (virtual, "lora_kernel_a has its values in another file"),
    "stored elsewhere": (stored_elsewhere, "lora_kernel_a has its values in another file"),
    "bomb": (bomb, "lora_kernel_a claims 8796093022208 bytes, in a file of"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_refused(change: str, file: Path) -> None:
    write_good(file)
    write_good(file.with_name("other.h5.lora.h5"))
    file.with_name("other.h5.lora.h5").rename(file.with_name("other.h5"))
    apply, message = CHANGES[change]
    with h5py.File(file, "r+") as h5:
        apply(h5)
    with pytest.raises(AdapterFileError, match=message) as caught:
        read_keras_hub_lora(file)
    assert str(file) in str(caught.value)


def test_all_that_is_wrong_is_told_at_once(file: Path) -> None:
    write_good(file)
    with h5py.File(file, "r+") as h5:
        h5["lora/x/y"] = 1
        h5["lora/7/vars/lora_kernel_a"] = np.zeros((3, 2))
    with pytest.raises(AdapterFileError, match=r"/lora/7: .*/lora/x: "):
        read_keras_hub_lora(file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04K\x01.", b"\x89HDF\r\n\x1a\n"])
def test_another_format_is_refused(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(AdapterFileError, match="expected a whole file of KerasHub's"):
        read_keras_hub_lora(file)


def test_no_file_is_refused(file: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"Received: no file; check the path"):
        read_keras_hub_lora(file)
    file.mkdir()
    with pytest.raises(AdapterFileError, match="expected a file"):
        read_keras_hub_lora(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_waited_for(file: Path) -> None:
    os.mkfifo(file)
    with pytest.raises(AdapterFileError, match="expected a file"):
        read_keras_hub_lora(file)


def test_another_name_is_refused(tmp_path: Path) -> None:
    for call in (read_keras_hub_lora, lambda path: write_keras_hub_arrays(path, 1, {})):
        with pytest.raises(AdapterFileError, match=r"expected a name that ends in \.lora\.h5"):
            call(tmp_path / "x.h5")


def test_a_weights_file_is_refused(file: Path) -> None:
    path = file.with_name("x.weights.h5")
    backbone("GPT2Backbone").save_weights(path)
    path.rename(file)
    with pytest.raises(AdapterFileError, match="/lora is missing"):
        read_keras_hub_lora(file)


def test_damaged_files_are_read_or_refused(file: Path) -> None:
    write_good(file)
    whole = file.read_bytes()
    rng = np.random.default_rng(29)
    damaged = [whole[: int(n)] for n in rng.integers(0, len(whole), 100)]
    for place in rng.integers(0, len(whole), 300):
        damaged.append(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    refused = 0
    for content in damaged:
        file.write_bytes(content)
        try:
            read_keras_hub_lora(file)
        except AdapterFileError:
            refused += 1
    assert refused > 100


def test_a_failed_write_leaves_what_was_there(file: Path) -> None:
    with pytest.raises(AdapterFileError, match="check that the directory exists"):
        write_good(file.parent / "nowhere" / file.name)
    write_good(file)
    before = file.read_bytes()
    with pytest.raises(AttributeError):
        write_keras_hub_arrays(file, 2, {5: (None, None)})  # type: ignore[dict-item]
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
