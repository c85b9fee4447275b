"""Files and directories that appear whole."""

from __future__ import annotations

import contextlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from keras_lora.files.adapter_files import read_adapter_files, write_adapter_files
from keras_lora.files.atomic import leftovers, replaced, temporary_path, write_files


def fill(path: Path, content: str, directory: bool) -> None:
    if directory:
        (path / "inner").mkdir(parents=True)
        (path / "inner" / "data").write_text(content)
    else:
        path.write_text(content)


def content(path: Path) -> str:
    return (path / "inner" / "data" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("directory", [False, True])
def test_a_target_is_replaced_and_synced(
    tmp_path: Path, directory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, sync = [], os.fsync

    def counting(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        sync(descriptor)

    if Path("/proc/self/fd").exists():
        monkeypatch.setattr(os, "fsync", counting)
    target = tmp_path / "new" / "version"
    for text in ("old", "new"):
        with replaced(target) as written:
            assert written.name == target.name
            fill(written, text, directory)
        assert content(target) == text
    assert [p.name for p in target.parent.iterdir()] == ["version"]
    if synced:
        names = [Path(path).name for path in synced[: len(synced) // 2]]
        assert names == (["version", "inner", "data", "new"] if directory else ["version", "new"])


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("failing", ["block", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_target(
    tmp_path: Path, directory: bool, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "version"
    fill(target, "old", directory)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    if failing != "block":
        monkeypatch.setattr(os if failing == "fsync" else Path, failing, fail)
    with contextlib.suppress(KeyboardInterrupt), replaced(target) as written:
        fill(written, "new", directory)
        if failing == "block":
            fail()
    assert content(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_parents_are_made_if_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    with pytest.raises(FileNotFoundError), replaced(target, make_parents=False):
        pass
    assert not target.parent.exists()


def test_temporary_files_are_recognised_by_the_names_they_are_for(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        temporary_path(tmp_path, name).touch()
    (tmp_path / ".a.json.tmp").touch()
    (found,) = leftovers(tmp_path, ["a.json"])
    assert found.name.startswith(".a.json.")
    write_files(tmp_path, {"a.json": b"{}"})
    assert (tmp_path / "a.json").read_bytes() == b"{}"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="directories are not locked there")
def test_writers_of_one_directory_wait_for_each_other(tmp_path: Path) -> None:
    """Each descriptor has a lock of its own, so that threads stand for processes."""

    def write(number: int) -> None:
        for _ in range(10):
            values = {"a": np.full(1000, number, "float32")}
            write_adapter_files(tmp_path, {"number": number}, values, overwrite=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    files = read_adapter_files(tmp_path)
    assert set(files.tensors["a"]) == {files.config["number"]}
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter.safetensors",
    }
