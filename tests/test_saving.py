"""What Keras's own ways to save do with an adapted model: exact, or a clear error."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import keras
import numpy as np
import pytest
from support import processes
from support.forks import Fork
from support.models import (
    Subclassed,
    composite,
    data,
    functional,
    one_block,
    randomize_adapters,
    state,
)

import keras_lora as kl
from keras_lora.inject.keras_savers import saver_modules

pytest_plugins = ["support.forks"]

# A warning of Keras before it refuses a file.
refusing = pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
every_model = pytest.mark.parametrize("make", [functional, composite])


def trained(make: Callable[[], keras.Model], **options: Any) -> keras.Model:
    model = kl.apply_lora(make(), kl.LoRAConfig(rank=2, alpha=3, **options))
    model.compile("adam", "mse")
    fit(model)
    return model


def fit(model: keras.Model, **options: Any) -> list[float]:
    x, y = data(model)
    options = {"batch_size": 2, "shuffle": False, "verbose": 0, **options}
    return list(model.fit(x, y, **options).history["loss"])


def predict(model: keras.Model) -> np.ndarray:
    return np.array(model.predict(data(model)[0], verbose=0))


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_a_keras_file_of_plain_layers_continues_exactly(bias: str, tmp_path: Path) -> None:
    model = trained(functional, bias=bias, layers_to_save=["head"])
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(predict(loaded), predict(model))
    paths = [[v.path for v in m.trainable_variables] for m in (model, loaded)]
    assert paths[0] == paths[1]
    assert fit(loaded, epochs=3) == fit(model, epochs=3)
    np.testing.assert_array_equal(predict(loaded), predict(model))
    assert type(kl.merge_lora(loaded).get_layer("up")) is keras.layers.Dense


def test_a_keras_file_that_could_not_come_back_is_refused_and_the_old_one_stays(
    tmp_path: Path,
) -> None:
    cases: list[tuple[Callable[..., keras.Model], dict[str, Any]]] = [
        (composite, {}),
        (functional, {"bias": "all", "targets": ["up"]}),  # one flag a layer in a config
    ]
    for make, options in cases:
        file = tmp_path / f"{make.__name__}.keras"
        model = make()
        model.save(file)
        old = file.read_bytes()
        kl.apply_lora(model, kl.LoRAConfig(rank=2, **options))
        with pytest.raises(
            ValueError, match=r"merge_lora\(model, inplace=False\)\.save.*save_weig"
        ):
            model.save(file)
        assert file.read_bytes() == old
        with pytest.raises(ValueError, match="merge_lora"):
            keras.saving.save_model(model, tmp_path / "other.keras")
        kl.merge_lora(model).save(file)
        assert keras.models.load_model(file).count_params() == model.count_params()


def test_an_outer_model_around_deep_adapters_refuses_too(tmp_path: Path) -> None:
    inner = kl.apply_lora(composite(), kl.LoRAConfig(rank=2))
    inputs = keras.Input((None, 5))
    outer = keras.Model(inputs, inner(inputs))
    with pytest.raises(ValueError, match="merge_lora"):
        outer.save(tmp_path / "outer.keras")


@every_model
def test_weights_continue_in_a_model_adapted_alike(
    make: Callable[[], keras.Model], tmp_path: Path
) -> None:
    model = trained(make, layers_to_save=["head"], dropout=0.2)
    model.save_weights(tmp_path / "m.weights.h5")
    keras.utils.set_random_seed(99)
    other = trained(make, layers_to_save=["head"], dropout=0.2)
    other.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(predict(other), predict(model))
    # The optimizer's moments and the dropout's seeds are restored too.
    assert fit(other, epochs=2) == fit(model, epochs=2)


@every_model
def test_weights_of_the_base_load_into_the_adapted_model_with_a_warning(
    make: Callable[[], keras.Model], tmp_path: Path
) -> None:
    base = make()
    base.save_weights(tmp_path / "base.weights.h5")
    expected = predict(base)
    keras.utils.set_random_seed(99)
    model = kl.apply_lora(make(), kl.LoRAConfig(rank=2))
    with pytest.warns(UserWarning, match=r"contains no adapters.*unload_lora\(model\) first"):
        model.load_weights(tmp_path / "base.weights.h5")
    np.testing.assert_allclose(predict(model), expected, rtol=1e-5, atol=1e-6)


@refusing
@every_model
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, "has shape"),
        ({"alpha": 5.0}, "scaling.default is 1.5, expected 2.5"),
        ({"use_rslora": True}, "scaling.default"),
        ({"name": "other"}, "a.default is not expected.*a.other is missing"),
        ({"dropout": 0.5}, "has_dropout.default is 0.0, expected 1.0"),
    ],
)
def test_weights_of_another_adapter_are_refused(
    make: Callable[[], keras.Model], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    kl.apply_lora(make(), kl.LoRAConfig(rank=2, alpha=3)).save_weights(tmp_path / "m.weights.h5")
    fields = {"rank": 2, "alpha": 3, "name": "default", **options}
    name = fields.pop("name")
    model = kl.apply_lora(make(), kl.LoRAConfig(**fields), name=name)
    with pytest.raises(ValueError, match=f"(?s){message}.*same LoRAConfig"):
        model.load_weights(tmp_path / "m.weights.h5")


@refusing
@every_model
def test_weights_of_an_adapted_model_do_not_load_into_a_plain_one(
    make: Callable[[], keras.Model], tmp_path: Path
) -> None:
    kl.apply_lora(make(), kl.LoRAConfig(rank=2)).save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(ValueError, match="could not be loaded"):
        make().load_weights(tmp_path / "m.weights.h5")


@every_model
def test_model_checkpoint(make: Callable[[], keras.Model], tmp_path: Path) -> None:
    model = trained(make)
    weights = tmp_path / "best.weights.h5"
    checkpoint = keras.callbacks.ModelCheckpoint(weights, save_weights_only=True)
    fit(model, callbacks=[checkpoint])
    expected = predict(model)
    randomize_adapters(model)
    model.load_weights(weights)
    np.testing.assert_array_equal(predict(model), expected)
    whole = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras")
    if make is composite:
        with pytest.raises(ValueError, match="save_weights_only=True"):
            fit(model, callbacks=[whole])
    else:
        fit(model, callbacks=[whole])
        loaded = keras.models.load_model(tmp_path / "best.keras")
        np.testing.assert_array_equal(predict(loaded), predict(model))


RESUMABLE = """
import sys, json, os, signal
import keras, numpy as np
from support import models
import keras_lora as kl

