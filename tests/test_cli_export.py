"""The command line: merged models, and SavedModels that answer as the library's."""

from __future__ import annotations

from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from support.command_line import BASE, REVIEWS, Ask, Run, tensors
from support.models import data, functional

import keras_lora as kl

pytest_plugins = ["support.command_line"]


# --- merge and export -----------------------------------------------------------------------


def expected_outputs(x: np.ndarray, *adapters: str) -> np.ndarray:
    """The outputs of the base with these adapters, in float64, from kernels formed in NumPy."""
    model = keras.models.load_model(BASE)
    for directory in adapters:
        config, values = kl.read_adapter_files(directory).config, tensors(directory)
        spec = kl.AdapterSpec(**config["spec"])
        for key in [k for k in values if k.endswith("/lora_a")]:
            kernel = model.get_layer(key.removesuffix("/lora_a")).kernel
            a, b = (values[key.removesuffix("a") + f].astype("float64") for f in "ab")
            kernel.assign(np.array(kernel, "float64") + spec.scaling * a @ b)
        for key in config["variables"]:
            layer, variable = key.split("/")
            getattr(model.get_layer(layer), variable).assign(values[key])
    return model.predict(x, verbose=0)


@pytest.mark.parametrize("adapters", [[REVIEWS], [REVIEWS, "adapters/style"]], ids=len)
@pytest.mark.parametrize("out", ["merged model.keras", "served/7"])
def test_a_merged_model_computes_base_and_adapters(
    ask: Ask, tmp_path: Path, adapters: list[str], out: str
) -> None:
    target = tmp_path / "new" / out
    found = ask("merge", BASE, *adapters, target)
    assert (found["out"], found["adapters"]) == (str(target), adapters)
    x, _ = data(functional())
    if target.suffix == ".keras":
        model = keras.models.load_model(target)
        assert not kl.lora_layers(model)
        received = model.predict(x, verbose=0)
    else:
        assert found["signatures"]["serving_default"]["inputs"]["features"]["shape"] == [None, 5]
        served = tf.saved_model.load(target).signatures["serving_default"]
        received = served(features=tf.constant(x))["head"].numpy()
    np.testing.assert_allclose(received, expected_outputs(x, *adapters), atol=1e-5)
    assert not list(tmp_path.glob("**/.*")), "temporary files stay"


@pytest.mark.parametrize("adapter", ["adapters/gpt2", "peft/gpt2", "gpt2.lora.h5"])
def test_a_preset_comes_out_of_a_preset(ask: Ask, tmp_path: Path, adapter: str) -> None:
    found = ask("merge", "presets/gpt2", adapter, tmp_path / "out")
    assert (found["format"], found["class"]) == ("preset", "GPT2CausalLM")
    received = keras_hub.models.CausalLM.from_preset(str(tmp_path / "out"))
    expected = keras_hub.models.CausalLM.from_preset("presets/gpt2")
    kl.load_adapter(expected, "adapters/gpt2")
    tokens = np.arange(1, 12)[None]
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    np.testing.assert_allclose(received(inputs), expected(inputs), atol=1e-5)


def test_what_a_base_was_adapted_with_stays(ask: Ask, tmp_path: Path) -> None:
    model = keras.models.load_model(BASE)
    kl.load_adapter(model, "adapters/style", "style")
    model.save(tmp_path / "adapted.keras")
    ask("merge", tmp_path / "adapted.keras", REVIEWS, tmp_path / "merged.keras")
    x, _ = data(functional())
    received = keras.models.load_model(tmp_path / "merged.keras").predict(x, verbose=0)
    expected = expected_outputs(x, "adapters/style", REVIEWS)
    np.testing.assert_allclose(received, expected, atol=1e-5)


