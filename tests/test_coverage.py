"""Which models can be adapted: containers, Keras applications, and every KerasHub backbone.

All of them pass through `check_adapting`, the promises that do not depend on the model.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import keras_hub
import keras_nlp
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from support.cases import numpy_of, randomize, snapshot
from support.keras_hub_backbones import BACKBONES

import keras_lora as kl
from keras_lora.walker import walk

pytestmark = [
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="takes a GradientTape"),
    # Some kernels of the backbones have a side of one.
    pytest.mark.filterwarnings("ignore:The rank is above:UserWarning"),
]

Targets = str | list[str]
WIDTH = 6


# --- What holds for every model -----------------------------------------------------------------


def check_adapting(
    model: keras.Model,
    inputs: Any,
    targets: Targets = "all-linear",
    rounding: float = 1e-6,
    training: bool = True,
) -> Any:
    """Adapt, train a step, give A and B random values, merge. Returns what the merged one says.

    `training=False` takes the step in inference mode.
    """
    # Else all flags would be alike, and to restore them would prove little.
    next(layer for layer in model.layers if layer.weights).trainable = False
    flags, base = trainable_flags(model), model(inputs, training=False)

    kl.apply_lora(model, kl.LoRAConfig(rank=2, alpha=4, targets=targets))
    assert difference(model(inputs, training=False), base) <= rounding
    check_step(model, inputs, training)

    randomize(f for x in kl.lora_layers(model).values() for f in x.adapters["default"].factors)
    adapted = model(inputs, training=False)
    assert difference(adapted, base) >= 1e-3

    assert kl.merge_lora(model) is model
    merged = model(inputs, training=False)
    assert difference(merged, adapted) <= 1e-4
    assert kl.lora_layers(model) == {}
    assert trainable_flags(model) == flags
    return merged


def check_step(model: keras.Model, inputs: Any, training: bool) -> None:
    """After a step of gradient descent nothing has moved but the adapters."""
    slots = [slot for layer in kl.lora_layers(model).values() for slot in layer.slots]
    factors = {id(v) for slot in slots for v in slot.factors}
    assert {id(v) for v in model.trainable_variables} == factors
    others = [v for v in model.weights if id(v) not in factors]
    zeros = [next(v for v in slot.factors if not np.any(numpy_of(v))) for slot in slots]
    before, gradients = snapshot(others), step(model, inputs, training)
    assert snapshot(others) == before

    moved = [bool(np.any(numpy_of(v))) for v in zeros]
    pulled = [bool(np.any(gradients.get(id(v), 0))) for v in zeros]
    assert moved == pulled
    # Not all: at random initialisation some layers of some backbones do not reach an output.
    assert 2 * sum(moved) >= len(moved)


def step(model: keras.Model, inputs: Any, training: bool) -> dict[int, np.ndarray]:
    """One step of SGD. Returns the gradients that there are, by the id of their variable."""
    with tf.GradientTape() as tape:
        loss = sum(weighted_square(y) for y in floating(model(inputs, training=training)))
    variables = model.trainable_variables
    gradients = tape.gradient(loss, [v.value for v in variables])
    pairs = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
    keras.optimizers.SGD(0.1).apply_gradients(pairs)
    return {id(v): numpy_of(tf.convert_to_tensor(g)) for g, v in pairs}


def weighted_square(y: Any) -> Any:
    """A sum of squares. Of a normalised output the unweighted one would be constant."""
    flat = ops.reshape(y, (-1,))
    return ops.sum((1 + ops.arange(flat.shape[0], dtype=flat.dtype) / flat.shape[0]) * flat**2)


def floating(outputs: Any) -> list[Any]:
    leaves = keras.tree.flatten(outputs)
    return [y for y in leaves if "float" in keras.backend.standardize_dtype(y.dtype)]


def difference(received: Any, expected: Any) -> float:
    """The largest difference over all outputs, each relative to its largest value."""
    pairs = zip(keras.tree.flatten(received), keras.tree.flatten(expected), strict=True)
    return max(_difference(numpy_of(r), numpy_of(e)) for r, e in pairs)


def _difference(received: np.ndarray, expected: np.ndarray) -> float:
    assert received.shape == expected.shape
    assert np.isfinite(received).all()
    return float(np.abs(received - expected).max() / max(np.abs(expected).max(), 1e-9))


def trainable_flags(model: keras.Model) -> list[bool]:
    return [x.trainable for x in (*model.variables, *(node.layer for node in walk(model)))]


# --- Containers -----------------------------------------------------------------------------------


def dense(name: str, units: int = WIDTH) -> layers.Dense:
    return layers.Dense(units, activation="tanh", name=name)


def functional() -> keras.Model:
    inputs = keras.Input((WIDTH,))
    return keras.Model(inputs, dense("head")(dense("down")(dense("up", 11)(inputs))))


def sequential() -> keras.Model:
    return keras.Sequential([keras.Input((WIDTH,)), dense("up", 11), dense("down"), dense("head")])


class Plain(keras.Model):
    """A model without a `get_config`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = dense("up", 11), dense("down"), dense("head")

    def call(self, x: Any) -> Any:
        return self.head(self.down(self.up(x)))


