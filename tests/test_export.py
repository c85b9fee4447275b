"""The exported SavedModel: its answers without Keras, its size, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from support import processes
from support.exports import EXPORTS, PythonInside, adapted, classifier, large, predict
from support.forks import Fork
from support.models import (
    Subclassed,
    composite,
    functional,
    state,
)
from support.tasks import bytes_of
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

import keras_lora as kl

pytest_plugins = ["support.forks"]

SERVE = """
import sys, numpy as np, tensorflow as tf
served = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
feeds = {name: tf.constant(value) for name, value in np.load(sys.argv[2]).items()}
np.savez(sys.argv[3], **{name: value.numpy() for name, value in served(**feeds).items()})
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", list(EXPORTS))
def test_answers_equal_predict_in_the_c_library_and_without_keras(
    name: str, fork_without_keras: Fork, tmp_path: Path
) -> None:
    make, feed, outputs = EXPORTS[name]
    model = adapted(make)
    feeds = feed(model)
    expected = predict(model, feeds)
    tolerance = 2e-2 if name in {"bfloat16", "mixed float16"} else 1e-5
    before = state(model)
    kl.export_saved_model(model, tmp_path / "1")
    assert state(model) == before
    np.savez(tmp_path / "in.npz", **feeds)
    paths = [tmp_path / "1", tmp_path / "in.npz"]
    script = Path("examples/run_saved_model.py")
    processes.run(
        f"import runpy, sys; sys.argv[0] = {str(script)!r}; sys.path[0] = {str(script.parent)!r}; "
        f"runpy.run_path({str(script)!r}, run_name='__main__')",
        *paths,
        tmp_path / "c.npz",
        block=("keras", "keras_lora"),  # the script itself refuses an imported tensorflow
    )
    status, output = fork_without_keras(SERVE, *paths, tmp_path / "python.npz")
    assert status == 0, output
    for file in ("c.npz", "python.npz"):
        served = dict(np.load(tmp_path / file))
        assert sorted(served) == sorted(outputs)
        for output, value in zip(outputs, expected, strict=True):
            assert served[output].dtype == np.float32
            np.testing.assert_allclose(served[output], value, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_an_exported_model_takes_other_batch_and_sequence_lengths(tmp_path: Path) -> None:
    model = adapted(composite)
    kl.export_saved_model(model, tmp_path / "1")
    served = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    x = np.random.default_rng(1).normal(size=(2, 17, 5)).astype("float32")
    received = served(sequence=tf.constant(x))["head"].numpy()
    np.testing.assert_allclose(received, np.array(model(x)), rtol=1e-4, atol=1e-5)


def test_variables_are_stored_once_and_nothing_names_the_package(tmp_path: Path) -> None:
    model = adapted(large)
    kl.export_saved_model(model, tmp_path / "ours")
    merged = kl.merge_lora(model, inplace=False)
    merged.export(tmp_path / "kerass", verbose=False)
    written = {
        name: (tmp_path / name / "variables/variables.data-00000-of-00001").stat().st_size
        for name in ("ours", "kerass")
    }
    values = sum(np.array(v).nbytes for v in merged.weights)
    assert values <= written["ours"] <= 1.02 * values + 4096
    assert written["kerass"] > 1.7 * written["ours"]
    for file in (tmp_path / "ours").rglob("*"):
        assert not file.is_file() or b"lora" not in file.read_bytes()


def test_a_model_is_traced_once_and_its_graph_is_stored_once(tmp_path: Path) -> None:
    calls = []

    class Counted(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            calls.append(x)
            return keras.ops.cumsum(x, axis=1)

    hidden = keras.layers.Dense(7)
    model = keras.Sequential([keras.Input((5,)), hidden, Counted(), keras.layers.Dense(3)])
    kl.apply_lora(model, kl.LoRAConfig(rank=2))
    calls.clear()
    kl.export_saved_model(model, tmp_path / "1")
    assert len(calls) == 1
    content = (tmp_path / "1/saved_model.pb").read_bytes()
    functions = SavedModel.FromString(content).meta_graphs[0].graph_def.library.function
    assert [node.op for each in functions for node in each.node_def].count("Cumsum") == 1


def test_the_graph_of_a_merged_model_is_as_large_as_the_base(tmp_path: Path) -> None:
    base = kl.export_saved_model(classifier(), tmp_path / "base")
    merged = kl.export_saved_model(adapted(classifier), tmp_path / "merged")
    assert merged.operations == base.operations


def test_merged_models_export_with_keras_alone(tmp_path: Path) -> None:
    model = kl.merge_lora(adapted(functional))
    model.export(tmp_path / "1", verbose=False)
    report = kl.check_saved_model(tmp_path / "1")
    assert not report.problems
    assert report.operations > 0


class Compiled(keras.layers.Layer):
    def call(self, inputs: Any) -> Any:
        return tf.function(tf.tanh, jit_compile=True)(inputs)


class CacheUpdate(keras.layers.Layer):
    """The operation by which KerasHub's caches are updated in `generate`."""

    def call(self, inputs: Any) -> Any:
        return keras.ops.slice_update(inputs, (0, 1), inputs[:, :2])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (PythonInside, "operation PyFunc, which runs Python"),
        (Compiled, "jit_compile=True"),
        (CacheUpdate, "operation XlaDynamicUpdateSlice, which needs XLA"),
    ],
)
def test_a_graph_that_a_server_cannot_run_is_refused(
    layer: type, message: str, tmp_path: Path
) -> None:
    inputs = keras.Input((5,))
    x = layer()(keras.layers.Dense(7, name="up")(inputs))
    model = adapted(lambda: keras.Model(inputs, keras.layers.Dense(3, name="head")(x)))
    before = state(model)
    with pytest.raises(ValueError, match=message):
        kl.export_saved_model(model, tmp_path / "1")
    assert state(model) == before
    assert not list(tmp_path.iterdir())


