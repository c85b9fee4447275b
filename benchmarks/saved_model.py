"""Serving many adapters: latency, memory and disk of exported models, in TensorFlow's C library.

    python benchmarks/saved_model.py [--check]

A BERT-shaped KerasHub encoder with a classifier, adapters of rank 8 on attention. It is exported
plain, merged, and with 8 and 256 adapters. A process of its own (`saved_model_process.py`) loads
all and answers batches; the rows of a batch ask for different adapters. Then, for 1 to 256 tasks,
the memory and throughput of one model of many adapters against one merged model for each task,
which gets a request of one row. If the merged models do not fit into memory, as many are loaded as
fit, and their mean is multiplied: such figures are marked with ≈.
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
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from encoder import add_shape, classifier, fixed_batch
from rich.console import Console
from rich.table import Table
from timing import Bars, Seconds, Times, print_bars, print_times, ratio

import keras_lora as kl

MIB = 2**20
# By number of adapters: the highest ratio of its latency to the merged model's.
LATENCY_BARS = {8: 1.25, 256: 1.35}


class Loaded(NamedTuple):
    """How often a process loads a model, and the adapters that its rows ask for."""

    copies: int = 1
    adapters: list[str] = []  # noqa: RUF012


class Measured(NamedTuple):
    memory: dict[str, int]
    times: Times


def with_adapters(model: keras.Model, count: int, rank: int) -> list[str]:
    """Add `count` adapters of random values to the attention layers; returns their names."""
    names = [f"task-{i}" for i in range(count)]
    rng = np.random.default_rng(0)
    for name in names:
        kl.apply_lora(model, kl.LoRAConfig(rank=rank, targets="attention"), name=name)
        for layer in kl.lora_layers(model).values():
            for factor in layer.adapters[name].factors:
                factor.assign(rng.normal(scale=0.02, size=factor.shape).astype("float32"))
    return names


def export(args: argparse.Namespace, folder: Path) -> list[str]:
    """Write `base`, `merged` and each `many-<number of adapters>`; returns the adapters' names."""
    model = classifier(args)
    kl.export_saved_model(model, folder / "base")
    names = with_adapters(model, max(args.loaded), args.rank)
    kl.export_saved_model(model, folder / "merged")
    for count in args.loaded:
        kl.export_saved_model(model, folder / f"many-{count}", adapters=names[:count])
    return names


def measure(
    folder: Path, models: dict[str, Loaded], inputs: str, batch: int, rounds: int
) -> Measured:
    """Load and time these models in a process of its own."""
    listed = {name: {"path": str(folder / name), **m._asdict()} for name, m in models.items()}
    order = {"inputs": inputs, "batch": batch, "rounds": rounds, "models": listed}
    (folder / "order.json").write_text(json.dumps(order))
    script = Path(__file__).with_name("saved_model_process.py")
    command = [sys.executable, str(script), str(folder / "order.json")]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = json.loads(printed.splitlines()[-1])
    times = {name: [Seconds(*s) for s in each] for name, each in found["times"].items()}
    return Measured(found["memory"], times)


def on_disk(path: Path) -> int:
    """The bytes of a SavedModel's weights."""
    return sum(file.stat().st_size for file in path.rglob("*.data-*"))


def adapter_bytes(args: argparse.Namespace) -> int:
    """The bytes of one adapter: on each layer four kernels `(d, d)`, float32."""
    return int(args.layers * 4 * 2 * args.rank * args.width * 4)


def check_sizes(args: argparse.Namespace, folder: Path, measured: Measured) -> Bars:
    table = Table("", "MiB on disk", "MiB in memory", title="weights")
    bars: Bars = {}
    for name, memory in measured.memory.items():
        table.add_row(name, f"{on_disk(folder / name) / MIB:.1f}", f"{memory / MIB:.1f}")
    for count in args.loaded:
        name, extra = f"many-{count}", count * adapter_bytes(args)
        disk = on_disk(folder / name) / (on_disk(folder / "base") + extra)
        bars[f"{count} adapters, disk / (base + adapters)"] = disk, 0.98, 1.02
        memory = measured.memory[name] / (measured.memory["base"] + extra)
        bars[f"{count} adapters, memory / (base + adapters)"] = memory, 0.9, 1.1
    Console().print(table)
    return bars


def latencies(args: argparse.Namespace, times: Times) -> Bars:
    print_times(f"a batch of {args.batch} x {args.length} tokens", times, "merged")
    bars: Bars = {"merged / base": (ratio(times, "merged", "base"), 0.97, 1.03)}
    for count in args.loaded:
        value = ratio(times, f"many-{count}", "merged")
        bars[f"{count} adapters / merged"] = value, 0, LATENCY_BARS.get(count, 1.35)
    return bars


def compare(args: argparse.Namespace, folder: Path, inputs: str, names: list[str]) -> None:
    """One model for all tasks against one merged model for each."""
    table = Table("tasks", title="a row for each task: one model of many adapters, merged models")
    for column in ("MiB, one model", "rows/s", "MiB, merged models", "rows/s"):
        table.add_column(column)
    size = on_disk(folder / "merged")
    holds = max(args.loaded)
    for tasks in args.tasks:
        batch = min(tasks, args.batch)
        many = {f"many-{holds}": Loaded(adapters=names[:batch])}
        one = measure(folder, many, inputs, batch, args.rounds)
        copies = max(1, min(tasks, int(args.memory * MIB / size)))
        each = measure(folder, {"merged": Loaded(copies)}, inputs, 1, args.rounds)
        mark = "" if copies == tasks else "≈"
        table.add_row(
            str(tasks),
            f"{one.memory[f'many-{holds}'] / MIB:.0f}",
            f"{batch / _seconds(one):.1f}",
            f"{mark}{each.memory['merged'] / copies * tasks / MIB:.0f}",
            f"{mark}{copies / _seconds(each):.1f}",
        )
    Console().print(table)


def _seconds(measured: Measured) -> float:
    (rounds,) = measured.times.values()
    return median(s.wall for s in rounds)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_shape(parser, layers=12)
    parser.set_defaults(batch=32, dropout=0.0)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--loaded", type=int, nargs="+", default=[8, 256], help="adapters")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--memory", type=int, default=12_000, help="MiB for merged models at most")
    parser.add_argument("--rounds", type=int, default=7, help="after 2 that do not count")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    keras.utils.set_random_seed(0)
    with tempfile.TemporaryDirectory() as created:
        folder = Path(created)
        names = export(args, folder)
        inputs = str(folder / "inputs.npz")
        np.savez(inputs, **fixed_batch(args)[0])
        models = {"base": Loaded(), "merged": Loaded()}
        for count in args.loaded:
            models[f"many-{count}"] = Loaded(adapters=names[: min(count, args.batch)])
        measured = measure(folder, models, inputs, args.batch, args.rounds)
        bars = latencies(args, measured.times) | check_sizes(args, folder, measured)
        compare(args, folder, inputs, names)
    met = print_bars(bars)
    if args.check and not met:
        sys.exit(1)


if __name__ == "__main__":
    main()
