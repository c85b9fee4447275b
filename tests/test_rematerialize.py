"""Rematerialized blocks train as plain ones do, and keep less."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from support.cases import numpy_of
from support.kept import kept_bytes
from support.models import randomize_adapters

import keras_lora as kl
from keras_lora.walker import Tree, select_blocks

TOKENS = np.array([[3, 7, 12, 0, 0], [7, 7, 1, 5, 0], [2, 9, 4, 11, 6]])
Y = np.random.default_rng(1).normal(size=(3, 5, 2)).astype("float32")
BACKEND = keras.backend.backend()


@keras.saving.register_keras_serializable("tests_rematerialize")
class Block(keras.layers.Layer):
    """With all that a second pass may miss: dropout drawn twice, `training` and a mask that no
    argument names, a variable of its own, a loss."""

    def __init__(self, attends: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.supports_masking, self.attends = True, attends
        self.attention = keras.layers.MultiHeadAttention(2, 3, dropout=0.3, name="attention")
        self.up = keras.layers.Dense(11, activation="gelu", name="up")
        self.drop = keras.layers.Dropout(0.4, name="drop")
        self.down = keras.layers.Dense(7, name="down")
        self.calls = 0

    def build(self, input_shape: Any) -> None:
        if self.attends:
            self.attention.build(input_shape, input_shape)
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], 11))
        self.gain = self.add_weight(shape=(7,), initializer="ones", name="gain")

    def call(self, x: Any) -> Any:
        self.calls += 1
        y = x + self.gain * (self.attention(x, x) if self.attends else x)
        self.add_loss(ops.cast(0.1 * ops.mean(ops.square(y)), "float32"))
        return y + self.drop(self.down(self.drop(self.up(y))))


def encoder(policy: str = "float32", blocks: int = 2, attends: bool = True) -> keras.Model:
    keras.utils.set_random_seed(3)
    keras.config.set_dtype_policy(policy)
    tokens = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(13, 7, mask_zero=True, name="tokens")(tokens)
    for i in range(blocks):
        x = Block(attends, name=f"block_{i}")(x)
    model = keras.Model(tokens, keras.layers.Dense(2, dtype="float32", name="head")(x))
    keras.config.set_dtype_policy("float32")
    return model


def trained(
    rematerialized: bool, policy: str, adapted: bool, integers: str = "", **options: Any
) -> list[np.ndarray]:
    """The loss of a step, all variables after it, seeds too, and the outputs."""
    attends = not options.get("jit_compile") and not integers  # XLA compiles long
    model = encoder(policy, attends=attends)
    if integers:
        model.quantize(integers, filters=["up", "down"])
    if adapted:
        kl.apply_lora(model, kl.LoRAConfig(rank=2, dropout=0.2))
        randomize_adapters(model, 0.1)
    if rematerialized:
        assert kl.rematerialize(model, "auto") is model
    model.compile(keras.optimizers.SGD(0.1), "mse", **options)
    loss = np.ravel(model.train_on_batch(TOKENS, Y))[0]
    return [loss, *map(numpy_of, model.variables), numpy_of(model(TOKENS))]


MODES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "compiled": ("float32", False, {"jit_compile": False}),
    "eager, adapted": ("float32", True, {"run_eagerly": True}),
    "XLA, adapted, bfloat16": ("mixed_bfloat16", True, {"jit_compile": True}),
    "int8": ("float32", True, {"integers": "int8"}),
    "int4, float16": ("mixed_float16", True, {"integers": "int4"}),
}
# torch has no XLA, and JAX compiles products of integers long.
NOT_ON = {"torch": ["XLA, adapted, bfloat16"], "jax": ["int8", "int4, float16"]}


@pytest.mark.parametrize("mode", [m for m in MODES if m not in NOT_ON.get(BACKEND, [])])
def test_losses_updates_and_seeds_are_those_of_the_plain_model(mode: str) -> None:
    policy, adapted, options = MODES[mode]
    expected = trained(False, policy, adapted, **options)
    tolerance = 1e-6 if policy == "float32" else 1e-2
    assert all(np.isfinite(values).all() for values in expected)
    for ours, plain in zip(trained(True, policy, adapted, **options), expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=tolerance, atol=tolerance)


def test_blocks_keep_their_inputs_alone() -> None:
    model = encoder()
    plain = kept_bytes(model, TOKENS)
    assert kept_bytes(kl.rematerialize(model), TOKENS) < 0.5 * plain
    assert kept_bytes(kl.unrematerialize(model), TOKENS) == plain


def test_the_second_pass_computes_with_the_adapters_of_the_first() -> None:
    model = encoder(blocks=1)
    block = model.get_layer("block_0")
    kl.rematerialize(model, blocks=["block_0"])  # and then:
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up"], use_dora=True))
    randomize_adapters(model)
    x = np.random.default_rng(2).normal(size=(3, 5, 7)).astype("float32")
    with kl.disable_adapter(model):
        base = gradient(block, x)
    with kl.merged(model):
        merged = gradient(block, x)
    adapted = gradient(block, x)
    np.testing.assert_allclose(adapted, merged, rtol=1e-3, atol=1e-5)
    assert abs(adapted - base).max() > 0.01
    kl.unload_lora(model)
    np.testing.assert_allclose(base, gradient(block, x), rtol=1e-5, atol=1e-6)


def gradient(block: keras.layers.Layer, x: np.ndarray) -> np.ndarray:
    """The gradient of a block's outputs in its inputs, without dropout."""
    if BACKEND == "jax":
        jax = pytest.importorskip("jax")
        return np.array(jax.grad(lambda x: ops.sum(ops.sin(block(x, training=False))))(x))
    tensor = ops.convert_to_tensor(x)
    if BACKEND == "torch":
        tensor.requires_grad_(True)
        outputs = block(tensor, training=False)
        return numpy_of(pytest.importorskip("torch").autograd.grad(outputs.sin().sum(), tensor)[0])
    tape = pytest.importorskip("tensorflow").GradientTape()
    with tape:
        tape.watch(tensor)
        outputs = ops.sum(ops.sin(block(tensor, training=False)))
    return numpy_of(tape.gradient(outputs, tensor))


