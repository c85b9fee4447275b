"""KerasHub's `.lora.h5` files: what KerasHub writes is read, and what is written it reads."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import keras
import keras_hub
import numpy as np
import pytest
from cases import CASES, Case, einsum, numpy_of, reference_delta
from kerashub_backbones import BACKBONES

import keras_lora as kl
from keras_lora.checks import AdapterFileError
from keras_lora.exchange.keras_hub.adapter import keras_hub_factors, write_keras_hub_lora
from keras_lora.exchange.keras_hub.h5 import read_keras_hub_lora, write_keras_hub_arrays
from keras_lora.exchange.keras_hub.numbering import keras_hub_layers, match_keras_hub_layers
from keras_lora.layers import kernel_shape, split_kernel
from keras_lora.lowrank.equations import EinsumSplit, split_equation
from keras_lora.lowrank.per_axis import Pair, from_per_axis, to_per_axis
from keras_lora.walker import walk

# --- The conversion -------------------------------------------------------------------------

# Last axes that no case has: contracted beside another, and beside shared and free ones.
MORE = [
    einsum(equation, (), ())
    for equation in (
        "btnh,dnh->btd",
        "btnh,ndh->btd",
        "betd,efd->betf",
        "betnh,efnh->betf",
        "betd,efdg->betfg",
        "bde,dfe->bfe",
        "bde,gde->bge",
        "bgde,dfge->bfge",
    )
]
EQUATIONS = list(dict.fromkeys(case.equation for case in [*CASES, *MORE]))
SIZES = dict(zip("defghnxyc", (5, 3, 7, 2, 11, 4, 13, 17, 19), strict=True))
RANKS = (1, 2, 6, 23)


def parts(equation: str) -> tuple[EinsumSplit, tuple[int, ...]]:
    split = split_equation(equation)
    return split, tuple(SIZES.get(c, 5) for c in split.kernel)


def normal(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(17)
    return [rng.normal(size=shape) for shape in shapes]


def matrix_rank(delta: np.ndarray) -> int:
    """Of the delta as Keras factors it."""
    return int(np.linalg.matrix_rank(delta.reshape(-1, delta.shape[-1])))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_from_per_axis_is_exact(equation: str, rank: int) -> None:
    split, shape = parts(equation)
    a, b = normal((*shape[:-1], rank), (rank, shape[-1]))
    big_a, big_b = from_per_axis(split, a, b)
    delta = np.tensordot(a, b, 1)
    case = Case("", lambda: None, (), equation)
    np.testing.assert_allclose(reference_delta(case, big_a, big_b, 1.0), delta, atol=1e-12)
    big_rank = big_a.shape[-1]
    assert (big_a.shape, big_b.shape) == split.factor_shapes(shape, big_rank)
    assert big_rank <= min(split.matrix_shape(shape))
    assert big_a.dtype == big_b.dtype == "float64"


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_to_per_axis_is_exact_and_of_least_rank(equation: str, rank: int) -> None:
    split, shape = parts(equation)
    big_a, big_b = normal(*split.factor_shapes(shape, rank))
    a, b = to_per_axis(split, shape, big_a, big_b)
    delta = reference_delta(Case("", lambda: None, (), equation), big_a, big_b, 1.0)
    np.testing.assert_allclose(np.tensordot(a, b, 1), delta, atol=1e-11)
    assert a.shape == (*shape[:-1], len(b))
    assert len(b) == matrix_rank(delta)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_there_and_back(equation: str, rank: int) -> None:
    split, shape = parts(equation)
    a, b = normal((*shape[:-1], rank), (rank, shape[-1]))
    back_a, back_b = to_per_axis(split, shape, *from_per_axis(split, a, b))
    delta = np.tensordot(a, b, 1)
    np.testing.assert_allclose(np.tensordot(back_a, back_b, 1), delta, atol=1e-11)
    assert len(back_b) == matrix_rank(delta) <= rank


@pytest.mark.parametrize(
    ("equation", "shape", "rank", "expected"),
    [
        ("btd,dnh->btnh", (29, 3, 7), 2, 6),  # n r
        ("btd,ndh->btnh", (3, 29, 7), 2, 6),
        ("btd,dnh->btnh", (5, 3, 7), 2, 5),  # d
        ("btnh,nhd->btd", (3, 7, 29), 2, 2),  # r
        ("btnh,dnh->btd", (29, 3, 7), 2, 6),  # n r, of a contracted axis
        ("ab,bc->ac", (11, 13), 2, 2),
        ("bd,d->bd", (5,), 2, 1),
    ],
)
def test_rank_of_from_per_axis(
    equation: str, shape: tuple[int, ...], rank: int, expected: int
) -> None:
    pair = normal((*shape[:-1], rank), (rank, shape[-1]))
    big_a, _ = from_per_axis(split_equation(equation), *pair)
    assert big_a.shape[-1] == expected


@pytest.mark.parametrize("equation", ["ab,bc->ac", "btnh,nhd->btd"])
def test_equal_layouts_are_left_alone(equation: str) -> None:
    split, shape = parts(equation)
    a, b = normal((*shape[:-1], 2), (2, shape[-1]))
    for converted in (from_per_axis(split, a, b), to_per_axis(split, shape, a, b)):
        np.testing.assert_array_equal(converted[0], a)
        np.testing.assert_array_equal(converted[1], b)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_zero_has_rank_one(equation: str) -> None:
    split, shape = parts(equation)
    big_a, big_b = (np.zeros(s) for s in split.factor_shapes(shape, 40))
    a, b = to_per_axis(split, shape, big_a, big_b)
    assert len(b) == 1
    assert not np.tensordot(a, b, 1).any()


# --- Files of KerasHub ----------------------------------------------------------------------


def backbone(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # KerasHub's own, of masks
        return BACKBONES[name]()[0]


Deltas = dict[int, np.ndarray]


def enabled_layers(model: Any) -> dict[int, Any]:
    numbered = keras_hub_layers(model).items()
    return {i: n.layer for i, n in numbered if getattr(n.layer, "lora_enabled", False)}


def keras_deltas(model: Any) -> Deltas:
    """Effective kernel minus base, as Keras computes it."""
    layers = enabled_layers(model)
    return {i: numpy_of(v.kernel) - numpy_of(v._kernel) for i, v in layers.items()}


def our_deltas(model: Any, factors: dict[str, Pair]) -> Deltas:
    """By number too: a copy of a model may have other names."""
    deltas = {}
    for i, node in keras_hub_layers(model).items():
        if node.path in factors:
            split = split_kernel(node.layer)
            equation = f"{split.a},{split.b}->{split.kernel}"
            deltas[i] = np.einsum(equation, *factors[node.path])
    assert len(deltas) == len(factors)
    return deltas


def assert_equal_deltas(ours: Deltas, theirs: Deltas) -> None:
    assert ours.keys() == theirs.keys()
    for i, delta in ours.items():
        np.testing.assert_allclose(delta, theirs[i], atol=1e-6, err_msg=str(i))


def trained(model: Any, rank: int = 2, names: list[str] | None = None) -> Any:
    model.enable_lora(rank, target_layer_names=names)
    rng = np.random.default_rng(19)
    for layer in enabled_layers(model).values():
        for variable in (layer.lora_kernel_a, layer.lora_kernel_b):
            variable.assign(rng.normal(scale=0.3, size=variable.shape))
    return model


def random_factors(model: Any, names: list[str], rank: int = 3) -> dict[str, Pair]:
    rng = np.random.default_rng(23)
    return {
        n.path: tuple(  # type: ignore[misc]
            rng.normal(scale=0.3, size=shape)
            for shape in split_kernel(n.layer).factor_shapes(kernel_shape(n.layer), rank)
        )
        for n in walk(model)
        if n.layer.name in names and hasattr(n.layer, "enable_lora")
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.lora.h5"


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_there_and_back(name: str, file: Path) -> None:
    model = backbone(name)
    copy = backbone(name)
    copy.set_weights(model.get_weights())
    trained(model)
    if not enabled_layers(model):
        with pytest.raises(ValueError, match="no lora-enabled layers"):
            model.save_lora_weights(file)
        return
    model.save_lora_weights(file)
    factors = keras_hub_factors(copy, file)
    assert_equal_deltas(our_deltas(copy, factors), keras_deltas(model))

    assert write_keras_hub_lora(file, copy, factors) <= 2
    copy.load_lora_weights(file)
    assert_equal_deltas(keras_deltas(copy), keras_deltas(model))


@pytest.mark.parametrize("name", ["BertBackbone", "GPT2Backbone", "GemmaBackbone"])
@pytest.mark.parametrize("rank", [2, 3])
def test_kernels_are_those_of_keras(name: str, rank: int, file: Path) -> None:
    model = trained(backbone(name), rank)
    model.save_lora_weights(file)
    factors = keras_hub_factors(model, file)
    assert_equal_deltas(our_deltas(model, factors), keras_deltas(model))


def adapted_kernels(model: Any, name: str) -> Deltas:
    """Effective kernel minus base of each layer that has the adapter."""
    layers = {i: node.layer for i, node in keras_hub_layers(model).items()}
    return {
        i: numpy_of(v.kernel) - numpy_of(v.base_kernel)
        for i, v in layers.items()
        if isinstance(v, kl.LoRALayer) and name in v.adapters
    }


@pytest.mark.parametrize("name", ["BertBackbone", "GPT2Backbone", "GemmaBackbone"])
def test_a_file_becomes_an_adapter_and_an_adapter_a_file(name: str, file: Path) -> None:
    theirs = trained(backbone(name))
    theirs.save_lora_weights(file)
    ours = backbone(name)
    report = kl.load_keras_hub_lora(ours, file, "hub")
    assert_equal_deltas(adapted_kernels(ours, "hub"), keras_deltas(theirs))
    assert {layer.file_rank for layer in report} == {2}
    assert max(layer.rank for layer in report) > 2  # a factor for each head
    assert not any(layer.error for layer in report)
    with kl.scale_adapter(ours, "hub", 0.5):
        kl.save_keras_hub_lora(ours, file, "hub")
    fresh = backbone(name)
    fresh.load_lora_weights(file)
    halved = {i: delta / 2 for i, delta in keras_deltas(theirs).items()}
    assert_equal_deltas(keras_deltas(fresh), halved)


def test_an_adapter_is_truncated_as_well_as_can_be(file: Path) -> None:
    theirs = trained(backbone("BertBackbone"), 3)
    theirs.save_lora_weights(file)
    ours = backbone("BertBackbone")
    report = kl.load_keras_hub_lora(ours, file, rank=2)
    nodes = {node.path: i for i, node in keras_hub_layers(ours).items()}
    exact = keras_deltas(theirs)
    for layer in report:
        delta = exact[nodes[layer.path]]
        values = np.linalg.svd(delta.reshape(len(delta), -1), compute_uv=False)
        expected = np.linalg.norm(values[2:]) / np.linalg.norm(values)
        assert layer.rank == 2
        assert layer.error == pytest.approx(expected, rel=1e-4)
        received = adapted_kernels(ours, "default")[nodes[layer.path]]
        error = np.linalg.norm(received - delta) / np.linalg.norm(delta)
        assert error == pytest.approx(expected, rel=1e-3)
    wrong: list[dict[str, Any]] = [{"rank": 0}, {"name": "default"}, {"name": "a/b"}]
    for options in wrong:
        with pytest.raises(ValueError, match="rank|name"):
            kl.load_keras_hub_lora(ours, file, **options)


@pytest.mark.parametrize("name", ["BertBackbone", "GPT2Backbone", "GemmaBackbone"])
def test_factors_of_true_rank_load_into_keras_hub(name: str, file: Path) -> None:
    model = backbone(name)
    factors = random_factors(model, ["query", "value"])
    rank = write_keras_hub_lora(file, model, factors)
    model.load_lora_weights(file)
    assert_equal_deltas(keras_deltas(model), our_deltas(model, factors))
    assert {layer.lora_rank for layer in enabled_layers(model).values()} == {rank}


def test_scale_in_keras_hub_is_one() -> None:
    """Why the file needs no alpha."""
    for layer in enabled_layers(trained(backbone("BertBackbone"))).values():
        assert layer.lora_alpha == layer.lora_rank == 2


def test_other_layers_by_name(file: Path) -> None:
    names = ["attention_output", "feedforward_intermediate_dense"]
    model, copy = backbone("BertBackbone"), backbone("BertBackbone")
    copy.set_weights(model.get_weights())
    trained(model, names=names).save_lora_weights(file)
    factors = keras_hub_factors(copy, file)
    assert_equal_deltas(our_deltas(copy, factors), keras_deltas(model))

    rank = write_keras_hub_lora(file, copy, factors, target_layer_names=names)
    copy.enable_lora(rank, target_layer_names=names)
    copy.load_lora_weights(file)
    assert_equal_deltas(keras_deltas(copy), keras_deltas(model))


def test_layers_without_factors_are_zeros_of_the_rank_asked_for(file: Path) -> None:
    model = backbone("BertBackbone")
    factors = random_factors(model, ["query"], rank=1)
    assert write_keras_hub_lora(file, model, factors, rank=11) == 11
    model.enable_lora(11)
    model.load_lora_weights(file)
    ours, theirs = our_deltas(model, factors), keras_deltas(model)
    assert {layer.name for layer in enabled_layers(model).values()} == {"query", "value"}
    assert not any(theirs[i].any() for i in theirs.keys() - ours.keys())
    assert_equal_deltas(ours, {i: theirs[i] for i in ours})


def test_a_task_holds_a_backbone(file: Path) -> None:
    inner = trained(backbone("BertBackbone"))
    inner.save_lora_weights(file)
    task = keras_hub.models.BertTextClassifier(inner, num_classes=2)
    of_backbone, of_task = keras_hub_factors(inner, file), keras_hub_factors(task, file)
    assert list(of_task) == [f"{inner.name}/{path}" for path in of_backbone]
    write_keras_hub_lora(file, task, of_task)
    inner.load_lora_weights(file)


def test_numbers_stay_when_a_model_is_adapted() -> None:
    model = backbone("GemmaBackbone")
    before = {i: node.path for i, node in keras_hub_layers(model).items()}
    kl.apply_lora(model, kl.LoRAConfig(rank=2, dropout=0.1))
    assert {i: node.path for i, node in keras_hub_layers(model).items()} == before


def test_a_model_without_one_backbone_is_refused() -> None:
    first, second = backbone("BertBackbone"), backbone("BertBackbone")
    second.name = "other"
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="expected a KerasHub backbone, or a model that holds one"):
        keras_hub_layers(model)
    owner = keras.layers.Layer()
    owner.parts = [first, second]
    with pytest.raises(ValueError, match="other.*; pass the backbone itself"):
        keras_hub_layers(owner)


# --- Files that are refused -----------------------------------------------------------------

LAYER = "lora/5"
A, B = f"{LAYER}/vars/lora_kernel_a", f"{LAYER}/vars/lora_kernel_b"


def replaced(key: str, value: Any) -> Callable[[Any], None]:
    def change(h5: Any) -> None:
        if key in h5:
            del h5[key]
        if value is not None:
            h5[key] = value

    return change


def group_for_b(h5: Any) -> None:
    del h5[B]
    h5.create_group(B)


def virtual(h5: Any) -> None:
    del h5[A]
    layout = h5py.VirtualLayout((11, 3, 2), "float32")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "a", (11, 3, 2))
    h5.create_virtual_dataset(A, layout)


def stored_elsewhere(h5: Any) -> None:
    del h5[A]
    h5.create_dataset(A, (11, 3, 2), "float32", external=[("/etc/passwd", 0, 264)])


def bomb(h5: Any) -> None:
    del h5[A]
    h5.create_dataset(A, (2**40, 2), "float32", chunks=(1024, 2), compression="gzip")


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "no lora": (replaced("lora", None), "/lora is missing"),
    "lora is an array": (replaced("lora", np.zeros(3)), "/lora is a Dataset, expected a Group"),
    "no rank": (replaced("lora/vars/rank", None), r"/lora/vars has keys \[\]"),
    "an alpha": (replaced("lora/vars/alpha", 4), "has keys .*'alpha', 'rank'.*expected .*'rank'"),
    "rank 0": (replaced("lora/vars/rank", 0), "rank is 0, expected a positive integer"),
    "rank 3": (replaced("lora/vars/rank", 3), "/lora/5: factors of shapes"),
    "ranks": (replaced("lora/vars/rank", [2, 2]), r"rank is \[2, 2\], expected"),
    "float rank": (replaced("lora/vars/rank", 2.0), "rank has dtype float64"),
    "text rank": (replaced("lora/vars/rank", "2"), "rank has dtype object"),
    "no layers": (replaced(LAYER, None), "/lora has no layers"),
    "name": (replaced("lora/query/vars/x", 1), "/lora/query: not the number of a layer"),
    "zeros": (replaced("lora/05/vars/x", 1), "/lora/05: not the number of a layer"),
    "no b": (replaced(B, None), r"/lora/5/vars has keys \['lora_kernel_a'\]"),
    "layer's alpha": (replaced(f"{LAYER}/vars/alpha", 4.0), "/lora/5/vars has keys .*'alpha'"),
    "a group for b": (group_for_b, "lora_kernel_b is a Group, expected a Dataset"),
    "a scalar": (replaced(A, np.float32(1)), r"factors of shapes \(\) and \(2, 7\)"),
    "empty": (replaced(A, h5py.Empty("float32")), "/lora/5"),
    "b of one axis": (replaced(B, np.zeros(2)), r"\(2,\), expected \(\.\.\., 2\) and \(2"),
    "b of three axes": (replaced(B, np.zeros((2, 7, 1))), r"\(2, 7, 1\), expected"),
    "NaN": (replaced(A, np.full((11, 3, 2), np.nan)), "lora_kernel_a has values that are not"),
    "infinity": (replaced(B, np.full((2, 7), np.inf)), "lora_kernel_b has values that are not"),
    "integers": (replaced(B, np.ones((2, 7), "int32")), "lora_kernel_b has dtype int32"),
    "text": (replaced(B, [["x"] * 7] * 2), "lora_kernel_b has dtype object"),
    "soft link": (replaced(B, h5py.SoftLink(f"/{A}")), "lora_kernel_b is a link"),
    "external link": (replaced(B, h5py.ExternalLink("other.h5", B)), "lora_kernel_b is a link"),
    "linked layer": (replaced(LAYER, h5py.ExternalLink("other.h5", LAYER)), "/lora/5 is a link"),
    "linked lora": (replaced("lora", h5py.ExternalLink("other.h5", "lora")), "/lora is a link"),
    "virtual": (virtual, "lora_kernel_a has its values in another file"),
    "stored elsewhere": (stored_elsewhere, "lora_kernel_a has its values in another file"),
    "bomb": (bomb, "lora_kernel_a claims 8796093022208 bytes, in a file of"),
}


def write_good(file: Path) -> None:
    a, b = normal((11, 3, 2), (2, 7))
    write_keras_hub_arrays(file, 2, {5: (a, b)})


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_refused(change: str, file: Path) -> None:
    write_good(file)
    write_good(file.with_name("other.h5.lora.h5"))
    file.with_name("other.h5.lora.h5").rename(file.with_name("other.h5"))
    apply, message = CHANGES[change]
    with h5py.File(file, "r+") as h5:
        apply(h5)
    with pytest.raises(AdapterFileError, match=message) as caught:
        read_keras_hub_lora(file)
    assert str(file) in str(caught.value)


def test_all_that_is_wrong_is_told_at_once(file: Path) -> None:
    write_good(file)
    with h5py.File(file, "r+") as h5:
        h5["lora/x/y"] = 1
        h5["lora/7/vars/lora_kernel_a"] = np.zeros((3, 2))
    with pytest.raises(AdapterFileError, match=r"/lora/7: .*/lora/x: "):
        read_keras_hub_lora(file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04K\x01.", b"\x89HDF\r\n\x1a\n"])
def test_another_format_is_refused(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(AdapterFileError, match="expected a whole file of KerasHub's"):
        read_keras_hub_lora(file)


def test_no_file_is_refused(file: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"Received: no file; check the path"):
        read_keras_hub_lora(file)
    file.mkdir()
    with pytest.raises(AdapterFileError, match="expected a file"):
        read_keras_hub_lora(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_waited_for(file: Path) -> None:
    os.mkfifo(file)
    with pytest.raises(AdapterFileError, match="expected a file"):
        read_keras_hub_lora(file)


def test_another_name_is_refused(tmp_path: Path) -> None:
    for call in (read_keras_hub_lora, lambda path: write_keras_hub_arrays(path, 1, {})):
        with pytest.raises(AdapterFileError, match=r"expected a name that ends in \.lora\.h5"):
            call(tmp_path / "x.h5")


def test_a_weights_file_is_refused(file: Path) -> None:
    path = file.with_name("x.weights.h5")
    backbone("GPT2Backbone").save_weights(path)
    path.rename(file)
    with pytest.raises(AdapterFileError, match="/lora is missing"):
        read_keras_hub_lora(file)


def test_damaged_files_are_read_or_refused(file: Path) -> None:
    write_good(file)
    whole = file.read_bytes()
    rng = np.random.default_rng(29)
    damaged = [whole[: int(n)] for n in rng.integers(0, len(whole), 100)]
    for place in rng.integers(0, len(whole), 300):
        damaged.append(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    refused = 0
    for content in damaged:
        file.write_bytes(content)
        try:
            read_keras_hub_lora(file)
        except AdapterFileError:
            refused += 1
    assert refused > 100


# --- Files of another model -----------------------------------------------------------------


def numbers(model: Any, name: str) -> list[int]:
    return [i for i, node in keras_hub_layers(model).items() if node.layer.name == name]


def fresh_pairs(model: Any, name: str, value: float = 1.0) -> dict[int, Pair]:
    layers = keras_hub_layers(model)
    shapes = {i: kernel_shape(layers[i].layer) for i in numbers(model, name)}
    return {
        i: (np.ones((*shape[:-1], 2)), np.full((2, shape[-1]), value))
        for i, shape in shapes.items()
    }


def test_every_mismatch_is_told_at_once() -> None:
    model = backbone("BertBackbone")
    first, second = numbers(model, "query")
    value, _ = numbers(model, "value")
    (norm,) = numbers(model, "embeddings_layer_norm")
    pairs = {
        norm: (np.zeros((12, 2)), np.zeros((2, 4))),
        first: (np.ones((12, 3, 2)), np.ones((2, 5))),
        value: (np.ones((12, 2)), np.ones((2, 4))),
        999: (np.ones((12, 3, 2)), np.ones((2, 4))),
    }
    with pytest.raises(AdapterFileError) as caught:
        match_keras_hub_layers(model, pairs, "x.lora.h5")
    for part in (
        "Invalid 'x.lora.h5': expected factors for layers of this model",
        "lora/999, while the model has ",
        f"lora/{norm} ('embeddings_layer_norm'), a layer for which Keras has no LoRA",
        f"no lora/{second} ('",
        f"lora/{first} ('transformer_layer_0/self_attention_layer/query') of shapes (12, 3, 2) "
        "and (2, 5), expected (12, 3, 2) and (2, 4)",
        f"lora/{value} ('transformer_layer_0/self_attention_layer/value') of shapes",
        "build the backbone that the file was saved from",
    ):
        assert part in str(caught.value)


def test_a_file_of_a_smaller_model_is_refused(file: Path) -> None:
    options: dict[str, Any] = {
        "vocabulary_size": 11,
        "num_heads": 2,
        "hidden_dim": 6,
        "intermediate_dim": 5,
    }
    small, large = (keras_hub.models.GPT2Backbone(num_layers=n, **options) for n in (1, 3))
    trained(small).save_lora_weights(file)
    with pytest.raises(AdapterFileError, match="no lora/"):
        keras_hub_factors(large, file)
    trained(large).save_lora_weights(file)
    with pytest.raises(AdapterFileError, match="layers with weights"):
        keras_hub_factors(small, file)


CONVOLUTION = "patch_embedding"


def vit() -> Any:
    model = backbone("ViTBackbone")
    convolutions = [n for n in walk(model) if isinstance(n.layer, keras.layers.Conv2D)]
    convolutions[0].layer.name = CONVOLUTION
    return model


def test_layers_that_cannot_be_adapted(file: Path) -> None:
    """KerasHub's file may hold a convolution, and no embedding."""
    model = vit()
    trained(model, names=[CONVOLUTION, "query"]).save_lora_weights(file)
    with pytest.raises(AdapterFileError, match=r"cannot be adapted \(skip_unsupported"):
        keras_hub_factors(model, file)
    with pytest.warns(
        UserWarning, match=rf"x\.lora\.h5: left out lora/\d+ \('.*{CONVOLUTION}'\), which"
    ):
        factors = keras_hub_factors(model, file, skip_unsupported=True)
    assert {path.split("/")[-1] for path in factors} == {"query"}


