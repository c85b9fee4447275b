"""One SavedModel for many adapters: each row of a batch is answered as by its merged model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import processes
import pytest
import tensorflow as tf
from models import composite, functional, randomize_adapters, state, subclassed
from test_export import PythonInside

import keras_lora as kl
from keras_lora.layers import BASE, all_owned

Feeds = dict[str, np.ndarray]
RNG = np.random.default_rng(3)
NAMES = ("fr", "de", "it")
# Eleven rows: every adapter and the base, next to itself and to each other.
MIX = ("de", "", "it", "it", "fr", "de", "fr", "", "de", "it", "fr")


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=(len(MIX), *shape)).astype("float32")


def tokens(length: int = 7) -> Feeds:
    return {
        "token_ids": RNG.integers(0, 31, (len(MIX), length)).astype("int32"),
        "segment_ids": np.zeros((len(MIX), length), "int32"),
        "padding_mask": np.ones((len(MIX), length), "int32"),
    }


def bert(dtype: str = "float32") -> keras.Model:
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=31,
        num_layers=1,
        num_heads=3,
        hidden_dim=15,
        intermediate_dim=17,
        max_sequence_length=13,
        dtype=dtype,
    )
    return keras_hub.models.BertTextClassifier(
        backbone=backbone, num_classes=5, preprocessor=None, dtype=dtype
    )


def attention() -> keras.Model:
    """Two sequences of tokens; every query looks at values of another length."""
    queries, values = keras.Input((None,), name="q"), keras.Input((None,), name="v")
    embed = keras.layers.Embedding(31, 11, name="embed")
    x = keras.layers.MultiHeadAttention(3, 5, name="attention")(embed(queries), embed(values))
    x = keras.layers.GlobalMaxPooling1D(name="pool")(x)
    return keras.Model({"q": queries, "v": values}, keras.layers.Dense(3, name="head")(x))


def experts() -> keras.Model:
    """A kernel with an axis that its input and its output share, and a bias across axes."""
    inputs = keras.Input((3, 5), name="x")
    dense = keras.layers.EinsumDense("bed,edk->bek", (3, 7), bias_axes="ek", name="experts")
    x = keras.layers.Flatten(name="flat")(dense(inputs))
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(x), name="mixture")


def config(rank: int, targets: Any, **options: Any) -> kl.LoRAConfig:
    return kl.LoRAConfig(rank=rank, targets=targets, **options)


# A model, its inputs, and the configurations of three adapters.
Case = tuple[Callable[[], keras.Model], Callable[[], Feeds], tuple[kl.LoRAConfig, ...]]
HEAD = {"layers_to_save": ["head"]}
CASES: dict[str, Case] = {
    "functional": (
        functional,
        lambda: {"features": normal(5)},
        (config(2, ["up", "middle"], **HEAD), config(5, ["up"]), config(3, ["middle"], **HEAD)),
    ),
    "composite": (
        composite,
        lambda: {"sequence": normal(11, 5)},
        (
            config(2, "all-linear", alpha=3, **HEAD),
            config(5, "attention", use_rslora=True, bias="lora_only"),
            config(1, ["block_1.up"], rank_pattern={"up": 4}, bias="all"),
        ),
    ),
    "subclassed": (
        subclassed,
        lambda: {"input_0": normal(5)},
        (config(2, "all-linear"), config(5, ["up"], bias="all"), config(1, ["block_0"], **HEAD)),
    ),
    "kerashub task": (
        bert,
        tokens,
        (
            config(2, "all-linear", layers_to_save=["logits"]),
            config(5, "attention", bias="all"),
            config(1, ["pooled_dense"], layers_to_save=["logits"]),
        ),
    ),
    "attention": (
        attention,
        lambda: {
            "q": RNG.integers(0, 31, (len(MIX), 3)).astype("float32"),
            "v": RNG.integers(0, 31, (len(MIX), 7)).astype("float32"),
        },
        (config(2, "attention"), config(3, ["query", "value"]), config(5, ["attention_output"])),
    ),
    "shared axes": (
        experts,
        lambda: {"x": normal(3, 5)},
        (config(2, ["experts"]), config(1, ["experts"], bias="all"), config(2, ["head"])),
    ),
    "dora": (
        functional,
        lambda: {"features": normal(5)},
        (
            config(2, ["up", "middle"], use_dora=True, **HEAD),
            config(5, ["up"], alpha=3, use_dora=True),
            config(3, "all-linear"),
        ),
    ),
    "dora, axes": (
        attention,
        lambda: {
            "q": RNG.integers(0, 31, (len(MIX), 3)).astype("float32"),
            "v": RNG.integers(0, 31, (len(MIX), 7)).astype("float32"),
        },
        (config(2, "attention", use_dora=True), config(3, ["query"]), config(5, ["query"])),
    ),
    "dora, shared axes": (
        experts,
        lambda: {"x": normal(3, 5)},
        (config(2, ["experts"], use_dora=True), config(1, ["experts"]), config(2, ["head"])),
    ),
    "mixed bfloat16": (
        lambda: functional(dtype="mixed_bfloat16"),
        lambda: {"features": normal(5)},
        (config(2, ["up", "middle"], **HEAD), config(5, ["up"]), config(3, ["middle"], **HEAD)),
    ),
    "bfloat16": (
        lambda: bert("bfloat16"),
        tokens,
        (config(2, "all-linear"), config(5, "attention", bias="all"), config(1, ["pooled_dense"])),
    ),
}


def adapted(make: Callable[[], keras.Model], configs: tuple[kl.LoRAConfig, ...]) -> keras.Model:
    model = make()
    for name, each in zip(NAMES, configs, strict=False):
        model = kl.apply_lora(model, each, name=name)
    randomize_adapters(model)
    rng = np.random.default_rng(13)
    for item in all_owned(model.variables):
        for name in sorted(item.names - {BASE}):
            item.assign(name, rng.normal(scale=0.3, size=item.variable.shape))
    kl.scale_adapter(model, NAMES[len(configs) - 1], 0.5)
    return model


def small() -> keras.Model:
    return adapted(CASES["functional"][0], CASES["functional"][2])


def called(model: keras.Model, feeds: Feeds) -> np.ndarray:
    values = list(feeds.values())
    given: Any = feeds if isinstance(getattr(model, "input", None), dict) else values[0]
    return np.array(keras.ops.cast(model(given, training=False), "float32"))


def answers(model: keras.Model, feeds: Feeds, names: tuple[str, ...] = MIX) -> np.ndarray:
    """Each row by the model into which its adapter alone is merged."""
    rows = np.zeros((0,))
    for name in dict.fromkeys(names):
        kl.set_adapter(model, name or None)
        if name:
            with kl.merged(model):
                received = called(model, feeds)
        else:
            received = called(model, feeds)
        rows = rows if len(rows) else np.zeros_like(received)
        wanted = [i for i, other in enumerate(names) if other == name]
        rows[wanted] = received[wanted]
    return rows


def served(path: Path, feeds: Feeds, adapter: Any = MIX) -> np.ndarray:
    loaded = tf.saved_model.load(str(path))
    given = {name: tf.constant(value) for name, value in feeds.items()}
    (output,) = loaded.signatures["serving_default"](adapter=tf.constant(adapter), **given).values()
    return output.numpy()


def assert_rows(received: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert received.dtype == np.float32
    scale = np.abs(expected).max()
    np.testing.assert_allclose(received / scale, expected / scale, atol=tolerance)


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
    """What another adapter has, on layers of its own and on the head, leaves no trace."""
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


CLIENT = """
import json, sys
import numpy as np
sys.path.insert(0, "examples")
from run_saved_model import ModelError, SavedModel
path, inputs, outputs = sys.argv[1:4]
feeds, model = dict(np.load(inputs)), SavedModel(path)
signature = model.signatures["serving_default"]
refused = []
for bad in json.loads(sys.argv[4]):
    for name, tensor in signature.outputs.items():  # each output alone
        model.signatures["one"] = signature._replace(outputs={name: tensor})
        try:
            model.run({**feeds, "adapter": np.array(bad)}, "one")
        except ModelError as error:
            refused.append([error.code, str(error)])
