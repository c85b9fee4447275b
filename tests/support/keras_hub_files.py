"""KerasHub backbones with factors of KerasHub's own, and files of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_lora.exchange.keras_hub.h5 import write_keras_hub_arrays
from keras_lora.exchange.keras_hub.numbering import keras_hub_layers
from keras_lora.layers import site_of
from keras_lora.lowrank.per_axis import Pair
from keras_lora.walker import walk
from support.cases import numpy_of
from support.keras_hub_backbones import BACKBONES


def normal(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(17)
    return [rng.normal(size=shape) for shape in shapes]


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
    """The deltas of factors, by number, since a copy of a model may have other names."""
    deltas = {}
    for i, node in keras_hub_layers(model).items():
        if node.path in factors:
            split = site_of(node.layer).split()
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
            for shape in site_of(n.layer).split().factor_shapes(site_of(n.layer).shape, rank)
        )
        for n in walk(model)
        if n.layer.name in names and hasattr(n.layer, "enable_lora")
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.lora.h5"


# --- Files that are refused -----------------------------------------------------------------

LAYER = "lora/5"
A, B = f"{LAYER}/vars/lora_kernel_a", f"{LAYER}/vars/lora_kernel_b"


def write_good(file: Path) -> None:
    a, b = normal((11, 3, 2), (2, 7))
    write_keras_hub_arrays(file, 2, {5: (a, b)})


# --- Files of another model -----------------------------------------------------------------


def numbers(model: Any, name: str) -> list[int]:
    return [i for i, node in keras_hub_layers(model).items() if node.layer.name == name]


CONVOLUTION = "patch_embedding"


def vit() -> Any:
    model = backbone("ViTBackbone")
    convolutions = [n for n in walk(model) if isinstance(n.layer, keras.layers.Conv2D)]
    convolutions[0].layer.name = CONVOLUTION
    return model