def test_the_inverse_leaves_nothing_and_files_never_have_anything(tmp_path: Any) -> None:
    model = encoder()
    before = [{**vars(layer)} for layer in model.layers]
    config, classes = model.get_config(), [type(layer) for layer in model.layers]
    kl.rematerialize(model)
    assert model.get_config() == config
    assert [type(layer) for layer in model.layers] == classes
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy_of(again(TOKENS)), numpy_of(model(TOKENS)))
    for copied in (again, keras.models.clone_model(model)):
        with pytest.raises(ValueError, match="expected a model with rematerialized blocks"):
            kl.unrematerialize(copied)
    ours = kl.apply_lora(model, kl.LoRAConfig(rank=2), inplace=False)
    for rematerialized in (ours, model):
        assert kl.unrematerialize(rematerialized) is rematerialized
    after = [vars(layer).keys() for layer in model.layers]
    assert after == [attributes.keys() for attributes in before]
    assert all(layer._remat_mode is None for layer in model.layers)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="SavedModels are of TensorFlow")
def test_a_graph_that_is_not_differentiated_is_the_plain_one() -> None:
    tf, model = pytest.importorskip("tensorflow"), encoder(blocks=1)

    def operations() -> list[str]:
        function = tf.function(model).get_concrete_function(tf.constant(TOKENS))
        return [operation.type for operation in function.graph.get_operations()]

    plain = operations()
    kl.rematerialize(model, blocks=["block_0"])
    assert operations() == plain


def test_compiled_functions_are_made_anew() -> None:
    model = encoder(blocks=1)
    model.compile("sgd", "mse", jit_compile=False)
    model.train_on_batch(TOKENS, Y)
    block = model.get_layer("block_0")
    for verb, options in ((kl.rematerialize, {"blocks": ["block_0"]}), (kl.unrematerialize, {})):
        calls = block.calls
        verb(keras.Sequential([model]), **options)  # through a model around it
        model.train_on_batch(TOKENS, Y)
        assert block.calls > calls, verb
        assert BACKEND == "torch" or model.train_function is not None


