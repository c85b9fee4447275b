"""Each private name that the package uses, so that a change of it fails a test of its own."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.models import composite, data, functional, subclassed
from support.variables import MIXTURES
from tensorflow.python.saved_model import save_context

import keras_lora as kl
from keras_lora.export.keras_hub.operations import server_operations
from keras_lora.inject.keras_savers import saver_modules
from keras_lora.layers.variables import EXPERTS


@pytest.mark.parametrize("layer_class", [keras.layers.Dense, keras.layers.EinsumDense])
def test_kernel_attributes(layer_class: type) -> None:
    layer = functional().get_layer("up")
    if layer_class is keras.layers.EinsumDense:
        layer = keras.layers.EinsumDense("ab,bc->ac", 7)
        layer.build((None, 5))
    assert layer._kernel is layer.kernel
    assert layer.lora_enabled is False
    assert layer.lora_rank is None


def test_the_loops_of_recurrent_layers_read_the_kernels_of_a_cell() -> None:
    for layer_class in (keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU):
        assert "inner_loop" in vars(layer_class), layer_class
    looped = []

    class Looped(keras.layers.SimpleRNN):
        def inner_loop(self, *args: Any, **kwargs: Any) -> Any:
            looped.append(self.cell)
            return super().inner_loop(*args, **kwargs)

    layer = Looped(5)
    layer(np.ones((2, 7, 3), "float32"))
    assert looped == [layer.cell]
    assert vars(layer.cell)["recurrent_kernel"] is layer.cell.recurrent_kernel
    assert type(keras.layers.ConvLSTM2D(5, 3).cell).__name__ == "ConvLSTMCell"


def test_the_own_variables_of_a_layer() -> None:
    layer = functional().get_layer("up")
    own = [*layer._trainable_variables, *layer._non_trainable_variables]
    assert list(map(id, own)) == list(map(id, layer.weights))


def test_the_experts_of_mixtures_are_attributes() -> None:
    for make in MIXTURES.values():
        layer = make().experts
        layer.build(None)
        for attribute in EXPERTS[type(layer).__name__]:
            assert len(vars(layer)[attribute].shape) == 3, attribute
        assert type(layer).call.__globals__["ops"] is keras.ops, "einsums of experts are factored"


@pytest.mark.parametrize("layer_class", [keras.layers.Embedding, keras.layers.ReversibleEmbedding])
def test_table_attributes(layer_class: type) -> None:
    layer = layer_class(13, 5)
    layer.build()
    assert layer._embeddings is layer.embeddings
    assert layer.embeddings_constraint is None
    assert layer.lora_enabled is False
    assert layer.lora_rank is None


def test_a_reversible_embedding_looks_up_by_the_class_after_it() -> None:
    """So an adapted one has its adapters' lookup, and Keras's own mask."""

    class Doubled(keras.layers.Embedding):
        def call(self, inputs: object) -> object:
            return 2 * super().call(inputs)

    class Reversible(keras.layers.ReversibleEmbedding, Doubled):
        pass

    layer, tokens = Reversible(13, 5), np.array([[4, 7]])
    np.testing.assert_allclose(layer(tokens), 2 * np.array(layer.embeddings)[tokens])


def test_tracker() -> None:
    layer = functional().get_layer("up")
    assert layer._tracker.locked
    layer._tracker.unlock()
    variable = layer.add_weight(name="extra", shape=(2,))
    layer._tracker.lock()
    assert any(v is variable for v in layer.weights)
    layer._untrack_variable(variable)
    assert not any(v is variable for v in layer.weights)
    layer._tracker.unlock()
    layer._track_variable(variable)
    seeds = keras.random.SeedGenerator(1)
    layer._tracker.add_to_store("seed_generators", seeds)
    assert any(v is seeds.state for v in layer.variables)
    layer._tracker.untrack(seeds)
    assert not any(v is seeds.state for v in layer.variables)


def test_what_keras_notes_of_call_is_renewed_with_the_class() -> None:
    """All that the constructor stores about `call`'s signature is right in a converted layer."""

    class Plain(keras.layers.Dense):
        def call(self, inputs: Any) -> Any:
            return super().call(inputs)

    class Masked(kl.LoRADense, Plain):
        def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
            assert mask is None
            return super().call(inputs, training)

    kl.register_lora_class(Plain, Masked)
    model = keras.Sequential([keras.Input((5,)), Plain(7, name="up"), keras.layers.Dense(2)])
    plain, made = vars(model.get_layer("up")), vars(Masked(7))
    notes = [name for name in made if "call_" in name and plain.get(name) != made[name]]
    assert "_call_has_mask_arg" in notes
    converted = vars(kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up"])).get_layer("up"))
    assert {name: converted[name] for name in notes} == {name: made[name] for name in notes}
    again = vars(kl.unload_lora(model).get_layer("up"))
    assert {name: again[name] for name in notes} == {name: vars(Plain(7))[name] for name in notes}


def test_variables_are_counted_before_they_are_loaded() -> None:
    layer = functional().get_layer("up")
    with pytest.raises(ValueError, match="expected 2 variables"):
        layer._check_load_own_variables({"0": np.zeros((5, 7))})


def test_flatten_layers() -> None:
    model = composite()
    children = model._flatten_layers(include_self=False, recursive=False)
    assert [layer.name for layer in children[1:3]] == ["block_0", "block_1"]
    names = {layer.name for layer in children[1]._flatten_layers(include_self=False)}
    assert {"attention", "query", "up", "down", "norm"} <= names


def test_keras_history_leads_from_an_output_to_its_layer() -> None:
    model = functional()
    (output,) = model.outputs
    history = output._keras_history
    assert history.operation is model.get_layer("head")
    node = history.operation._inbound_nodes[history.node_index]
    assert [tuple(t.shape) for t in node.input_tensors] == [(None, 11)]


def test_build_shapes_of_a_subclassed_model() -> None:
    assert dict(subclassed()._build_shapes_dict) == {"input_shape": (1, 5)}


def test_names_in_weight_files_come_from_the_class() -> None:
    """The reason why an adapted class has the name of its base."""
    model = kl.apply_lora(functional(), kl.LoRAConfig(rank=2))
    layer = model.get_layer("up")
    assert type(layer) is kl.LoRADense
    assert type(layer).__name__ == "Dense"
    assert repr(layer).startswith("<LoRADense name=up")


def test_savers_look_their_functions_up_when_they_are_called(monkeypatch: Any) -> None:
    """So a wrapped function is the one that `save` and `keras.saving.save_model` call."""
    saving_lib, legacy = saver_modules()
    model, called = functional(), []
    for module, name in [(saving_lib, "save_model"), (legacy, "save_model_to_hdf5")]:
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: called.append(name))
    for save in (model.save, partial(keras.saving.save_model, model)):
        for file in ("m.keras", "m.h5"):
            save(file)
    model.save("m", zipped=False)
    assert called == ["save_model", "save_model_to_hdf5"] * 2 + ["save_model"]
    monkeypatch.undo()
    monkeypatch.setattr(saving_lib, "_serialize_model_as_json", called.append)
    with pytest.raises(TypeError, match="NoneType"):
        copy.deepcopy(model)
    assert called[-1] is model