np.savez(outputs, **model.run(feeds))  # the failed requests harmed nothing
assert not {"tensorflow", "keras", "keras_lora"} & sys.modules.keys()
print(json.dumps(refused))
"""


def client(path: Path, feeds: Mapping[str, Any], bad: list[list[str]]) -> tuple[Feeds, list[Any]]:
    """Answers of TensorFlow's C library, and what it says of bad adapters, once per output."""
    folder = path.parent
    np.savez(folder / "in.npz", **{name: np.array(value) for name, value in feeds.items()})  # type: ignore[arg-type]
    block = ("keras", "keras_lora")
    arguments = (path, folder / "in.npz", folder / "out.npz", json.dumps(bad))
    printed = processes.run(CLIENT, *arguments, block=block)
    return dict(np.load(folder / "out.npz")), json.loads(printed.splitlines()[-1])


def two_outputs() -> keras.Model:
    inputs = keras.Input((5,), name="x")
    x = keras.layers.Dense(7, activation="gelu", name="up")(inputs)
    outputs = [keras.layers.Dense(3, name="class")(x), keras.layers.Dense(2, name="plain")(inputs)]
    return keras.Model(inputs, outputs)


@pytest.mark.slow
def test_an_unknown_name_fails_its_request_in_the_c_library(tmp_path: Path) -> None:
    """Even where the output that is asked for depends on no adapter."""
    model = adapted(two_outputs, (config(2, ["up"]), config(3, ["class"])))
    kl.export_saved_model(model, tmp_path / "1", adapters=["fr", "de"])
    x, names = normal(5), [name.replace("it", "fr") for name in MIX]
    bad = [[*names[:-1], "zz"], ["fr"], names * 2]
    received, refused = client(tmp_path / "1", {"x": x, "adapter": names}, bad)
    for name in ("fr", "de", ""):
        kl.set_adapter(model, name or None)
        rows = [i for i, other in enumerate(names) if other == name]
        for key, expected in zip(("class", "plain"), model(x), strict=True):
            assert_rows(received[key][rows], np.array(expected)[rows])
    assert [code for code, _ in refused] == [3] * 6  # INVALID_ARGUMENT
    for _, message in refused[:2]:
        assert "one of: fr, de; or an empty string for the base. Received: zz" in message
    for _, message in refused[2:]:
        assert "Expected one adapter for each row" in message


