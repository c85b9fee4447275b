"""`targets="attention"`: query, key, value and output projections, whatever contains them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import pytest

import keras_lora as kl


class Group(keras.layers.Layer):
    """Sublayers as attributes; the names of the layers are those that Keras makes, or given."""

    def __init__(self, layers: Mapping[str, Any], name: str, named: bool = False) -> None:
        super().__init__(name=name)
        for attribute, layer in layers.items():
            own = keras.layers.Dense(5, name=attribute if named else None)
            setattr(self, attribute, own if layer is None else layer)

    def build(self, input_shape: Any) -> None:
        for layer in self._flatten_layers(include_self=False, recursive=False):
            if not layer.built:
                layer.build(input_shape)

    def call(self, inputs: Any) -> Any:
        return inputs


class AttentionBlock(Group):
    """A transformer block by this name, of which the feed-forward part is no attention."""


def group(*names: str, **layers: Any) -> Group:
    return built(Group(dict.fromkeys(names) | layers, "group"))


def built(layer: Group) -> Group:
    layer.build((None, 5))
    return layer


SELECTED: dict[str, tuple[str, ...]] = {
    "keras": ("query", "key", "value", "attention_output"),
    "private": ("_query_dense", "_key_dense", "_value_dense", "_output_dense"),
    "proj": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "out": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "letters": ("q", "k", "v", "proj"),
    "w": ("wq", "wk", "wv", "wo"),
    "capitals": ("WQ", "WK", "WV", "WO"),
    "w_": ("W_query", "W_key", "W_value", "W_output"),
    "to": ("to_q", "to_k", "to_v", "to_out"),
    "camel case": ("queryDense", "keyDense", "valueDense", "outputDense"),
    "lin": ("q_lin", "k_lin", "v_lin", "out_lin"),
    "fused": ("qkv", "proj"),
    "fused, long": ("query_key_value", "dense"),
    "fused in part": ("q_proj", "kv_proj", "out_proj"),
    "nano": ("c_attn", "c_proj"),
    "a tutorial": ("wq", "wk", "wv", "dense"),
    "another tutorial": ("query_dense", "key_dense", "value_dense", "combine_heads"),
    "plural": ("queries", "keys", "values", "fc_out"),
    "keys are values": ("query", "key", "output_dense"),
    "two streams": ("attention_qkv", "attention_proj", "attention_qkv2", "attention_proj2"),
}


def chosen(layer: keras.layers.Layer) -> list[Any]:
    """What the preset takes of a layer inside a model, which has another head."""
    head = keras.layers.Dense(3)
    return [t.layer for t in kl.find_targets(group(inside=layer, head=head), "attention")]


@pytest.mark.parametrize("named", [False, True], ids=["by attribute", "by name"])
@pytest.mark.parametrize("names", SELECTED.values(), ids=list(SELECTED))
def test_projections_by_many_names(names: tuple[str, ...], named: bool) -> None:
    layers = dict.fromkeys(names)
    attention = built(Group(layers, "mixer", named))
    assert chosen(attention) == [getattr(attention, name) for name in names]


@pytest.mark.parametrize("names", SELECTED.values(), ids=list(SELECTED))
def test_a_block_without_layers_of_its_own_for_attention(names: tuple[str, ...]) -> None:
    if names[-1] in {"dense", "combine_heads"}:
        names = (*names[:-1], "attention_output")
    block = built(AttentionBlock(dict.fromkeys([*names, "up_proj", "down_proj", "gate"]), "b"))
    assert chosen(block) == [getattr(block, name) for name in names]


NOT_ATTENTION = {
    "feed-forward": ("attention_up", "attention_down"),
    "key and value": ("key", "value", "output_dense"),
    "query only": ("query_proj", "text_proj"),
    "parts of words": ("querying", "keyed", "valued", "outputs"),
    "sampling": ("sampling_offsets", "attention_weights"),
}


@pytest.mark.parametrize("names", NOT_ATTENTION.values(), ids=list(NOT_ATTENTION))
def test_what_is_only_called_attention_is_left_out(names: tuple[str, ...]) -> None:
    inner = built(AttentionBlock(dict.fromkeys(names), "self_attention", named=True))
    with pytest.raises(ValueError, match="targets='attention', which matches none"):
        kl.find_targets(group(attention=inner), "attention")


def attention_of(name: str, *names: str) -> Group:
    return built(Group(dict.fromkeys(names or ("q", "k", "v")), name))


def test_an_output_projection_beside_the_layer_of_the_others() -> None:
    core, post = attention_of("core"), keras.layers.Dense(5)
    around = group(attn=core, post=post, norm=keras.layers.LayerNormalization())
    assert chosen(around) == [core.q, core.k, core.v, post]

    core, output = attention_of("core"), group("dense", norm=keras.layers.LayerNormalization())
    around = group(self=core, output_part=output)
    assert chosen(around) == [core.q, core.k, core.v]
    around = group(parts={"self": core, "output": output})
    assert chosen(around) == [core.q, core.k, core.v, output.dense]

    block = group("up", "down", attn=attention_of("core"))
    assert chosen(block) == [block.attn.q, block.attn.k, block.attn.v]


def test_projections_in_wrappers_and_in_a_dict() -> None:
    wrapped = {name: group("dense") for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    attention = group(**wrapped)
    assert chosen(attention) == [layer.dense for layer in wrapped.values()]
    parts = {name: keras.layers.Dense(5) for name in "qkvo"}
    attention = group(parts=parts)
    assert chosen(attention) == list(parts.values())


def keras_attention(layer: Callable[[], keras.layers.Layer]) -> keras.Model:
    inputs = keras.Input((3, 5))
    x = keras.layers.Dense(5, name="attention_dense")(layer()(inputs, inputs))
    x = keras.layers.Dense(7, name="self_attn_up")(x)
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(x))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: keras.layers.MultiHeadAttention(3, 2, name="mixer"),
        lambda: keras.layers.GroupQueryAttention(2, 6, 3, name="mixer"),
    ],
    ids=["MultiHeadAttention", "GroupQueryAttention"],
)
def test_the_layers_of_keras(layer: Callable[[], keras.layers.Layer]) -> None:
    names = ("query", "key", "value", "attention_output")
    found = [t.path for t in kl.find_targets(keras_attention(layer), "attention")]
    assert found == [f"mixer/{name}" for name in names]


def test_two_attentions_in_the_graph_of_one_model() -> None:
    x = inputs = keras.Input((3, 5))
    expected = []
    for i in range(2):
        names = [f"block_{i}_{role}" for role in ("query", "key", "value")]
        q, k, v = [keras.layers.Dense(5, name=name)(x) for name in names]
        mixed = keras.layers.Attention()([q, v, k])
        x = x + keras.layers.Dense(5, name=f"block_{i}_attention_output")(mixed)
        x = x + keras.layers.Dense(5, name=f"block_{i}_output_dense_of_mlp")(x)
        expected += [*names, f"block_{i}_attention_output"]
    model = keras.Model(inputs, keras.layers.Dense(2, name="output")(x))
    assert {t.path for t in kl.find_targets(model, "attention")} == set(expected)


def test_a_warning_names_projections_alone_of_what_cannot_be_adapted() -> None:
    class Doubled(keras.layers.Dense):
        def call(self, inputs: Any, training: bool | None = None) -> Any:
            return 2 * super().call(inputs, training)

    block = group("q", "k", v=Doubled(5, name="v"), up=Doubled(7, name="up"), o=None)
    with pytest.warns(UserWarning, match=r"leaves out 'group/v' \([^']*Doubled\): ") as caught:
        assert chosen(block) == [block.q, block.k, block.o]
    assert len(caught) == 1
    assert "/up" not in str(caught[0].message)