def test_fit_starts_where_it_is_told() -> None:
    model = functional()
    model.compile("adam", "mse", metrics=["accuracy"])
    model._initial_epoch = 2
    x, y = data(model)
    assert model.fit(x, y, epochs=3, initial_epoch=1, verbose=0).epoch == [2]
    model._initial_epoch = None
    assert model.fit(x, y, epochs=3, initial_epoch=1, verbose=0).epoch == [1, 2]


def test_metrics_are_built_and_tell_their_direction() -> None:
    model = functional()
    metrics = [keras.metrics.MeanAbsoluteError(), keras.metrics.R2Score()]
    model.compile("adam", "mse", metrics=metrics)
    model._symbolic_build(data_batch=data(model))
    assert len(model.metrics_variables) == 2 + 2 + len(metrics[1].variables)
    assert [metric._direction for metric in metrics] == ["down", "up"]


def test_a_resource_of_ones_own_takes_assets_along(tmp_path: Path) -> None:
    """`_track_trackable`, of TensorFlow."""

    class Resource(tf.saved_model.experimental.TrackableResource):
        def _create_resource(self) -> Any:
            return tf.raw_ops.VarHandleOp(dtype=tf.bool, shape=[])

    (tmp_path / "words").write_text("one")
    module = tf.Module()
    module.resource = Resource()
    module.resource._track_trackable(tf.saved_model.Asset(str(tmp_path / "words")), "words")
    tf.saved_model.save(module, str(tmp_path / "saved"))
    assert (tmp_path / "saved/assets/words").read_text() == "one"


def test_slice_update_needs_xla_unless_it_is_replaced() -> None:
    """The name is public, but later versions of Keras may not need XLA."""

    def update(x: tf.Tensor) -> tf.Tensor:
        return keras.ops.slice_update(x, (0, 1), x[:, :2])

    operations = []
    for context in (contextlib.nullcontext(), server_operations()):
        with context:
            traced = tf.function(update).get_concrete_function(tf.TensorSpec((None, 5)))
        operations.append({node.op for node in traced.graph.as_graph_def().node})
    assert "XlaDynamicUpdateSlice" in operations[0]
    assert not any(name.startswith("Xla") for name in operations[1])
    assert "TensorStridedSliceUpdate" in operations[1]


