"""The memory of a training step, and a billion parameters on one machine.

    python benchmarks/memory.py [--length 2048] [--sparing] [--jit] [--tiny] [--check]
    python benchmarks/memory.py --interleaved [--length 2048] [--steps 3]
    python benchmarks/memory.py --billion [--dtype bfloat16] [--quantized int8]

A Llama-shaped KerasHub language model with random weights (8 layers of 1,024, a vocabulary of
8,000), all linear layers adapted at rank 8, Adam, in a process for each row: as it is, with blocks
rematerialized, with logits in chunks of 512 tokens too, and with a base in 8 or 4 bits. The memory
is the peak resident size during the steps minus the size when everything was imported, so it counts
weights, activations and what TensorFlow keeps. The making of the model does not count: one that is
quantized is whole before. The weights are the bytes of the backbone, adapters too. Rows of
`--sparing` have the two settings of docs/memory.md, by which TensorFlow takes less. With
`--interleaved`, steps of LoRA and of `enable_lora` are timed in turn, in one process.

With `--billion`, a model of 1.1 billion parameters is adapted, trained with `fit` and
`AdapterCheckpoint`, resumed, and merged, each in a process of its own, whose whole peak counts. A
row that comes to more than `--most` GiB is stopped there. Linux with glibc only.
"""

from __future__ import annotations

import os

from keras_lora_cli.quiet import silenced

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

with silenced():
    import keras
    import keras_hub

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from encoder import quantize, train_only, with_everything
from resident import MIB, SPARING, billion, forget_peak, resident, size
from rich.console import Console
from rich.table import Table
from timing import Bars, Step, interleaved, print_bars, print_times, ratio

import keras_lora as kl

RANK = 8
MOST_GIB = 12.0  # for the model of a billion parameters


def adapted(model: keras.Model) -> None:
    kl.apply_lora(model, kl.LoRAConfig(rank=RANK))


def enabled(model: keras.Model) -> None:
    for target in kl.find_targets(model):
        target.layer.enable_lora(RANK)
    train_only(model, lambda variable: "lora_" in variable.name)


@dataclass(frozen=True)
class Variant:
    """How a model is trained, and the mode that its base is quantized in."""

    prepare: Callable[[keras.Model], None] = adapted
    blocks: bool = False
    chunks: bool = False
    quantized: str | None = None


VARIANTS = {
    "LoRA": Variant(),
    "LoRA, blocks": Variant(blocks=True),
    "LoRA, blocks, chunks": Variant(blocks=True, chunks=True),
    "int8": Variant(quantized="int8"),
    "int4": Variant(quantized="int4"),
    "int4, blocks, chunks": Variant(blocks=True, chunks=True, quantized="int4"),
    "enable_lora": Variant(enabled),
    "full": Variant(with_everything),
    "full, blocks, chunks": Variant(with_everything, blocks=True, chunks=True),
}
# The first variant's figure as a share of the second's, and the bar.
BARS = {
    ("LoRA, blocks, chunks", "LoRA", "peak"): 0.35,
    ("LoRA, blocks, chunks", "LoRA", "seconds"): 1.35,
    ("int8", "LoRA", "weights"): 0.30,
    ("int4", "LoRA", "weights"): 0.20,
    ("int4, blocks, chunks", "enable_lora", "peak"): 0.20,
}


