"""Adapters of a tiny torch model, as PEFT saves them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import safetensors.numpy
import safetensors.torch
import torch
from peft.tuners.lora import LoraLayer

from keras_lora.exchange.peft_files import (
    PeftAdapter,
    PeftModule,
    write_peft_adapter,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VOCABULARY, D, K, CLASSES = 13, 11, 7, 3
# Twelve layers, so that the name of layer 1 begins that of layer 11.
LAYERS = 12


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(D, K)
        self.v_proj = torch.nn.Linear(D, K, bias=False)
        self.down_proj = torch.nn.Linear(K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(torch.tanh(self.q_proj(x) * self.v_proj(x)))


class Base(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(VOCABULARY, D)
        self.layers = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = torch.nn.LayerNorm(D)
        self.conv = torch.nn.Conv1d(D, 6, 3, groups=1)
        self.grouped = torch.nn.Conv1d(6, 4, 1, groups=2)
        self.score = torch.nn.Linear(4, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.grouped(self.conv(self.norm(x).transpose(1, 2)))
        return self.score(x.mean(2))


IDS = torch.arange(15).reshape(3, 5) % VOCABULARY
ALL_MODULES = [name for name, _ in Base().named_modules() if name]

CASES: dict[str, dict[str, Any]] = {
    "list": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r"layers\.(1|11)\.(q_proj|down_proj)"},
    "all-linear": {"r": 3, "target_modules": "all-linear", "lora_dropout": 0.25},
    "layers": {
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [1, 3, 11],
        "layers_pattern": "layers",
        "exclude_modules": ["layers.3.q_proj"],
    },
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"layers.1.q_proj": 3, r"^layers\.(0|11)\.v_proj": 5, "down_proj": 7},
        "alpha_pattern": {r".*\.1\d\.q_proj": 9.5, "q_proj": 4, "layers.1.down_proj": 1},
    },
    "rslora": {
        "use_rslora": True,
        "lora_alpha": 2.5,
        "target_modules": ["q_proj"],
        "rank_pattern": {"layers.11.q_proj": 3},
    },
    "dora": {"use_dora": True, "target_modules": ["q_proj", "conv", "emb"]},
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["score", "norm"]},
    "bias-all": {"target_modules": ["q_proj"], "modules_to_save": ["score"], "bias": "all"},
    "bias-lora": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "lora-bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "embedding": {"target_modules": ["emb", "down_proj"], "r": 5},
    "convolutions": {"target_modules": ["conv", "grouped"], "r": 4},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "r": 2},
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica", "r": 2},
    "revision": {"target_modules": ["q_proj"], "revision": "a"},
}
MINIMAL = {"peft_type": "LORA", "r": 8, "lora_alpha": 8}
COMPUTED = ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"]
COMPUTED += ["rank_pattern", "alpha_pattern"]


def adapted(case: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A PEFT model in which all trainable parameters have random values."""
    torch.manual_seed(0)
    base = Base().to(dtype)
    model = peft.get_peft_model(base, peft.LoraConfig(**case), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.normal_(mean=0.3, std=0.2)
    return model.eval()


def saved_by_peft(case: str, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = adapted(CASES[case], dtype)
    model.save_pretrained(directory)
    return model


def fresh(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    base = Base().to(dtype)
    model = peft.PeftModel.from_pretrained(base, str(directory), autocast_adapter_dtype=False)
    return model.eval()


def outputs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(IDS).double())


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    """The files are equal byte for byte, except tensors that PEFT writes twice or never reads."""
    if b"original_module" in (theirs / WEIGHTS).read_bytes():
        unused = re.compile(r"\.(original_module|modules_to_save)\.")
        with_tensors(theirs, lambda t: [t.pop(key) for key in list(t) if unused.search(key)])
    assert (ours / WEIGHTS).read_bytes() == (theirs / WEIGHTS).read_bytes()


def lora_layers(model: Any) -> dict[str, LoraLayer]:
    modules = model.base_model.model.named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLayer)}


def assert_reads(adapter: PeftAdapter, model: Any) -> None:
    layers = lora_layers(model)
    assert set(adapter.modules) == set(layers)
    for name, module in adapter.modules.items():
        layer = layers[name]
        assert module.rank == layer.r["default"]
        assert module.alpha == layer.lora_alpha["default"]
        assert module.scaling == layer.scaling["default"]
        factors = ("embedding_A", "embedding_B") if module.embedding else ("A", "B")
        for factor, received in zip(factors, (module.a, module.b), strict=True):
            expected = getattr(layer, f"lora_{factor}")["default"]
            expected = expected if module.embedding else expected.weight
            assert_same(received, expected)
        if "default" in layer.lora_magnitude_vector:
            assert_same(module.magnitude, layer.lora_magnitude_vector["default"].weight)
        if layer.lora_bias["default"]:
            assert_same(module.bias, layer.lora_B["default"].bias)


def assert_same(received: np.ndarray | None, expected: torch.Tensor) -> None:
    assert received is not None
    assert received.dtype == "float32"
    np.testing.assert_array_equal(received, expected.detach().float().numpy())


def written(adapter: PeftAdapter, directory: Path, **options: Any) -> None:
    given: dict[str, Any] = {"all_modules": ALL_MODULES, "dtype": adapter.dtypes, **options}
    write_peft_adapter(directory, adapter.modules, adapter.saved, adapter.config, **given)


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / CONFIG).read_text())
    return config


def with_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    edit(tensors)
    safetensors.torch.save_file(tensors, directory / WEIGHTS, {"format": "pt"})


def with_config(directory: Path, **fields: Any) -> None:
    (directory / CONFIG).write_text(json.dumps(config_of(directory) | fields))


def renamed(*rules: tuple[str, str]) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            name = key
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            tensors[name] = tensors.pop(key)

    return edit


def module(rank: int = 2, **options: Any) -> PeftModule:
    rng = np.random.default_rng(rank)
    a, b = rng.normal(size=(rank, D)), rng.normal(size=(K, rank))
    given: dict[str, Any] = {"a": a, "b": b, "rank": rank, "alpha": 8.0, **options}
    return PeftModule(**given)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}
