"""What only embeddings have: masks, the gradient of a row, starts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from support.cases import numpy_of, randomize
from support.models import state

import keras_lora as kl

VOCABULARY, DIM = 13, 5
TOKENS = np.array([[4, 4, 7, 0, 0]], "int32")


def model_of(layer: keras.layers.Layer) -> keras.Model:
    inputs = keras.Input((None,), dtype="int32")
    return keras.Model(inputs, layer(inputs))


def language_model(**options: Any) -> keras.Model:
    """A model from tokens to logits, through one embedding matrix."""
    inputs = keras.Input((None,), dtype="int32")
    table = keras.layers.ReversibleEmbedding(VOCABULARY, DIM, name="table", **options)
    hidden = keras.layers.Dense(DIM, activation="tanh", name="up")(table(inputs))
    return keras.Model(inputs, table(hidden, reverse=True))


CONFIG = kl.LoRAConfig(rank=2, alpha=6, targets=["table"])


def randomized(model: keras.Model) -> keras.Model:
    kl.apply_lora(model, CONFIG)
    (layer,) = kl.lora_layers(model).values()
    randomize(layer.adapters["default"].factors)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_in_both_directions_equals_numpy(tied: bool) -> None:
    model = language_model(tie_weights=tied, logit_soft_cap=2.0)
    randomize(model.weights)
    table, up = model.get_layer("table"), model.get_layer("up")
    e, head = numpy_of(table.embeddings), None if tied else numpy_of(table.reverse_embeddings)
    randomized(model)
    a, b = map(numpy_of, table.adapters["default"].factors)
    effective = e + 3 * a @ b
    hidden = np.tanh(effective[TOKENS] @ numpy_of(up.kernel) + numpy_of(up.bias))
    logits = hidden @ (effective.T if head is None else head)
    np.testing.assert_allclose(numpy_of(model(TOKENS)), 2 * np.tanh(logits / 2), rtol=1e-4)
    adapted = numpy_of(model(TOKENS))
    np.testing.assert_allclose(numpy_of(kl.merge_lora(model)(TOKENS)), adapted, rtol=1e-4)


def test_an_untied_head_is_frozen_and_left_alone() -> None:
    model = language_model(tie_weights=False)
    before = numpy_of(model.get_layer("table").reverse_embeddings)
    kl.apply_lora(model, CONFIG)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(TOKENS, TOKENS, epochs=2, verbose=0)
    assert [v.name for v in model.trainable_variables] == ["lora_a", "lora_b"]
    np.testing.assert_array_equal(numpy_of(model.get_layer("table").reverse_embeddings), before)


@pytest.mark.parametrize("make", [kl.LoRAEmbedding, kl.LoRAReversibleEmbedding])
def test_masks_and_starts(make: Any) -> None:
    layer = make(VOCABULARY, 257, rank=3, mask_zero=True, dropout=0.5)
    pool = keras.layers.GlobalAveragePooling1D()
    model = keras.Sequential([keras.Input((None,), dtype="int32"), layer, pool])
    unpadded = numpy_of(model(TOKENS[:, :3]))
    np.testing.assert_allclose(numpy_of(model(TOKENS)), unpadded, rtol=1e-5)
    a, b = layer.adapters["default"].factors
    assert not np.array(a).any()
    assert abs(float(np.std(b)) - 1) < 0.1


def test_there_is_no_dropout() -> None:
    layer = kl.LoRAEmbedding(VOCABULARY, DIM, rank=2, dropout=0.9)
    model = model_of(layer)
    randomize(layer.adapters["default"].factors)
    np.testing.assert_array_equal(
        numpy_of(model(TOKENS, training=True)), numpy_of(model(TOKENS, training=False))
    )
    assert not [v for v in layer.variables if "seed" in v.path]
    assert layer.get_config()["adapters"]["default"]["dropout"] == 0.9


def test_only_the_rows_of_tokens_move() -> None:
    model = kl.apply_lora(model_of(keras.layers.Embedding(VOCABULARY, DIM, name="table")), CONFIG)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(TOKENS, np.ones((1, 5, DIM)), verbose=0)
    (layer,) = kl.lora_layers(model).values()
    moved = np.array(layer.adapters["default"].a).any(1)
    assert np.flatnonzero(moved).tolist() == [0, 4, 7]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="takes a GradientTape")
def test_the_gradient_of_a_is_of_rows() -> None:
    import tensorflow as tf  # noqa: PLC0415

    model = randomized(model_of(keras.layers.Embedding(VOCABULARY, DIM, name="table")))
    with tf.GradientTape() as tape:
        loss = ops.sum(ops.square(model(TOKENS)))
    a, b = tape.gradient(loss, [v.value for v in model.trainable_variables])
    assert isinstance(a, tf.IndexedSlices)
    assert tuple(a.values.shape) == (5, 2)
    assert tuple(b.shape) == (2, DIM)


@pytest.mark.parametrize("tied", [True, False])
def test_a_layer_by_hand_saves_and_loads(tied: bool, tmp_path: Path) -> None:
    layer = kl.LoRAReversibleEmbedding(VOCABULARY, DIM, rank=2, tie_weights=tied, name="table")
    model = keras.Sequential([keras.Input((None,), dtype="int32"), layer])
    randomize(layer.adapters["default"].factors)
    assert [v.name for v in model.trainable_variables] == ["lora_a", "lora_b"]
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(numpy_of(loaded(TOKENS)), numpy_of(model(TOKENS)))
    assert type(kl.unload_lora(loaded).layers[0]) is keras.layers.ReversibleEmbedding


def test_adapters_of_tables_go_through_files_and_combinations(tmp_path: Path) -> None:
    model = randomized(language_model())
    kl.save_adapter(model, tmp_path / "adapter")
    base = language_model()
    base.set_weights(kl.merge_lora(model, inplace=False).get_weights())
    kl.unload_lora(model)
    kl.load_adapter(model, tmp_path / "adapter", "one")
    np.testing.assert_allclose(numpy_of(model(TOKENS)), numpy_of(base(TOKENS)), rtol=1e-4)
    kl.combine_adapters(model, {"one": 0.5}, "half", "svd", rank=2)
    kl.combine_adapters(model, {"half": 2.0}, "again", "cat")
    kl.set_adapter(model, "again")
    np.testing.assert_allclose(numpy_of(model(TOKENS)), numpy_of(base(TOKENS)), rtol=1e-4)


class Reader(keras.layers.Layer):
    """Reads the private attribute of an embedding, as a layer of KerasHub's SAM 3 does."""

    def __init__(self, table: keras.layers.Layer) -> None:
        super().__init__()
        self.table = table

    def build(self, input_shape: Any) -> None:  # noqa: ARG002
        self.table.build()

    def call(self, inputs: Any) -> Any:
        return inputs + keras.ops.sum(self.table._embeddings, axis=0)


