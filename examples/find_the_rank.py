"""Which rank does a task need? From a large one to the smallest that suffices.

    python examples/find_the_rank.py            # 96 steps
    python examples/find_the_rank.py --quick    # few steps: only whether everything works

A pretrained MiniLM (22.7M parameters) learns Rotten Tomatoes, film reviews that are favourable or
not, with adapters of rank 64. `rank_report` shows how much of that rank is used. `shrink_adapter`
then halves the rank, down to 1, and each size is scored on validation rows; the smallest that loses
at most half a point against the largest is chosen, and scored on test rows. At the end an adapter
of that rank is trained from the beginning, for comparison. What `rank="auto"` would have taken is
printed too.

Two pictures are written: `ranks.png`, layers by ranks, and `find_the_rank.png`, accuracy by size.

Needs `pip install keras-lora[nlp,plot]`; downloads 97 MB on the first run (see `assets.py`).
"""

from __future__ import annotations

import os

from keras_lora_cli.quiet import silenced

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

with silenced():
    import keras

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import assets
from matplotlib.figure import Figure
from minilm import CONFIG, Data, classifier, tokenise
from rich.console import Console
from rich.table import Table
from training import (
    Steps,
    argument_parser,
    batches,
    compile_for_training,
    output_folder,
    progress_bars,
)

import keras_lora as kl

LENGTH, CLASSES = 32, 2
STEPS, QUICK_STEPS = 96, 3
# The rate that `text_classification.py --sweep` found for LoRA; the scale is 2 at every rank.
RATE = 2e-3
HIGHEST = 64
TOLERANCE = 0.005
SCORED_AT_ONCE = 100
QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Size:
    """An adapter of one rank: its parameters, heads apart, and its accuracy on validation rows."""

    rank: int
    parameters: int
    accuracy: float


def rows() -> tuple[Data, Data, Data]:
    """Tokenised rows to train on, to choose the rank on, and to score the chosen one on."""
    splits = assets.rotten_tomatoes()
    train, validation, test = (
        tokenise(part, LENGTH) for part in (splits.train, splits.validation, splits.test)
    )
    return train, validation, test


def trained(rank: int, train: Data, options: Namespace, console: Console) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = classifier(CLASSES)
    compile_for_training(model, jit=not options.quick)
    kl.apply_lora(model, replace(CONFIG, rank=rank, alpha=2 * rank))
    with progress_bars(console) as progress:
        steps = Steps(RATE, options.steps, progress, f"rank {rank}")
        data = batches(train.features, train.labels, options.steps, seed=0)
        model.fit(data, shuffle=False, verbose=0, callbacks=[steps])
    return model


def accuracy(model: keras.Model, data: Data) -> float:
    answers = model.predict(data.features, batch_size=SCORED_AT_ONCE, verbose=0)
    return data.accuracy(answers)


def parameters(model: keras.Model) -> int:
    return sum(row.parameters for row in kl.lora_summary(model, QUIET).rows)


def shrunk(model: keras.Model, validation: Data, folder: Path) -> list[Size]:
    """The sizes from the largest down, each of which is saved; nothing is trained again."""
    sizes, rank = [], HIGHEST
    while True:
        kl.save_adapter(model, folder / f"rank_{rank}", overwrite=True)
        sizes.append(Size(rank, parameters(model), accuracy(model, validation)))
        if rank == 1:
            return sizes
        rank //= 2
        kl.shrink_adapter(model, "default", rank=rank, console=QUIET)


def chosen(sizes: Sequence[Size]) -> Size:
    """The smallest size before the first that loses more than is allowed."""
    found = sizes[0]
    for size in sizes[1:]:
        if size.accuracy < sizes[0].accuracy - TOLERANCE:
            break
        found = size
    return found


def draw(sizes: Sequence[Size], size: Size, path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([x.parameters for x in sizes], [x.accuracy for x in sizes], marker="o")
    for each in sizes:
        axes.annotate(
            f"{each.rank}",
            (each.parameters, each.accuracy),
            xytext=(4, 4),
            textcoords="offset points",
        )
    axes.axhline(sizes[0].accuracy - TOLERANCE, linestyle="--", color="gray")
    axes.plot([size.parameters], [size.accuracy], marker="o", markersize=12, fillstyle="none")
    axes.set(xscale="log", xlabel="parameters of the adapter", ylabel="validation accuracy")
    figure.savefig(path, dpi=120)


def show(sizes: Sequence[Size], size: Size, console: Console) -> None:
    table = Table(title="One training, at the highest rank")
    for heading in ("rank", "parameters", "validation accuracy", ""):
        table.add_column(heading, justify="right")
    for each in sizes:
        cells = f"{each.rank}", f"{each.parameters:,}", f"{each.accuracy:.2%}"
        table.add_row(*cells, "chosen" if each is size else "")
    console.print(table)


def parse(arguments: Sequence[str] | None) -> Namespace:
    parser = argument_parser(__doc__, STEPS)
    parser.add_argument("--quick", action="store_true", help="few steps: only whether all works")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps = QUICK_STEPS
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options, console = parse(arguments), Console()
    train, validation, test = rows()
    with output_folder(options.out) as folder:
        model = trained(HIGHEST, train, options, console)
        kl.rank_report(model, plot=folder / "ranks.png", console=console)
        sizes = shrunk(model, validation, folder)
        size = chosen(sizes)
        show(sizes, size, console)
        draw(sizes, size, folder / "find_the_rank.png")
        kl.load_adapter(model, folder / f"rank_{size.rank}", replace=True)
        truncated = accuracy(model, test)
    low = accuracy(trained(size.rank, train, options, console), test)
    console.print(f"Test accuracy, trained at rank {HIGHEST}, cut to {size.rank}: {truncated:.2%}")
    console.print(f"Test accuracy, trained at rank {size.rank}: {low:.2%}")
    auto = classifier(CLASSES)
    data = batches(train.features, train.labels, options.steps, seed=0)
    kl.apply_lora(auto, replace(CONFIG, rank="auto", alpha="auto"), data=data)
    console.print(f"Left to the library: {kl.lora_summary(auto, QUIET).settled['default']}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