@keras.saving.register_keras_serializable("test_coverage")
class Configured(keras.Model):
    """A model with a `get_config`."""

    def __init__(self, width: int = 11, **options: Any) -> None:
        super().__init__(**options)
        self.width = width
        self.up, self.head = dense("up", width), dense("head")

    def call(self, x: Any) -> Any:
        return self.head(self.up(x))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}


class Listed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [dense("first", 11), [dense("second"), dense("third")]]
        self.head = dense("head")

    def call(self, x: Any) -> Any:
        first, (second, third) = self.blocks
        return self.head(third(second(first(x))))


class Mapped(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.branches = {"left": dense("left"), "right": dense("right")}
        self.head = dense("head")

    def call(self, x: Any) -> Any:
        return self.head(self.branches["left"](x) + self.branches["right"](x))


class Twins(keras.Model):
    """Two siblings of the same name, which a Functional model would refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = dense("twin"), dense("twin"), dense("head")

    def call(self, x: Any) -> Any:
        return self.head(self.two(self.one(x)))


class Block(layers.Layer):
    """A composite layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inner, self.norm = dense("inner"), layers.LayerNormalization()

    def call(self, x: Any) -> Any:
        return self.norm(x + self.inner(x))


@keras.saving.register_keras_serializable("test_coverage")
class Cell(layers.Layer):
    """A recurrent cell that computes with a layer; Bidirectional copies it by its config."""

    def __init__(self, units: int, **options: Any) -> None:
        super().__init__(**options)
        self.units = self.state_size = self.output_size = units
        self.mix = dense("mix", units)

    def build(self, input_shape: Any) -> None:
        self.mix.build((input_shape[0], input_shape[-1] + self.units))

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        state = self.mix(ops.concatenate([inputs, states[0]], axis=-1))
        return state, [state]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


def nested(inner: Callable[[], keras.Model]) -> keras.Model:
    inside = inner()
    inside.name = "inside"
    inputs = keras.Input((WIDTH,))
    return keras.Model(inputs, dense("head")(inside(dense("outside")(inputs))))


def nested_twice() -> keras.Model:
    inputs = keras.Input((WIDTH,))
    middle = nested(functional)
    middle.name = "middle"
    return keras.Model(inputs, dense("last")(middle(inputs)))


def shared() -> keras.Model:
    inputs, layer = keras.Input((WIDTH,)), dense("shared")
    return keras.Model(inputs, dense("head")(layer(layer(inputs))))


def on_sequence(*inner: layers.Layer) -> keras.Model:
    x = inputs = keras.Input((5, WIDTH))
    for layer in inner:
        x = layer(x)
    return keras.Model(inputs, dense("head")(x))


def attending(layer: layers.Layer) -> keras.Model:
    inputs = keras.Input((5, WIDTH))
    return keras.Model(inputs, dense("head")(layer(inputs, inputs)))


def recurrent() -> keras.Model:
    rnn = layers.RNN(Cell(5, name="cell"), name="rnn", return_sequences=True)
    return on_sequence(layers.Bidirectional(rnn, name="both"))


def projections(*prefixes: str) -> list[str]:
    names = ("query", "key", "value", "attention_output")
    return [f"{prefix}/{name}" for prefix in prefixes for name in names]


# The paths are those of "all-linear", which leaves out the head.
CONTAINERS: dict[str, tuple[Callable[[], keras.Model], list[str]]] = {
    "Functional": (functional, ["up", "down"]),
    "Sequential": (sequential, ["up", "down"]),
    "subclassed": (Plain, ["up", "down"]),
    "subclassed with a config": (Configured, ["up"]),
    "Functional in Functional": (
        lambda: nested(functional),
        ["outside", "inside/up", "inside/down", "inside/head"],
    ),
    "Sequential in Functional": (
        lambda: nested(sequential),
        ["outside", "inside/up", "inside/down", "inside/head"],
    ),
    "subclassed in Functional": (
        lambda: nested(Configured),
        ["outside", "inside/up", "inside/head"],
    ),
    "three deep": (
        nested_twice,
        [f"middle/{p}" for p in ("outside", "inside/up", "inside/down", "inside/head", "head")],
    ),
    "list": (Listed, ["first", "second", "third"]),
    "dict": (Mapped, ["left", "right"]),
    "siblings of one name": (Twins, ["twin", "twin#2"]),
    "shared layer": (shared, ["shared"]),
    "composite layer": (lambda: on_sequence(Block(name="block")), ["block/inner"]),
    "MultiHeadAttention": (
        lambda: attending(layers.MultiHeadAttention(2, 5, name="attention")),
        projections("attention"),
    ),
    "GroupQueryAttention": (
        lambda: attending(layers.GroupQueryAttention(5, 4, 2, name="attention")),
        projections("attention"),
    ),
    "TimeDistributed": (
        lambda: on_sequence(layers.TimeDistributed(dense("step"), name="steps")),
        ["steps/step"],
    ),
    "Bidirectional, custom cell": (
        recurrent,
        ["both/forward_rnn/cell/mix", "both/backward_rnn/cell/mix"],
    ),
}
ON_SEQUENCES = {
    "composite layer",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "TimeDistributed",
    "Bidirectional, custom cell",
}


def container(name: str) -> tuple[keras.Model, np.ndarray]:
    shape = (3, 5, WIDTH) if name in ON_SEQUENCES else (3, WIDTH)
    model, inputs = CONTAINERS[name][0](), np.random.default_rng(1).normal(size=shape)
    inputs = inputs.astype("float32")
    model(inputs)
    return model, inputs


@pytest.mark.parametrize("name", CONTAINERS)
def test_container(name: str) -> None:
    model, inputs = container(name)
    assert paths(model) == CONTAINERS[name][1]
    check_adapting(model, inputs)


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_path_names_its_layer(name: str) -> None:
    model, _ = container(name)
    for target in kl.find_targets(model):
        hits = kl.find_targets(model, [target.path])
        assert target.layer in [hit.layer for hit in hits]
        # A name without a number means all siblings of that name.
        assert len({hit.path.split("#")[0] for hit in hits}) == 1


def paths(model: keras.Model, targets: Targets = "all-linear") -> list[str]:
    return [target.path for target in kl.find_targets(model, targets)]


# --- Keras applications ---------------------------------------------------------------------------

APPLICATIONS: dict[str, dict[str, Any]] = {
    "ConvNeXtTiny": {},
    "DenseNet121": {},
    "EfficientNetB0": {},
    "EfficientNetV2B0": {},
    "InceptionResNetV2": {"input_shape": (75, 75, 3)},
    "InceptionV3": {"input_shape": (75, 75, 3)},
    "MobileNetV2": {"alpha": 0.35},
    "NASNetMobile": {},
    "ResNet50": {},
    "ResNet50V2": {},
    "VGG16": {},
    "VGG19": {},
    "Xception": {"input_shape": (71, 71, 3)},
}
WITH_DENSE_INSIDE = {"ConvNeXtTiny", "VGG16", "VGG19"}


def application(name: str) -> tuple[keras.Model, np.ndarray]:
    options: dict[str, Any] = {"input_shape": (32, 32, 3), "classes": 7}
    options |= APPLICATIONS.get(name, {})
    model = getattr(keras.applications, name)(weights=None, classifier_activation=None, **options)
    x = np.random.default_rng(1).uniform(0, 255, size=(2, *options["input_shape"]))
    return model, x.astype("float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
def test_application(name: str) -> None:
    model, inputs = application(name)
    if name in WITH_DENSE_INSIDE:
        assert "predictions" not in paths(model)
        check_adapting(model, inputs)
        return
    with pytest.raises(ValueError, match=r"the head is all there is.*targets=\['predictions'\]"):
        kl.find_targets(model)
    check_adapting(model, inputs, ["predictions"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNet", "MobileNetV3Small"])
def test_application_without_dense(name: str) -> None:
    model, _ = application(name)
    with pytest.raises(ValueError, match="Expected a model with layers of Dense"):
        kl.find_targets(model)


# --- KerasHub and KerasNLP ------------------------------------------------------------------------


def bert_classifier() -> keras.Model:
    backbone = keras_nlp.models.BertBackbone(
        vocabulary_size=19,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=7,
        name="bert",
    )
    return keras_nlp.models.BertTextClassifier(backbone, num_classes=3, preprocessor=None)


def gemma_lm() -> keras.Model:
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=19,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=12,
        head_dim=6,
        name="gemma",
    )
    return keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)


def llama_lm(tied: bool) -> keras.Model:
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=19,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=12,
        tie_word_embeddings=tied,
        name="llama",
    )
    return keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)


