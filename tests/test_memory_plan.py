"""`memory_plan`: exact counts of what is kept, peaks of graphs counted by hand, and refusals."""

from __future__ import annotations

import importlib
from typing import Any

import keras
import numpy as np
import pytest

import keras_lora as kl
from keras_lora.memory.plan import largest_size

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="memory_plan reads TensorFlow's graphs"
)
IN, UP, OUT, RANK = 11, 131, 5, 3
FACTORS = (IN + UP) * RANK + (UP + OUT) * RANK
BASE = (IN + 1) * UP + (UP + 1) * OUT
CONFIG = kl.LoRAConfig(rank=RANK, targets=["up", "down"])
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "mixed_bfloat16": 4}


def mlp(dtype: str = "float32") -> keras.Model:
    up = keras.layers.Dense(UP, "relu", name="up", dtype=dtype)
    down = keras.layers.Dense(OUT, name="down", dtype=dtype)
    return keras.Sequential([keras.Input((IN,)), up, down])


def language_model(vocabulary: int = 211, width: int = 13) -> keras.Model:
    tokens = keras.Input((None,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(vocabulary, width, tie_weights=False)
    x = embedding(tokens)
    for i in range(2):
        up, down = keras.layers.Dense(61, "tanh", name="up"), keras.layers.Dense(width, name="down")
        x = keras.Sequential([keras.Input((None, width)), up, down], name=f"block_{i}")(x)
    return keras.Model(tokens, embedding(x, reverse=True))


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return language_model()


@pytest.mark.parametrize(
    ("dtype", "optimizer", "moments"),
    [
        ("float32", "adam", 2),
        ("bfloat16", "sgd", 0),
        ("float16", "rmsprop", 1),
        ("mixed_bfloat16", "adamw", 2),
    ],
)
def test_what_is_kept_is_counted_exactly(dtype: str, optimizer: str, moments: int) -> None:
    plan = kl.memory_plan(mlp(dtype), CONFIG, (7,), optimizer=optimizer)
    assert plan["weights"].bytes == BASE * SIZES[dtype]
    assert plan["gradients"].bytes == 4 * FACTORS
    # Beside A and B each layer has a few numbers, such as its scale.
    assert 0 <= plan["factors"].bytes - 4 * FACTORS <= 2 * 16
    # A count of steps, an int64 for TensorFlow's sake, and the learning rate.
    assert 0 <= plan["optimizer"].bytes - 4 * moments * FACTORS <= 16


def test_full_fine_tuning_is_what_a_model_without_config_does() -> None:
    model = mlp()
    model.compile("adam", "mse")
    plan = kl.memory_plan(model, None, (7,))
    assert plan["factors"].bytes == 0
    assert plan["gradients"].bytes == 4 * BASE
    assert 0 <= plan["optimizer"].bytes - 8 * BASE <= 16


def test_the_peak_of_a_step_is_what_is_alive() -> None:
    """With a large batch: hidden values that are kept, and the gradient of one of them."""
    batch = 10_007
    plan = kl.memory_plan(mlp(), CONFIG, (batch,), loss="mse")
    hidden = 4 * batch * UP
    assert hidden * 1.9 < plan["activations"].at_peak < hidden * 3.2
    assert plan.peak == sum(row.at_peak for row in plan.rows)


@pytest.mark.parametrize(
    "mode", ["int8", "int4", keras.quantizers.Int4QuantizationConfig(None, None, block_size=None)]
)
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_quantized_weights_are_those_of_keras(mode: Any, model: keras.Model) -> None:
    plan = kl.memory_plan(model, kl.LoRAConfig(rank=RANK), (2, 7), quantized=mode)
    real = language_model()
    real.quantize(**({"mode": mode} if isinstance(mode, str) else {"config": mode}))
    expected = sum(np.prod(v.shape) * np.dtype(v.dtype).itemsize for v in real.variables)
    assert plan["weights"].bytes == expected
    if mode == "int8":
        kl.apply_lora(real, kl.LoRAConfig(rank=RANK))
        assert kl.memory_plan(real, None, (2, 7)).rows == plan.rows


def test_an_adapted_model_is_planned_as_what_it_was_made_of(model: keras.Model) -> None:
    config = kl.LoRAConfig(rank=RANK, use_dora=True, rank_pattern={"up": 2})
    adapted = kl.rematerialize(kl.apply_lora(language_model(), config))
    plan = kl.memory_plan(adapted, None, (2, 7))
    assert plan.rows == kl.memory_plan(model, config, (2, 7), rematerialize="auto").rows
    factors = sum(np.prod(v.shape) for v in adapted.trainable_variables)
    assert plan["gradients"].bytes == 4 * factors
    kl.chunk_logits(adapted, 5)
    chunked = kl.memory_plan(adapted, None, (2, 97))
    assert chunked["logits"].at_peak < kl.memory_plan(model, config, (2, 97))["logits"].at_peak


def test_less_memory_by_blocks_and_chunks_and_more_by_size(model: keras.Model) -> None:
    config, shape = kl.LoRAConfig(rank=RANK), (3, 307)
    plain = kl.memory_plan(model, config, shape)
    blocks = kl.memory_plan(model, config, shape, rematerialize="auto")
    both = kl.memory_plan(model, config, shape, rematerialize="auto", chunk_tokens=16)
    assert plain.peak > blocks.peak > both.peak
    assert plain["logits"].at_peak >= 2 * 4 * 3 * 307 * 211
    longer = plain.for_shape((3, 331))
    assert longer.peak > plain.peak == longer.for_shape(shape).peak
    assert 307 <= plain.largest_length((plain.peak + longer.peak) // 2) < 331


@pytest.mark.parametrize("budget", [0.5, 1, 100, 12_345, 10**7])
@pytest.mark.parametrize("start", [1, 7, 5000])
def test_the_largest_size_is_found_in_few_tries(budget: float, start: int) -> None:
    tries: list[int] = []

    def peak(size: int) -> int:
        tries.append(size)
        return max(3 * size, size * size // 7)

    largest = largest_size(peak, {start: peak(start)}, budget)
    assert peak(largest) <= budget < peak(largest + 1)
    assert len(tries) < 30


def test_the_largest_batch_fits() -> None:
    plan = kl.memory_plan(mlp(), CONFIG, (7,), loss="mse")
    budget = 3 * plan.peak
    largest = plan.largest_batch(budget)
    assert plan.for_shape((largest,)).peak <= budget < plan.for_shape((largest + 1,)).peak
    assert plan.largest_batch(plan["weights"].bytes) == 0


def test_graphs_know_what_is_in_their_loops() -> None:
    tf = importlib.import_module("tensorflow")
    loop = tf.function(lambda x: tf.while_loop(lambda i: i < 3, lambda i: i + 1, [x]))
    graph = loop.get_concrete_function(tf.constant(0)).graph
    (op,) = [op for op in graph.get_operations() if op.type == "StatelessWhile"]
    inner = graph._get_function(op.get_attr("body").name).graph
    assert [t.shape.rank for t in inner.outputs], "Keras-lora reads shapes in loops here"


def test_the_model_does_not_change() -> None:
    adapted = kl.apply_lora(language_model(), kl.LoRAConfig(rank=RANK))
    adapted.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.arange(14).reshape(2, 7)
    adapted.fit(x, x, verbose=0)
    function, optimizer = adapted.train_function, adapted.optimizer
    classes = [type(layer) for layer in adapted.layers]
    before = [np.array(v) for v in [*adapted.variables, *optimizer.variables]]
    kl.memory_plan(adapted, None, (2, 7), rematerialize="auto", quantized="int8")
    with pytest.raises(ValueError, match="unload_lora"):
        kl.memory_plan(adapted, kl.LoRAConfig(), (2, 7))
    assert adapted.train_function is function
    assert adapted.optimizer is optimizer
    assert [type(layer) for layer in adapted.layers] == classes
    for value, variable in zip(before, [*adapted.variables, *optimizer.variables], strict=True):
        np.testing.assert_array_equal(value, np.array(variable))
    adapted.fit(x, x, verbose=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_shape": (2,)}, "batch_shape"),
        ({"batch_shape": (2, 3, 4)}, "batch_shape"),
        ({"batch_shape": (2, 0)}, "batch_shape"),
        ({"batch_shape": 2}, "batch_shape"),
        ({"config": {"rank": 2}}, "LoRAConfig"),
        ({"quantized": "gptq"}, "int8"),
        ({"rematerialize": ["nothing"]}, "blocks"),
        ({"chunk_tokens": 0}, "tokens"),
        ({"config": kl.LoRAConfig(targets=["nothing"])}, "nothing"),
    ],
)
def test_refused(model: keras.Model, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kl.memory_plan(model, **{"batch_shape": (2, 7), **options})


def test_refused_models_and_budgets() -> None:
    class Own(keras.Model):
        pass

    with pytest.raises(ValueError, match="one output"):
        kl.memory_plan(Own(), None, (2, 7))
    plan = kl.memory_plan(mlp(), CONFIG, (2,), loss="mse")
    for budget in (0, -1, "16GB", float("inf")):
        with pytest.raises(ValueError, match="budget"):
            plan.largest_batch(budget)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length"):
        plan.largest_length(1)
    with pytest.raises(ValueError, match="weights"):
        plan["weight"]
