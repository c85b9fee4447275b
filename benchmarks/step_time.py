"""Time of a training step: keras_lora, Keras's `enable_lora`, full fine-tuning, and PEFT.

    python benchmarks/step_time.py [--peft] [--check]

A BERT-shaped KerasHub encoder with random weights and a classifier of two classes, Adam, one
fixed batch, dropout 0.1 as KerasHub has it. `keras_lora` and `enable_lora` adapt the same
layers at rank 8, with alpha 16, and train the classifier beside them; `dora` is `keras_lora` with
a magnitude of each output. In the *floor* only the position embedding trains: gradients flow to
the bottom through Keras's own layers and no gradient of a kernel is taken, so no LoRA without a
rewrite of these layers is faster.
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
import contextlib
import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from encoder import (
    CLASSES,
    HEAD,
    add_shape,
    classifier,
    compiled,
    fixed_batch,
    train_only,
    with_everything,
)
from timing import Bars, Seconds, Step, interleaved, print_bars, print_times, ratio

import keras_lora as kl

RANK, ALPHA = 8, 16.0


def with_keras_lora(model: keras.Model) -> None:
    kl.apply_lora(model, kl.LoRAConfig(rank=RANK, alpha=ALPHA, layers_to_save=[HEAD]))


def with_dora(model: keras.Model) -> None:
    config = kl.LoRAConfig(rank=RANK, alpha=ALPHA, layers_to_save=[HEAD], use_dora=True)
    kl.apply_lora(model, config)


def with_enable_lora(model: keras.Model) -> None:
    targets = [target.layer for target in kl.find_targets(model)]
    for layer in targets:
        layer.enable_lora(RANK, lora_alpha=ALPHA)
    train_only(model, lambda v: "lora_" in v.name or f"{HEAD}/" in v.path)


def with_nothing_but_positions(model: keras.Model) -> None:
    train_only(model, lambda v: "position_embedding" in v.path)


VARIANTS: dict[str, Callable[[keras.Model], None]] = {
    "keras_lora": with_keras_lora,
    "dora": with_dora,
    "enable_lora": with_enable_lora,
    "floor": with_nothing_but_positions,
    "full": with_everything,
}


def stepper(args: argparse.Namespace, name: str, jit: bool) -> Step:
    keras.utils.set_random_seed(0)
    model = classifier(args)
    VARIANTS[name](model)
    compiled(model, jit)
    x, y = fixed_batch(args)
    trained = sum(math.prod(v.shape) for v in model.trainable_variables)
    print(f"{name}: {trained:,} of {model.count_params():,} train")

    def step() -> None:
        model.train_on_batch(x, y)

    return step


@contextlib.contextmanager
def peft_stepper(args: argparse.Namespace) -> Iterator[Step]:
    """A second process, which makes one step when asked and idles otherwise.

    Its OpenMP threads sleep while they wait. Spinning, the default, would slow it several times
    on a machine that does other work too.
    """
    settings = {**vars(args), "rank": RANK, "alpha": ALPHA, "classes": CLASSES}
    command = [sys.executable, str(Path(__file__).with_name("peft_step.py")), json.dumps(settings)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        requests, answers = child.stdin, child.stdout
        print(answers.readline().strip())

        def step() -> Seconds:
            requests.write("step\n")
            requests.flush()
            wall, cpu = answers.readline().split()
            return Seconds(float(wall), float(cpu))

        yield step
        requests.close()  # the child ends at the end of its input


def section(args: argparse.Namespace, jit: bool) -> Bars:
    """Time every variant and return the bars of this section."""
    with contextlib.ExitStack() as stack:
        steps = {name: stepper(args, name, jit) for name in args.variants}
        if args.peft:
            steps["PEFT (torch)"] = stack.enter_context(peft_stepper(args))
        times = interleaved(steps, args.steps)
    title = f"Training step, XLA {'on' if jit else 'off'}, {args.layers} x {args.width}"
    print_times(f"{title}, batch {args.batch} x {args.length}", times, "keras_lora")
    highest = {("keras_lora", "enable_lora"): 1.00 if jit else 0.80, ("dora", "keras_lora"): 1.26}
    if not jit:
        highest["keras_lora", "floor"] = 1.05
    return {
        f"{name} / {other}, XLA {'on' if jit else 'off'}": (ratio(times, name, other), 0.0, high)
        for (name, other), high in highest.items()
        if {name, other} <= times.keys()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_shape(parser, layers=12)
    parser.add_argument("--steps", type=int, default=9, help="rounds, after 2 that do not count")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--jit", action=argparse.BooleanOptionalAction, help="only with, or without"
    )
    parser.add_argument("--peft", action="store_true", help="time PEFT on torch too")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    args = parser.parse_args()
    bars: Bars = {}
    for jit in (False, True) if args.jit is None else (args.jit,):
        bars |= section(args, jit)
        keras.backend.clear_session()
        gc.collect()
    met = print_bars(bars)
    if args.check and not met:
        sys.exit(1)


if __name__ == "__main__":
    main()