def gpt2_lm() -> keras.Model:
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=19,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=7,
        name="gpt2",
    )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


def blocks(prefix: str, *names: str) -> list[str]:
    return [f"{prefix}_{i}/{name}" for i in range(2) for name in names]


BERT, GEMMA = "bert/transformer_layer", "gemma/decoder_block"
BERT_DENSE = ("feedforward_intermediate_dense", "feedforward_output_dense")
GEMMA_DENSE = ("ffw_gating", "ffw_gating_2", "ffw_linear")
# What makes the model, the paths that "attention" finds, and those that "all-linear" finds too.
TASKS: dict[str, tuple[Callable[[], keras.Model], list[str], list[str]]] = {
    "BertTextClassifier of keras_nlp": (
        bert_classifier,
        blocks(BERT, *projections("self_attention_layer")),
        [*blocks(BERT, *BERT_DENSE), "bert/pooled_dense"],
    ),
    "GemmaCausalLM of keras_hub": (
        gemma_lm,
        blocks(GEMMA, *projections("attention")),
        blocks(GEMMA, *GEMMA_DENSE),
    ),
}


def task(name: str) -> tuple[keras.Model, dict[str, np.ndarray]]:
    return with_inputs(TASKS[name][0]())


def with_inputs(model: keras.Model) -> tuple[keras.Model, dict[str, np.ndarray]]:
    ids = np.random.default_rng(1).integers(1, 19, size=(2, 7)).astype("int32")
    inputs = {
        "token_ids": ids,
        "padding_mask": np.ones_like(ids),
        "segment_ids": np.zeros_like(ids),
    }
    return model, {key: inputs[key] for key in model.input}