keras.utils.set_random_seed(3)
make, directory, kill_at = getattr(models, sys.argv[1]), sys.argv[2], int(sys.argv[3])
model = kl.apply_lora(make(), kl.LoRAConfig(rank=2, dropout=0.2, layers_to_save=["head"]))
model.compile("adam", "mse")

class Kill(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

x, y = models.data(model)
backup = keras.callbacks.BackupAndRestore(directory)
options = {"batch_size": 2, "shuffle": False, "epochs": 5, "verbose": 0}
history = model.fit(x, y, callbacks=[backup, Kill()], **options)
print(json.dumps({"epochs": history.epoch, "loss": history.history["loss"]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("make", [functional, one_block])
def test_backup_and_restore_resumes_a_killed_run_exactly(
    make: Callable[[], keras.Model], fork: Fork, tmp_path: Path
) -> None:
    def run(directory: str, kill_at: int) -> tuple[int, dict[str, list[float]]]:
        code, output = fork(RESUMABLE, make.__name__, tmp_path / directory, kill_at)
        return code, (json.loads(output.splitlines()[-1]) if code == 0 else {})

    _, unbroken = run("unbroken", 99)
    code, _ = run("broken", 3)
    assert code == -signal.SIGKILL
    _, resumed = run("broken", 99)
    assert resumed["epochs"] == [3, 4]
    assert resumed["loss"] == unbroken["loss"][3:]


def test_a_merged_file_loads_where_the_package_cannot_be_imported(tmp_path: Path) -> None:
    model = trained(functional)
    randomize_adapters(model)
    x, _ = data(model)
    np.savez(tmp_path / "io.npz", x=x, y=predict(model))
    kl.merge_lora(model).save(tmp_path / "m.keras")
    script = """
import sys, numpy as np, keras
arrays = np.load(sys.argv[2])
y = keras.models.load_model(sys.argv[1]).predict(arrays["x"], verbose=0)
np.testing.assert_allclose(y, arrays["y"], rtol=1e-4, atol=1e-5)
assert not any("lora" in name for name in sys.modules)
"""
    processes.run(script, tmp_path / "m.keras", tmp_path / "io.npz", block=("keras_lora",))


def test_a_failed_load_leaves_the_adapter_flags_alone(tmp_path: Path) -> None:
    model = Subclassed()
    model(np.zeros((1, 5), "float32"))
    kl.apply_lora(model, kl.LoRAConfig(rank=2))
    before = state(model)
    (tmp_path / "m.weights.h5").write_bytes(b"truncated")
    with pytest.raises(OSError, match="Unable to"):
        model.load_weights(tmp_path / "m.weights.h5")
    assert state(model) == before


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.3])
@pytest.mark.parametrize("name", ["m.weights.h5", "m.keras"])
def test_the_factor_of_scale_adapter_is_saved(factor: float, name: str, tmp_path: Path) -> None:
    model = kl.apply_lora(functional(), kl.LoRAConfig(rank=2, alpha=3))
    randomize_adapters(model)
    plain = predict(model)
    with kl.scale_adapter(model, "default", factor):
        expected = predict(model)
        model.save(tmp_path / name) if name == "m.keras" else model.save_weights(tmp_path / name)
    if name == "m.keras":
        loaded = keras.models.load_model(tmp_path / name)
    else:
        loaded = kl.apply_lora(functional(), kl.LoRAConfig(rank=2, alpha=3))
        loaded.load_weights(tmp_path / name)
    np.testing.assert_array_equal(predict(loaded), expected)
    assert abs(plain - expected).max() > 0.01


def test_weights_without_a_factor_end_a_factor(tmp_path: Path) -> None:
    model = kl.apply_lora(functional(), kl.LoRAConfig(rank=2, alpha=3))
    randomize_adapters(model)
    model.save_weights(tmp_path / "m.weights.h5")
    expected = predict(model)
    kl.scale_adapter(model, "default", 0.5)
    model.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(predict(model), expected)


@refusing
@every_model
@pytest.mark.parametrize("by_name", [False, True])
def test_a_legacy_file_of_a_base_is_refused(
    make: Callable[[], keras.Model], by_name: bool, tmp_path: Path
) -> None:
    file = tmp_path / "base.h5"
    with h5py.File(file, "w") as opened:
        legacy = saver_modules()[1]
        legacy.save_weights_to_hdf5_group(opened, make())
    model = kl.apply_lora(make(), kl.LoRAConfig(rank=2))
    before = state(model)
    with pytest.raises(ValueError, match=r"one without adapters.*call apply_lora then"):
        model.load_weights(file, by_name=by_name)
    assert state(model) == before
    kl.unload_lora(model).load_weights(file, by_name=by_name)
