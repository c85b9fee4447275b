"""`rank="auto"` and `alpha="auto"`: the rule against values by hand, and who reads a config."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
from rich.console import Console
from support.cases import numpy_of
from support.models import state

import keras_lora as kl
from keras_lora.files.adapter_files import write_adapter_files

SIDES = {"up": (23, 29), "middle": (29, 37), "down": (37, 5)}
COST = sum(map(sum, SIDES.values()))
X = np.random.default_rng(2).normal(size=(41, 23)) * np.geomspace(9, 0.1, 23)
X = X.astype("float32")
AUTO = kl.LoRAConfig(rank="auto", alpha="auto", targets=list(SIDES))
QUIET = Console(quiet=True)


def linear_model(kernels: keras.initializers.Initializer | None = None) -> keras.Model:
    """Without activations, so that inputs are products of matrices; from the same values each."""
    layers = [
        keras.layers.Dense(
            k,
            use_bias=False,
            kernel_initializer=kernels or keras.initializers.GlorotUniform(seed=d),
            name=name,
        )
        for name, (d, k) in SIDES.items()
    ]
    return keras.Sequential([keras.Input((23,)), *layers])


def batches(answers: int) -> list[Any]:
    """Two batches of the same inputs, the second of which counts as the first does."""
    return [(X, np.zeros((1, -(-answers // 2)), "int32"))] * 2


def ranks_of(model: keras.Model, name: str = "default") -> dict[str, int]:
    return {p: x.adapters[name].spec.rank for p, x in kl.lora_layers(model).items()}


def scales_of(model: keras.Model) -> set[float]:
    return {round(x.adapters["default"].spec.scaling, 6) for x in kl.lora_layers(model).values()}


def ranks_by_hand(model: keras.Model, rank: int) -> dict[str, int]:
    """Directions of the inputs with the largest share of their layer first, in float64."""
    x, shares = X.astype("float64"), {}
    for layer in model.layers:
        squares = np.linalg.svd(x, compute_uv=False) ** 2
        shares[layer.name] = squares / squares.sum()
        x = x @ numpy_of(layer.kernel).astype("float64")
    ranks = {name: min(rank // 2, *sides) for name, sides in SIDES.items()}
    whole = {name: min(rank, *sides) for name, sides in SIDES.items()}
    left = sum((whole[name] - ranks[name]) * sum(sides) for name, sides in SIDES.items())
    highest = {name: min(2 * rank, *sides) for name, sides in SIDES.items()}
    for _, name, index in sorted((-s[i], n, i) for n, s in shares.items() for i in range(len(s))):
        if ranks[name] == index < highest[name] and sum(SIDES[name]) <= left:
            left, ranks[name] = left - sum(SIDES[name]), index + 1
    return ranks


@pytest.mark.parametrize(
    ("answers", "rank"),
    [
        (2, 8),
        (8 * COST, 8),
        (8 * COST + 2, 16),
        (16 * COST, 16),
        (16 * COST + 2, 32),
        (32 * COST + 2, 64),
        (900 * COST, 64),
    ],
)
def test_the_rank_is_the_lowest_with_a_parameter_for_each_answer(answers: int, rank: int) -> None:
    model = linear_model()
    expected = ranks_by_hand(model, rank)
    kl.apply_lora(model, AUTO, data=batches(answers))
    assert ranks_of(model) == expected
    assert scales_of(model) == {2.0}
    size = sum(expected[name] * sum(sides) for name, sides in SIDES.items())
    assert size <= rank * COST
    (found,) = kl.lora_summary(model, QUIET).settled.values()
    assert found.startswith(f"rank {rank}: ")
    assert f"{rank * COST:,}" in found
    assert found.endswith("; scale 2")


FLOATS = np.ones((3, 5), "float32")
INTEGERS = np.ones((3, 5), "int32")


@pytest.mark.parametrize(
    ("batch", "answers"),
    [
        ((X, INTEGERS[:, 0]), 3),  # a class of each row
        ((X, INTEGERS[:, :1]), 3),
        ((X, FLOATS), 3),  # a vector of each row, such as a class in one-hot form
        ((X, INTEGERS), 15),  # a token at each place
        ((X, INTEGERS, np.eye(3, 5)), 3),  # of which some have no weight
        ((X, FLOATS[..., None]), 15),
        ((X, {"a": INTEGERS, "b": FLOATS}), 18),
        ((X, [1, 0, 1]), 3),
    ],
)
def test_what_an_answer_is(batch: Any, answers: int) -> None:
    model = kl.apply_lora(linear_model(), AUTO, data=[batch] * 7)
    (found,) = kl.lora_summary(model, QUIET).settled.values()
    assert f"answers ({7 * answers:,})" in found


@pytest.mark.parametrize(
    ("options", "scales"),
    [
        ({"rank": 3}, {2.0}),
        ({"rank": 5}, {2.0}),
        ({"rank": 3, "rank_pattern": {"up": 5, "re:mid.*": 7}}, {2.0}),
        ({"rank": 3, "rank_pattern": {"up": 5}, "alpha_pattern": {"up": 5.0}}, {1.0, 2.0}),
        ({"rank": 2, "use_rslora": True, "rank_pattern": {"up": 8}}, {4.0, 2.0}),
        ({"rank": 2, "init": "pissa"}, {2.0}),
    ],
)
def test_an_alpha_that_is_found_needs_no_data(options: Any, scales: set[float]) -> None:
    config = dataclasses.replace(AUTO, **options)
    model = kl.apply_lora(linear_model(), config)
    assert scales_of(model) == scales
    assert list(kl.lora_summary(model, QUIET).settled) == ["default"]


def test_with_an_alpha_of_its_own_the_scale_is_that_of_the_rank() -> None:
    config = dataclasses.replace(AUTO, alpha=32)
    model = kl.apply_lora(linear_model(), config, data=batches(16 * COST))
    assert scales_of(model) == {2.0}
    assert len(set(ranks_of(model).values())) > 1


def test_the_same_data_give_the_same_ranks() -> None:
    found = []
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        found.append(ranks_of(kl.apply_lora(linear_model(), AUTO, data=batches(9))))
    assert found[0] == found[1]


def generator() -> Iterator[Any]:
    yield X, INTEGERS


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (AUTO, None, "Invalid `data`: expected batches for rank='auto'"),
        (AUTO, [], "at least one batch"),
        (AUTO, generator(), "whose number is known"),
        (AUTO, [(X,)], "batches with y"),
        (AUTO, (X, INTEGERS), "put the batches in a list"),
        (dataclasses.replace(AUTO, targets=["other"]), batches(2), "other"),
        (dataclasses.replace(AUTO, rank=2), batches(2), "Invalid `data`: expected None"),
    ],
)
def test_what_cannot_be_settled_is_refused(config: Any, data: Any, message: str) -> None:
    model = linear_model()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        kl.apply_lora(model, config, data=data)
    assert state(model) == before
    assert not kl.lora_layers(model)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank_pattern": {"up": 3}}, "rank_pattern"),
        ({"alpha_pattern": {"up": 3}}, "alpha_pattern"),
        ({"init": "loftq"}, "init"),
        ({"settled": 3}, "settled"),
    ],
)
def test_what_a_rank_to_be_found_cannot_go_with(options: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid `{named}`: expected"):
        dataclasses.replace(AUTO, **options)


def test_a_config_that_is_not_settled_goes_into_json_as_it_is() -> None:
    assert kl.LoRAConfig.from_json(AUTO.to_json()) == AUTO
    assert not AUTO.is_settled


REFUSALS: dict[str, Callable[[keras.Model], Any]] = {
    "spec": lambda _: AUTO.spec(),
    "allocate_ranks": lambda model: kl.allocate_ranks(model, batches(2), AUTO),
    "alpha": lambda model: kl.allocate_ranks(model, batches(2), dataclasses.replace(AUTO, rank=2)),
    "memory_plan": lambda model: kl.memory_plan(model, AUTO, (3,)),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_who_needs_numbers_refuses_auto(name: str) -> None:
    with pytest.raises(ValueError, match=r"Invalid `(rank|alpha)`: expected a number.*'auto'"):
        REFUSALS[name](linear_model())


def test_files_have_the_numbers_and_the_reasons(tmp_path: Path) -> None:
    model = kl.apply_lora(linear_model(), AUTO, data=batches(9))
    kl.save_adapter(model, tmp_path / "adapter")
    config = kl.read_adapter_config(tmp_path / "adapter")["config"]
    assert kl.LoRAConfig.from_dict(config).is_settled
    assert '"auto"' not in json.dumps(config)
    again = linear_model()
    kl.load_adapter(again, tmp_path / "adapter")
    assert ranks_of(again) == ranks_of(model)
    assert kl.lora_summary(again, QUIET).settled == kl.lora_summary(model, QUIET).settled


def test_files_of_peft_have_the_numbers(tmp_path: Path) -> None:
    model = keras_hub.models.BertBackbone(31, 1, 2, 26, 34)
    ids = np.ones((3, 7), "int32")
    x = {"token_ids": ids, "padding_mask": ids, "segment_ids": 0 * ids}
    kl.apply_lora(model, dataclasses.replace(AUTO, targets="attention"), data=[(x, ids)])
    kl.save_peft_adapter(model, tmp_path, prefix="")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {config["r"], *config["rank_pattern"].values()}
    assert ranks == set(ranks_of(model).values())


def test_a_file_whose_rank_is_to_be_found_is_refused(tmp_path: Path) -> None:
    model = kl.apply_lora(linear_model(), AUTO, data=batches(9))
    kl.save_adapter(model, tmp_path)
    files = kl.read_adapter_files(tmp_path)
    wrong = {**files.config, "config": {**files.config["config"], "alpha": "auto"}}
    write_adapter_files(tmp_path, wrong, files.tensors, overwrite=True)
    with pytest.raises(kl.AdapterFileError, match="alpha"):
        kl.load_adapter(linear_model(), tmp_path)


def test_a_file_of_keras_goes_on_with_the_numbers(tmp_path: Path) -> None:
    model = kl.apply_lora(linear_model(), AUTO, data=batches(9))
    model.save(tmp_path / "model.keras")
    assert ranks_of(keras.models.load_model(tmp_path / "model.keras")) == ranks_of(model)


def test_a_second_adapter_has_one_rank() -> None:
    model = kl.apply_lora(linear_model(), kl.LoRAConfig(rank=2, targets=["up"]))
    kl.apply_lora(model, AUTO, name="second", data=batches(9))
    assert ranks_of(model, "second") == {"up": 8, "middle": 8, "down": 5}
    assert list(kl.lora_summary(model, QUIET).settled) == ["second"]


def test_layers_that_are_not_linear_have_one_rank() -> None:
    layers = [keras.layers.Embedding(31, 23), keras.layers.Dense(29)]
    model = keras.Sequential([keras.Input((7,), dtype="int32"), *layers])
    data = [(np.ones((3, 7), "int32"), INTEGERS)]
    kl.apply_lora(model, dataclasses.replace(AUTO, targets="all"), data=data)
    assert set(ranks_of(model).values()) == {8}


def test_rows_of_tokens_have_no_rank() -> None:
    layers = [keras.layers.Embedding(31, 23), keras.layers.Dense(29, name="up")]
    model = keras.Sequential([keras.Input((7,), dtype="int32"), *layers])
    data = [(np.ones((3, 7), "int32"), INTEGERS)]
    config = dataclasses.replace(AUTO, targets=["up"], train_tokens=[3, 5])
    kl.apply_lora(model, config, data=data)
    assert sorted(ranks_of(model).values()) == [0, 8]


@pytest.mark.parametrize("options", [{}, {"init": "eva"}, {"use_dora": True}, {"freeze_a": True}])
def test_a_copy_of_a_quantized_model_has_the_ranks_of_its_inputs(options: Any) -> None:
    model = linear_model()
    for layer in model.layers:
        layer.quantize("int8")
    data = batches(9)
    copy = kl.apply_lora(model, dataclasses.replace(AUTO, **options), inplace=False, data=data)
    assert not kl.lora_layers(model)
    low, *_, high = sorted(ranks_of(copy).values())
    assert 4 <= low < high <= 16


def test_a_smaller_adapter_is_not_the_one_that_was_found() -> None:
    model = kl.apply_lora(linear_model(), AUTO, data=batches(9))
    kl.shrink_adapter(model, "default", rank=2, console=QUIET)
    assert set(ranks_of(model).values()) == {2}
    assert scales_of(model) == {2.0}
    assert not kl.lora_summary(model, QUIET).settled


def test_the_summary_says_what_was_found() -> None:
    model = kl.apply_lora(linear_model(), AUTO, data=batches(9))
    console = Console(width=200)
    with console.capture() as printed:
        kl.lora_summary(model, console)
    assert "default, found: rank 8: the lowest that is tried" in printed.get()
