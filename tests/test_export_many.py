"""One SavedModel for many adapters: each row of a batch is answered as by its merged model."""

from __future__ import annotations

from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from support.mixed_batches import (
    CASES,
    MIX,
    NAMES,
    adapted,
    answers,
    assert_rows,
    bert,
    config,
    served,
    small,
)
from support.models import functional, randomize_adapters, state

import keras_lora as kl


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_rows_of_a_mixed_batch_equal_the_merged_models(case: str, tmp_path: Path) -> None:
    make, feed, configs = CASES[case]
    model, feeds = adapted(make, configs), feed()
    kl.set_adapter(model, "de")
    before = state(model)
    report = kl.export_saved_model(model, tmp_path / "1", adapters=NAMES)
    assert not report.problems
    assert state(model) == before
    received = served(tmp_path / "1", feeds)
    assert_rows(received, answers(model, feeds), 2e-2 if "bfloat16" in case else 1e-5)
    different = {name: received[list(MIX).index(name)].tobytes() for name in set(MIX)}
    assert len(set(different.values())) == len(different)


def test_what_is_compiled_stays_and_predicts_the_same(tmp_path: Path) -> None:
    model, (x,) = small(), CASES["functional"][1]().values()
    kl.set_adapter(model, "it")
    model.compile("adam", "mse")
    model.fit(x, np.zeros((len(MIX), 3)), verbose=0)
    before, functions = model.predict(x, verbose=0), (model.train_function, model.predict_function)
    optimizer = [np.array(v) for v in model.optimizer.variables]
    kl.export_saved_model(model, tmp_path / "1", adapters=NAMES)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    assert (model.train_function, model.predict_function) == functions
    for variable, value in zip(model.optimizer.variables, optimizer, strict=True):
        np.testing.assert_array_equal(np.array(variable), value)
    assert kl.lora_layers(model)["up"].active_adapters == ()
    assert kl.lora_layers(model)["middle"].active_adapters == ("it",)


def test_any_mix_of_any_length_is_answered_alike(tmp_path: Path) -> None:
    model, feeds = small(), CASES["functional"][1]()
    kl.export_saved_model(model, tmp_path / "1", adapters=NAMES)
    loaded = tf.saved_model.load(str(tmp_path / "1"))
    assert set(loaded.signatures) == {"serve", "serving_default"}
    serve = loaded.signatures["serving_default"]
    rng = np.random.default_rng(17)
    for size in (1, 2, 5, 13):
        rows = {"features": np.resize(feeds["features"], (size, 5))}
        names = tuple(rng.choice(["", *NAMES], size).tolist())
        received = serve(adapter=tf.constant(names), features=tf.constant(rows["features"]))
        assert_rows(received["head"].numpy(), answers(model, rows, names))


def test_rows_of_the_base_alone_are_the_base(tmp_path: Path) -> None:
    model, feeds = small(), CASES["functional"][1]()
    kl.export_saved_model(model, tmp_path / "1", adapters=NAMES)
    none = ("",) * len(MIX)
    assert_rows(served(tmp_path / "1", feeds, none), answers(model, feeds, none), 1e-6)


def test_a_part_of_the_adapters_by_index(tmp_path: Path) -> None:
    """An adapter that is not exported has no effect on its own layers and the head."""
    model, feeds = small(), CASES["functional"][1]()
    kl.set_adapter(model, "fr")
    chosen = ("it", "de")
    kl.export_saved_model(model, tmp_path / "1", adapters=chosen, adapter_ids="index")
    indices = [-1 if name not in chosen else chosen.index(name) for name in MIX]
    names = tuple(name if name in chosen else "" for name in MIX)
    assert_rows(served(tmp_path / "1", feeds, indices), answers(model, feeds, names))
    serve = tf.saved_model.load(str(tmp_path / "1"))
    for wrong in (2, -2):
        with pytest.raises(tf.errors.InvalidArgumentError, match=rf"0 to 1, of: it, de.*{wrong}"):
            serve.signatures["serve"](
                adapter=tf.constant([wrong]), features=tf.constant(feeds["features"][:1])
            )


@pytest.mark.slow
def test_text_in_and_labels_out_by_row(tmp_path: Path) -> None:
    """A tokenizer's graph does not know the size of the batch."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "is", "long"]
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(
        keras_hub.models.BertTokenizer(words), sequence_length=7
    )

    def make() -> keras.Model:
        task = bert()
        return keras_hub.models.BertTextClassifier(
            backbone=task.backbone, num_classes=5, preprocessor=preprocessor
        )

    text = np.array(["the film", "is long", "long film is the long film", "the"] * 3)[: len(MIX)]
    labels = ["ash", "elm", "fir", "oak", "yew"]
    model = adapted(make, CASES["kerashub task"][2])
    kl.export_saved_model(
        model, tmp_path / "1", adapters=NAMES, preprocessing=True, class_names=labels
    )
    serve = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    received = serve(adapter=tf.constant(MIX), text=tf.constant(text))
    expected = tf.nn.softmax(answers(model, preprocessor(text))).numpy()
    assert_rows(received["probabilities"].numpy(), expected)
    wanted = [labels[i].encode() for i in expected.argmax(axis=-1)]
    assert received["label"].numpy().tolist() == wanted


def test_values_that_are_those_of_the_base_need_no_place(tmp_path: Path) -> None:
    """A normalization in `layers_to_save`, not trained, is not served by row."""
    model = kl.apply_lora(functional(), config(2, ["up"], layers_to_save=["norm"]), name="fr")
    randomize_adapters(model)
    kl.export_saved_model(model, tmp_path / "1", adapters=["fr"])
    feeds = CASES["functional"][1]()
    names = ("fr", "") * 5 + ("fr",)
    assert_rows(served(tmp_path / "1", feeds, names), answers(model, feeds, names))