@pytest.mark.parametrize("name", TASKS)
def test_task(name: str) -> None:
    model, inputs = task(name)
    _, attention, other = TASKS[name]
    assert set(paths(model)) == {*attention, *other}
    check_adapting(model, inputs)


@pytest.mark.parametrize("name", TASKS)
def test_task_attention_alone(name: str) -> None:
    model, inputs = task(name)
    assert paths(model, "attention") == TASKS[name][1]
    check_adapting(model, inputs, "attention")


# A model with its head, and the embeddings that "all" adds.
TABLES: dict[str, tuple[Callable[[], keras.Model], set[str]]] = {
    "bert": (bert_classifier, {"bert/token_embedding", "bert/segment_embedding"}),
    "llama": (lambda: llama_lm(tied=False), {"llama/token_embedding"}),
    "llama, tied": (lambda: llama_lm(tied=True), {"llama/token_embedding"}),
    "gemma, tied": (gemma_lm, {"gemma/token_embedding"}),
    "gpt2, tied": (gpt2_lm, {"gpt2/token_embedding"}),
}


@pytest.mark.parametrize("name", TABLES)
def test_embeddings(name: str) -> None:
    make, tables = TABLES[name]
    model, inputs = with_inputs(make())
    assert set(paths(model, "all")) == {*paths(model), *tables}
    check_adapting(model, inputs, "all")