def test_only_the_same_kind_is_overwritten(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "served" / "1"
    merge = ("merge", BASE, REVIEWS, target)
    assert run(*merge).code == 0
    before = sorted(target.rglob("*"))
    result = run(*merge)
    assert (result.code, sorted(target.rglob("*"))) == (2, before)
    assert "pass --overwrite to replace it" in result.err
    assert run(*merge, "--overwrite").code == 0
    (tmp_path / "mine" / "1").mkdir(parents=True)
    (tmp_path / "mine" / "1" / "thesis.txt").write_text("irreplaceable")
    result = run("merge", BASE, REVIEWS, tmp_path / "mine" / "1", "--overwrite")
    assert result.code == 2
    assert (tmp_path / "mine" / "1" / "thesis.txt").read_text() == "irreplaceable"


def test_the_base_alone_is_exported_too(ask: Ask, tmp_path: Path) -> None:
    assert ask("export", BASE, tmp_path / "plain")["adapters"] == []
    x, _ = data(functional())
    served = tf.saved_model.load(tmp_path / "plain").signatures["serving_default"]
    received = served(features=tf.constant(x))["head"]
    np.testing.assert_allclose(received, expected_outputs(x), atol=1e-5)


def served(path: Path, **inputs: object) -> dict[str, np.ndarray]:
    signature = tf.saved_model.load(path).signatures["serving_default"]
    return {key: value.numpy() for key, value in signature(**inputs).items()}


def test_many_adapters_are_exported_and_one_is_added(ask: Ask, tmp_path: Path) -> None:
    adapters = ["--adapter", f"a={REVIEWS}", "--adapter", "b=adapters/style"]
    version = tmp_path / "served" / "1"
    assert ask("export", BASE, version, *adapters)["adapters"] == ["a", "b"]
    added = ask("add-adapter", version, f"c={REVIEWS}")
    assert added == {"out": str(tmp_path / "served" / "2"), "adapters": ["a", "b", "c"]}
    assert ask("inspect", added["out"])["adapters"] == ["a", "b", "c"]
    assert ask("inspect", "unservable")["adapters"] is None
    x, _ = data(functional())
    names = ["a", "", "b", "c", "b", "a"]
    received = served(tmp_path / "served" / "2", features=tf.constant(x), adapter=names)["head"]
    paths = {"a": [REVIEWS], "b": ["adapters/style"], "c": [REVIEWS], "": []}
    expected = {name: expected_outputs(x, *adapters) for name, adapters in paths.items()}
    for i, name in enumerate(names):
        np.testing.assert_allclose(received[i], expected[name][i], atol=1e-5)
    again = ask("add-adapter", version, f"c={REVIEWS}", "--out", tmp_path / "other")
    assert again["out"] == str(tmp_path / "other")


def test_their_sum_is_exported_with_the_names_of_classes(ask: Ask, tmp_path: Path) -> None:
    adapters = ["--adapter", f"a={REVIEWS}", "--adapter", "b=adapters/style", "--merged"]
    names = ["bad", "so so", "good"]
    options = [part for name in names for part in ("--class-name", name)]
    found = ask("export", BASE, tmp_path / "1", *adapters, *options)
    assert found["adapters"] == ["a", "b"]
    x, _ = data(functional())
    received = served(tmp_path / "1", features=tf.constant(x))
    expected = expected_outputs(x, REVIEWS, "adapters/style")
    np.testing.assert_allclose(received["head"], expected, atol=1e-5)
    labels = [name.decode() for name in received["label"]]
    assert labels == [names[i] for i in expected.argmax(1)]


def test_a_language_model_is_exported_with_and_without_generation(ask: Ask, tmp_path: Path) -> None:
    adapter = ["--adapter", "g=adapters/gpt2", "--merged"]
    plain = ask("export", "presets/gpt2", tmp_path / "1", *adapter, "--no-generate")
    assert set(plain["signatures"]) == {"serve", "serving_default"}
    lengths = ["--max-length", 11, "--stop-token-id", 3]
    found = ask("export", "presets/gpt2", tmp_path / "2", *adapter, *lengths)
    assert set(found["signatures"]) == {"serve", "serving_default", "generate"}