def test_zeros_on_layers_that_cannot_be_adapted_are_left_out() -> None:
    model = vit()
    assert match_keras_hub_layers(model, fresh_pairs(model, CONVOLUTION, 0.0), "x.lora.h5") == {}


def test_keras_hub_saves_no_embedding(file: Path) -> None:
    """Why `write_keras_hub_lora` refuses the name of one."""
    model = backbone("GPT2Backbone")
    model.enable_lora(2, target_layer_names=["token_embedding"])
    with pytest.raises(AttributeError, match="lora_kernel_a"):
        model.save_lora_weights(file)


# --- Factors that no file can hold ----------------------------------------------------------


def test_all_that_cannot_be_written_is_told_at_once(file: Path) -> None:
    model = backbone("BertBackbone")
    factors = random_factors(model, ["query", "value", "key"])
    queries = [path for path in factors if path.endswith("query")]
    values = [path for path in factors if path.endswith("value")]
    factors[queries[0]] = (np.ones((12, 2)), np.ones((2, 3, 5)))
    factors[queries[1]] = (np.array(1.0), np.ones((2, 3, 5)))
    factors[values[0]][0][0] = np.nan
    factors[values[1]][1][0] = 1e39
    keys = [path for path in factors if path.endswith("key")]
    factors["nowhere"] = factors[values[0]]
    with pytest.raises(ValueError, match="Expected factors of layers of the backbone") as caught:
        write_keras_hub_lora(file, model, factors)
    for part in (
        *(f"'{key}', which it does not reach" for key in keys),
        "'nowhere', which it does not reach",
        f"'{queries[0]}' of shapes (12, 2) and (2, 3, 5), expected (12, 2) and (2, 3, 4)",
        f"'{queries[1]}' of shapes ()",
        f"'{values[0]}' of values that are not finite in float32",
        f"'{values[1]}' of values that are not finite in float32",
    ):
        assert part in str(caught.value)
    assert not file.exists()


