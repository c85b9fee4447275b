"""Every KerasHub backbone is adapted; each passes through `check_adapting`."""

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
import pytest
from support.adapting import check_adapting
from support.cases import numpy_of
from support.keras_hub_backbones import BACKBONES, CONVOLUTIONAL
from support.keras_hub_backbones.attention import PROJECTIONS

import keras_lora as kl
from keras_lora.walker import Tree, attention_projections

pytestmark = [
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="takes a GradientTape"),
    # Some kernels of the backbones have a side of one.
    pytest.mark.filterwarnings("ignore:The rank is above:UserWarning"),
]


# For each line of input, a path, it prints a line of JSON: the difference of the saved model's
# outputs from the outputs in the file beside it, or an error.
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
    """Gives the answer of `READER`, a process without keras_lora, for a saved model."""
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
    check_attention(model)
    with warnings.catch_warnings(action="ignore"):
        assert {t.site.kind.family for t in kl.find_targets(model, "all-linear")} == {"linear"}
    with left_out_layers(name):
        outputs = check_adapting(model, inputs, "all", **PECULIAR.get(name, {}))
    path = tmp_path / "merged.keras"
    model.save(path)
    expected = [numpy_of(y) for y in keras.tree.flatten(outputs)]
    path.with_suffix(".keras.pickle").write_bytes(pickle.dumps((inputs, expected)))
    answer = reader(path)
    assert isinstance(answer, float), answer
    assert answer <= 1e-6


@pytest.mark.filterwarnings(r"ignore::UserWarning:keras(_hub)?\.src")
@pytest.mark.slow
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional_backbone(name: str) -> None:
    model, inputs = CONVOLUTIONAL[name]()
    check_adapting(model, inputs, "all")
    families = {t.site.kind.family for t in kl.find_targets(model, "all")}
    assert families == {"convolution"}


def check_attention(model: keras.Model) -> None:
    """The preset "attention" takes the projections that are known by class, and no others."""
    tree = Tree.of(model)
    named = [
        getattr(layer, name, None)
        for layer in tree.layers
        for name in PROJECTIONS.get(type(layer).__name__, ())
    ]
    dense = (keras.layers.Dense, keras.layers.EinsumDense)
    inside = [x for layer in named if layer is not None for x in tree.within(layer)]
    expected = {id(layer) for layer in inside if isinstance(layer, dense)}
    assert attention_projections(tree) == expected


PECULIAR: dict[str, dict[str, Any]] = {
    # The adapted layer multiplies matrices where the plain one calls einsum. So sums have another
    # order, and the outputs of these models differ by a few units in the last place.
    "EdRecBackbone": {"rounding": 5e-6},
    "StableDiffusion3Backbone": {"rounding": 5e-6},
    "T5Gemma2Backbone": {"rounding": 5e-6},
    # Its codebook is a moving average, which is updated in training mode, frozen or not.
    "RQVAEBackbone": {"training": False},
}


def left_out_layers(name: str) -> Any:
    """SAM has layers that it never calls; a warning says that the preset leaves them out."""
    if name.startswith("SAM"):
        return pytest.warns(UserWarning, match="leaves out .*not built")
    return warnings.catch_warnings()