def test_adapted_tables_generate_what_merged_ones_do() -> None:
    model, inputs = with_inputs(gpt2_lm())
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["token_embedding"]))
    randomize(f for x in kl.lora_layers(model).values() for f in x.adapters["default"].factors)
    prompt = {key: value[:, :3] for key, value in inputs.items()}
    prompt = {key: np.pad(value, ((0, 0), (0, 4))) for key, value in prompt.items()}
    model.compile(sampler="greedy")
    adapted = model.generate(prompt, stop_token_ids=None)
    merged = kl.merge_lora(model).generate(prompt, stop_token_ids=None)
    np.testing.assert_array_equal(adapted["token_ids"], merged["token_ids"])


# Reads paths from its input, one a line, and answers each with a line of JSON: how far the outputs
# of the model there are from those noted beside it, or what went wrong.
READER = """
import json, pickle, sys
sys.modules["keras_lora"] = None
answers, sys.stdout = sys.stdout, sys.stderr
import keras, keras_hub, numpy as np

def difference(path):
    with open(path + ".pickle", "rb") as file:
        inputs, expected = pickle.load(file)
    received = keras.tree.flatten(keras.models.load_model(path)(inputs, training=False))
    assert len(received) == len(expected)
    pairs = [(np.array(r, "float64"), e) for r, e in zip(received, expected)]
    return max(float(abs(r - e).max() / max(abs(e).max(), 1e-9)) for r, e in pairs)

for line in sys.stdin:
    try:
        answer = difference(line.strip())
    except BaseException as error:
        answer = repr(error)
    print(json.dumps(answer), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def reader() -> Iterator[Callable[[Path], Any]]:
    """What a process that cannot import keras_lora makes of a saved model; one for all models."""
    process = subprocess.Popen(
        [sys.executable, "-c", READER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(path: Path) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        print(path, file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    with process:
        yield ask


# How Keras and KerasHub build and call some of these models.
@pytest.mark.filterwarnings(r"ignore::UserWarning:keras(_hub)?\.src")
@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_backbone(name: str, reader: Callable[[Path], Any], tmp_path: Path) -> None:
    model, inputs = BACKBONES[name]()
    with left_out_layers(name):
        outputs = check_adapting(model, inputs, **PECULIAR.get(name, {}))
    path = tmp_path / "merged.keras"
    model.save(path)
    expected = [numpy_of(y) for y in keras.tree.flatten(outputs)]
    path.with_suffix(".keras.pickle").write_bytes(pickle.dumps((inputs, expected)))
    answer = reader(path)
    assert isinstance(answer, float), answer
    assert answer <= 1e-6


PECULIAR: dict[str, dict[str, Any]] = {
    # The adapted layer multiplies matrices where the plain one calls einsum: another order of
    # summation, which these carry to a few units in the last place.
    "EdRecBackbone": {"rounding": 5e-6},
    "StableDiffusion3Backbone": {"rounding": 5e-6},
    "T5Gemma2Backbone": {"rounding": 5e-6},
    # Its codebook is a moving average, which is updated in training mode, frozen or not.
    "RQVAEBackbone": {"training": False},
}


def left_out_layers(name: str) -> Any:
    """SAM holds Dense layers that it never calls, and the preset says so."""
    if name == "SAMBackbone":
        return pytest.warns(UserWarning, match="leaves out .*not built")
    return warnings.catch_warnings()
