"""The command line: adapters to PEFT and KerasHub and back, and how far two differ."""

from __future__ import annotations

from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from support.command_line import BASE, HEAD, REVIEWS, Ask, Run, assert_same_tensors, tensors
from support.models import randomize_adapters

import keras_lora as kl
from keras_lora.layers import site_of

pytest_plugins = ["support.command_line"]


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
    kl.load_adapter(loaded, tmp_path / "native")  # so the fingerprint is that of this base


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


def test_an_adapter_with_a_counterpart_is_compared_as_what_it_computes(
    ask: Ask, tmp_path: Path
) -> None:
    model = kl.apply_lora(keras.models.load_model(BASE), kl.LoRAConfig(rank=2, init="olora"))
    for layer in kl.lora_layers(model).values():
        layer.adapters["default"].b.assign(1.5 * np.array(layer.adapters["default"].b))
    kl.save_adapter(model, tmp_path / "a")
    kl.save_adapter(model, tmp_path / "half", dtype="bfloat16")
    assert [x["rank"] for x in ask("inspect", tmp_path / "a")["layers"]] == [4, 4]
    found = ask("diff", tmp_path / "a", tmp_path / "half", code=1)
    assert 0 < max(x["relative_distance"] for x in found["layers"]) < 2**-7
    assert ask("diff", tmp_path / "a", tmp_path / "half", "--base", BASE, "--tolerance", 0.01)[
        "equal"
    ]


@pytest.mark.slow
def test_a_hugging_face_directory_is_a_base(ask: Ask, tmp_path: Path) -> None:
    from support.hugging_face_models import HUGGING_FACE_MODELS  # noqa: PLC0415  (imports torch)

    (tmp_path / "llama").mkdir()
    HUGGING_FACE_MODELS["llama"](tmp_path / "llama")
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
    """If the rank equals the number of experts, shapes do not tell which axis is which."""

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
        assert site_of(layer).split().shared
    (found,) = ask("diff", tmp_path / "2", tmp_path / "2")["layers"]
    assert found["ranks"] == [2, 2]
    result = run("diff", tmp_path / "3", tmp_path / "3")
    assert result.code == 2
    assert "give the model that they belong to as --base" in result.err
