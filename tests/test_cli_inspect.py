"""The command line: what `inspect` says of models and adapters."""

from __future__ import annotations

import json
from pathlib import Path

import keras
import pytest
import tensorflow as tf
from support.command_line import BASE, REVIEWS, Ask, Run
from support.models import functional

import keras_lora as kl

pytest_plugins = ["support.command_line"]


# --- inspect --------------------------------------------------------------------------------


def test_a_model_is_inspected_for_what_could_be_adapted(ask: Ask) -> None:
    found = ask("inspect", BASE, "--rank", 3, "--targets", "up", "--targets", "head")
    assert (found["format"], found["class"], found["name"]) == ("keras", "Functional", "mlp")
    model = keras.models.load_model(BASE)
    targets = kl.find_targets(model, ["up", "head"])
    assert [(t["path"], t["kind"], tuple(t["kernel_shape"])) for t in found["targets"]] == [
        (t.path, t.kind, t.kernel_shape) for t in targets
    ]
    assert [t["adapter_parameters"] for t in found["targets"]] == [3 * (5 + 7), 3 * (11 + 3)]
    kl.apply_lora(model, kl.LoRAConfig(rank=3, targets=["up", "head"]))
    rows = kl.lora_summary(model).rows
    assert found["adapter_parameters"] == sum(row.parameters for row in rows)
    assert found["bytes"] == Path(BASE).stat().st_size


def test_a_preset_is_inspected_without_its_weights(ask: Ask, tmp_path: Path) -> None:
    for name in ("config.json", "task.json"):
        (tmp_path / name).write_bytes(Path("presets/gpt2", name).read_bytes())
    for preset, options in (("presets/gpt2", []), (tmp_path, [])):
        found = ask("inspect", preset, "--targets", "re:.*/(query|value)", *options)
        assert found["class"] == "GPT2CausalLM"
        assert [t["kernel_shape"] for t in found["targets"]] == [[24, 3, 8]] * 2
    (tmp_path / "task.json").unlink()
    assert ask("inspect", tmp_path)["class"] == "GPT2Backbone"
    assert ask("inspect", tmp_path, "--task", "CausalLM")["class"] == "GPT2CausalLM"


def test_an_adapted_model_shows_its_adapters(ask: Ask, run: Run, tmp_path: Path) -> None:
    model = kl.apply_lora(functional(), kl.LoRAConfig(rank=2), name="fr")
    model.save(tmp_path / "m.keras")
    found = ask("inspect", tmp_path / "m.keras")["adapters"]
    assert [(x["path"], x["adapter"], x["rank"]) for x in found] == [
        ("up", "fr", 2),
        ("middle", "fr", 2),
    ]
    assert "of kernel" in run("inspect", tmp_path / "m.keras").out


def test_a_native_adapter_is_inspected(ask: Ask) -> None:
    found = ask("inspect", REVIEWS)
    written = kl.read_adapter_files(REVIEWS)
    assert (found["format"], found["config"]) == ("native", written.config)
    assert found["base"] == written.config["base"]
    assert [(x["name"], x["rank"], x["alpha"], x["scale"]) for x in found["layers"]] == [
        ("middle", 2, 3, 1.5),
        ("up", 2, 3, 1.5),
    ]
    assert [x["shapes"] for x in found["layers"]] == [[[7, 2], [2, 11]], [[5, 2], [2, 7]]]
    assert found["values"] == [
        {"name": "head/kernel", "shape": [11, 3], "parameters": 33},
        {"name": "head/bias", "shape": [3], "parameters": 3},
    ]
    assert found["parameters"] == sum(value.size for value in written.tensors.values())
    assert found["bytes"] == sum(file.stat().st_size for file in Path(REVIEWS).iterdir())


def test_adapters_of_others_are_inspected(ask: Ask) -> None:
    peft = ask("inspect", "peft/bert")
    assert peft["format"] == "peft"
    assert [x["name"] for x in peft["values"]] == ["classifier.bias", "classifier.weight"]
    config = json.loads(Path("peft/bert/adapter_config.json").read_text())
    assert peft["config"] == config
    assert {x["rank"] for x in peft["layers"]} == {config["r"]}
    hub = ask("inspect", "gpt2.lora.h5")
    assert (hub["format"], hub["base"], hub["values"]) == ("keras-hub", None, [])
    # A rank of 2 in each of 3 heads needs at most 6 where Keras factors the last axis.
    assert {x["rank"] for x in hub["layers"]} == {6}


def test_a_saved_model_is_inspected(ask: Ask, tmp_path: Path) -> None:
    ask("export", BASE, tmp_path / "1")
    found = ask("inspect", tmp_path / "1")
    signature = found["signatures"]["serving_default"]
    loaded = tf.saved_model.load(tmp_path / "1").signatures["serving_default"]
    (spec,) = loaded.structured_input_signature[1].values()
    shape = list(spec.shape)
    assert signature["inputs"] == {"features": {"dtype": spec.dtype.name, "shape": shape}}
    assert signature["outputs"] == {"head": {"dtype": "float32", "shape": [None, 3]}}
    assert found["operations"] == kl.check_saved_model(tmp_path / "1").operations


@pytest.mark.parametrize(
    "path", [BASE, REVIEWS, "peft/bert", "gpt2.lora.h5", "presets/bert", "unservable"]
)
def test_people_get_tables(run: Run, path: str) -> None:
    result = run("inspect", path)
    assert (result.code, result.err) == (0, "")
    assert path in result.out
    assert "━" in result.out
