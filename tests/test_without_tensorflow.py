"""The package on JAX and torch: TensorFlow is not loaded, and need not be installed."""

from __future__ import annotations

import keras
import pytest
from support import processes

import keras_lora as kl
from keras_lora.export import on_first_use

# Everything except the export: adapt, train, save, load, merge.
ADAPTED = """
import sys, tempfile
import keras, numpy as np
import keras_lora as kl
assert keras.backend.backend() == sys.argv[1]
assert "tensorflow" not in sys.modules, "keras_lora loads TensorFlow"
assert set(kl.__all__) <= set(dir(kl))

def adapted():
    layers = [keras.layers.Dense(5, name="up"), keras.layers.Dense(2, name="head")]
    model = keras.Sequential([keras.Input((3,)), *layers])
    return kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2, layers_to_save=["head"]))

model, folder, x = adapted(), tempfile.mkdtemp(), np.ones((7, 3), "float32")
model.compile("adam", "mse", jit_compile=False)
model.fit(x, np.ones((7, 2)), verbose=0)
kl.save_adapter(model, folder, "default")
expected = model.predict(x, verbose=0)
with kl.disable_adapter(model):
    assert not np.allclose(model.predict(x, verbose=0), expected)
kl.unload_lora(model)
kl.load_adapter(model, folder, "default")
np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-5)
merged = kl.merge_lora(model)
np.testing.assert_allclose(merged.predict(x, verbose=0), expected, rtol=1e-5)
"""
EXPORTED = """
from keras_lora import *
from keras_lora.export.on_first_use import MODULES
for name in MODULES:
    assert globals()[name].__name__ == name
    try:
        globals()[name](merged, folder)
    except ImportError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_all_but_the_export_does_without_tensorflow(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", backend)
    output = processes.run(ADAPTED + EXPORTED, backend, block=("tensorflow",))
    assert output.splitlines()[-len(on_first_use.MODULES) :] == [
        f"Expected TensorFlow, which {name} needs. Received: tensorflow is blocked. Install it "
        "with `pip install tensorflow`, and export in a process with KERAS_BACKEND=tensorflow."
        for name in on_first_use.MODULES
    ]


COMMANDS = """
import shlex
import keras_lora_cli
merged.save(f"{folder}/base.keras")
for line in (
    "inspect {0}",
    "inspect {0}/base.keras",
    "convert {0} {0}/small --to native --dtype bfloat16",
    "diff {0} {0}",
    "merge {0}/base.keras {0} {0}/merged.keras",
    "check {0}",
    "export {0}/base.keras {0}/1",
    "merge {0}/base.keras {0} {0}/1",
):
    print("code", keras_lora_cli.main(shlex.split(line.format(folder))))
"""


@pytest.mark.slow
def test_the_commands_do_without_tensorflow_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    output = processes.run(ADAPTED + COMMANDS, "jax", block=("tensorflow",))
    lines = output.splitlines()
    codes = [line for line in lines if line.startswith("code")]
    assert codes == ["code 0"] * 5 + ["code 2"] * 3, output
    errors = [line for line in lines if line.startswith("keras-lora: error")]
    users = "keras-lora check", "keras-lora export", "export_saved_model"
    for user, error in zip(users, errors, strict=True):
        assert f"Expected TensorFlow, which {user} needs. Received: tensorflow is blocked" in error


OTHER_BACKEND = """
import sys
import keras
import keras_lora as kl
assert "tensorflow" not in sys.modules
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5)])
for export in (kl.export_saved_model, kl.export_onnx, kl.export_litert):
    try:
        export(model, "unwritten")
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_an_export_names_the_backend_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    output = processes.run(OTHER_BACKEND)
    assert output.count("expected the TensorFlow backend to export. Received: backend='jax'") == 3


def test_each_export_is_a_public_name_and_loads_on_first_use() -> None:
    for name, module in on_first_use.MODULES.items():
        function = getattr(kl, name)
        assert name in kl.__all__
        assert (function.__module__, function.__name__) == (module, name)
    assert set(kl.__all__) <= set(dir(kl))
    with pytest.raises(AttributeError, match="'keras_lora' has no attribute 'export_pickle'"):
        kl.export_pickle  # noqa: B018
    assert keras.backend.backend() == "tensorflow"
