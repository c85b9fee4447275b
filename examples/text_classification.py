"""Is a film review favourable? LoRA on a BERT encoder, against the other ways to fine-tune it.

    python examples/text_classification.py              # one seed
    python examples/text_classification.py --seeds 3    # the mean of three
    python examples/text_classification.py --sweep      # how the learning rates were chosen

A pretrained MiniLM (22.7M parameters) learns Rotten Tomatoes from 3,072 of its sentences in three
ways: low-rank adapters, full fine-tuning, and training of the head alone. The LoRA model is then
exported as a plain SavedModel, tokenizer and all: sentences in, probabilities and names of classes
out. It answers a batch through TensorFlow's C library, in a process without Keras. The exit status
is 1 if these probabilities differ from Keras's by more than 1e-4.

Needs `pip install keras-lora[nlp]`; downloads 97 MB on the first run (see `assets.py`).
"""

from __future__ import annotations

import os

from keras_lora_cli.quiet import silenced

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

with silenced():
    import keras

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import assets
import numpy as np
from comparing import (
    Measure,
    Method,
    Plain,
    Study,
    add_options,
    compare,
    sweep,
    train_everything,
)
from minilm import CONFIG, Data, classifier, preprocessor, tokenise
from rich.console import Console
from rich.progress import Progress
from training import (
    BATCH,
    argument_parser,
    batches,
    compile_for_training,
    folder_bytes,
    megabytes,
    output_folder,
    progress_bars,
)

import keras_lora as kl

SEQUENCE_LENGTH = 32
CLASSES = ("unfavourable", "favourable")
STEPS = 96
# It divides the validation and the test rows: a smaller last batch would compile again.
SCORED_AT_ONCE = 100
TOLERANCE = 1e-4
SERVER = Path(__file__).with_name("run_saved_model.py")


def adapt(model: keras.Model) -> None:
    kl.apply_lora(model, CONFIG)


def train_head(model: keras.Model) -> None:
    model.backbone.trainable = False
    model.backbone.get_layer("pooled_dense").trainable = True


# The accuracies are those of `--sweep`.
LORA = Method("LoRA", adapt, {5e-4: 0.755, 1e-3: 0.776, 2e-3: 0.787, 5e-3: 0.722})
METHODS = (
    LORA,
    Method(
        "full fine-tuning", train_everything, {5e-5: 0.757, 1e-4: 0.785, 2e-4: 0.793, 5e-4: 0.583}
    ),
    Method("head only", train_head, {3e-4: 0.634, 1e-3: 0.656, 3e-3: 0.654, 1e-2: 0.653}),
)


def trainee() -> keras.Model:
    model = classifier(len(CLASSES))
    compile_for_training(model)
    return model


def study(train: Data, scored: Data, steps: int, folder: Path, progress: Progress) -> Study:
    plain = Plain(classifier(len(CLASSES)))

    def accuracy(model: keras.Model) -> float:
        answers = plain.like(model).predict(scored.features, batch_size=SCORED_AT_ONCE, verbose=0)
        return scored.accuracy(answers)

    return Study(
        title="Rotten Tomatoes",
        base=trainee,
        methods=METHODS,
        batches=lambda seed: batches(train.features, train.labels, steps, seed),
        score=accuracy,
        measure=Measure("accuracy", "{:.2%}", max),
        steps=steps,
        folder=folder,
        progress=progress,
    )


def serve(model: keras.Model, sentences: Sequence[str], folder: Path, console: Console) -> float:
    """Export, let the C library answer one batch, and return the largest error of the answers."""
    path = folder / "saved_model" / "1"
    model.preprocessor = preprocessor(SEQUENCE_LENGTH)
    report = kl.export_saved_model(
        model, path, preprocessing=True, class_names=CLASSES, overwrite=True
    )
    served = answers(path, sentences)
    expected = keras.ops.softmax(model.predict(list(sentences), verbose=0))
    error = float(np.abs(served["probabilities"] - expected).max())
    for sentence, label in list(zip(sentences, served["label"], strict=True))[:3]:
        console.print(f"{label}: {sentence}")
    console.print(
        f"SavedModel: {megabytes(folder_bytes(path))}, {report.operations:,} operations, no "
        f"keras_lora. Adapter and head: {megabytes((folder / 'LoRA.safetensors').stat().st_size)}."
    )
    console.print(
        f"{len(sentences)} sentences through TensorFlow's C library: largest difference to "
        f"model.predict {error:.1e} (allowed: {TOLERANCE:g})."
    )
    return error


def answers(saved_model: Path, sentences: Sequence[str]) -> Mapping[str, np.ndarray]:
    """The answers of TensorFlow's C library, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
        np.savez(inputs, text=sentences)
        command = [sys.executable, SERVER, saved_model, inputs, outputs]
        words = [str(word) for word in command]
        done = subprocess.run(words, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"Expected answers. Received: {done.stderr}")
        with np.load(outputs) as arrays:
            return dict(arrays)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__, STEPS)
    add_options(parser, seeds=1)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console = parse(arguments), Console()
    started = time.perf_counter()
    with console.status("Downloading and tokenising"):
        splits = assets.rotten_tomatoes()
        train = tokenise(splits.train, SEQUENCE_LENGTH)
        held_out = splits.validation if options.sweep else splits.test
        scored = tokenise(held_out, SEQUENCE_LENGTH)
    with output_folder(options.out) as folder, progress_bars(console) as progress:
        methods = study(train, scored, options.steps, folder, progress)
        if options.sweep:
            sweep(methods, console)
            return 0
        model = compare(methods, options.seeds, console)[LORA.name]
        kl.lora_summary(model, console)
        error = serve(model, held_out.texts[:BATCH], folder, console)
    console.print(f"{time.perf_counter() - started:.0f} s in all.")
    return int(not error <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
