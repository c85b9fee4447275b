"""The peak memory of a training step with logits in chunks, against whole logits.

    python benchmarks/logits.py [--tokens 128 --jit --check]

A Llama-shaped KerasHub model of 2 layers of 256 with a vocabulary of 128,256, 2 x 1,024 tokens,
rank 2, on the backend that KERAS_BACKEND names. Each run has a process of its own, and its peak is
the largest resident size in three steps, above the size before the first. Linux with glibc only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

from keras_lora_cli.quiet import silenced

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

BAR = 0.25


def measured(args: argparse.Namespace) -> dict[str, float]:
    """Runs in a process of its own."""
    with silenced():
        import keras  # noqa: PLC0415
        import keras_hub  # noqa: PLC0415
        import numpy as np  # noqa: PLC0415
        from resident import MIB, forget_peak, resident  # noqa: PLC0415

        import keras_lora as kl  # noqa: PLC0415

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=args.vocabulary,
        num_layers=args.layers,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=args.width,
        intermediate_dim=2 * args.width,
    )
    model = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
    kl.apply_lora(model, kl.LoRAConfig(rank=2))
    if args.tokens:
        kl.chunk_logits(model, args.tokens)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, weighted_metrics=["accuracy"], jit_compile=args.jit)
    shape = (args.batch, args.length)
    tokens = np.random.default_rng(0).integers(1, args.vocabulary, shape, "int32")
    x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    forget_peak()
    before = resident("VmRSS")
    values, seconds = [], []
    for _ in range(3):
        start = time.perf_counter()
        values.append(float(model.train_on_batch(x, tokens, np.ones(shape, "float32"))[0]))
        seconds.append(time.perf_counter() - start)
    peak = (resident("VmHWM") - before) / MIB
    return {"MiB": peak, "seconds": min(seconds), "loss": values[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=128, help="in a chunk")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--jit", action="store_true", help="with XLA")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--one", action="store_true", help="this run alone; 0 tokens: whole logits")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args)))
        return
    chunked = _in_a_process(args.tokens)
    whole = _in_a_process(0)
    for name, run in ((f"{args.tokens} tokens", chunked), ("whole", whole)):
        print(f"{name}: {run['MiB']:.0f} MiB, {run['seconds']:.2f} s, loss {run['loss']:.6f}")
    ratio = chunked["MiB"] / whole["MiB"]
    print(f"peak / peak with whole logits: {ratio:.3f} (bar: {BAR})")
    if args.check and ratio > BAR:
        sys.exit(1)


def _in_a_process(tokens: int) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--one", "--tokens", str(tokens)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
