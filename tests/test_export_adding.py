"""One more adapter for an exported model: a new version, with the same file of the base."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.forks import Fork
from support.mixed_batches import (
    HEAD,
    adapted,
    answers,
    assert_rows,
    client,
    config,
    normal,
    served,
)
from support.models import functional, randomize_adapters

import keras_lora as kl
from keras_lora.export.many import adding
from keras_lora.export.many.endpoint import DESCRIPTION
from keras_lora.files.adapter_files import write_adapter_files

pytest_plugins = ["support.forks"]

FEEDS = {"features": normal(5)}
BASE_FILES = ["saved_model.pb", "variables/variables.data-00000-of-00001"]
MIX = ("it", "de", "", "es", "fr", "it", "es", "de", "fr", "", "it")
CONFIGS = (config(2, ["up", "middle"], **HEAD), config(5, ["up"], use_rslora=True, init="pissa"))


def model_of_four() -> keras.Model:
    """Two adapters to export, and two that come later: of a higher rank, and of fewer layers."""
    model = adapted(functional, CONFIGS)
    model = kl.apply_lora(model, config(4, ["up", "middle"], alpha=3, **HEAD), name="it")
    model = kl.apply_lora(model, config(1, ["middle"], init="olora"), name="es")
    randomize_adapters(model)
    kl.set_adapter(model, "it")
    model.get_layer("head").kernel.assign(np.full((11, 3), 0.7))
    kl.scale_adapter(model, "it", -0.5)
    return model


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> tuple[keras.Model, Path]:
    folder, model = tmp_path_factory.mktemp("origin"), model_of_four()
    kl.export_saved_model(model, folder / "served/1", adapters=["fr", "de"])
    for name in ("it", "es"):
        kl.save_adapter(model, folder / name, name)
    return model, folder


@pytest.fixture
def exported(origin: tuple[keras.Model, Path], tmp_path: Path) -> tuple[keras.Model, Path]:
    """A model of four adapters, of which two are exported and two saved."""
    model, folder = origin
    return model, shutil.copytree(folder, tmp_path / "copy")


def inodes(version: Path) -> list[int]:
    return [(version / name).stat().st_ino for name in BASE_FILES]


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_added_twice_the_rows_equal_the_merged_models(exported: tuple[keras.Model, Path]) -> None:
    model, folder = exported
    second = kl.add_adapter_to_saved_model(folder / "served/1", folder / "it", "it")
    third = kl.add_adapter_to_saved_model(second, folder / "es", "es")
    assert [second, third] == [folder / "served/2", folder / "served/3"]
    assert inodes(folder / "served/1") == inodes(second) == inodes(third)
    assert listed(folder / "served") == ["1", "2", "3"]
    assert_rows(served(third, FEEDS, MIX), answers(model, FEEDS, MIX))
    # The versions are served side by side, each with its own adapters.
    first, last = (tf.saved_model.load(str(v)) for v in (folder / "served/1", third))
    row = {"features": tf.constant(FEEDS["features"][:1])}
    last.signatures["serve"](adapter=tf.constant(["es"]), **row)
    with pytest.raises(tf.errors.InvalidArgumentError, match="one of: fr, de; .*Received: es"):
        first.signatures["serve"](adapter=tf.constant(["es"]), **row)
    assert not kl.check_saved_model(third).problems


@pytest.mark.slow
def test_the_c_library_serves_an_added_adapter(exported: tuple[keras.Model, Path]) -> None:
    model, folder = exported
    version = kl.add_adapter_to_saved_model(folder / "served/1", folder / "it", "it")
    names = tuple(name.replace("es", "de") for name in MIX)
    received, refused = client(version, {**FEEDS, "adapter": names}, [["zz"] * len(MIX)])
    assert_rows(received["head"], answers(model, FEEDS, names))
    assert "one of: fr, de, it; " in refused[0][1]


def test_the_base_is_not_read(exported: tuple[keras.Model, Path]) -> None:
    """Files of the base with any content, since neither they nor a model are needed."""
    _, folder = exported
    for name in BASE_FILES:
        (folder / "served/1" / name).write_bytes(b"")
    version = kl.add_adapter_to_saved_model(folder / "served/1", folder / "it", "it")
    assert [(version / name).stat().st_size for name in BASE_FILES] == [0, 0]


def test_files_are_copied_where_there_are_no_links(
    exported: tuple[keras.Model, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Any) -> None:
        raise OSError("no links here")

    model, folder = exported
    monkeypatch.setattr(os, "link", link)
    version = kl.add_adapter_to_saved_model(
        folder / "served/1", folder / "it", "it", target=folder / "elsewhere"
    )
    assert version == folder / "elsewhere"
    assert inodes(version) != inodes(folder / "served/1")
    names = ("it",) * len(MIX)
    assert_rows(served(version, FEEDS, names), answers(model, FEEDS, names))


def test_an_index_goes_on(tmp_path: Path) -> None:
    model = model_of_four()
    kl.export_saved_model(model, tmp_path / "7", adapters=["de"], adapter_ids="index")
    kl.save_adapter(model, tmp_path / "fr", "fr")
    with pytest.raises(kl.AdapterFileError, match="middle/lora_a: no adapter of the export"):
        kl.add_adapter_to_saved_model(tmp_path / "7", tmp_path / "fr", "fr")
    kl.save_adapter(model, tmp_path / "de", "de")
    version = kl.add_adapter_to_saved_model(tmp_path / "7", tmp_path / "de", "again")
    assert version.name == "8"
    indices, names = [1, -1, 0] * 3 + [1, -1], ("de", "", "de") * 3 + ("de", "")
    assert_rows(served(version, FEEDS, indices), answers(model, FEEDS, names))


def other_width(folder: Path) -> Path:
    inputs = keras.Input((5,), name="features")
    x = keras.layers.Dense(13, name="up")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x), name="other")
    kl.save_adapter(kl.apply_lora(model, config(2, ["up", "head"])), folder / "other")
    return folder / "other"


def peft(folder: Path) -> Path:
    (folder / "peft").mkdir()
    (folder / "peft/adapter_model.safetensors").write_bytes(b"")
    return folder / "peft"


def dora(folder: Path) -> Path:
    model = kl.apply_lora(functional(), config(2, ["up"], use_dora=True))
    kl.save_adapter(model, folder / "dora")
    return folder / "dora"


def halved(folder: Path) -> Path:
    files = kl.read_adapter_files(folder / "it")
    tensors = {key: value for key, value in files.tensors.items() if key != "up/lora_b"}
    tensors["middle/lora_a"] = tensors["middle/lora_a"][:, :3]
    adding_files = folder / "halved"
    write_adapter_files(adding_files, files.config, tensors, overwrite=False)
    return adding_files


ADAPTERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "other base": (
        other_width,
        r"(?s)another base, 'other'.*head/lora_a: no adapter of the export has this.*"
        r"up/lora_b: shape \(2, 13\), expected \(None, 7\)",
    ),
    "peft": (peft, "one of PEFT; convert it, with the model: load_peft_adapter"),
    "halved": (halved, r"middle/lora_a: shape \(7, 3\).*up/lora_b: missing"),
    "dora": (dora, "up/lora_magnitude: DoRA needs the norms of the base's weights"),
    "none": (lambda folder: folder / "nowhere", "adapter.safetensors"),
}


@pytest.mark.parametrize("case", list(ADAPTERS))
def test_an_adapter_that_does_not_fit_is_refused(
    case: str, exported: tuple[keras.Model, Path]
) -> None:
    _, folder = exported
    make, message = ADAPTERS[case]
    with pytest.raises(kl.AdapterFileError, match=message):
        kl.add_adapter_to_saved_model(folder / "served/1", make(folder), "new")
    assert listed(folder / "served") == ["1"]


def test_bad_arguments(exported: tuple[keras.Model, Path]) -> None:
    model, folder = exported
    first = folder / "served/1"
    kl.export_saved_model(model, folder / "merged/1")
    kl.export_saved_model(model, folder / "latest", adapters=["fr"])
    wrong: list[tuple[Path, str, dict[str, Any], str]] = [
        (first, "de", {}, r"a name that is not among \['fr', 'de'\]"),
        (first, "", {}, "non-empty adapter name"),
        (first, "new", {"target": first}, "a path that does not exist"),
        (folder / "merged/1", "new", {}, r"adapters=\[...\]"),
        (folder / "nowhere", "new", {}, r"adapters=\[...\]"),
        (folder / "latest", "new", {}, "a directory with a number"),
    ]
    for path, name, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            kl.add_adapter_to_saved_model(path, folder / "it", name, **options)
    (first / "assets/adapters.index").write_bytes(b"cut")
    with pytest.raises(ValueError, match="Expected the stored adapters of an export"):
        kl.add_adapter_to_saved_model(first, folder / "it", "it")
    description = json.loads((first / DESCRIPTION).read_text())
    (first / DESCRIPTION).write_text(json.dumps({**description, "format_version": 2}))
    with pytest.raises(ValueError, match="format_version 2"):
        kl.add_adapter_to_saved_model(first, folder / "it", "it")
    assert listed(folder / "served") == ["1"]


def test_a_failure_leaves_no_version(
    exported: tuple[keras.Model, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("disk full")

    _, folder = exported
    monkeypatch.setattr(adding, "write_stacks", full)
    with pytest.raises(OSError, match="disk full"):
        kl.add_adapter_to_saved_model(folder / "served/1", folder / "it", "it")
    assert listed(folder / "served") == ["1"]


KILLED = """
import os, sys
import keras_lora as kl
from keras_lora.export.many import adding
from keras_lora.files.adapter_files import write_adapter_files
from keras_lora.export.many.endpoint import DESCRIPTION

def killed(*_):
    os._exit(0)

adding.write_stacks = killed
kl.add_adapter_to_saved_model(sys.argv[1], sys.argv[2], "it")
"""


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_a_server_takes_for_a_version(
    exported: tuple[keras.Model, Path], fork: Fork
) -> None:
    _, folder = exported
    status, output = fork(KILLED, folder / "served/1", folder / "it")
    assert status == 0, output
    assert [name for name in listed(folder / "served") if name.isdecimal()] == ["1"]
    version = kl.add_adapter_to_saved_model(folder / "served/1", folder / "it", "it")
    assert version.name == "2"
