"""LoRAConfig: what it refuses, and its JSON round trip."""

from __future__ import annotations

import dataclasses
import enum
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.models import data, functional, randomize_adapters

import keras_lora as kl

INVALID = [
    ({"rank": 0}, "rank"),
    ({"rank": -3}, "rank"),
    ({"rank": 2.0}, "rank"),
    ({"rank": True}, "rank"),
    ({"rank": "8"}, "rank"),
    ({"alpha": math.nan}, "alpha"),
    ({"alpha": math.inf}, "alpha"),
    ({"alpha": "16"}, "alpha"),
    ({"dropout": 1.0}, "dropout"),
    ({"dropout": -0.1}, "dropout"),
    ({"dropout": math.nan}, "dropout"),
    ({"use_rslora": 1}, "use_rslora"),
    ({"init": "magic"}, "init"),
    ({"bias": "some"}, "bias"),
    ({"targets": "query"}, "targets"),
    ({"targets": []}, "targets"),
    ({"targets": [""]}, "targets"),
    ({"targets": [3]}, "targets"),
    ({"targets": 3}, "targets"),
    ({"targets": "re:["}, "targets"),
    ({"targets": ["re:("]}, "targets"),
    ({"exclude": "query"}, "exclude"),
    ({"layers_to_save": "head"}, "layers_to_save"),
    ({"rank_pattern": {"query": 0}}, "rank"),
    ({"rank_pattern": ["query"]}, "rank_pattern"),
    ({"alpha_pattern": {"query": math.nan}}, "alpha"),
]


@pytest.mark.parametrize(("options", "named"), INVALID, ids=[str(o) for o, _ in INVALID])
def test_invalid_values_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid `{named}`.*expected.*Received: {named}="):
        kl.LoRAConfig(**options)


def test_json_round_trip_keeps_every_field() -> None:
    config = kl.LoRAConfig(
        rank=3,
        alpha=7,
        dropout=0.25,
        targets=["query", "re:.*value"],
        exclude=["block_0/query"],
        rank_pattern={"query": 5},
        alpha_pattern={"query": 1.5},
        use_rslora=True,
        init="gaussian",
        bias="lora_only",
        layers_to_save=["head"],
    )
    assert kl.LoRAConfig.from_json(config.to_json()) == config
    assert kl.LoRAConfig.from_dict(config.to_dict()) == config


class Choice(str, enum.Enum):  # noqa: UP042, a StrEnum is its value already
    BIAS = "lora_only"
    INIT = "gaussian"
    NAME = "up"


INTEGERS = [np.int64(3), np.uint8(3), np.int32(3)]
NUMBERS = [np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2)]
FLAGS = [np.True_]
NAMES = [np.str_("up"), Choice.NAME]
FOREIGN: list[tuple[str, Any, Any]] = [
    *(("rank", value, 3) for value in INTEGERS),
    *(("rank_pattern", {name: 3}, {"up": 3}) for name in NAMES),
    *(("rank_pattern", {"up": value}, {"up": 3}) for value in INTEGERS),
    *((f, value, 0.5) for f in ("alpha", "dropout") for value in NUMBERS),
    *(("alpha", value, 3) for value in INTEGERS),
    *(("alpha_pattern", {"up": value}, {"up": 0.5}) for value in NUMBERS),
    *((f, value, True) for f in ("use_rslora", "use_dora", "freeze_a") for value in FLAGS),
    *((f, [n], ("up",)) for f in ("targets", "exclude", "layers_to_save") for n in NAMES),
    ("targets", np.str_("all"), "all"),
    ("init", Choice.INIT, "gaussian"),
    ("bias", Choice.BIAS, "lora_only"),
    *(("train_tokens", [value], (3,)) for value in INTEGERS),
    *(("train_tokens", {name: [np.int64(4), 3]}, {"up": (3, 4)}) for name in NAMES),
    ("train_tokens", np.array([4, 3]), (3, 4)),
    ("settled", Choice.NAME, "up"),
]


def _types(value: Any) -> Any:
    if isinstance(value, dict):
        return [_types(item) for pair in value.items() for item in pair]
    return [_types(item) for item in value] if isinstance(value, tuple) else type(value)


@pytest.mark.parametrize(("name", "value", "expected"), FOREIGN, ids=str)
def test_values_of_other_types_become_pythons_own(name: str, value: Any, expected: Any) -> None:
    config = kl.LoRAConfig(**{name: value})
    received = getattr(config, name)
    assert (received, _types(received)) == (expected, _types(expected))
    assert kl.LoRAConfig.from_json(config.to_json()) == config


def test_every_field_takes_values_of_other_types() -> None:
    assert {f.name for f in dataclasses.fields(kl.LoRAConfig)} == {name for name, _, _ in FOREIGN}


def test_an_adapter_with_a_config_of_numpy_values_is_written_and_read(tmp_path: Path) -> None:
    model = functional()
    options: dict[str, Any] = {"rank": np.int64(2), "alpha": np.float32(4)}
    options |= {"dropout": np.float32(0.1), "use_dora": np.True_}
    kl.apply_lora(model, kl.LoRAConfig(**options))
    randomize_adapters(model)
    kl.save_adapter(model, tmp_path / "adapter")
    model.save(tmp_path / "model.keras")
    x = data(model)[0]
    expected = np.array(model(x))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    kl.load_adapter(kl.unload_lora(model), tmp_path / "adapter")
    for other in (loaded, model):
        np.testing.assert_allclose(np.array(other(x)), expected, rtol=1e-5, atol=1e-6)


def test_a_config_with_a_function_cannot_be_written() -> None:
    with pytest.raises(ValueError, match=r"targets=\[t\.path for t in find_targets"):
        kl.LoRAConfig(targets=lambda target: True).to_json()


@pytest.mark.parametrize("text", ["[]", "3", '{"rank": 2, "colour": "red"}', '{"rank": 0}'])
def test_a_wrong_file_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="[Ee]xpected"):
        kl.LoRAConfig.from_json(text)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        kl.LoRAConfig().rank = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 8}, r"Received: \['r=8'\]; write rank=\."),
        ({"r": 8, "lora_alpha": 4, "target_modules": ["q_proj"]}, "write rank=, alpha=, targets="),
        ({"modules_to_save": ["head"], "lora_dropout": 0.1}, "write layers_to_save=, dropout="),
        ({"rnk": 8}, r"Received: \['rnk=8'\]; try LoRAConfig\(rank=8\)"),
    ],
)
def test_names_of_other_libraries_are_translated(fields: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        kl.LoRAConfig(**fields)


def test_fields_are_given_by_name() -> None:
    with pytest.raises(TypeError, match=r"by name: \['rank', 'alpha'.*Received: \[8\]; try"):
        kl.LoRAConfig(8)  # type: ignore[call-arg]