def test_an_adapter_with_an_embedding_is_not_saved(file: Path) -> None:
    model = backbone("GPT2Backbone")
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["query", "value", "token_embedding"]))
    with pytest.raises(ValueError, match="'token_embedding' is an embedding"):
        kl.save_keras_hub_lora(model, file)
    assert not file.exists()


@pytest.mark.parametrize("names", [["token_embedding", "query"], ["patch_embedding"]])
def test_other_kinds_of_layers_are_not_written(names: list[str], file: Path) -> None:
    model = vit() if names == [CONVOLUTION] else backbone("GPT2Backbone")
    factors = random_factors(model, ["query"])
    with pytest.raises(ValueError, match="is an embedding|which it does not reach"):
        write_keras_hub_lora(file, model, factors, target_layer_names=names)
    layer = keras_hub_layers(model)[numbers(model, names[0])[0]]
    one = {layer.path: (np.ones((2, 1)), np.ones((1, 2)))}
    with pytest.raises(ValueError, match="cannot be adapted|neither writes nor reads"):
        write_keras_hub_lora(file, model, one, target_layer_names=names)


def test_a_convolution_of_the_name_is_filled_with_zeros(file: Path) -> None:
    model = vit()
    names = [CONVOLUTION, "query"]
    factors = random_factors(model, ["query"])
    rank = write_keras_hub_lora(file, model, factors, target_layer_names=names)
    assert keras_hub_factors(model, file).keys() == factors.keys()
    model.enable_lora(rank, target_layer_names=names)
    model.load_lora_weights(file)


def test_nothing_and_a_low_rank_are_refused(file: Path) -> None:
    model = backbone("BertBackbone")
    with pytest.raises(ValueError, match="Received: none"):
        write_keras_hub_lora(file, model, {})
    empty = {path: (a[:, :0], b[:0]) for path, (a, b) in random_factors(model, ["query"]).items()}
    with pytest.raises(ValueError, match=r"of shapes \(12, 0\)"):
        write_keras_hub_lora(file, model, empty)
    with pytest.raises(ValueError, match=r"rank.*expected 4 or more.*rank=3; truncate"):
        write_keras_hub_lora(file, model, random_factors(model, ["query"]), rank=3)
    with pytest.raises(ValueError, match="rank"):
        write_keras_hub_lora(file, model, random_factors(model, ["query"]), rank=0)


def test_a_failed_write_leaves_what_was_there(file: Path) -> None:
    with pytest.raises(AdapterFileError, match="check that the directory exists"):
        write_good(file.parent / "nowhere" / file.name)
    write_good(file)
    before = file.read_bytes()
    with pytest.raises(AttributeError):
        write_keras_hub_arrays(file, 2, {5: (None, None)})  # type: ignore[dict-item]
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
