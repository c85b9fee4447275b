"""The names of modules in PEFT's files mean the same to PEFT and to this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from support.peft_adapters import (
    ALL_MODULES,
    CASES,
    LAYERS,
    MINIMAL,
    adapted,
    assert_reads,
    config_of,
    fresh,
    module,
    renamed,
    with_tensors,
)

from keras_lora.exchange.peft_files import (
    read_peft_adapter,
    write_peft_adapter,
)
from keras_lora.exchange.peft_files.config import (
    is_targeted,
    parse_config,
)
from keras_lora.exchange.peft_files.naming import target_modules, value_and_pattern
from keras_lora.exchange.peft_files.tensors import PREFIX
from keras_lora.exchange.problems import Problems

NAMED = [
    (r"(lora_[AB])\.", r"\1.my_adapter."),
    (r"(lora_embedding_[AB])$", r"\1.my_adapter"),
    (r"score\.", "score.modules_to_save.default."),
]


@pytest.mark.parametrize("magnitude", ["", ".weight", ".my_adapter", ".my_adapter.weight"])
def test_other_forms_of_keys(magnitude: str, tmp_path: Path) -> None:
    model = adapted({**CASES["dora"], "modules_to_save": ["score"]})
    model.save_pretrained(tmp_path)
    before = read_peft_adapter(tmp_path)
    with_tensors(tmp_path, renamed(*NAMED, ("(magnitude_vector)$", rf"\1{magnitude}")))
    frozen = {f"{PREFIX}score.original_module.weight": torch.ones(2)}
    with_tensors(tmp_path, lambda tensors: tensors.update(frozen))
    after = read_peft_adapter(tmp_path)
    assert_reads(after, model)
    assert list(after.saved) == list(before.saved)
    assert (after.dtypes, after.unknown) == (before.dtypes, ())


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "layers.1.v_proj", "score"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj", "layers.3.v_proj"], "layers_to_transform": 11},
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [1],
            "layers_pattern": ["h", "layers"],
        },
        {"target_modules": ["q_proj", "score"], "layers_to_transform": [0], "layers_pattern": "h"},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj"], "exclude_modules": ["1.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r"layers\.1.*"},
    ],
)
def test_targets_match_as_in_peft(fields: dict[str, Any]) -> None:
    settings = parse_config(MINIMAL | fields, Problems())
    assert settings
    config = peft.LoraConfig(**fields)
    for name in ALL_MODULES if fields["target_modules"] != "all-linear" else ():
        expected = check_target_module_exists(config, name)
        excluded = type(expected).__name__ == "_ExcludedModule"
        assert is_targeted(settings.config, name) == (bool(expected) and not excluded), name


@pytest.mark.parametrize("key", ["q_proj", "1.q_proj", "^layers.1.q_proj", r"layers\.\d\.q", "q|v",
    r".*\.1\d\.q_proj", "layers.1", "^q_proj$", "[[a]q_proj"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
def test_patterns_match_as_in_peft(key: str) -> None:
    settings = parse_config(MINIMAL | {"rank_pattern": {key: 3, "v_proj": 5}}, Problems())
    assert settings
    for name in ALL_MODULES:
        pattern = {key: 3, "v_proj": 5}
        assert settings.ranks.of(name) == pattern.get(get_pattern_key(list(pattern), name), 8)


def test_names_that_are_written() -> None:
    names = [f"layers.{i}.q_proj" for i in range(LAYERS)]
    assert target_modules(names, ALL_MODULES) == ["q_proj"]
    assert target_modules(names[:2], ALL_MODULES) == ["0.q_proj", "1.q_proj"]
    assert target_modules(names[:2], None) == names[:2]
    assert target_modules(["q", "b.q"], ["a.q", "q", "b.q"]) == r"(b\.q|q)"


@pytest.mark.parametrize(
    "values",
    [
        {f"layers.{i}.{p}": 4 for i in range(LAYERS) for p in "qv"} | {"layers.1.q": 3},
        {f"layers.{i}.{p}": i % 3 for i in range(LAYERS) for p in "qv"},
        {f"layers.{i}.{p}": "qv".index(p) for i in range(LAYERS) for p in "qv"},
        {"q": 1, "a.q": 2, "b.a.q": 3, "c.q": 3, "d.q": 3},
        {"layersx1.q": 1, "layers.1.q": 2, "a+b": 3, "a*b": 3, "aab": 1},
    ],
)
def test_patterns_that_are_written_mean_each_module_to_peft(values: dict[str, int]) -> None:
    common, pattern = value_and_pattern(values)
    for order in (pattern, dict(reversed(pattern.items()))):
        found = {name: order.get(get_pattern_key(list(order), name), common) for name in values}
        assert found == values


def test_targets_without_names_of_the_base_load_too(tmp_path: Path) -> None:
    modules = {"layers.1.q_proj": module(), "layers.11.v_proj": module(5, alpha=2.5)}
    write_peft_adapter(tmp_path, modules, config={"bias": "none"})
    adapter = read_peft_adapter(tmp_path)
    assert_reads(adapter, fresh(tmp_path))
    assert config_of(tmp_path)["target_modules"] == list(modules)
    assert config_of(tmp_path)["lora_alpha"] == 8
    assert isinstance(config_of(tmp_path)["lora_alpha"], int)