def test_a_layer_that_reads_the_private_matrix_computes_with_the_effective_one() -> None:
    inputs = keras.Input((DIM,))
    table = keras.layers.Embedding(VOCABULARY, DIM, name="table")
    model = randomized(keras.Model(inputs, Reader(table)(inputs)))
    adapted = numpy_of(model(np.ones((2, DIM))))
    expected = 1 + numpy_of(table.embeddings).sum(0)
    np.testing.assert_allclose(adapted[0], expected, rtol=1e-4)
    assert abs(expected - 1 - numpy_of(table.base_kernel).sum(0)).max() > 0.1
    merged = numpy_of(kl.merge_lora(model)(np.ones((2, DIM))))
    np.testing.assert_allclose(merged, adapted, rtol=1e-4)


REFUSED = {
    "constraint": ({"embeddings_constraint": "non_neg"}, "expected no embeddings constraint"),
    "keras": ({"lora_rank": 2}, "without Keras's own LoRA"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=[*REFUSED])
def test_what_cannot_be_adapted_is_refused(options: dict[str, Any], message: str) -> None:
    model = model_of(keras.layers.Embedding(VOCABULARY, DIM, name="table", **options))
    before = state(model)
    with pytest.raises(ValueError, match=message):
        kl.apply_lora(model, CONFIG)
    assert state(model) == before


def test_a_constraint_elsewhere_does_not_stop_an_adapter(tmp_path: Path) -> None:
    def model() -> keras.Model:
        table = keras.layers.Embedding(VOCABULARY, DIM, embeddings_constraint="non_neg")
        return keras.Sequential(
            [keras.Input((5,), dtype="int32"), table, keras.layers.Dense(3, name="up")]
        )

    kl.save_adapter(kl.apply_lora(model(), kl.LoRAConfig(rank=2, targets=["up"])), tmp_path)
    kl.load_adapter(other := model(), tmp_path)
    assert list(kl.lora_layers(other)) == ["up"]


def test_weights_by_the_constructor_are_refused() -> None:
    with pytest.raises(ValueError, match="Invalid `weights`.*base_kernel"):
        kl.LoRAEmbedding(VOCABULARY, DIM, weights=[np.ones((VOCABULARY, DIM))])


@keras.saving.register_keras_serializable("tests")
class Scaled(keras.layers.Embedding):
    def call(self, inputs: Any) -> Any:
        return 3 * super().call(inputs)


def test_a_class_of_ones_own_is_registered() -> None:
    class LoRAScaled(kl.LoRAEmbedding, Scaled):
        def call(self, inputs: Any) -> Any:
            return 3 * self.adapted_lookup(inputs)

    model = model_of(Scaled(VOCABULARY, DIM, name="table"))
    with pytest.raises(ValueError, match="register_lora_class"):
        kl.apply_lora(model, CONFIG)
    kl.register_lora_class(Scaled, LoRAScaled)
    expected = numpy_of(randomized(model)(TOKENS))
    assert type(kl.merge_lora(model).get_layer("table")) is Scaled
    np.testing.assert_allclose(numpy_of(model(TOKENS)), expected, rtol=1e-5)
