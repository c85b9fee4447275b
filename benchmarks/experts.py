"""Time of a training step of mixtures of experts: keras_lora, the floor, whole experts.

    python benchmarks/experts.py [--models Mixtral Qwen3Moe]

Decoders of two layers of KerasHub, width 256, Adam, one fixed batch of 1,024 tokens: a Mixtral of 8
experts of 512 and a Qwen3 MoE of 64 experts of 64. `keras_lora` adapts the experts at rank 8;
*formed* is the same with `W0 + s A B` formed, as other bare variables have it; `whole` trains the
experts in full, and in the *floor* they are frozen. In all of them the embedding of the tokens
trains too, so that gradients flow through all layers, and nothing else. KerasHub computes all
experts for each token.
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
import contextlib
import gc
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
from encoder import train_only
from timing import Step, interleaved, print_times

import keras_lora as kl
from keras_lora.layers.factored_calls import FactoredOps

RANK, ALPHA, VOCABULARY, EMBEDDING = 8, 16.0, 1000, "token_embedding"
SHAPE = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 256,
    "intermediate_dim": 512,
    "num_experts": 8,
}
MODELS: dict[str, Callable[[], keras.Model]] = {
    "Mixtral": lambda: keras_hub.models.MixtralBackbone(**SHAPE),
    "Qwen3Moe": lambda: keras_hub.models.Qwen3MoeBackbone(
        **SHAPE | {"num_experts": 64, "head_dim": 64, "moe_intermediate_dim": 64, "top_k": 8}
    ),
}


def with_keras_lora(model: keras.Model) -> None:
    config = kl.LoRAConfig(rank=RANK, alpha=ALPHA, targets="experts", layers_to_save=[EMBEDDING])
    kl.apply_lora(model, config)


def formed() -> contextlib.AbstractContextManager[Any]:
    """What is traced within the context forms the effective matrices of experts."""
    return mock.patch.object(FactoredOps, "einsum", staticmethod(keras.ops.einsum))


def with_frozen_experts(model: keras.Model) -> None:
    train_only(model, lambda variable: EMBEDDING in variable.path)


def with_whole_experts(model: keras.Model) -> None:
    train_only(model, lambda variable: EMBEDDING in variable.path or "expert_feed" in variable.path)


VARIANTS: dict[str, Callable[[keras.Model], None]] = {
    "keras_lora": with_keras_lora,
    "formed": with_keras_lora,
    "floor": with_frozen_experts,
    "whole": with_whole_experts,
}


def stepper(args: argparse.Namespace, name: str, variant: str) -> Step:
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    VARIANTS[variant](model)
    model.compile(keras.optimizers.Adam(1e-4), "mse", jit_compile=args.jit)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (args.batch, args.length))
    x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    y = np.zeros((*tokens.shape, 256), "float32")

    def step() -> None:
        with formed() if variant == "formed" else contextlib.nullcontext():
            model.train_on_batch(x, y)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens")
    parser.add_argument("--steps", type=int, default=9, help="rounds, after 2 that do not count")
    parser.add_argument("--jit", action="store_true", help="with XLA")
    args = parser.parse_args()
    for name in args.models:
        steps = {variant: stepper(args, name, variant) for variant in VARIANTS}
        title = f"Training step of {name}, XLA {'on' if args.jit else 'off'}"
        times = interleaved(steps, args.steps)
        print_times(f"{title}, {args.batch} x {args.length} tokens", times, "keras_lora")
        keras.backend.clear_session()
        gc.collect()


if __name__ == "__main__":
    main()
