"""`RankSchedule`: what it keeps and takes back by a metric that a test writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.adapters import counted
from support.broken_runs import BATCHES, BreakAfter, BrokenError, assert_same, fit, trained
from support.models import functional, randomize_adapters

import keras_lora as kl

# Of `up` and `middle`: 12 and 18 parameters for each rank.
SIZES = [120, 60, 30]
NAN = float("nan")


class Scores(keras.callbacks.Callback):
    """Writes a metric into the logs."""

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        self.values = values

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs["score"] = self.values[epoch]


def adapted(seed: int = 1, optimizer: Any = "adam", **options: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = functional()
    keras.utils.set_random_seed(seed)
    kl.apply_lora(model, kl.LoRAConfig(**{"rank": 4, "alpha": 3, "dropout": 0.1, **options}))
    model.compile(optimizer, "mse")
    return model


def schedule(**options: Any) -> kl.RankSchedule:
    return kl.RankSchedule("score", **{"mode": "max", "verbose": 0, **options})


def size(model: keras.Model) -> int:
    adapters = [x.adapters["default"] for x in kl.lora_layers(model).values()]
    return sum(adapter.a.__array__().size + adapter.b.__array__().size for adapter in adapters)


@pytest.mark.parametrize(
    ("values", "options", "kept", "final"),
    [
        ([3, 3, 3, 3], {}, [True, True, True], 30),
        ([3, 2, 3, 3], {}, [True, False], 120),
        ([3, 2, 3, 3], {"tolerance": 1}, [True, True, True], 30),
        ([3, 2.5, 2, 3], {"tolerance": 0.5}, [True, True, False], 60),
        ([3, 2, 3, 3], {"mode": "min"}, [True, True, False], 60),
        ([3, 2, 3, 3], {"patience": 2}, [True, True], 60),
        ([3, 2, 1, 2], {"patience": 2}, [True, False], 120),
        ([3, 3, 3], {"patience": 2}, [True, True], 60),
        ([3, 2, 1], {"patience": 2}, [True, False], 120),
        ([3], {}, [True], 120),
        ([NAN, 3], {}, [False], 120),
        ([3, NAN], {}, [True, False], 120),
    ],
)
def test_a_size_is_kept_while_the_metric_holds(
    values: Sequence[float], options: Any, kept: Sequence[bool], final: int
) -> None:
    model, callback = adapted(), schedule(**options)
    fit(model, Scores(values), callback, epochs=len(values))
    assert [trial.kept for trial in callback.trials] == kept
    assert [trial.parameters for trial in callback.trials] == SIZES[: len(kept)]
    assert size(model) == final
    assert np.isfinite(trained(model)[0]).all()


def test_the_last_good_adapter_returns_and_nothing_is_traced_again() -> None:
    model, counter = counted()
    kl.apply_lora(model, kl.LoRAConfig(rank=4))
    randomize_adapters(model)
    model.compile(keras.optimizers.SGD(0.0), "mse")  # the values stay as they were
    fit(model, epochs=1)
    before = {p: np.array(x.kernel) for p, x in kl.lora_layers(model).items()}
    calls = counter.calls
    callback = schedule()
    fit(model, Scores([3, 2, 2]), callback, epochs=3)
    assert [trial.kept for trial in callback.trials] == [True, False]
    for path, layer in kl.lora_layers(model).items():
        np.testing.assert_allclose(np.array(layer.kernel), before[path], rtol=1e-6)
    if keras.backend.backend() == "tensorflow":
        assert counter.calls == calls


@pytest.mark.parametrize(
    ("values", "after"),
    [
        ([3, 3, 3, 3], BATCHES + 2),
        ([3, 3, 2, 3], 2 * BATCHES + 1),
        ([3, 2, 3, 3], 3 * BATCHES + 4),
    ],
)
def test_a_broken_run_goes_on_as_an_unbroken_one(
    values: Sequence[float], after: int, tmp_path: Path
) -> None:
    def callbacks() -> list[Any]:
        own = schedule(directory=tmp_path / "ranks")
        return [Scores(values), own, kl.AdapterCheckpoint(tmp_path / "run", save_freq=2)]

    unbroken, whole = adapted(), schedule()
    fit(unbroken, Scores(values), whole, epochs=4)
    with pytest.raises(BrokenError):
        fit(adapted(), *callbacks(), BreakAfter(after), epochs=4)
    model, (scores, own, checkpoint) = adapted(2), callbacks()
    fit(model, scores, own, checkpoint, epochs=4)
    assert own.trials == whole.trials
    assert size(model) == size(unbroken)
    assert_same(trained(model), trained(unbroken))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience"),
        ({"tolerance": -1}, "tolerance"),
        ({"factor": 1.0}, "factor"),
        ({"mode": "up"}, "mode"),
    ],
)
def test_arguments_that_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(**options)


def test_what_fit_cannot_schedule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DoRA"):
        fit(adapted(use_dora=True), schedule())
    with pytest.raises(ValueError, match="by element"):
        fit(adapted(optimizer="adafactor"), schedule())
    with pytest.raises(ValueError, match="monitor.*loss"):
        fit(adapted(), schedule())
    model = adapted()
    kl.set_adapter(model, None)
    with pytest.raises(ValueError, match="set_adapter"):
        fit(model, schedule())
    (tmp_path / "rank_schedule.json").write_text('{"1": 3}')
    with pytest.raises(kl.AdapterFileError, match="start anew"):
        fit(adapted(), schedule(directory=tmp_path))


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    fit(adapted(), Scores([3, 3, 3]), schedule(directory=tmp_path), epochs=3)
    model = adapted()
    randomize_adapters(model)
    with pytest.raises(ValueError, match="that was trained"):
        fit(model, Scores([3] * 4), schedule(directory=tmp_path), epochs=4, initial_epoch=3)