class Twice(keras.layers.Layer):
    """Integers and other values among its arguments and outputs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.w = self.add_weight(shape=(5, 5), name="w")

    def call(self, pair: Any, index: Any, mode: str = "plain", cache: Any = None) -> Any:
        x = ops.tanh(ops.matmul(pair["x"], self.w)) * ops.cast(index, "float32")
        return {"x": x, "index": index + 1, "mode": mode, "cache": cache}


def test_blocks_take_and_give_any_structure_and_may_be_called_twice() -> None:
    layer = Twice(name="twice")
    model = keras.Sequential([layer])
    x = np.random.default_rng(4).normal(size=(3, 5)).astype("float32")

    def twice() -> Any:
        first = layer({"x": ops.convert_to_tensor(x)}, ops.convert_to_tensor(2), mode="a")
        return layer({"x": first["x"]}, first["index"], mode="b", cache=[first["x"], None])

    expected = twice()
    kl.rematerialize(model, blocks=lambda layer: isinstance(layer, Twice))
    tape = contextlib.nullcontext()
    if BACKEND == "tensorflow":
        tape = pytest.importorskip("tensorflow").GradientTape()
    with tape:
        received = twice()
    assert received.keys() == expected.keys()
    assert received["mode"] == "b"
    assert received["cache"][1] is None
    assert int(received["index"]) == int(expected["index"]) == 4
    for ours, plain in (
        (received["x"], expected["x"]),
        (received["cache"][0], expected["cache"][0]),
    ):
        np.testing.assert_array_equal(numpy_of(ops.stop_gradient(ours)), numpy_of(plain))


def stages() -> keras.Model:
    """Two stages of a class, one of which has three blocks, and one block that is called twice."""
    stage = [keras.Sequential([Block() for _ in range(n)], name=f"stage_{n}") for n in (3, 1)]
    shared = Block(name="shared")
    x = inputs = keras.Input((5, 7))
    for layer in (*stage, shared, shared):
        x = layer(x)
    return keras.Model(inputs, x)


def test_auto_selects_the_outermost_layers_that_repeat() -> None:
    selected = select_blocks(Tree.of(stages()), "auto")
    paths = [node.path for node in selected]
    assert [path.split("/")[0] for path in paths] == ["stage_3"] * 3 + ["stage_1", "shared"]
    assert all("/block" in path for path in paths[:3])
    model = encoder(blocks=3)
    paths = ["block_0", "block_1", "block_2"]
    outer = keras.Sequential([model, keras.layers.Dense(2)])
    assert [node.layer.name for node in select_blocks(Tree.of(outer), "auto")] == paths
    assert [node.path for node in select_blocks(Tree.of(model), "re:block_[02]")] == paths[::2]


def normalized(trainable: bool = True) -> keras.Model:
    inner = [
        keras.Sequential([keras.layers.Dense(5), keras.layers.BatchNormalization(name=f"norm_{i}")])
        for i in range(2)
    ]
    inner[1].layers[1].trainable = inner[0].layers[1].trainable = trainable
    return keras.Sequential([keras.Input((5,)), *inner])


def flat() -> keras.Model:
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(5), keras.layers.Dense(5)])


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "state": (normalized, "auto", r"in which \['norm_0'\] assign to .*moving_mean"),
    "unbuilt": (lambda: keras.Sequential([Block(name="b")]), ["b"], "call it on a batch"),
    "no blocks": (flat, "auto", "Its blocks may be parts of one graph, as in keras.applications"),
    "a name": (encoder, "block_0", r"for a layer of that name write \['block_0'\]"),
    "no such name": (encoder, ["block_9"], "Closest: .*block_1"),
    "nothing": (encoder, lambda _: False, "no layer of the model is selected"),
    "nested": (encoder, "re:block_0.*", "name the outer or the inner ones"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    make, blocks, message = REFUSED[what]
    model = make()
    with pytest.raises(ValueError, match=message):
        kl.rematerialize(model, blocks=blocks)
    with pytest.raises(ValueError, match="call rematerialize first"):
        kl.unrematerialize(model)


def test_refused_around_and_in_what_is_rematerialized_and_where_state_thaws() -> None:
    model = kl.rematerialize(encoder(), blocks=["block_0"])
    for blocks in (["block_0"], ["block_0/up"], "auto"):
        with pytest.raises(ValueError, match=r"Received: \['block_0.*unrematerialize\(model\) fi"):
            kl.rematerialize(model, blocks=blocks)
    kl.rematerialize(model, blocks=["block_1"])
    frozen = kl.rematerialize(normalized(trainable=False))
    frozen.compile("sgd", "mse")
    x = np.ones((3, 5), "float32")
    frozen.train_on_batch(x, x)
    frozen.layers[0].layers[1].trainable = True
    frozen.compile("sgd", "mse")
    with pytest.raises(ValueError, match="assign to .*moving_mean"):
        frozen.train_on_batch(x, x)
