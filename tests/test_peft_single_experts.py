"""PEFT's adapters of before transformers 5, with modules for each expert of a mixture."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from safetensors.numpy import save_file
from support.hugging_face_models import HIDDEN, INTERMEDIATE
from support.peft_models import assert_agree, hub_model, keras_model, peft_warnings, tensors

import keras_lora as kl
from keras_lora.checks import AdapterFileError

pytest_plugins = ["support.peft_models"]

pytestmark = peft_warnings

EXPERTS, LAYERS, RANK, ALPHA = 3, 2, 3, 7
QWEN = ("mlp", "gate_proj", "up_proj", "down_proj")
NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": QWEN,
    "qwen3_moe": QWEN,
}
# PEFT 0.21 with transformers 5.24 loads these files and leaves the experts out.
PEFT_LEAVES_OUT = {"qwen2_moe"}
# The banks of KerasHub, and the parts of an expert whose outputs they are, by their place.
GATE = "expert_feedforward_gate_dense"
UP = "expert_feedforward_intermediate_dense"
OUTPUT = "expert_feedforward_output_dense"
BANKS: dict[str, dict[str, list[int]]] = {
    GATE: {"mixtral": [0], "qwen2_moe": [0, 1], "qwen3_moe": [0, 1]},
    UP: {"mixtral": [1]},
    OUTPUT: {name: [2] for name in NAMES},
}


class Factors:
    """Random factors of modules `(layer, expert, part)`, and the files with them."""

    def __init__(
        self,
        name: str,
        ranks: Mapping[tuple[int, ...], int] | None = None,
    ) -> None:
        self.name, rng = name, np.random.default_rng(7)
        inner = INTERMEDIATE if name == "mixtral" else 11
        self.shapes = [(HIDDEN, inner), (HIDDEN, inner), (inner, HIDDEN)]
        ranks = dict.fromkeys(np.ndindex(LAYERS, EXPERTS, 3), RANK) if ranks is None else ranks
        self.found: dict[tuple[int, ...], tuple[Any, Any]] = {
            at: (
                rng.normal(size=(rank, self.shapes[at[2]][0])).astype("float32"),
                rng.normal(size=(self.shapes[at[2]][1], rank)).astype("float32"),
            )
            for at, rank in ranks.items()
        }

    def module(self, at: tuple[int, ...]) -> str:
        block, *parts = NAMES[self.name]
        return f"model.layers.{at[0]}.{block}.experts.{at[1]}.{parts[at[2]]}"

    def write(self, directory: Path, **config: Any) -> Path:
        directory.mkdir(exist_ok=True)
        files = {}
        for at, (a, b) in self.found.items():
            files[f"base_model.model.{self.module(at)}.lora_A.weight"] = a
            files[f"base_model.model.{self.module(at)}.lora_B.weight"] = b
            if config.get("use_dora"):
                magnitude = f"base_model.model.{self.module(at)}.lora_magnitude_vector"
                files[magnitude] = np.ones(len(b), "float32")
        save_file(files, directory / "adapter_model.safetensors")
        given = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
        given |= {"target_modules": list(NAMES[self.name][1:])}
        (directory / "adapter_config.json").write_text(json.dumps(given | config))
        return directory

    def delta(self, layer: int, bank: str) -> Any:
        """`dW` of a bank `(experts, in, out)`, in float64."""
        parts = BANKS[bank][self.name]
        found = [self._deltas(layer, part) for part in parts]
        return np.concatenate(found, -1)

    def _deltas(self, layer: int, part: int) -> Any:
        delta = np.zeros((EXPERTS, *self.shapes[part]))
        for expert in range(EXPERTS):
            at = (layer, expert, part)
            if at in self.found:
                a, b = (x.astype("float64") for x in self.found[at])
                delta[expert] = ALPHA / len(a) * (b @ a).T
        return delta


def check_deltas(model: Any, factors: Factors, ranks: dict[tuple[int, str], int]) -> None:
    """The updates of the banks `(layer, name)`, which have these ranks."""
    found = {}
    for path, layer in kl.lora_layers(model).items():
        for name, bank in layer.banks.items():
            if name in BANKS and bank.adapters:
                adapter = bank.adapters["default"]
                number = int(path.partition("layer_")[2].partition("/")[0])
                a, b = (np.array(f).astype("float64") for f in (adapter.a, adapter.b))
                expected = factors.delta(number, name)
                np.testing.assert_allclose(adapter.scaling * a @ b, expected, atol=1e-5)
                found[number, name] = adapter.spec.rank
    assert found == ranks


@pytest.mark.parametrize("name", NAMES)
def test_single_experts_compute_as_in_peft(name: str, base: Path, tmp_path: Path) -> None:
    factors = Factors(name)
    factors.write(tmp_path / "old")
    model = keras_model(base)
    kl.load_peft_adapter(model, tmp_path / "old")
    parts = {bank: parts[name] for bank, parts in BANKS.items() if name in parts}
    every = itertools.product(range(LAYERS), parts)
    check_deltas(model, factors, {at: RANK * len(parts[at[1]]) for at in every})
    kl.save_peft_adapter(model, tmp_path / "new")
    read = "new" if name in PEFT_LEAVES_OUT else "old"
    theirs = peft.PeftModel.from_pretrained(hub_model(base), tmp_path / read)
    assert_agree(name, model, theirs.eval())
    theirs.save_pretrained(tmp_path / "theirs")
    expected, written = tensors(tmp_path / "theirs"), tensors(tmp_path / "new")
    assert written.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(written[key], value)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_and_parts_may_be_left_out_and_differ_in_rank(
    name: str, base: Path, tmp_path: Path
) -> None:
    ranks: dict[tuple[int, ...], int]
    ranks = {(0, 1, 0): 5, (0, 2, 0): 3, (1, 1, 1): 3, (1, 2, 2): 3, (1, 0, 2): 3}
    factors = Factors(name, ranks)
    pattern = {rf".*experts\.1\.{NAMES[name][1]}": 5}
    factors.write(tmp_path, rank_pattern=pattern, lora_dropout=0.1)
    model = keras_model(base)
    with pytest.warns(UserWarning, match="the experts train without lora_dropout=0.1"):
        kl.load_peft_adapter(model, tmp_path)
    gates = {(0, GATE): 5, (1, UP if name == "mixtral" else GATE): 3}
    check_deltas(model, factors, {**gates, (1, OUTPUT): 3})


def test_single_experts_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    factors = Factors("mixtral")
    model = keras_model(base)
    before = [np.array(v) for v in model.variables]

    factors.found[0, EXPERTS, 0] = factors.found[0, 0, 0]
    with pytest.raises(AdapterFileError, match=r"experts\.3\.w1: the model has 3 experts"):
        kl.load_peft_adapter(model, factors.write(tmp_path))
    del factors.found[0, EXPERTS, 0]

    with pytest.raises(AdapterFileError, match=r"experts\.2\.w3: more than A and B"):
        kl.load_peft_adapter(model, factors.write(tmp_path, use_dora=True))

    a, b = factors.found[1, 1, 1]
    factors.found[1, 1, 1] = a[:, 1:], b
    with pytest.raises(
        AdapterFileError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: experts of"
    ):
        kl.load_peft_adapter(model, factors.write(tmp_path))
    factors.found = {at: (a[:, 1:], b) for at, (a, b) in factors.found.items()}
    with pytest.raises(AdapterFileError, match="for experts of shape .* expected"):
        kl.load_peft_adapter(model, factors.write(tmp_path))

    assert not kl.lora_layers(model)
    for value, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(np.array(variable), value)


@pytest.fixture
def name() -> str:
    return "mixtral"
