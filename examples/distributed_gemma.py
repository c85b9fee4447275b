"""Gemma on 8 devices, as in Google's guide to distributed tuning, with adapters of this package.

    python examples/distributed_gemma.py                           # a mesh of 2 x 4
    python examples/distributed_gemma.py --mesh 1x8
    python examples/distributed_gemma.py --preset gemma_2b_en      # the real model
    python examples/distributed_gemma.py --quick                   # 3 steps: only whether it works

The guide (https://ai.google.dev/gemma/docs/core/distributed_tuning) trains Gemma 7B on reviews of
films on the 8 chips of a TPU. Its code stays as it is, but for `enable_lora`, in whose place is
`apply_lora`, and for two prompts at once, which the batch axis of a mesh of 2 x 4 divides.

On a processor JAX makes 8 virtual devices. A small Gemma of random weights and a vocabulary of its
own, both made here, stand in for the preset, for which Kaggle asks a login and a consent. So the
loss falls, and what is generated are no sentences.

Needs `pip install keras-lora[nlp] jax sentencepiece`; downloads 13 MB on the first run (see
`assets.py`).
"""

from __future__ import annotations

import os

from keras_lora_cli.quiet import silenced

os.environ["KERAS_BACKEND"] = "jax"  # `keras.distribution` works on JAX alone
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

with silenced():
    import keras

import argparse
import io
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import assets
import keras_hub
import sentencepiece
import tensorflow as tf
from training import folder_bytes, megabytes, positive

import keras_lora as kl

STEPS, QUICK_STEPS = 40, 3
BATCH = 8  # divided by both batch axes
LENGTH = 64
PROMPTS = ["Best comedy movies in the 90s ", "A film to see twice is "]
# For random weights; the guide has 5e-5 for those of Gemma.
LEARNING_RATE, PRESET_LEARNING_RATE = 1e-2, 5e-5
# Of the small model: each size is divided by 8.
VOCABULARY = 512
SIZES = {
    "num_layers": 2,
    "num_query_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "hidden_dim": 64,
    "intermediate_dim": 256,
}


def set_mesh(shape: tuple[int, ...]) -> None:
    """Split what is made from now on over all devices, as the map of KerasHub says."""
    mesh = keras.distribution.DeviceMesh(
        shape, ["batch", "model"], devices=keras.distribution.list_devices()
    )
    layouts = keras_hub.models.GemmaBackbone.get_layout_map(mesh)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )


def small_gemma(reviews: Sequence[str]) -> keras.Model:
    """A Gemma of random weights, with a vocabulary of these reviews."""
    vocabulary = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(reviews),
        model_writer=vocabulary,
        vocab_size=VOCABULARY,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        minloglevel=2,
    )
    tokenizer = keras_hub.models.GemmaTokenizer(vocabulary.getvalue())
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(tokenizer)
    backbone = keras_hub.models.GemmaBackbone(vocabulary_size=VOCABULARY, **SIZES)
    return keras_hub.models.GemmaCausalLM(backbone, preprocessor=preprocessor)


def show_layouts(variables: Iterable[keras.Variable]) -> None:
    """How variables are split, in the form of the guide."""
    for variable in variables:
        spec = variable.value.sharding.spec
        print(f"{variable.path:<58}  {variable.shape!s:<16}  {spec}")


def train(gemma: keras.Model, reviews: Sequence[str], rate: float) -> tuple[float, float]:
    """One epoch of the reviews; the loss before and after it."""
    gemma.preprocessor.sequence_length = LENGTH
    optimizer = keras.optimizers.AdamW(learning_rate=rate, weight_decay=0.01)
    optimizer.exclude_from_weight_decay(var_names=["bias", "scale"])
    gemma.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=optimizer,
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
        sampler="greedy",
    )
    # Batches of one shape, so that a step is compiled once.
    batches = tf.data.Dataset.from_tensor_slices(list(reviews)).batch(BATCH, drop_remainder=True)
    before, _ = gemma.evaluate(batches, verbose=0)
    gemma.fit(batches, epochs=1, shuffle=False, verbose=2)  # they are in a random order
    after, _ = gemma.evaluate(batches, verbose=0)
    return before, after


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mesh", choices=["2x4", "1x8"], default="2x4", help="batch by model")
    parser.add_argument("--preset", help="a preset of Gemma, for the small one of random weights")
    parser.add_argument("--steps", type=positive, help=f"of {BATCH} reviews each (default {STEPS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    reviews = assets.imdb(steps * BATCH)
    set_mesh(tuple(map(int, options.mesh.split("x"))))
    if options.preset:
        gemma = keras_hub.models.GemmaCausalLM.from_preset(options.preset)
    else:
        gemma = small_gemma(reviews)
    block = gemma.backbone.get_layer("decoder_block_1")
    show_layouts([*gemma.backbone.get_layer("token_embedding").weights, *block.weights])
    gemma.compile(sampler="greedy")
    print("Before:", *gemma.generate(PROMPTS, max_length=LENGTH), sep="\n  ")

    kl.apply_lora(gemma, kl.LoRAConfig(rank=8))  # gemma.backbone.enable_lora(rank=8) in the guide
    show_layouts(v for v in block.variables if "lora_a" in v.path or "lora_b" in v.path)
    kl.lora_summary(gemma)
    before, after = train(gemma, reviews, PRESET_LEARNING_RATE if options.preset else LEARNING_RATE)
    print(f"Loss: {before:.3f} before, {after:.3f} after {steps} steps of {BATCH} reviews")
    print("After:", *gemma.generate(PROMPTS, max_length=LENGTH), sep="\n  ")
    with tempfile.TemporaryDirectory() as folder:
        kl.save_adapter(gemma, folder)
        size = megabytes(folder_bytes(Path(folder)))
    print(f"The adapter is {size}, of whole arrays: it loads under any mesh, or none.")
    return int(after >= before)


if __name__ == "__main__":
    sys.exit(main())