def test_the_check_sees_low_precision_in_signatures_of_others(tmp_path: Path) -> None:
    merged = kl.merge_lora(adapted(lambda: classifier("bfloat16")))
    merged.export(tmp_path / "1", verbose=False)
    (problem, *_) = kl.check_saved_model(tmp_path / "1").problems
    assert "DT_BFLOAT16" in problem
    assert "no JSON form" in problem


def test_only_a_saved_model_is_overwritten(tmp_path: Path) -> None:
    model, served = adapted(functional), tmp_path / "served"
    target, precious = served / "1", served / "notes.txt"
    target.mkdir(parents=True)
    kl.export_saved_model(model, target, overwrite=True)  # an empty directory
    with pytest.raises(ValueError, match="overwrite=True"):
        kl.export_saved_model(model, target)
    (target / "assets" / "old").write_text("of an older version")
    kl.export_saved_model(model, target, overwrite=True)
    assert not (target / "assets" / "old").exists()
    precious.write_text("mine")
    (target / "thesis.txt").write_text("mine too")
    before = bytes_of(served)
    for path, message in (
        (served, r"without saved_model.pb, with \['1', 'notes.txt'\]"),
        (target, r"other files beside it, \['thesis.txt'\]"),
        (precious, "notes.txt', a file"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*remove it, or write elsewhere"):
            kl.export_saved_model(model, path, overwrite=True)
    assert bytes_of(served) == before
    assert [p.name for p in tmp_path.iterdir()] == ["served"]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a built keras\.Model"):
        kl.export_saved_model(Subclassed(), tmp_path / "1")
    for content in (None, b"not a graph"):
        if content:
            (tmp_path / "saved_model.pb").write_bytes(content)
        with pytest.raises(ValueError, match="Expected a SavedModel"):
            kl.check_saved_model(tmp_path)


def test_strings_in_a_graph_name_their_text_operations(tmp_path: Path) -> None:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "##s"]
    tokenizer = keras_hub.models.BertTokenizer(vocabulary)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=7)

    class Served(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
        def serve(self, text: Any) -> Any:
            return {"token_ids": preprocessor(text)["token_ids"]}

    served = Served()
    served.tokenizer = tokenizer
    tf.saved_model.save(served, tmp_path / "1", signatures={"serving_default": served.serve})
    report = kl.check_saved_model(tmp_path / "1")
    assert any(name.startswith("TFText>") for name in report.text_operations)