def large() -> keras.Model:
    inputs = keras.Input((263,), name="x")
    x = keras.layers.Dense(257, name="up")(inputs)
    return keras.Model(inputs, keras.layers.Dense(251, name="head")(x))


def stored(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*.data-*"))


def test_the_size_is_that_of_the_base_and_the_adapters(tmp_path: Path) -> None:
    """However different their ranks are, and with heads of their own."""
    configs = (config(1, ["up"]), config(113, ["up"]), config(2, ["up"], **HEAD))
    model = adapted(large, configs)
    kl.export_saved_model(model, tmp_path / "1", adapters=NAMES)
    adapters = (1 + 113 + 2) * (263 + 257) + (257 + 1) * 251
    base = (263 + 1) * 257 + (257 + 1) * 251
    assert 4 * (base + adapters) <= stored(tmp_path / "1") <= 1.02 * 4 * (base + adapters)


@pytest.mark.slow
def test_generation_by_row_equals_generation_with_each_adapter(tmp_path: Path) -> None:
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=31,
        num_layers=1,
        num_heads=3,
        hidden_dim=15,
        intermediate_dim=17,
        max_sequence_length=13,
    )

    def make() -> keras.Model:
        task = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
        task.compile(sampler="greedy")
        return task

    model = adapted(make, (config(2, "all-linear"), config(5, "attention", bias="all")))
    kl.export_saved_model(model, tmp_path / "1", adapters=["fr", "de"], stop_token_ids=None)
    mask = np.zeros((3, 11), "int32")
    mask[:, :4] = 1
    prompt = {"token_ids": RNG.integers(1, 31, (3, 11)).astype("int32") * mask}
    prompt["padding_mask"] = mask
    loaded = tf.saved_model.load(str(tmp_path / "1"))
    given = {name: tf.constant(value) for name, value in prompt.items()}
    received = loaded.signatures["generate"](adapter=tf.constant(["de", "", "fr"]), **given)
    written = []
    for row, name in enumerate(("de", "", "fr")):
        kl.set_adapter(model, name or None)
        written.append(model.generate(prompt, stop_token_ids=None)["token_ids"][row])
        np.testing.assert_array_equal(received["token_ids"][row], written[row])
    assert len({tuple(row[4:]) for row in written}) > 1


class Folded(keras.layers.Layer):
    """Tokens of all rows as one long list, as experts take them."""

    def __init__(self) -> None:
        super().__init__(name="folded")
        self.inner = keras.layers.Dense(5, name="inner")

    def build(self, shape: Any) -> None:
        self.inner.build((None, shape[-1]))

    def call(self, inputs: Any) -> Any:
        flat = keras.ops.reshape(inputs, (-1, inputs.shape[-1]))
        return keras.ops.reshape(self.inner(flat), keras.ops.shape(inputs))


