"""Fifty adapters on one model, and adapters in files.

    python benchmarks/adapters.py [--check]

The time, the added memory and the bytes read of `load_adapter` on a Llama-shaped model of a billion
parameters. Then three BERT-shaped KerasHub classifiers with 50, 2 and 1 adapters of rank 8, one of
them active: a `predict` and a training step, and `set_adapter`, without an optimizer and with one
whose moments move too. For both kinds of model, the sizes of the adapter's files. Linux with glibc
only.
"""

from __future__ import annotations

import os

from keras_lora_cli.quiet import silenced

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

with silenced():
    import keras

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from statistics import median

from encoder import add_shape, classifier, compiled, fixed_batch
from merged import predicting, training
from resident import MIB, billion, forget_peak, read_so_far, resident
from timing import Bars, Step, interleaved, print_bars, print_times, ratio

import keras_lora as kl

MOST_SLOWER = 1.05
MOST_MEMORY = 3.0  # times the adapter
SLACK = 2**16  # bytes that are read for modules imported late, and by the counter itself
TENSORS, CONFIG = "adapter.safetensors", "adapter_config.json"


def with_adapters(model: keras.Model, count: int) -> keras.Model:
    for name in names(count):
        kl.apply_lora(model, kl.LoRAConfig(rank=8), name=name)
        randomize(model, name)
    return model


def names(count: int) -> list[str]:
    return [f"task_{index}" for index in range(count)]


def randomize(model: keras.Model, name: str) -> None:
    for layer in kl.lora_layers(model).values():
        for factor in layer.adapters[name].factors:
            factor.assign(keras.random.normal(factor.shape, stddev=0.02))


def steps(models: Mapping[str, keras.Model], many: str, args: argparse.Namespace) -> Bars:
    """A step of a model with many adapters against a model with one, the active one in both."""
    bars: Bars = {}
    for what, make in (("predict", predicting), ("train", training)):
        times = interleaved({name: make(model, args) for name, model in models.items()}, args.steps)
        print_times(f"{what}, {args.layers} x {args.width}", times, many)
        for other in models.keys() - {many}:
            bars[f"{what}: {many} / {other}"] = (ratio(times, many, other), 0.0, MOST_SLOWER)
    return bars


def switching(model: keras.Model, count: int) -> Step:
    """Switches to each adapter in turn. All are active once before, so that none is new."""
    for name in names(count):
        kl.set_adapter(model, name)
    turns = cycle(names(count))

    def step() -> None:
        kl.set_adapter(model, next(turns))

    return step


def switches(models: Mapping[int, keras.Model], optimizer: str, args: argparse.Namespace) -> Bars:
    """The time of `set_adapter` on a model with many adapters, against a model with few."""
    many, few = max(models), min(models)
    calls = {f"among {count}": switching(model, count) for count, model in models.items()}
    times = interleaved(calls, args.switches)
    for name, seconds in times.items():
        call, layers = median(s.wall for s in seconds), len(kl.lora_layers(models[many]))
        print(
            f"set_adapter {name}, {optimizer}: {call * 1e3:.2f} ms for {layers} layers, "
            f"{call / layers * 1e6:.0f} us a layer"
        )
    value = ratio(times, f"among {many}", f"among {few}")
    return {f"set_adapter, {optimizer}: among {many} / {few}": (value, 0.0, MOST_SLOWER)}


def switched(args: argparse.Namespace) -> Bars:
    """All bars of the small models."""
    keras.utils.set_random_seed(0)
    models = {n: with_adapters(classifier(args), n) for n in (args.adapters, 2, 1)}
    for model in models.values():
        kl.set_adapter(model, "task_0")
    pair = {n: models[n] for n in (args.adapters, 2)}
    bars = switches(pair, "no optimizer", args)
    for model in models.values():
        kl.set_adapter(model, "task_0")
        compiled(model, args.jit)
    many = f"{args.adapters} adapters"
    bars |= steps({many: models[args.adapters], "one": models[1]}, many, args)
    models[2].train_on_batch(*fixed_batch(args))
    bars |= switches(pair, "Adam built", args)
    with tempfile.TemporaryDirectory() as folder:
        kl.save_adapter(models[1], folder, "task_0")
        return bars | file_size(f"{args.layers} x {args.width}", models[1], Path(folder))


def file_size(title: str, model: keras.Model, folder: Path) -> Bars:
    count = parameters(model)
    tensors, config = ((folder / name).stat().st_size for name in (TENSORS, CONFIG))
    print(f"{title}: {count:,} parameters, {TENSORS} {tensors:,} bytes, {CONFIG} {config:,}")
    most = 1.02 + 4096 / (4 * count)
    return {f"{title}: {TENSORS} / 4 bytes a parameter": (tensors / (4 * count), 0.0, most)}


def parameters(model: keras.Model) -> int:
    return sum(x.adapters["task_0"].parameters for x in kl.lora_layers(model).values())


def loaded(args: argparse.Namespace) -> Bars:
    """All bars of the large model."""
    model = with_adapters(billion(args.large_layers, args.large_width), 1)
    with tempfile.TemporaryDirectory() as folder:
        kl.save_adapter(model, folder, "task_0")
        title = f"{model.count_params():,} parameters"
        adapter = 4 * parameters(model)
        bars = file_size(title, model, Path(folder))
        kl.unload_lora(model)
        forget_peak()
        before, read, start = resident("VmRSS"), read_so_far(), time.perf_counter()
        kl.load_adapter(model, folder, "task_0")
        seconds, read = time.perf_counter() - start, read_so_far() - read
        peak = resident("VmHWM") - before
        files = sum(file.stat().st_size for file in Path(folder).iterdir())
    if peak < adapter:
        sys.exit("The measurement failed: the adapter took memory that was resident before.")
    print(
        f"load_adapter: {len(kl.lora_layers(model))} layers in {seconds:.2f} s, "
        f"peak +{peak / MIB:.1f} MiB, {read / MIB:.2f} MiB read of files of {files / MIB:.2f} MiB"
    )
    bars["load_adapter: peak / adapter"] = (peak / adapter, 0.0, MOST_MEMORY)
    bars["load_adapter: MiB read"] = (read / MIB, 0.0, (files + SLACK) / MIB)
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_shape(parser, layers=4)
    parser.set_defaults(width=256)
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--steps", type=int, default=40, help="rounds, after 2 that do not count")
    parser.add_argument("--switches", type=int, default=200, help="calls of set_adapter")
    parser.add_argument("--jit", action="store_true", help="compile with XLA")
    parser.add_argument("--large-layers", type=int, default=16, help="of the large model")
    parser.add_argument("--large-width", type=int, default=2048, help="a multiple of 256")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    args = parser.parse_args()

    # The large model first: a call that reuses freed memory would seem to take none.
    met = print_bars(loaded(args) | switched(args))
    if args.check and not met:
        sys.exit(1)


if __name__ == "__main__":
    main()
