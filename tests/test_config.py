"""LoRAConfig: what it refuses, and its JSON round trip."""

from __future__ import annotations

import math
from typing import Any

import pytest

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
