"""An adapter's directory: what was saved comes back whole, or the error says why not."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from support import mutations
from support.adapter_arrays import (
    CONFIG,
    DIFFERENT,
    DTYPES,
    SMALL,
    arrays,
    assert_same,
    names,
    read_traced,
    size_of,
)
from support.bad_values import BAD_KEYS
from support.mutations import CONFIG_FILE, TENSORS_FILE

from keras_lora.checks import AdapterFileError
from keras_lora.files.adapter_files import (
    AdapterFiles,
    read_adapter_config,
    read_adapter_files,
    write_adapter_files,
)

pytest_plugins = ["support.adapter_arrays"]


def test_round_trip(saved: Path) -> None:
    assert_same(read_adapter_files(saved), CONFIG, arrays())
    assert read_adapter_config(saved) == CONFIG
    assert names(saved) == [TENSORS_FILE, CONFIG_FILE]
    assert json.loads((saved / CONFIG_FILE).read_text()) == CONFIG


def test_what_is_written_follows_the_format(saved: Path) -> None:
    header, data = mutations.read_header(saved / TENSORS_FILE)
    config = json.dumps(CONFIG, sort_keys=True, separators=(",", ":"))
    digest = mutations.digest(header, data)
    expected = {"format_version": "1", "config": config, "digest": digest}
    assert header["__metadata__"] == expected


def test_loaded_tensors_are_free_to_change(saved: Path) -> None:
    assert all(array.flags.writeable for array in read_adapter_files(saved).tensors.values())


def test_other_orders_and_kinds_of_arrays(tmp_path: Path) -> None:
    x = np.arange(15, dtype="float32").reshape(3, 5)
    given = {"transposed": x.T, "strided": x[:, ::2], "big-endian": x.astype(">f4")}
    write_adapter_files(tmp_path, {1: (2, 3)}, given, overwrite=False)  # type: ignore[dict-item]
    loaded = read_adapter_files(tmp_path)
    assert loaded.config == {"1": [2, 3]}
    for key, array in given.items():
        np.testing.assert_array_equal(loaded.tensors[key], array)
        assert loaded.tensors[key].dtype == "<f4"


def test_an_adapter_without_tensors(tmp_path: Path) -> None:
    write_adapter_files(tmp_path / "a" / "b", {}, {}, overwrite=False)
    assert_same(read_adapter_files(tmp_path / "a" / "b"), {}, {})


def test_overwriting_is_asked_for(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    with pytest.raises(AdapterFileError, match=r"expected no adapter.*overwrite=True"):
        write_adapter_files(saved, {}, {}, overwrite=False)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before
    write_adapter_files(saved, {"new": 1}, {"x": np.ones(2)}, overwrite=True)
    assert_same(read_adapter_files(saved), {"new": 1}, {"x": np.ones(2)})
    assert (saved / "README.md").read_text() == "mine"


def peft(directory: Path) -> None:
    (directory / TENSORS_FILE).rename(directory / "adapter_model.safetensors")


def directory_in_the_way(directory: Path) -> None:
    (directory / TENSORS_FILE).unlink()
    (directory / TENSORS_FILE).mkdir()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (mutations.directory_as_file, "FileExistsError"),
        (directory_in_the_way, "expected a file, or nothing"),
        (mutations.link(TENSORS_FILE, "../outside"), "a link"),
        (mutations.link(CONFIG_FILE, CONFIG_FILE), "a link"),
        (peft, "as other programs write"),
    ],
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_no_adapter_is_not_overwritten(
    saved: Path, prepare: Callable[[Path], None], message: str, overwrite: bool
) -> None:
    prepare(saved)
    before = sorted(saved.parent.rglob("*"))
    with pytest.raises(AdapterFileError, match=message):
        write_adapter_files(saved, {}, {}, overwrite=overwrite)
    assert sorted(saved.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"a": float("nan")}, {}, "all finite"),
        ({"a": [float("inf")]}, {}, "all finite"),
        ({"a": object()}, {}, "JSON"),
        ({"a": 1, 2: 3}, {}, "JSON"),
        ({"a": "x" * 2**24}, {}, "bytes of JSON"),
        ({}, {"a" * 2**24: np.ones(2)}, "bytes of JSON"),
        ({}, {"a": np.ones(2, "int32"), "b": np.ones(2, bool)}, r"'a' \(dtype int32\), 'b'"),
        ({}, {"a": np.ones(2) * np.nan, "b": np.ones(2) * -np.inf}, r"'a' \(NaN.*'b' \(NaN"),
        ({}, {k: np.ones(2) for k in BAD_KEYS}, r"'/etc.*'a//b'.*'a\\x00b'"),
        ({}, {"\ud800": np.ones(2)}, "unprintable"),
        ({}, {"__metadata__": np.ones(2)}, "not a name"),
        ({}, {1: np.ones(2)}, "not a name"),
    ],
)
def test_what_could_not_be_read_is_not_written(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(AdapterFileError, match=message):
        write_adapter_files(tmp_path / "a", config, tensors, overwrite=True)
    assert not (tmp_path / "a").exists()


def test_every_bad_key_is_named(saved: Path) -> None:
    edits = [mutations.rename(0, "a/../b"), mutations.rename(3, "c\\d")]
    for edit in [*edits, mutations.set_field(5, "dtype", "I16")]:
        mutations.edited(edit, sealed=True)(saved)
    with pytest.raises(AdapterFileError, match=r"'a/\.\./b' \(an.*'c\\\\d' \(a.*\(dtype I16\)"):
        read_adapter_files(saved)


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_refused_under_a_right_digest(
    tmp_path: Path, dtype: type, kind: int
) -> None:
    write_adapter_files(tmp_path, {}, {"a": np.ones(3).astype(dtype)}, overwrite=False)
    mutations.edited(mutations.set_not_finite(0, 2, kind), sealed=True)(tmp_path)
    with pytest.raises(AdapterFileError, match=r"adapter.safetensors.*'a' \(NaN or infinity\)"):
        read_adapter_files(tmp_path)


@pytest.mark.parametrize(
    ("array", "shape"),
    [(np.ones(()), [1] * 65), (np.ones(0), [0, 2**63]), (np.ones(0), [0, 2**62, 8])],
)
def test_shapes_that_the_format_has_and_numpy_has_not(
    tmp_path: Path, array: np.ndarray, shape: list[int]
) -> None:
    write_adapter_files(tmp_path, {}, {"a": array}, overwrite=False)
    mutations.edited(mutations.set_field(0, "shape", shape), sealed=True)(tmp_path)
    with pytest.raises(AdapterFileError, match=r"expected a valid numpy shape for 'a'"):
        read_adapter_files(tmp_path)


@pytest.mark.parametrize("read", [read_adapter_files, read_adapter_config])
def test_the_config_inside_the_tensors_counts(
    saved: Path, read: Callable[[Path], AdapterFiles | dict[str, Any]]
) -> None:
    (saved / CONFIG_FILE).write_text(json.dumps(CONFIG))
    read(saved)
    (saved / CONFIG_FILE).write_text(json.dumps(CONFIG | {"rank": 2.0}))
    with pytest.warns(UserWarning, match=DIFFERENT) as caught:
        loaded = read(saved)
    assert caught[0].filename == __file__
    assert (loaded.config if isinstance(loaded, AdapterFiles) else loaded) == CONFIG


@pytest.mark.parametrize("read", [read_adapter_files, read_adapter_config])
@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (mutations.special(CONFIG_FILE, lambda file: None), f"{CONFIG_FILE}.*FileNotFound"),
        (mutations.special(TENSORS_FILE, lambda file: None), f"{TENSORS_FILE}.*FileNotFound"),
        (mutations.special(TENSORS_FILE, os.mkfifo), "pipe"),
        (mutations.directory_as_file, "NotADirectory"),
        (mutations.link(TENSORS_FILE, TENSORS_FILE), "loop|Too many"),
        (mutations.repeat_in_json, f"{CONFIG_FILE}.*'alpha' twice"),
        (mutations.replace(CONFIG_FILE, b"[]"), "a JSON object. Received: list"),
        (mutations.replace(CONFIG_FILE, b"{} " + b" " * 2**24), "bytes of JSON"),
        (
            mutations.replace(TENSORS_FILE, save({"a": np.ones(2)})),
            "format_version '1'. Received: None",
        ),
        (mutations.overwrite(TENSORS_FILE, b"\xff" * 8), "18446744073709551615 bytes of header"),
        (mutations.truncate(TENSORS_FILE, 0), "bytes of header in 0 bytes"),
        (
            mutations.edited(mutations.set_metadata("format_version", "2"), sealed=True),
            "format_version '1'.*Received: '2'; install",
        ),
    ],
)
def test_messages(
    saved: Path, read: Callable[[Path], object], mutation: mutations.Mutation, message: str
) -> None:
    mutation(saved)
    with pytest.raises(AdapterFileError, match=message):
        read(saved)


@pytest.mark.parametrize("target", ["inside", "../outside"])
def test_links_to_files_and_to_the_directory_are_followed(saved: Path, target: str) -> None:
    """As in a snapshot of the Hugging Face cache."""
    for name in (TENSORS_FILE, CONFIG_FILE):
        mutations.link(name, f"{target}{name}")(saved)
    (saved.parent / "latest").symlink_to(saved)
    assert_same(read_adapter_files(saved.parent / "latest"), CONFIG, arrays())


@pytest.mark.parametrize("name", [TENSORS_FILE, CONFIG_FILE])
def test_no_permission_to_read(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved / name).chmod(0)
    open_path = Path.open

    def refusing(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return open_path(self, *args, **options)

    if os.geteuid() == 0:  # Root may read whatever the mode says.
        monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(AdapterFileError, match=f"{name}.*PermissionError.*permissions"):
        read_adapter_files(saved)


def test_the_mode_of_the_files_follows_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_adapter_files(tmp_path, {}, {}, overwrite=False)
    finally:
        os.umask(mask)
    assert {stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_of_reading_stays_under_twice_the_file(tmp_path: Path, dtype: type) -> None:
    tensors: dict[str, np.ndarray] = {
        "large": np.ones(2**21).astype(dtype),
        "small": np.ones((2, 3)).astype(dtype),
    }
    write_adapter_files(tmp_path, {"rank": 1}, tensors, overwrite=False)
    assert read_traced(tmp_path)[1] <= 2 * size_of(tmp_path) + SMALL
