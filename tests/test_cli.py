"""The command line: its answers against the library's own and NumPy's, and its refusals."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pty
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import processes
import pytest
import tensorflow as tf
import typer.main
from models import data, functional, randomize_adapters

import keras_lora as kl
import keras_lora_cli
from keras_lora.layers import split_kernel
from keras_lora_cli.app import EXAMPLES, TRACEBACK, app

BASE = "the base.keras"
REVIEWS = "adapters/réviews"
HEAD = ["--head", "logits=classifier"]

Run = Callable[..., "Result"]
Ask = Callable[..., Any]


class Result:
    """What a command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def language_model() -> keras.Model:
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=31, num_layers=1, num_heads=3, hidden_dim=24, intermediate_dim=37
    )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


def classifier() -> keras.Model:
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=31, num_layers=1, num_heads=3, hidden_dim=15, intermediate_dim=17
    )
    return keras_hub.models.BertTextClassifier(backbone, num_classes=5, preprocessor=None)


def save_adapter(model: keras.Model, config: kl.LoRAConfig, name: str) -> None:
    """Adapt a model, save the adapter and leave the model as it was."""
    kl.apply_lora(model, config)
    rng = np.random.default_rng(len(name))
    for variable in model.trainable_variables:
        variable.assign(rng.normal(scale=0.3, size=variable.shape))
    kl.save_adapter(model, f"adapters/{name}")
    if name == "gpt2":
        kl.save_peft_adapter(model, "peft/gpt2", prefix="transformer.")
        kl.save_keras_hub_lora(model, "gpt2.lora.h5")
    if name == "bert":
        kl.save_peft_adapter(model, "peft/bert", heads={"logits": "classifier"})
    kl.unload_lora(model)


