"""PEFT's files: what PEFT on torch writes is read and written again, byte for byte."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from support.peft_adapters import (
    CASES,
    COMPUTED,
    CONFIG,
    LAYERS,
    WEIGHTS,
    Base,
    adapted,
    assert_reads,
    assert_same,
    assert_same_tensors,
    config_of,
    fresh,
    lora_layers,
    module,
    outputs,
    saved_by_peft,
    written,
)

from keras_lora.checks import AdapterFileError
from keras_lora.exchange.peft_files import (
    read_peft_adapter,
    write_peft_adapter,
)
from keras_lora.exchange.peft_files.tensors import PREFIX, file_tensors


# PEFT says so of the bias of B and of groups.
@pytest.mark.filterwarnings("ignore:.*(invalid shape|groups > 1):UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_is_read_and_written_again(case: str, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model = saved_by_peft(case, theirs)
    adapter = read_peft_adapter(theirs)
    assert_reads(adapter, model)
    assert adapter.unknown == ()
    assert adapter.config == config_of(theirs)

    written(adapter, ours)
    assert_same_tensors(ours, theirs)
    config, expected = config_of(ours), config_of(theirs)
    assert list(config) == list(expected)
    assert {k: v for k, v in config.items() if k not in COMPUTED} == {
        k: v for k, v in expected.items() if k not in COMPUTED
    }
    loaded = fresh(ours)
    assert_reads(adapter, loaded)
    np.testing.assert_array_equal(outputs(loaded), outputs(model))
    assert np.abs(outputs(model) - outputs(model.unload())).max() > 1e-3


@pytest.mark.parametrize(("dtype", "name"), [
    (torch.float16, "float16"),
    (torch.bfloat16, "bfloat16"),
    (torch.float64, "float64"),
])  # fmt: skip
@pytest.mark.parametrize("case", ["list", "dora", "saved", "bias-all"])
def test_dtypes(case: str, dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    saved_by_peft(case, theirs, dtype)
    adapter = read_peft_adapter(theirs)
    assert set(adapter.dtypes.values()) == {name}
    arrays = [*file_tensors(adapter.modules, adapter.saved).values()]
    assert {a.dtype.name for a in arrays} == {"float64" if name == "float64" else "float32"}
    written(adapter, ours)
    assert_same_tensors(ours, theirs)
    written(adapter, tmp_path / "cast", dtype="float32")
    assert set(read_peft_adapter(tmp_path / "cast").dtypes.values()) == {"float32"}


def test_mixed_dtypes_return_too(tmp_path: Path) -> None:
    model = adapted(CASES["dora"], torch.bfloat16)
    for layer in lora_layers(model).values():
        layer.lora_A.float()
    model.save_pretrained(tmp_path / "theirs")
    adapter = read_peft_adapter(tmp_path / "theirs")
    assert set(adapter.dtypes.values()) == {"float32", "bfloat16"}
    written(adapter, tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")


def test_parameters_that_take_the_place_of_the_bases(tmp_path: Path) -> None:
    model = saved_by_peft("bias-all", tmp_path)
    adapter = read_peft_adapter(tmp_path)
    expected = {"score.weight", "score.bias", "norm.bias", "conv.bias", "grouped.bias"}
    expected |= {f"layers.{i}.{p}.bias" for i in range(LAYERS) for p in ("q_proj", "down_proj")}
    assert set(adapter.saved) == expected
    score = model.base_model.model.score.modules_to_save["default"]
    assert_same(adapter.saved["score.bias"], score.bias)
    q_proj = model.base_model.model.layers[1].q_proj
    assert_same(adapter.saved["layers.1.q_proj.bias"], q_proj.base_layer.bias)


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_embeddings_that_peft_saves_beside_their_factors(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=8, vocab_size=17)
    base = transformers.GPT2LMHeadModel(config)
    case = {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}
    model = peft.get_peft_model(base, peft.LoraConfig(**case, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    adapter = read_peft_adapter(tmp_path / "theirs")
    assert {name: m.kind for name, m in adapter.modules.items()} == {
        "transformer.wte": "embedding",
        "transformer.h.0.attn.c_attn": "linear",
    }
    assert_same(adapter.saved["transformer.wte.weight"], base.transformer.wte.base_layer.weight)
    written(adapter, tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    assert "pipeline_tag: text-generation" in (tmp_path / "ours/README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*changes the base weights:UserWarning")
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_change_the_base_are_read_once_converted(
    init: str, use_rslora: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = Base()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    case = {"target_modules": ["q_proj"], "r": 2, "init_lora_weights": init}
    model = peft.get_peft_model(base, peft.LoraConfig(**case, use_rslora=use_rslora))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    model.save_pretrained(tmp_path / "unconverted")
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial"
    )
    with pytest.raises(AdapterFileError, match=f"init_lora_weights: '{init}' changes the base"):
        read_peft_adapter(tmp_path / "unconverted")
    for name, read in read_peft_adapter(tmp_path / "converted").modules.items():
        layer = lora_layers(model)[name]
        expected = layer.base_layer.weight + layer.get_delta_weight("default")
        received = before[f"{name}.weight"].numpy() + read.scaling * read.b @ read.a
        np.testing.assert_allclose(received, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_the_links_of_a_snapshot_are_followed(tmp_path: Path) -> None:
    model = saved_by_peft("list", tmp_path / "snapshot")
    (tmp_path / "blobs").mkdir()
    for name in (CONFIG, WEIGHTS):
        blob = (tmp_path / "snapshot" / name).rename(tmp_path / "blobs" / name)
        (tmp_path / "snapshot" / name).symlink_to(blob)
    assert_reads(read_peft_adapter(tmp_path / "snapshot"), model)


def test_memory_of_reading_stays_under_three_times_the_file(tmp_path: Path) -> None:
    large = np.ones((2, 2**20), "float32")
    modules = {name: module(a=large) for name in "qkvo"}
    write_peft_adapter(tmp_path, modules, dtype="bfloat16")
    tracemalloc.start()
    read_peft_adapter(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 3 * (tmp_path / WEIGHTS).stat().st_size + 2**17


def test_bfloat16_is_read_exactly(tmp_path: Path) -> None:
    values = np.arange(-7, 7).reshape(2, 7).astype(ml_dtypes.bfloat16)
    write_peft_adapter(tmp_path, {"q": module(a=values)}, dtype="bfloat16")
    read = read_peft_adapter(tmp_path)
    np.testing.assert_array_equal(read.modules["q"].a, values.astype("float32"))
    assert read.dtypes[f"{PREFIX}q.lora_A.weight"] == "bfloat16"