def llama(args: argparse.Namespace) -> keras.Model:
    return keras_hub.models.LlamaBackbone(
        vocabulary_size=args.vocabulary,
        num_layers=args.layers,
        num_query_heads=args.width // 64,
        num_key_value_heads=max(1, args.width // 256),
        hidden_dim=args.width,
        intermediate_dim=11 * args.width // 4,
        dtype=args.dtype,
    )


def language_model(args: argparse.Namespace, variant: Variant) -> keras.Model:
    """The model as the variant trains it."""
    keras.utils.set_random_seed(0)
    backbone = billion(args.layers, args.width, args.dtype) if args.billion else llama(args)
    model = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    if variant.quantized:
        quantize(model, variant.quantized)
    variant.prepare(model)
    if variant.blocks:
        kl.rematerialize(model)
    if variant.chunks:
        kl.chunk_logits(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss, jit_compile=args.jit, weighted_metrics=[])
    return model


def batch(args: argparse.Namespace) -> tuple[dict[str, np.ndarray], np.ndarray]:
    shape = (args.batch, args.length)
    tokens = np.random.default_rng(0).integers(1, args.vocabulary, shape, "int32")
    return {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}, tokens


def steps(args: argparse.Namespace, model: keras.Model) -> dict[str, Any]:
    """The loss and the seconds of training steps, the first of which is not timed."""
    x, y = batch(args)
    losses, times = [], []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        losses.append(float(np.ravel(model.train_on_batch(x, y))[0]))
        times.append(time.perf_counter() - start)
    return {"loss": losses[-1], "seconds": median(times[1:] or times)}


def in_turn(args: argparse.Namespace) -> Bars:
    """The time of a step of LoRA against `enable_lora`, of both in this process."""
    x, y = batch(args)

    def stepper(name: str) -> Step:
        model = language_model(args, VARIANTS[name])

        def step() -> None:
            model.train_on_batch(x, y)

        return step

    times = interleaved({n: stepper(n) for n in ("LoRA", "enable_lora")}, args.steps, warmups=1)
    print_times(title_of(args), times, "LoRA")
    return {"LoRA / enable_lora, wall time": (ratio(times, "LoRA", "enable_lora"), 0.0, 0.92)}


def title_of(args: argparse.Namespace) -> str:
    title = f"{args.layers} layers of {args.width}, {args.dtype}, {args.batch} x {args.length}"
    sparing = ", sparing" if args.sparing else ""
    return f"A training step, {title}, XLA {'on' if args.jit else 'off'}{sparing}"


def in_this_process(args: argparse.Namespace) -> None:
    """One row, printed as JSON."""
    forget_peak()
    before = resident("VmRSS")
    figures = STAGES[args.only](args) if args.billion else row(args, VARIANTS[args.only])
    print(json.dumps({**figures, "peak": resident("VmHWM") - before}))


def row(args: argparse.Namespace, variant: Variant) -> dict[str, Any]:
    model = language_model(args, variant)
    forget_peak()
    return {"weights": size(model.backbone.variables), **steps(args, model)}


def measured(args: argparse.Namespace, only: str) -> dict[str, Any]:
    """One row, from a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", only, "--folder", args.folder]
    settings = {**os.environ, **(SPARING if args.sparing else {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=settings) as child:
        while child.poll() is None:
            if resident("VmRSS", child.pid) > 1024 * MIB * args.most:
                child.kill()
                return {"stopped": True, "peak": 1024 * MIB * args.most}
            time.sleep(0.1)
        output, _ = child.communicate()
    if child.returncode:
        raise RuntimeError(f"Expected figures of {only!r}. Received: status {child.returncode}.")
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return figures


def fitted(args: argparse.Namespace, epochs: int) -> dict[str, Any]:
    model = language_model(args, Variant(blocks=True, chunks=True, quantized=args.quantized))
    x, y = batch(args)
    checkpoint = kl.AdapterCheckpoint(args.folder, monitor="loss")
    start = time.perf_counter()
    options = {"batch_size": args.batch, "epochs": epochs, "shuffle": False}
    history = model.fit(x, y, **options, callbacks=[checkpoint], verbose=0)
    seconds = (time.perf_counter() - start) / len(history.epoch)
    np.save(f"{args.folder}/outputs.npy", outputs(model))
    weights = size(model.backbone.variables)
    return {"weights": weights, "loss": history.history["loss"][-1], "seconds": seconds}


def outputs(model: keras.Model) -> np.ndarray:
    ids = np.arange(1, 8, dtype="int32")[None]
    logits = model({"token_ids": ids, "padding_mask": np.ones_like(ids)}, training=False)
    array: np.ndarray = keras.ops.convert_to_numpy(keras.ops.cast(logits, "float32"))
    return array


def merged(args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    model = language_model(args, Variant(with_everything, quantized=args.quantized))
    kl.load_adapter(model, args.folder)
    options: dict[str, Any] = {"quantized": "dequantize"} if args.quantized else {}
    kl.merge_lora(model, **options)
    drift = np.abs(outputs(model) - np.load(f"{args.folder}/outputs.npy")).max()
    weights = size(model.backbone.variables)
    return {"weights": weights, "loss": float(drift), "seconds": time.perf_counter() - start}


STAGES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "adapt, train, save": lambda args: fitted(args, 1),
    "resume": lambda args: fitted(args, 2),
    "load, merge (loss: largest difference)": merged,
    "enable_lora": lambda args: row(args, Variant(enabled, quantized=args.quantized)),
}


def print_rows(rows: dict[str, dict[str, Any]], title: str) -> None:
    table = Table("", "weights MiB", "peak MiB", "of the first", "s a step", "loss", title=title)
    first = next(iter(rows.values()))
    for name, figures in rows.items():
        if "stopped" in figures:
            table.add_row(name, "", f"stopped at {figures['peak'] / MIB:,.0f}")
            continue
        sizes = [f"{figures[key] / MIB:,.0f}" for key in ("weights", "peak")]
        share = f"{figures['peak'] / first['peak']:.3f}"
        table.add_row(name, *sizes, share, f"{figures['seconds']:.2f}", f"{figures['loss']:.4f}")
    Console().print(table)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int, help="a multiple of 64; with --billion of 256")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int, default=2048, help="tokens")
    parser.add_argument("--steps", type=int, default=1, help="after one that is not timed")
    parser.add_argument("--dtype", help="of the base, such as bfloat16")
    parser.add_argument("--quantized", help="with --billion: the mode of the base, such as int8")
    parser.add_argument("--jit", action="store_true", help="with XLA")
    parser.add_argument("--sparing", action="store_true", help="with settings that save memory")
    parser.add_argument("--most", type=float, default=18.0, help="GiB that a row may come to")
    parser.add_argument("--interleaved", action="store_true", help="time LoRA and enable_lora")
    parser.add_argument("--billion", action="store_true", help="stages of a model of 1.1 billion")
    parser.add_argument(
        "--tiny", action="store_true", help="small enough for CI; bars mean nothing"
    )
    parser.add_argument("--variants", nargs="+", help="rows; with --billion stages")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    sizes = {"layers": 8, "width": 1024, "vocabulary": 8000, "batch": 2, "dtype": "float32"}
    if args.billion:
        larger = {"layers": 16, "width": 2048, "vocabulary": 32000, "batch": 1}
        sizes |= {**larger, "dtype": "bfloat16"}
    if args.tiny:
        sizes |= {"layers": 2, "width": 256}
        args.length = 64
    for name, value in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def bars(args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> Bars:
    if args.billion:
        trained = [figures["peak"] for name, figures in rows.items() if name != "enable_lora"]
        return {"largest stage, GiB": (max(trained) / MIB / 1024, 0.0, MOST_GIB)} if trained else {}
    return {
        f"{name} / {other}, {key}": (rows[name][key] / rows[other][key], 0.0, highest)
        for (name, other, key), highest in BARS.items()
        if key in rows.get(name, {}) and key in rows.get(other, {})
    }


def in_processes(args: argparse.Namespace) -> Bars:
    names = args.variants or list(STAGES if args.billion else VARIANTS)
    with tempfile.TemporaryDirectory() as args.folder:
        rows = {name: measured(args, name) for name in names}
    print_rows(rows, title_of(args))
    return bars(args, rows)


def main() -> None:
    args = arguments()
    if args.only:
        in_this_process(args)
        return
    found = in_turn(args) if args.interleaved else in_processes(args)
    if not print_bars(found) and args.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