class TimeFirst(Folded):
    def call(self, inputs: Any) -> Any:
        return keras.ops.swapaxes(self.inner(keras.ops.swapaxes(inputs, 0, 1)), 0, 1)


class KernelReader(Folded):
    def call(self, inputs: Any) -> Any:
        return keras.ops.matmul(inputs, self.inner.kernel)


def around(*layers: keras.layers.Layer) -> Callable[[], keras.Model]:
    def make() -> keras.Model:
        x = inputs = keras.Input((None, 5), name="x")
        for layer in layers:
            x = layer(x)
        pooled = keras.layers.GlobalAveragePooling1D(name="pool")(x)
        return keras.Model(inputs, keras.layers.Dense(3, name="head")(pooled), name="outer")

    return make


def named_adapter() -> keras.Model:
    inputs = keras.Input((5,), name="adapter")
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(inputs))


def tokens_in() -> keras.Model:
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(31, 5, name="table")(inputs)
    return keras.Model(inputs, keras.layers.GlobalMaxPooling1D()(x))


INNER = config(2, "re:.*inner")
# What is refused: a model, its adapter, and the message.
REFUSED: dict[str, tuple[Callable[[], keras.Model], kl.LoRAConfig, str]] = {
    "folded": (around(Folded()), INNER, r"'folded/inner': .*\(None, 5\).* batch is 1009"),
    "time first": (around(TimeFirst()), INNER, r"'folded/inner': .*\(None, 1009, 5\)"),
    "kernel read": (around(KernelReader()), INNER, "'folded/inner': its kernel is read"),
    "head read": (
        around(KernelReader()),
        config(2, ["head"], layers_to_save=["inner"]),
        "'folded/inner': its kernel is read",
    ),
    "all at once": (
        around(Folded(), keras.layers.EinsumDense("btd,dk->tbk", (None, 5), name="turned")),
        config(1, "all-linear"),
        r"(?s)'folded/inner': .*'turned': its einsum btd,dk->tbk",
    ),
    "embedding": (
        tokens_in,
        config(2, ["table"]),
        "'table': the adapters of Embedding cannot differ from row to row",
    ),
    "norm": (
        functional,
        config(2, ["up"], layers_to_save=["norm"]),
        r"'norm/gamma': only a kernel or a bias.*'norm/beta'",
    ),
    "python": (around(PythonInside(name="python")), config(2, ["head"]), "PyFunc"),
    "input": (named_adapter, config(2, ["head"]), "none of them 'adapter'"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_not_by_row_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, each, message = REFUSED[case]
    model = adapted(make, (each,))
    before = state(model)
    with pytest.raises(ValueError, match=message):
        kl.export_saved_model(model, tmp_path / "1", adapters=["fr"])
    assert state(model) == before
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path: Path) -> None:
    model = small()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"adapters": []}, "at least one name"),
        ({"adapters": ["zz"]}, "names among .*zz"),
        ({"adapters": ["fr", "fr"]}, "each name once"),
        ({"adapters": ["fr"], "adapter_ids": "uuid"}, "one of .'name', 'index'"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            kl.export_saved_model(model, tmp_path / "1", **options)
    with pytest.raises(ValueError, match="which has none"):
        kl.export_saved_model(functional(), tmp_path / "1", adapters=["fr"])
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = small()
    factor = kl.lora_layers(model)["up"].adapters["de"].b
    factor.assign(np.full(factor.shape, np.inf))
    before = state(model)
    with pytest.raises(ValueError, match=r"infinity in \['up/lora_b'\] of 'de'"):
        kl.export_saved_model(model, tmp_path / "1", adapters=NAMES)
    assert state(model) == before
    assert not list(tmp_path.iterdir())


def test_values_that_are_those_of_the_base_need_no_place(tmp_path: Path) -> None:
    """A normalization in `layers_to_save` that was not trained."""
    model = kl.apply_lora(functional(), config(2, ["up"], layers_to_save=["norm"]), name="fr")
    randomize_adapters(model)
    kl.export_saved_model(model, tmp_path / "1", adapters=["fr"])
    feeds = CASES["functional"][1]()
    names = ("fr", "") * 5 + ("fr",)
    assert_rows(served(tmp_path / "1", feeds, names), answers(model, feeds, names))
