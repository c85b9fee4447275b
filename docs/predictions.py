"""Writes `docs/predictions.md`: what large models would take to train, as `memory_plan` predicts.

`make predictions` runs it, in about twenty minutes of CPU time. No model is made with values. The
blocks of a language model are alike, so each way to train is planned with a few blocks, and the
memory of the others is added:

    peak(n) = peak(m) + (n - m) (peak(m) - peak(m - 1))

That holds while a block keeps more for its backward pass than the gradients of its factors take:
the peak is then where the values of all blocks are there, whatever their number. In full
fine-tuning it moves to the end of the backward pass, where all gradients are: not predicted here.

    python docs/predictions.py [file] [--models "1B, TinyLlama"]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras_hub
import tensorflow as tf

import keras_lora as kl

PAGE = Path("docs/predictions.md")
HEAD = """\
# Predictions for large models

What a training step of models of 1 to 70 billion parameters would take, as
[`memory_plan`](memory.md#a-plan-beforehand) predicts. Written by `make predictions`; not edited by
hand. **None of these was run**: the figures are predicted, and of smaller models
`python benchmarks/memory_plan.py` prints how far predictions are from what is measured.

Adam, rank 8 on all linear layers, one example, the base in bfloat16 or quantized from it. *blocks*
are [rematerialised](memory.md#rematerialised-blocks), *chunks* are
[logits](memory.md#logits-in-chunks) of 512 tokens at a time. Each figure is the peak in GB (10⁹
bytes) and the smallest device of 16, 24 and 80 GB that it fits, with a tenth of the device left for
what is not planned: the runtime, the allocator and metrics.

It is a step of TensorFlow's executor without XLA, as a CPU runs it, with attention whose scores are
whole in memory. A GPU that multiplies bfloat16 without copies in float32, or has an attention that
keeps no scores, takes less.

"""
FEW = 3  # blocks that are planned
LENGTHS = (512, 2048, 8192)
DEVICES = (16, 24, 80)  # GB
KEPT = 0.9


@dataclass(frozen=True)
class Sizes:
    """The shape of a Llama."""

    layers: int
    width: int
    heads: int
    key_value_heads: int
    inner: int
    vocabulary: int

    def few(self, layers: int) -> keras_hub.models.LlamaCausalLM:
        """The model with some of its blocks, without values."""
        with tf.Graph().as_default():
            backbone = keras_hub.models.LlamaBackbone(
                vocabulary_size=self.vocabulary,
                num_layers=layers,
                num_query_heads=self.heads,
                num_key_value_heads=self.key_value_heads,
                hidden_dim=self.width,
                intermediate_dim=self.inner,
                dtype="bfloat16",
            )
            return keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)


MODELS = {
    "1B, TinyLlama": Sizes(22, 2048, 32, 4, 5632, 32000),
    "7B, Llama 2 7B": Sizes(32, 4096, 32, 32, 11008, 32000),
    "13B, Llama 2 13B": Sizes(40, 5120, 40, 40, 13824, 32000),
    "70B, Llama 2 70B": Sizes(80, 8192, 64, 8, 28672, 32000),
}
CONFIG = kl.LoRAConfig(rank=8)
FITS: dict[str, Any] = {"rematerialize": "auto", "chunk_tokens": 512}
WAYS: dict[str, tuple[kl.LoRAConfig, dict[str, Any]]] = {
    "LoRA": (CONFIG, {}),
    "LoRA, blocks, chunks": (CONFIG, FITS),
    "LoRA on int8, blocks, chunks": (CONFIG, {**FITS, "quantized": "int8"}),
    "LoRA on int4, blocks, chunks": (CONFIG, {**FITS, "quantized": "int4"}),
}


def predicted(sizes: Sizes, way: str, lengths: Sequence[int] = LENGTHS) -> list[int]:
    """The peaks of a step of one example for each length, in bytes."""
    config, options = WAYS[way]
    fewer, more = (
        kl.memory_plan(sizes.few(n), config, (1, lengths[0]), optimizer="adam", **options)
        for n in (FEW - 1, FEW)
    )

    def peak(length: int) -> int:
        low, high = (plan.for_shape((1, length)).peak for plan in (fewer, more))
        return high + (sizes.layers - FEW) * (high - low)

    return [peak(length) for length in lengths]


def cell(peak: int) -> str:
    """The peak in GB and the smallest device that it fits."""
    gigabytes = peak / 1e9
    device = next((f"{size} GB" for size in DEVICES if gigabytes <= KEPT * size), "none")
    return f"{gigabytes:,.1f} → {device}"


def page(names: Sequence[str]) -> str:
    titles = [f"1 x {length:,} tokens" for length in LENGTHS]
    lines = [["model", "trained by", *titles]]
    lines.append(["---"] * len(lines[0]))
    for name, way in itertools.product(names, WAYS):
        lines.append([name, way, *(cell(peak) for peak in predicted(MODELS[name], way))])
    return HEAD + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?", type=Path, default=PAGE)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    options.file.write_text(page(options.models))


if __name__ == "__main__":
    main()
