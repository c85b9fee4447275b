"""Training steps of a Llama of a billion parameters on a GPU: time, tokens a second, peak memory.

    python benchmarks/gpu.py [--backends jax torch] [--tiny]

The shapes of Llama 3.2 1B with random weights in bfloat16, 4 x 2,048 tokens, rank 8 on every linear
layer of the blocks, Adam. Each row has a process of its own. PEFT is on torch over transformers,
with the fastest attention that is installed, plain and with gradient checkpointing, which is what
rematerialized blocks are in keras_lora. A row that would not end within the time left is not
run.
`--tiny` has small shapes, for a run without a GPU; the memory is that of the process then.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

RANK = 8
PEFT = ("PEFT", "PEFT, gradient checkpointing")
VARIANTS = (
    "keras_lora",
    "keras_lora, chunks",
    "keras_lora, blocks, chunks",
    "enable_lora",
    "full",
    "full, blocks, chunks",
)
LARGE = {
    "vocabulary": 128_256,
    "layers": 16,
    "width": 2048,
    "heads": 32,
    "kv_heads": 8,
    "hidden": 8192,
    "batch": 4,
    "length": 2048,
}
TINY = {
    "vocabulary": 61,
    "layers": 2,
    "width": 16,
    "heads": 2,
    "kv_heads": 1,
    "hidden": 32,
    "batch": 2,
    "length": 7,
}
CHUNK = 1024

Figures = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backends", nargs="+", choices=("jax", "torch"), default=["jax", "torch"])
    parser.add_argument("--variants", nargs="+", choices=(*VARIANTS, *PEFT))
    parser.add_argument("--steps", type=int, default=6, help="timed, after 3 that are not")
    parser.add_argument("--seconds", type=float, default=470, help="for all rows together")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--one", choices=(*VARIANTS, *PEFT), help="this row alone, in this process")
    args = parser.parse_args(arguments)
    if args.one is not None:
        print(json.dumps(measured(args.one, TINY if args.tiny else LARGE, args.steps)))
        return 0
    end, rows = time.monotonic() + args.seconds, []
    for backend in args.backends:
        for name in args.variants or (*VARIANTS, *PEFT):
            if name not in PEFT or backend == "torch":
                options = ["--steps", str(args.steps), *(["--tiny"] if args.tiny else [])]
                rows.append((name, backend, _in_a_process(name, backend, options, end)))
    Console(width=110).print(_table(rows))
    return int(any("error" in figures for _, _, figures in rows))


def measured(name: str, shape: dict[str, int], steps: int) -> Figures:
    """The figures of one row, in this process, on the backend that KERAS_BACKEND names."""
    step, trained = (_peft if name in PEFT else _keras)(name, shape)
    seconds = []
    for _ in range(3 + steps):
        start = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - start)
    device, peak = _device(os.environ["KERAS_BACKEND"])
    return {
        "seconds": median(seconds[3:]),
        "tokens": shape["batch"] * shape["length"] / median(seconds[3:]),
        "peak": peak,
        "trained": trained,
        "loss": loss,
        "device": device,
    }


def _keras(name: str, shape: dict[str, int]) -> tuple[Callable[[], float], int]:
    import keras  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    model = _language_model(shape)
    _prepare(model, name)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), loss, weighted_metrics=[])
    size = (shape["batch"], shape["length"] + 1)
    ids = np.random.default_rng(0).integers(1, shape["vocabulary"], size, "int32")
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, 1:])}
    weights = np.ones(ids[:, 1:].shape, "float32")

    def step() -> float:
        return float(np.ravel(model.train_on_batch(x, ids[:, 1:], weights))[0])

    return step, sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def _language_model(shape: dict[str, int]) -> Any:
    import keras_hub  # noqa: PLC0415

    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=shape["vocabulary"],
        num_layers=shape["layers"],
        num_query_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        hidden_dim=shape["width"],
        intermediate_dim=shape["hidden"],
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    return keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)


def _prepare(model: Any, name: str) -> None:
    import keras_lora as kl  # noqa: PLC0415

    if name.startswith("keras_lora"):
        kl.apply_lora(model, kl.LoRAConfig(rank=RANK))
    if name == "enable_lora":
        targets = [target.layer for target in kl.find_targets(model)]
        for variable in model.variables:
            variable.trainable = False
        for layer in targets:
            layer.enable_lora(RANK)
    if "blocks" in name:
        kl.rematerialize(model)
    if "chunks" in name:
        kl.chunk_logits(model, CHUNK)


def _peft(name: str, shape: dict[str, int]) -> tuple[Callable[[], float], int]:
    import peft  # noqa: PLC0415
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    config = transformers.LlamaConfig(
        vocab_size=shape["vocabulary"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        hidden_size=shape["width"],
        intermediate_size=shape["hidden"],
        max_position_embeddings=shape["length"],
        tie_word_embeddings=True,
        attn_implementation="flash_attention_2" if _has_flash_attention() else "sdpa",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = peft.LoraConfig(r=RANK, target_modules="all-linear")
    network: Any = peft.get_peft_model(model, lora).train()
    if "checkpointing" in name:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    ids = torch.randint(1, shape["vocabulary"], (shape["batch"], shape["length"]), device=device)

    def step() -> float:
        optimizer.zero_grad()
        loss = network(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return float(loss)

    return step, sum(p.numel() for p in trained)


def _has_flash_attention() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _device(backend: str) -> tuple[str, int]:
    """The name of the device, and the peak of its memory in bytes; without a GPU the process's."""
    if backend == "jax":
        device = importlib.import_module("jax").local_devices()[0]
        stats = device.memory_stats() if device.platform != "cpu" else None
        if stats is not None:
            return str(device.device_kind), int(stats["peak_bytes_in_use"])
    elif (cuda := importlib.import_module("torch").cuda).is_available():
        return str(cuda.get_device_name()), int(cuda.max_memory_allocated())
    return "CPU", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _in_a_process(name: str, backend: str, options: Sequence[str], end: float) -> Figures:
    left = end - time.monotonic()
    if left <= 0:
        return {"error": "not run: no time was left"}
    settings = {"KERAS_BACKEND": backend, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, __file__, *options, "--one", name]
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=left,
            env=os.environ | settings,
        )
    except subprocess.TimeoutExpired:
        return {"error": "stopped: no time was left"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return {"error": lines[-1]}
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def _table(rows: Sequence[tuple[str, str, Figures]]) -> Table:
    devices = sorted({figures["device"] for _, _, figures in rows if "device" in figures})
    table = Table("", "backend", title=f"A training step on {', '.join(devices) or 'no device'}")
    for heading in ("ms", "tokens/s", "peak GiB", "trains", "loss"):
        table.add_column(heading, justify="right")
    for name, backend, found in rows:
        if "error" in found:
            table.add_row(name, backend, found["error"][:60])
            continue
        table.add_row(
            name,
            backend,
            f"{1000 * found['seconds']:.1f}",
            f"{found['tokens']:,.0f}",
            f"{found['peak'] / 2**30:.2f}",
            f"{found['trained']:,}",
            f"{found['loss']:.4f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
