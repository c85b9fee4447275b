"""Seconds and memory that `apply_lora` takes on a model of a billion parameters.

    python benchmarks/injection.py [--dtype bfloat16] [--init pissa:4 --rank 16] [--check]

A Llama-shaped KerasHub backbone with random weights; all linear layers are adapted, at rank 8
unless `--rank` gives another. The memory is the peak resident size during the call, minus the size
before it and the size of the adapters. Linux with glibc only.
"""

from __future__ import annotations

import os

from keras_lora_cli.quiet import silenced

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

with silenced():
    import keras_lora as kl

import argparse
import sys
import time

from resident import MIB, billion, forget_peak, resident, size
from timing import print_bars

MOST_SECONDS, MOST_PERCENT = 5.0, 2.0
MOST_SECONDS_OF_STARTS = 60.0  # of a start that decomposes each matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048, help="a multiple of 256")
    parser.add_argument("--dtype", default="float32", help="or bfloat16")
    parser.add_argument("--init", default="kaiming_uniform", help="how factors start")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    args = parser.parse_args()

    model = billion(args.layers, args.width, args.dtype)
    model_size, parameters = size(model.variables), model.count_params()
    forget_peak()
    before, start, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    kl.apply_lora(model, kl.LoRAConfig(rank=args.rank, init=args.init))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resident("VmHWM") - before

    adapters = size(v for x in kl.lora_layers(model).values() for v in x.adapter_variables)
    if peak < adapters:
        sys.exit("The measurement failed: the adapters took memory that was resident before.")
    percent = 100 * (peak - adapters) / model_size
    print(f"{parameters:,} parameters in {args.dtype}, {model_size / MIB:,.0f} MiB")
    print(
        f"{len(kl.lora_layers(model))} layers adapted in {seconds:.2f} s ({cpu:.2f} s of CPU time)"
    )
    print(f"peak +{peak / MIB:.1f} MiB, of which adapters {adapters / MIB:.1f} MiB")
    bars = {"seconds": (seconds, 0.0, MOST_SECONDS_OF_STARTS)}
    if args.init == "kaiming_uniform":
        bars = {
            "seconds": (seconds, 0.0, MOST_SECONDS),
            "memory beside the adapters, % of the model": (percent, 0.0, MOST_PERCENT),
        }
    met = print_bars(bars)
    if args.check and not met:
        sys.exit(1)


if __name__ == "__main__":
    main()
