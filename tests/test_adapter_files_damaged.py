"""An adapter's directory after a failed save, a kill at any moment, or damage."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from support import mutations, processes
from support.adapter_arrays import (
    CONFIG,
    DIFFERENT,
    SMALL,
    arrays,
    assert_same,
    documented_warning,
    names,
    read_traced,
    size_of,
)
from support.mutations import CONFIG_FILE, TENSORS_FILE

from keras_lora.checks import AdapterFileError
from keras_lora.files.adapter_files import (
    AdapterFiles,
    read_adapter_files,
    write_adapter_files,
)

pytest_plugins = ["support.adapter_arrays"]


@pytest.mark.parametrize("name", ["fsync", "replace", "close"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", [1, 2, 3])
@documented_warning
def test_a_failed_save_leaves_no_temporary_file(
    saved: Path, name: str, error: BaseException, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1, 99))
    module: Any = Path if name == "replace" else os
    function = getattr(module, name)

    def failing(*args: Any) -> Any:
        if next(calls) == call:
            raise error
        return function(*args)

    monkeypatch.setattr(module, name, failing)
    with contextlib.suppress(AdapterFileError, KeyboardInterrupt):
        write_adapter_files(saved, {"new": 1}, {"x": np.ones(2)}, overwrite=True)
    monkeypatch.undo()
    assert names(saved) == [TENSORS_FILE, CONFIG_FILE]
    assert read_adapter_files(saved).config in (CONFIG, {"new": 1})


def test_left_over_temporary_files_go_and_others_stay(saved: Path) -> None:
    left = [f".{name}.{'0a' * 16}.tmp" for name in (TENSORS_FILE, CONFIG_FILE)]
    others = [f".{TENSORS_FILE}.0a.tmp", f".{TENSORS_FILE}.{'0A' * 16}.tmp", ".adapter.tmp"]
    for name in [*left, *others]:
        (saved / name).touch()
    write_adapter_files(saved, {}, {}, overwrite=True)
    assert names(saved) == sorted([TENSORS_FILE, CONFIG_FILE, *others])


WRITERS = """
import sys, warnings; warnings.simplefilter("ignore")
from support import without_package, writers
"""


@pytest.mark.slow
def test_a_save_killed_at_any_step_leaves_the_old_adapter_or_the_new_one(tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    output = processes.run(f"{WRITERS}writers.die_at_every_step(sys.argv[1])", directory)
    lines = [line.split() for line in output.splitlines()]
    found: dict[str, list[str]] = {"old": [], "new": []}
    for name, status, now in lines:
        assert status in ("killed", "0")
        found[name].append(now)
    for name, before in (("old", "None"), ("new", "old")):
        count = found[name].count(before)
        assert found[name] == [before] * count + [name] * (len(found[name]) - count)
        assert min(count, len(found[name]) - count) > 1
    assert names(directory) == [TENSORS_FILE, CONFIG_FILE]


@pytest.mark.slow
@documented_warning
def test_a_save_killed_at_any_moment_leaves_the_old_adapter_or_the_new_one(tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    script = f"{WRITERS}writers.die_at_random_moments(sys.argv[1], 50)"
    output = processes.run(script, directory)
    killed, found = zip(*map(str.split, output.splitlines()), strict=True)
    assert killed == ("True",) * 50
    assert set(found) - {"None"} == {"old", "new"}
    assert "None" not in found[found.index("old") :]
    write_adapter_files(directory, {}, {}, overwrite=True)
    assert names(directory) == [TENSORS_FILE, CONFIG_FILE]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "adapter"
    write_adapter_files(directory, CONFIG, arrays(), overwrite=False)
    return directory


@settings(max_examples=2000, derandomize=True, deadline=None, database=None)
@given(mutation=mutations.mutations())
def test_a_damaged_adapter_is_read_as_it_was_saved_or_refused(
    whole: Path, mutation: mutations.Mutation
) -> None:
    with tempfile.TemporaryDirectory() as parent:
        directory = shutil.copytree(whole, Path(parent, "adapter"))
        mutation(directory)
        limit = 2 * size_of(directory) + SMALL
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded, peak = read_traced(directory)
    assert peak <= limit
    assert all(DIFFERENT in str(warning.message) for warning in caught)
    if isinstance(loaded, AdapterFiles):
        assert_same(loaded, CONFIG, arrays())
    else:
        assert not caught
        assert str(directory) in str(loaded)
