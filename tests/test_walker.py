"""What each form of `targets` selects, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import keras
import pytest
from support.models import Block, Subclassed, composite, functional, subclassed

import keras_lora as kl
from keras_lora.walker import matches

BLOCK = ["attention/query", "attention/key", "attention/value", "attention/attention_output"]
ATTENTION = [f"block_{i}/{name}" for i in range(2) for name in BLOCK]
LINEAR = sorted([*ATTENTION, *(f"block_{i}/{n}" for i in range(2) for n in ("up", "down"))])


def form_id(value: object) -> str:
    return "function" if callable(value) else str(value)[:40]


FORMS = [
    ("all-linear", LINEAR),
    ("all", LINEAR),
    ("attention", ATTENTION),
    (["query"], [p for p in ATTENTION if p.endswith("/query")]),
    (["attention.query", "block_1/up"], [*(p for p in ATTENTION if "query" in p), "block_1/up"]),
    (["head"], ["head"]),
    ("re:block_0/.*", [p for p in LINEAR if p.startswith("block_0/")]),
    (["re:.*/(up|down)"], [p for p in LINEAR if "attention" not in p]),
    (lambda t: t.kernel_shape == (7, 5), ["block_0/down", "block_1/down"]),
    (lambda t: t.kind == "EinsumDense", ATTENTION),
]


def paths(*arguments: object, **options: object) -> list[str]:
    return sorted(t.path for t in kl.find_targets(*arguments, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("targets", "expected"), FORMS, ids=form_id)
def test_forms_of_targets(targets: object, expected: list[str]) -> None:
    assert paths(composite(), targets) == sorted(expected)


def test_exclude_takes_out_a_layer_or_all_that_is_inside_one() -> None:
    assert paths(composite(), "attention", ["block_0", "key"]) == sorted(
        p for p in ATTENTION if p.startswith("block_1") and "key" not in p
    )


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("query", "a/query", True),
        ("query", "a/subquery", False),
        ("query", "a/query_norm", False),
        ("a/query", "b/a/query", True),
        ("a.query", "b/a/query", True),
        ("b/query", "b/a/query", False),
        ("dense", "a/dense#2", True),
        ("dense#2", "a/dense#2", True),
        ("dense#2", "a/dense", False),
        ("block.0/q", "a/block.0/q", True),
        ("re:a", "a/query", False),
    ],
)
def test_names_match_whole_segments_from_the_end(name: str, path: str, expected: bool) -> None:
    assert matches(name, path) is expected


REFUSED = [
    (["quer"], r"\['quer'\], which match none\. Closest: .*query"),
    (["query", "nothing"], r"\['nothing'\], which match none"),
    ("re:query", r"\['re:query'\], which match none"),
    (lambda t: False, "matches none"),
    (["norm"], r"LayerNormalization.*asked for as 'norm'"),
    (["block_0"], r"targets='re:\.\*block_0/\.\*'"),
]


@pytest.mark.parametrize(("targets", "message"), REFUSED, ids=form_id)
def test_what_does_not_match_is_refused(targets: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kl.find_targets(composite(), targets)  # type: ignore[arg-type]


MALFORMED: list[tuple[object, str]] = [
    (
        "query",
        r"'all-linear', .*'experts', 'all'.*targets='query'.*write targets=\['query'\]",
    ),
    ("all_linear", "expected one of"),
    ("Attention", "expected one of"),
    ("", "expected one of"),
    (5, "expected a list of names"),
    ([], "at least one name"),
    (["query", 5], "non-empty strings"),
    ([""], "non-empty strings"),
    ("re:(", "a regular expression"),
]


@pytest.mark.parametrize(("targets", "message"), MALFORMED, ids=form_id)
def test_a_form_that_does_not_exist_is_refused_as_in_a_config(targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kl.find_targets(composite(), targets)
    with pytest.raises(ValueError, match=message):
        kl.LoRAConfig(targets=targets)


def test_names_to_exclude_are_a_list() -> None:
    with pytest.raises(ValueError, match="Invalid `exclude`: expected a list of names"):
        kl.find_targets(composite(), "attention", "query")


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected at least one target to remain"):
        kl.find_targets(functional(), ["up"], ["re:.*"])
    with pytest.raises(ValueError, match=r"`exclude` to match a layer.*\['uq'\]"):
        kl.find_targets(functional(), ["up"], ["uq"])


def head_models() -> dict[str, tuple[keras.Model, list[str]]]:
    inputs = keras.Input((5,))
    encoder = keras.Sequential([keras.Input((5,)), keras.layers.Dense(7, name="up")], name="enc")
    x = keras.layers.Dense(11, name="a")(encoder(inputs))
    two = [keras.layers.Dense(3, name="h1")(x), keras.layers.Dense(2, name="h2")(x)]
    softmax = keras.layers.Softmax()(keras.ops.reshape(two[0], (-1, 3, 1)))
    timed = keras.Input((3, 5))
    stack = keras.Sequential([keras.Input((5,)), *(keras.layers.Dense(4, name=n) for n in "pqr")])
    return {
        "two outputs": (keras.Model(inputs, two), ["a", "enc/up"]),
        "through operations": (keras.Model(inputs, softmax), ["a", "enc/up"]),
        "wrapped": (
            keras.Model(
                timed,
                keras.layers.TimeDistributed(keras.layers.Dense(2, name="t"), name="w")(
                    keras.layers.Dense(7, name="u")(timed)
                ),
            ),
            ["u"],
        ),
        "sequential": (stack, ["p", "q"]),
        "nested": (keras.Model(inputs, stack(inputs)), [f"{stack.name}/p", f"{stack.name}/q"]),
        "subclassed": (subclassed(), ["block_0", "block_1", "up"]),
    }


@pytest.mark.parametrize("name", list(head_models()))
def test_the_output_head_is_left_out(name: str) -> None:
    model, expected = head_models()[name]
    assert paths(model) == expected


class Headed(keras.Model):
    """A subclassed model with these layers, in this order."""

    def __init__(self, **layers: keras.layers.Layer) -> None:
        super().__init__(name="headed")
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.order = list(layers)

    def call(self, inputs: Any) -> Any:
        for name in self.order:
            inputs = getattr(self, name)(inputs)
        return inputs


def headed(*names: str, norm: bool = False) -> keras.Model:
    layers = {name: keras.layers.Dense(5, name=name) for name in names}
    model = Headed(**layers, **({"norm": keras.layers.LayerNormalization()} if norm else {}))
    model(keras.ops.zeros((1, 5)))
    return model


def joined(join: Any) -> keras.Model:
    inputs = keras.Input((5,))
    x = keras.layers.Dense(7, activation="gelu", name="a")(inputs)
    return keras.Model(inputs, join(inputs, *(keras.layers.Dense(5, name=n)(x) for n in "hi")))


UNCLEAR: dict[str, tuple[Any, list[str], list[str]]] = {
    "concatenated": (
        lambda: joined(lambda _, h, i: keras.layers.Concatenate()([h, i])),
        ["h", "i"],
        ["a", "h", "i"],
    ),
    "masked": (lambda: joined(lambda x, h, _: h * keras.ops.sign(x)), ["h"], ["a", "h"]),
    "a sum": (lambda: joined(lambda x, h, i: keras.ops.tanh(h + i)), ["h", "i"], ["a", "h", "i"]),
    "one output of two": (lambda: joined(lambda x, h, i: [h, i + x]), ["i"], ["a", "i"]),
    "head first": (lambda: headed("head", "up"), ["head"], ["head"]),
    "logits first": (lambda: headed("lm_logits", "up", "down"), ["lm_logits"], ["lm_logits", "up"]),
    "a norm last": (lambda: headed("up", "down", norm=True), ["down", "up"], ["down", "up"]),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_warning_names_layers_that_may_be_heads(name: str) -> None:
    make, possible, selected = UNCLEAR[name]
    with pytest.warns(UserWarning, match="may make the model's outputs") as caught:
        assert paths(make()) == selected
    (message,) = [str(w.message) for w in caught]
    assert sorted(re.findall(r"'([^']+)'", message.split(", which may")[0])) == [
        "all-linear",
        *possible,
    ]
    fix = re.findall(r"(exclude|layers_to_save)=(\[[^]]*\])", message)
    assert [argument for argument, _ in fix] == ["exclude", "layers_to_save"]
    for argument in ("exclude", "layers_to_save"):  # nothing is unclear to one who names them
        config = kl.LoRAConfig.from_dict({"rank": 2, argument: possible})
        if len(possible) < len(selected):
            kl.apply_lora(make(), config)


@pytest.mark.parametrize("make", [functional, composite, subclassed, lambda: headed("up", "head")])
def test_no_warning_where_the_head_is_clear(make: Any) -> None:
    kl.find_targets(make())


def test_a_head_beside_layers_that_cannot_be_adapted_is_better_trained_whole() -> None:
    layers = [keras.layers.PReLU(name="slopes"), keras.layers.GlobalMaxPooling2D()]
    model = keras.Sequential([keras.Input((5, 5, 2)), *layers, keras.layers.Dense(2, name="top")])
    with pytest.raises(ValueError, match=r"\['top'\], and the other layers.*'slopes' \(.*PReLU\)"):
        kl.find_targets(model)


def test_a_head_beside_layers_of_another_kind_names_the_preset_that_selects_them() -> None:
    layers = [keras.layers.Conv2D(3, 2, name="conv"), keras.layers.GlobalMaxPooling2D()]
    model = keras.Sequential([keras.Input((5, 5, 2)), *layers, keras.layers.Dense(2, name="top")])
    with pytest.raises(ValueError, match=r"\['top'\], and .* \['Conv2D'\]. Write targets='all'"):
        kl.find_targets(model)
    assert paths(model, "all") == ["conv"]


def test_a_model_that_is_only_a_head_says_how_to_adapt_it() -> None:
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, name="only")])
    with pytest.raises(ValueError, match=r"no other matrix. Name it: targets=\['only'\]"):
        kl.find_targets(model)
    assert paths(model, ["only"]) == ["only"]


@keras.saving.register_keras_serializable("tests")
class Doubled(keras.layers.Dense):
    def call(self, inputs: object, training: bool | None = None) -> object:
        return 2 * super().call(inputs, training)


@keras.saving.register_keras_serializable("tests")
class Renamed(keras.layers.Dense):
    """A subclass that computes what `Dense` does."""

    def greeting(self) -> str:
        return "hello"


def with_layer(layer: keras.layers.Layer) -> keras.Model:
    inputs = keras.Input((5,))
    x = keras.layers.Dense(7, name="plain")(layer(inputs))
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def test_a_subclass_that_overrides_call_is_refused_by_name_and_left_out_of_presets() -> None:
    model = with_layer(Doubled(5, name="double"))
    with pytest.raises(ValueError, match=r"'double' \(.*Doubled\).*register_lora_class"):
        kl.find_targets(model, ["double"])
    with pytest.warns(UserWarning, match=r"leaves out 'double' \(.*Doubled\).*overrides"):
        assert paths(model) == ["plain"]


def test_a_subclass_that_overrides_nothing_keeps_its_own_methods() -> None:
    model = with_layer(Renamed(5, name="renamed"))
    kl.apply_lora(model, kl.LoRAConfig(rank=2))
    layer = model.get_layer("renamed")
    assert isinstance(layer, kl.LoRADense)
    assert layer.greeting() == "hello"
    assert type(kl.merge_lora(model).get_layer("renamed")) is Renamed


def test_registering_how_makes_a_class_adaptable() -> None:
    class Tripled(keras.layers.Dense):
        def call(self, inputs: object, training: bool | None = None) -> object:  # noqa: ARG002
            return 3 * keras.ops.matmul(inputs, self.kernel)

    class LoRATripled(kl.LoRALayer, Tripled):
        @staticmethod
        def kernel_equation(layer: keras.layers.Layer) -> str:  # noqa: ARG004
            return "...x,xy->...y"

        def call(self, inputs: object, training: bool | None = None) -> object:
            return 3 * self.adapted_product(inputs, training)

    with pytest.raises(ValueError, match="a subclass of LoRALayer and of Tripled"):
        kl.register_lora_class(Tripled, kl.LoRADense)
    kl.register_lora_class(Tripled, LoRATripled)
    model = with_layer(Tripled(5, name="triple"))
    x = keras.random.normal((2, 5), seed=1)
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["triple"]))
    for variable in model.trainable_variables:
        variable.assign(keras.random.normal(variable.shape, seed=2))
    expected = model(x)
    assert keras.ops.max(keras.ops.abs(kl.merge_lora(model)(x) - expected)) < 1e-4


@pytest.mark.filterwarnings("ignore:`build:UserWarning")
def test_unbuilt_models_and_layers() -> None:
    with pytest.raises(ValueError, match="Expected a built model"):
        kl.find_targets(keras.Sequential([keras.layers.Dense(3)]))
    model = Subclassed()
    model.spare = keras.layers.Dense(2, name="spare")
    model(keras.ops.zeros((1, 5)))
    with pytest.warns(UserWarning, match="leaves out 'spare'.*not built"):
        assert "spare" not in paths(model)
    with pytest.raises(ValueError, match="'spare'.*not built"):
        kl.find_targets(model, ["spare"])


def test_a_model_without_a_supported_layer_is_refused() -> None:
    model = keras.Sequential([keras.Input((5,)), keras.layers.LayerNormalization()])
    with pytest.raises(ValueError, match="Expected a model with layers of Dense"):
        kl.find_targets(model)


def test_a_layer_can_be_walked_like_a_model() -> None:
    block = Block(name="alone")
    block.build((None, None, 5))
    assert paths(block, "attention") == sorted(BLOCK)