def test_operations_are_the_rows_of_a_functional_summary() -> None:
    model, lines = functional(), list[str]()
    model.summary(print_fn=lines.append)
    (text,) = lines
    names = [operation.name for operation in model._operations]
    assert [line.split()[1] for line in text.splitlines() if line.startswith("│")] == names


def test_a_model_knows_the_strategy_that_it_was_made_in() -> None:
    outside, strategy = functional(), tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope():
        assert functional()._distribute_strategy is strategy
        assert outside._distribute_strategy is None


def test_a_variable_knows_its_layout_and_may_be_without_a_value() -> None:
    """Which `keras.distribution` and the steps of JAX use; `tests/devices` has several devices."""
    variable = keras.Variable(np.ones(3))
    assert variable._layout is None
    assert variable._value is not None


def test_the_constructor_of_a_layer_binds_quantize() -> None:
    """So `attach` takes it out, for the adapted class's own to be found."""
    assert "quantize" in vars(keras.layers.Dense(3))


def test_optimizers() -> None:
    variables = [keras.Variable(np.ones((3, 2), "float32"), name=n) for n in ("kept", "excluded")]
    optimizer = keras.optimizers.AdamW(0.1, use_ema=True)
    optimizer.exclude_from_weight_decay(variables[1:], ["bias"])
    assert optimizer._exclude_from_weight_decay == {optimizer._var_key(variables[1])}
    assert optimizer._exclude_from_weight_decay_pattern.pattern == "bias"
    optimizer.build(variables)
    assert all(v is w for v, w in zip(optimizer._trainable_variables, variables, strict=True))
    assert optimizer.variables[0] is optimizer._iterations
    assert optimizer._learning_rate is optimizer.learning_rate
    averages = optimizer._model_variables_moving_average
    assert [v.shape for v in averages] == [(3, 2)] * 2
    chosen = keras.optimizers.OptimizerMap(optimizer)
    assert keras.optimizers.MultiOptimizer(chosen)._optimizer_map is chosen


def test_what_rates_by_group_build_on() -> None:
    asked = []

    class Asking(keras.optimizers.Nadam):
        def _get_current_learning_rate(self) -> Any:
            asked.append("rate")
            return super()._get_current_learning_rate()

        def _apply_weight_decay(self, variables: Any) -> None:
            asked.append("decay")
            super()._apply_weight_decay(variables)

        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            assert self._get_variable_index(variable) == 0
            assert not self._use_weight_decay(variables[0])
            super().update_step(gradient, variable, learning_rate)

    variables = [keras.Variable(np.ones(2, "float32"))]
    optimizer = Asking(0.1)
    optimizer.exclude_from_weight_decay(variables)
    optimizer.apply([np.ones(2, "float32")], variables)
    assert asked == ["decay", "rate"]
    assert any(v is optimizer._u_product for v in optimizer.variables)
    # On torch alone; `tests/test_rates.py` runs there too.
    assert not hasattr(optimizer, "_parallel_update_step")


def test_the_model_that_calls_a_layer() -> None:
    asked = []

    class Asking(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            asked.append(self._get_call_context().entry_layer)
            return inputs

    model = keras.Sequential([keras.Input((3,)), Asking()])
    model(np.ones((2, 3), "float32"))
    assert asked[-1] is model


def test_tensorflow_asks_a_layer_for_its_children() -> None:
    layer, found = functional().get_layer("up"), []
    real = type(layer)._trackable_children

    class Asked(keras.layers.Dense):
        def _trackable_children(self, save_type: str = "checkpoint", **options: Any) -> Any:
            found.append(save_type)
            return real(self, save_type, **options)

    layer.__class__ = Asked
    assert list(tf.train.TrackableView(layer).descendants())
    assert found == ["checkpoint"]


def test_a_function_that_is_traced_to_be_saved_is_not_traced_again(tmp_path: Path) -> None:
    traces = []

    def twice(x: Any) -> Any:
        traces.append(x)
        return 2 * x

    module, options = tf.Module(), tf.saved_model.SaveOptions()
    module.twice = tf.function(twice, input_signature=[tf.TensorSpec((None,))])
    with save_context.save_context(options):
        signature = module.twice.get_concrete_function()
    tf.saved_model.save(module, str(tmp_path / "1"), signature, options)
    assert len(traces) == 1