def unservable() -> tf.Module:
    module = tf.Module()
    module.f = tf.function(
        lambda x: tf.numpy_function(np.sin, [x], tf.float32),
        input_signature=[tf.TensorSpec([3], tf.float32)],
    )
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of models and adapters, with names that need quoting."""
    folder = tmp_path_factory.mktemp("with space")
    before = Path.cwd()
    os.chdir(folder)
    try:
        model = functional()
        model.save(BASE)
        save_adapter(model, kl.LoRAConfig(rank=2, alpha=3, layers_to_save=["head"]), "réviews")
        save_adapter(model, kl.LoRAConfig(rank=3, targets=["up"], use_rslora=True), "style")
        for name, task in (("gpt2", language_model()), ("bert", classifier())):
            task.save_to_preset(f"presets/{name}")
            head = ["logits"] if name == "bert" else []
            targets = ["query", "value"]
            save_adapter(task, kl.LoRAConfig(rank=2, targets=targets, layers_to_save=head), name)
        task.save("bert.keras")
        tf.saved_model.save(unservable(), "unservable")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(files)

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = keras_lora_cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def ask(run: Run) -> Ask:
    """Run a command that has an answer, as JSON and as a table."""

    def call(*arguments: object, code: int = 0) -> Any:
        result = run(*arguments, "--json")
        assert (result.err, result.code) == ("", code)
        return json.loads(result.out)

    return call


def tensors(directory: str | Path) -> Mapping[str, np.ndarray]:
    return kl.read_adapter_files(directory).tensors


def assert_same_tensors(first: str | Path, second: str | Path) -> None:
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, two[key], strict=True)


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


# --- merge and export -----------------------------------------------------------------------


def expected_outputs(x: np.ndarray, *adapters: str) -> np.ndarray:
    """Of the base with these adapters, in float64: kernels formed by hand."""
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


# --- convert --------------------------------------------------------------------------------


def test_there_and_back_through_peft(ask: Ask, tmp_path: Path) -> None:
    base = ["--base", "presets/bert", *HEAD]
    there = ask("convert", "adapters/bert", tmp_path / "peft", *base)
    assert (there["source_format"], there["format"], there["ranks"]) == ("native", "peft", [2])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "peft" / name).read_bytes() == Path("peft/bert", name).read_bytes()
    back = ask("convert", tmp_path / "peft", tmp_path / "native", *base)
    assert back["parameters"] == ask("inspect", "adapters/bert")["parameters"] - 5 * 15 - 5
    assert_same_tensors(tmp_path / "native", "adapters/bert")
    loaded = keras_hub.models.TextClassifier.from_preset("presets/bert", preprocessor=None)
    kl.load_adapter(loaded, tmp_path / "native")  # the fingerprint is the base's


def test_there_and_back_through_keras_hub(ask: Ask, tmp_path: Path) -> None:
    base = ["--base", "presets/gpt2"]
    file = tmp_path / "x.lora.h5"
    ask("convert", "adapters/gpt2", file, *base)
    back = ask("convert", file, tmp_path / "back", *base)
    assert {(x["file_rank"], x["error"]) for x in back["converted"]} == {(6, 0)}
    assert ask("diff", tmp_path / "back", "adapters/gpt2")["equal"]
    cut = ask("convert", file, tmp_path / "cut", *base, "--rank", 1)
    assert cut["ranks"] == [1]
    assert all(0 < x["error"] < 1 for x in cut["converted"])
    peft = ask("convert", file, tmp_path / "peft", *base, "--to", "peft")
    assert peft["format"] == "peft"
    assert ask("diff", tmp_path / "peft", "adapters/gpt2", *base)["equal"]


@pytest.mark.parametrize(("source", "to"), [("adapters/bert", "native"), ("peft/bert", "peft")])
def test_another_dtype_needs_no_base(ask: Ask, tmp_path: Path, source: str, to: str) -> None:
    ask("convert", source, tmp_path / "half", "--to", to, "--dtype", "bfloat16")
    found = ask("diff", source, tmp_path / "half", code=1)
    assert 0 < max(x["relative_distance"] for x in found["layers"]) < 2**-7
    assert ask("diff", source, tmp_path / "half", "--tolerance", 0.01)["equal"]


@pytest.mark.slow
def test_a_hugging_face_directory_is_a_base(ask: Ask, tmp_path: Path) -> None:
    from hub_models import HUB_MODELS  # noqa: PLC0415  (imports torch)

    (tmp_path / "llama").mkdir()
    HUB_MODELS["llama"](tmp_path / "llama")
    base = keras_hub.models.CausalLM.from_preset(str(tmp_path / "llama"), preprocessor=None)
    kl.apply_lora(base, kl.LoRAConfig(rank=2, targets="attention"))
    randomize_adapters(base)
    kl.save_adapter(base, tmp_path / "native")
    options = ["--base", tmp_path / "llama", "--task", "CausalLM"]
    ask("convert", tmp_path / "native", tmp_path / "peft", *options)
    ask("convert", tmp_path / "peft", tmp_path / "back", *options)
    assert_same_tensors(tmp_path / "native", tmp_path / "back")
    merge = ["merge", tmp_path / "llama", tmp_path / "peft", tmp_path / "merged"]
    ask(*merge, "--task", "CausalLM", "--no-preprocessor")
    merged = keras_hub.models.CausalLM.from_preset(str(tmp_path / "merged"))
    tokens = np.arange(1, 12)[None]
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    np.testing.assert_allclose(merged(inputs), base(inputs), atol=1e-5)


# --- diff -----------------------------------------------------------------------------------


def test_differences_are_those_of_the_deltas(ask: Ask) -> None:
    found = ask("diff", REVIEWS, "adapters/style", code=1)
    assert not found["equal"]
    assert set(found["differing"]) == {"middle", "up", "head/kernel", "head/bias"}
    first, second = tensors(REVIEWS), tensors("adapters/style")
    x = 1.5 * first["up/lora_a"].astype("float64") @ first["up/lora_b"]
    y = 16 / 3**0.5 * second["up/lora_a"].astype("float64") @ second["up/lora_b"]
    (row,) = [row for row in found["layers"] if row["name"] == "up"]
    assert (row["ranks"], row["scales"]) == ([2, 3], pytest.approx([1.5, 16 / 3**0.5]))
    norms = [np.linalg.norm(x), np.linalg.norm(y)]
    assert row["norms"] == pytest.approx(norms)
    assert row["distance"] == pytest.approx(np.linalg.norm(x - y))
    assert row["relative_distance"] == pytest.approx(np.linalg.norm(x - y) / max(norms))
    assert row["cosine"] == pytest.approx(np.vdot(x, y) / np.prod(norms))
    (alone,) = [row for row in found["layers"] if row["name"] == "middle"]
    assert (alone["ranks"], alone["relative_distance"]) == ([2, None], 1)
    config = {x["name"]: x["values"] for x in found["config"]}
    assert config["spec.rank"] == [2, 3]
    assert config["config.use_rslora"] == [False, True]


def test_the_farthest_layers_come_first(ask: Ask, tmp_path: Path) -> None:
    model = keras.models.load_model(BASE)
    kl.load_adapter(model, REVIEWS)
    for name, factor in (("up", 1.1), ("middle", 1.3)):
        adapter = kl.lora_layers(model)[name].adapters["default"]
        adapter.b.assign(np.array(adapter.b) * factor)
    model.get_layer("head").bias.assign([1.0, 2.0, 3.0])
    kl.save_adapter(model, tmp_path / "moved")
    found = ask("diff", REVIEWS, tmp_path / "moved", code=1)
    assert [x["name"] for x in found["layers"]] == ["middle", "up"]
    distances = [x["relative_distance"] for x in found["layers"]]
    assert distances == pytest.approx([1 - 1 / 1.3, 1 - 1 / 1.1])
    assert found["differing"] == ["middle", "up", "head/bias"]
    assert ask("diff", REVIEWS, tmp_path / "moved", "--tolerance", 1)["equal"]


@pytest.mark.parametrize("other", ["adapters/gpt2", "peft/gpt2", "gpt2.lora.h5"])
def test_the_same_adapter_in_two_formats_is_equal(ask: Ask, other: str) -> None:
    found = ask("diff", "adapters/gpt2", other, "--base", "presets/gpt2")
    assert found["equal"]
    assert len(found["layers"]) == 2
    assert ask("diff", other, other)["equal"]


def test_experts_are_compared_by_their_shapes_or_with_a_base(
    ask: Ask, run: Run, tmp_path: Path
) -> None:
    """Where the rank is the number of experts, shapes alone do not tell which axis is which."""

    def experts() -> keras.Model:
        inputs = keras.Input((3, 7, 5), name="x")  # (batch, expert, rows, d)
        layer = keras.layers.EinsumDense("betd,edf->betf", (3, None, 11), name="experts")
        return keras.Model(inputs, layer(inputs))

    experts().save(tmp_path / "experts.keras")
    for rank in (2, 3):
        model = kl.apply_lora(experts(), kl.LoRAConfig(rank=rank, targets=["experts"]))
        randomize_adapters(model)
        kl.save_adapter(model, tmp_path / str(rank))
        layer = kl.lora_layers(model)["experts"]
        a, b = (np.array(x, "float64") for x in layer.adapters["default"].factors)
        norm = np.linalg.norm(16 / rank * np.einsum("edr,erf->edf", a, b))
        base = ["--base", tmp_path / "experts.keras"]
        (found,) = ask("diff", tmp_path / str(rank), tmp_path / str(rank), *base)["layers"]
        assert found["norms"][0] == pytest.approx(norm)
        assert split_kernel(layer).shared
    (found,) = ask("diff", tmp_path / "2", tmp_path / "2")["layers"]
    assert found["ranks"] == [2, 2]
    result = run("diff", tmp_path / "3", tmp_path / "3")
    assert result.code == 2
    assert "give the model that they belong to as --base" in result.err


# --- check ----------------------------------------------------------------------------------


def test_a_saved_model_that_no_server_runs_is_a_no(ask: Ask, run: Run) -> None:
    found = ask("check", "unservable", code=1)
    assert found["problems"] == list(kl.check_saved_model("unservable").problems)
    assert "runs Python" in run("check", "unservable").out


# --- Bad input ------------------------------------------------------------------------------

REFUSED = {
    "no such command": ("mrege", "Did you mean 'merge'?"),
    "no such option": ("inspect x --nope", "No such option: --nope"),
    "an argument is missing": ("merge base out", "Missing argument"),
    "no such path": ("inspect no/where", "Received: nothing; give the path of one"),
    "no such preset": ("inspect bert_nowhere", "a path that exists, or the name of a preset"),
    "another kind of file": ("inspect broken.txt", "Received: a file of another kind"),
    "another kind of directory": ("check presets/gpt2", "Received: a preset directory"),
    "a broken model": ("inspect broken.keras", "expected a whole .keras file"),
    "a broken adapter": ("inspect broken/native", "expected at most 0. Received: "),
    "a broken PEFT": ("inspect broken/peft", "valid JSON"),
    "a broken lora.h5": ("inspect broken.lora.h5", "a whole file of KerasHub's"),
    "a broken SavedModel": ("check broken/saved", "Expected a SavedModel"),
    "python code": ("inspect lambda.keras", "safe_mode=False"),
    "an unknown layer": ("inspect custom.keras", "give --import the module that registers it"),
    "an unknown module": ("inspect custom.keras --import nowhere", "No module named 'nowhere'"),
    "a rank of 0": ("inspect base.keras --rank 0", "expected a positive integer"),
    "a rank of words": ("inspect base.keras --rank four", "Invalid value for '--rank'"),
    "no such layer": ("inspect base.keras --targets nope", "Expected every name in `targets`"),
    "a bad pattern": ("inspect base.keras --targets re:(", "a regular expression after 're:'"),
    "a task for a file": ("inspect base.keras --task CausalLM", "expected a preset for --task"),
    "no such task": ("inspect presets/gpt2 --task Nope", "a class in keras_hub.models"),
    "another base": ("merge base.keras adapters/gpt2 x.keras", "of a base with the shapes of"),
    "no form": ("merge base.keras adapters/style out", "a path that tells the format"),
    "no preset": ("merge base.keras adapters/style out --format preset", "a model of KerasHub"),
    "no ending": ("merge base.keras adapters/style out --format keras", "ends in .keras"),
    "no room": ("add-adapter unservable a=adapters/style", "adapters=[...]) wrote"),
    "no native one": ("add-adapter unservable a=peft/gpt2", "expected an adapter's directory."),
    "no class names": ("export base.keras out --class-name a", "class_names"),
    "no name": ("export base.keras out --adapter adapters/style", "expected NAME=VALUE"),
    "a base that is needed": ("convert adapters/gpt2 out", "Expected a --base"),
    "nothing to convert": ("convert gpt2.lora.h5 out.lora.h5", "Expected a --base"),
    "no such dtype": ("convert peft/gpt2 out --to peft --dtype int8", "expected one of"),
    "heads unnamed": ("convert peft/bert out --base presets/bert", "has no variable that is this"),
    "no such config": (
        "convert adapters/gpt2 out --base presets/gpt2 --transformers-config broken.txt",
        "the config.json of a Hugging Face model",
    ),
    "two formats": ("diff adapters/gpt2 peft/gpt2", "directory of PEFT; give the model"),
    "two bases": ("diff adapters/style adapters/other", "Expected two adapters of one base"),
    "no tolerance": ("diff peft/gpt2 peft/gpt2 --tolerance=-1", "that is not negative"),
}


@pytest.fixture(scope="module")
def broken(files: Path) -> None:
    """Files that cannot be read, beside the others."""
    for name in ("broken.txt", "broken.keras", "broken.lora.h5"):
        (files / name).write_text("broken")
    for folder, name in (
        ("native", "adapter.safetensors"),
        ("peft", "adapter_config.json"),
        ("saved", "saved_model.pb"),
    ):
        (files / "broken" / folder).mkdir(parents=True)
        (files / "broken" / folder / name).write_text("broken")
    inputs = keras.Input((5,))
    x = keras.layers.Dense(3)(inputs)
    keras.Model(inputs, keras.layers.Lambda(lambda x: x)(x)).save(files / "lambda.keras")
    (files / "base.keras").write_bytes((files / BASE).read_bytes())
    own = type("Own", (keras.layers.Dense,), {})
    keras.Model(inputs, keras.layers.Dense(2)(own(3)(x))).save(files / "custom.keras")
    wider = keras.Sequential([keras.Input((5,)), keras.layers.Dense(13, name="up")])
    kl.apply_lora(wider, kl.LoRAConfig(rank=2, targets=["up"]))
    kl.save_adapter(wider, files / "adapters" / "other")


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("broken")
def test_bad_input_is_refused_in_one_line(run: Run, files: Path, case: str) -> None:
    command, message = REFUSED[case]
    before = sorted(files.rglob("*"))
    result = run(*shlex.split(command))
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("keras-lora: error: ")
    assert result.err.count("\n") == 1
    assert message in result.err
    assert sorted(files.rglob("*")) == before


@pytest.mark.usefixtures("broken")
def test_the_traceback_is_there_when_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(ValueError, match="a whole .keras file"):
        run("inspect", "broken.keras")


def test_warnings_are_lines(run: Run, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter.safetensors").write_bytes(
        Path(REVIEWS, "adapter.safetensors").read_bytes()
    )
    result = run("inspect", tmp_path, "--json")
    assert result.code == 0
    assert json.loads(result.out)["format"] == "native"
    assert result.err.startswith("keras-lora: warning: Expected in ")
    assert result.err.count("\n") == 1


def test_modules_are_imported_for_layers_of_ones_own(
    ask: Ask, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_layers.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable('own')\n"
        "class Shift(keras.layers.Layer):\n"
        "    def call(self, x): return x + 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shift = importlib.import_module("own_layers").Shift()
    up, head = keras.layers.Dense(3, name="up"), keras.layers.Dense(2)
    keras.Sequential([keras.Input((5,)), up, shift, head]).save(tmp_path / "own.keras")
    keras.saving.get_custom_objects().pop("own>Shift")
    sys.modules.pop("own_layers")
    assert run("inspect", tmp_path / "own.keras").code == 2
    found = ask("inspect", tmp_path / "own.keras", "--import", "own_layers")
    assert [t["path"] for t in found["targets"]] == ["up"]


# --- Help, and the command as it is installed -------------------------------------------------


def test_every_command_has_help_with_its_examples(run: Run) -> None:
    group: Any = typer.main.get_command(app)
    assert set(EXAMPLES) == set(group.commands)
    for name, examples in EXAMPLES.items():
        shown = " ".join(run(name, "--help").out.split())
        assert examples
        for example in examples:
            assert " ".join(example.split()) in shown
            program, command, *arguments = shlex.split(example)
            assert (program, command) == ("keras-lora", name)
            group.commands[name].make_context(name, arguments)  # what it says is understood
        assert not run(name, "--help").err


def test_help_lists_the_exit_codes(run: Run) -> None:
    assert "Exit codes: 0 all is well" in " ".join(run("--help").out.split())
    assert run().code == 2
    assert run("--version").out == f"{kl.__version__}\n"


HEAVY = ("tensorflow", "keras", "keras_lora", "keras_hub", "numpy", "torch")
CALL = "import sys, keras_lora_cli; sys.exit(keras_lora_cli.main(sys.argv[1:]))"


def test_help_and_the_errors_of_typing_do_not_import_tensorflow() -> None:
    assert "Usage: keras-lora" in processes.run(CALL, "--help", block=HEAVY)
    assert "Examples:" in processes.run(CALL, "merge", "--help", block=HEAVY)
    failing = CALL.replace("sys.exit(", "assert 2 == (")
    assert "No such option" in processes.run(failing, "merge", "--nope", block=HEAVY)


def test_without_typer_the_command_says_what_to_install() -> None:
    failing = CALL.replace("sys.exit(", "assert 2 == (")
    output = processes.run(failing, "--help", block=("typer",))
    assert output.startswith('keras-lora: error: typer is needed: pip install "keras-lora[cli]"')
    assert output.count("\n") == 1


def command(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command as it is installed, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(processes.ROOT)}
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(
        [sys.executable, "-c", CALL, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        check=False,
        **settings,
    )


def read_all(terminal: int) -> str:
    """What is written to a terminal until its other end is closed."""
    parts = []
    with contextlib.suppress(OSError):  # Linux says so in this way
        while part := os.read(terminal, 2**16):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts).decode()


@pytest.mark.slow
def test_a_process_answers_in_json_alone_beside_a_bar(files: Path) -> None:
    """As on a terminal: standard error is one, standard output a pipe."""
    ours, theirs = pty.openpty()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_all, ours)
        done = command(files, "diff", REVIEWS, "adapters/style", "--json", stderr=theirs)
        os.close(theirs)
        bar = reading.result()
    assert done.returncode == 1
    assert json.loads(done.stdout)["formats"] == ["native", "native"]
    assert "starting Keras" in bar
    assert "oneDNN" not in bar


@pytest.mark.slow
def test_a_process_fails_with_one_line(files: Path) -> None:
    done = command(files, "check", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("keras-lora: error: Invalid 'nowhere'")


def test_the_package_is_the_command_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["keras_lora", "--version"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("keras_lora", run_name="__main__")
    assert (done.value.code, capsys.readouterr().out) == (0, f"{kl.__version__}\n")
