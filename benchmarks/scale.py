"""How costs grow: with adapted layers, adapters, rank, width, depth and length.

    python benchmarks/scale.py [--parts layers adapters step] [--tiny] [--check]

    cost ~ size ** exponent        least squares of the logarithms

`layers`: CPU seconds of the verbs on models of 625 to 5,000 adapted `Dense` layers of width 2,
where arithmetic is nothing. `adapters`: all of 8 to 500 adapters added to a model of 25 such
layers, switched to in turn, and saved. `step`: a training step of a BERT-shaped encoder, with one
size changed at a time; the product of a matrix of width w and t tokens grows with w squared and t,
and attention with t squared. CPU seconds are those of all threads, the least of `--rounds`.
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
import gc
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from encoder import classifier, compiled, fixed_batch
from rich.console import Console
from rich.table import Table
from timing import Bars, print_bars

import keras_lora as kl

MOST = 1.1  # the exponent of what should be linear
IN_A_BLOCK = 25
CONFIG = kl.LoRAConfig(rank=1, targets="all")

Action = Callable[[], object]
Costs = dict[str, dict[int, float]]  # CPU seconds by what is done and its size


class Block(keras.layers.Layer):
    """Layers of width 2, one after the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.denses = [keras.layers.Dense(2) for _ in range(count)]

    def build(self, input_shape: Sequence[int | None]) -> None:
        for dense in self.denses:
            dense.build(input_shape)

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        for dense in self.denses:
            x = dense(x)
        return x


def deep(layers: int) -> keras.Model:
    x = inputs = keras.Input((2,))
    for _ in range(layers // IN_A_BLOCK):
        x = Block(IN_A_BLOCK)(x)
    return keras.Model(inputs, x)


def seconds(action: Action) -> float:
    """CPU seconds of all threads."""
    gc.collect()
    start = time.process_time()
    action()
    return time.process_time() - start


def exponent(costs: Mapping[int, float]) -> float:
    """The slope of the costs' logarithms over those of the sizes."""
    return float(np.polyfit(np.log(list(costs)), np.log(list(costs.values())), 1)[0])


def least(
    measure: Callable[[int], Mapping[str, float]], sizes: Sequence[int], rounds: int
) -> Costs:
    """The least cost of each action at each size. The sizes take turns."""
    costs: Costs = {}
    for _ in range(rounds):
        for size in sizes:
            for name, cost in measure(size).items():
                known = costs.setdefault(name, {})
                known[size] = min(cost, known.get(size, cost))
    return costs


def verbs(layers: int) -> dict[str, float]:
    """The costs of verbs on a model of that many layers."""
    model = deep(layers)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Merging drops the adapters")
        actions: dict[str, Action] = {
            "apply_lora": lambda: kl.apply_lora(model, CONFIG),
            "apply_lora, a second adapter": lambda: kl.apply_lora(model, CONFIG, name="second"),
            "set_adapter": lambda: kl.set_adapter(model, "default"),
            "save_adapter": lambda: kl.save_adapter(model, f"{folder}/saved"),
            "load_adapter": lambda: kl.load_adapter(model, f"{folder}/saved", name="loaded"),
            "merge_lora": lambda: kl.merge_lora(model),
        }
        return {name: seconds(action) for name, action in actions.items()}


def many(adapters: int) -> dict[str, float]:
    """The costs of that many adapters on one model, all together."""
    model = deep(IN_A_BLOCK)
    names = [f"task_{index}" for index in range(adapters)]

    def each(verb: Callable[[str], object]) -> Action:
        return lambda: [verb(name) for name in names]

    with tempfile.TemporaryDirectory() as folder:
        actions = {
            "apply_lora": each(lambda name: kl.apply_lora(model, CONFIG, name=name)),
            "set_adapter": each(lambda name: kl.set_adapter(model, name)),
            "save_adapter": each(lambda n: kl.save_adapter(model, f"{folder}/{n}", name=n)),
        }
        return {name: seconds(action) for name, action in actions.items()}


def stepping(args: argparse.Namespace, rank: int = 8) -> float:
    """The least cost of three training steps, after two that are not measured."""
    model = classifier(args)
    kl.apply_lora(model, kl.LoRAConfig(rank=rank))
    compiled(model, jit=False)
    x, y = fixed_batch(args)
    for _ in range(2):
        model.train_on_batch(x, y)
    return min(seconds(lambda: model.train_on_batch(x, y)) for _ in range(3))


def shape(**sizes: int) -> argparse.Namespace:
    usual = {"layers": 2, "width": 256, "batch": 4, "length": 128, "vocabulary": 1009}
    return argparse.Namespace(**{**usual, "dropout": 0.0, **sizes})


def step_costs(rounds: int, tiny: bool) -> Costs:
    by_size: dict[str, tuple[Callable[[int], float], list[int]]] = {
        "rank": (lambda n: stepping(shape(), rank=n), [1, 4, 16, 64]),
        "width": (lambda n: stepping(shape(width=n)), [256, 512, 1024]),
        "depth": (lambda n: stepping(shape(layers=n)), [2, 4, 8]),
        "length": (lambda n: stepping(shape(length=n)), [128, 256, 512]),
    }
    costs: Costs = {}
    for name, (measure, sizes) in by_size.items():
        costs |= least(named(name, measure), sizes[:2] if tiny else sizes, rounds)
    return costs


def named(name: str, measure: Callable[[int], float]) -> Callable[[int], dict[str, float]]:
    return lambda size: {name: measure(size)}


def costs_of(part: str, args: argparse.Namespace) -> Costs:
    if part == "layers":
        return least(verbs, [25, 50] if args.tiny else [625, 1250, 2500, 5000], args.rounds)
    if part == "adapters":
        return least(many, [2, 4] if args.tiny else [8, 32, 128, 500], args.rounds)
    return step_costs(args.rounds, args.tiny)


def print_costs(part: str, costs: Costs) -> None:
    table = Table(part, "sizes", "CPU s", "exponent")
    for name, by_size in costs.items():
        cells = (
            ", ".join(f"{n:,}" for n in by_size),
            ", ".join(f"{s:.3g}" for s in by_size.values()),
        )
        table.add_row(name, *cells, f"{exponent(by_size):.3f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parts = ["layers", "adapters", "step"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="small sizes; bars mean nothing")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    args = parser.parse_args()
    bars: Bars = {}
    for part in args.parts:
        costs = costs_of(part, args)
        print_costs(part, costs)
        if part != "step":
            bars |= {f"{part}, {n}": (exponent(by), 0.0, MOST) for n, by in costs.items()}
    if not print_bars(bars) and args.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
