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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import assets
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.numpy import save_file
from training import (
    BATCH,
    CONFIG,
    Data,
    Steps,
    argument_parser,
    batches,
    classifier,
    compile_for_training,
    folder_bytes,
    megabytes,
    output_folder,
    positive,
    preprocessor,
    progress_bars,
    tokenise,
)

import keras_lora as kl

SEQUENCE_LENGTH = 32
CLASSES = ("unfavourable", "favourable")
STEPS = 96
# It divides the validation and the test rows: a smaller last batch would compile again.
SCORED_AT_ONCE = 100
TOLERANCE = 1e-4
SERVER = Path(__file__).with_name("run_saved_model.py")


@dataclass(frozen=True)
class Method:
    """A way to fine-tune. `sweep` has the validation accuracy of each learning rate, at seed 0."""

    name: str
    prepare: Callable[[keras.Model], object]
    sweep: Mapping[float, float]

    @property
    def learning_rate(self) -> float:
        return max(self.sweep, key=lambda rate: self.sweep[rate])


@dataclass(frozen=True)
class Outcome:
    """The result of one run. `saved_bytes` is the size of a file with all trained values."""

    accuracy: float
    trainable: int = 0
    step_seconds: float = 0.0
    saved_bytes: int = 0


def adapt(model: keras.Model) -> None:
    kl.apply_lora(model, CONFIG)


def train_everything(model: keras.Model) -> None:
    model.trainable = True


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


class Scorer:
    """The accuracy of any method's model, through one plain classifier that is compiled once.

    Adapters are merged first, as for serving.
    """

    def __init__(self, data: Data) -> None:
        self._data = data
        self._plain = classifier(len(CLASSES))
        self._plain.compile(jit_compile=True)

    def accuracy(self, model: keras.Model) -> float:
        plain = kl.merge_lora(model, inplace=False) if kl.lora_layers(model) else model
        self._plain.set_weights(plain.get_weights())
        logits = self._plain.predict(self._data.features, batch_size=SCORED_AT_ONCE, verbose=0)
        return self._data.accuracy(logits)


@dataclass(frozen=True)
class Study:
    """Trains all methods on the same rows, and scores them on others."""

    train: Data
    scorer: Scorer
    steps: int
    folder: Path
    progress: Progress

    def untrained(self, seed: int) -> Outcome:
        keras.utils.set_random_seed(seed)
        return Outcome(self.scorer.accuracy(classifier(len(CLASSES))))

    def run(self, model: keras.Model, method: Method, rate: float, seed: int) -> Outcome:
        """Train `model`, which is `trainee(method)`, from the start of this seed."""
        restart(model, method, seed)
        title = f"{method.name}, learning rate {rate:g}, seed {seed}"
        steps = Steps(rate, self.steps, self.progress, title)
        rows = batches(self.train, self.steps, seed)
        model.fit(rows, shuffle=False, verbose=0, callbacks=[steps])
        outcome = Outcome(
            accuracy=self.scorer.accuracy(model),
            trainable=sum(int(np.prod(v.shape)) for v in model.trainable_variables),
            step_seconds=steps.median,
            saved_bytes=save_trained(model, self.folder / f"{method.name}.safetensors"),
        )
        self.progress.console.print(f"{title}: accuracy {outcome.accuracy:.2%}")
        return outcome


def trainee(method: Method) -> keras.Model:
    """A model that is ready for every run of a method, so that it compiles only once."""
    model = classifier(len(CLASSES))
    method.prepare(model)
    compile_for_training(model)
    return model


def restart(model: keras.Model, method: Method, seed: int) -> None:
    """Give a model the values of a new one of this seed, dropout seeds too; clear the optimizer."""
    keras.utils.set_random_seed(seed)
    fresh = classifier(len(CLASSES))
    method.prepare(fresh)
    for variable, value in zip(model.variables, fresh.variables, strict=True):
        variable.assign(value)
    for variable in model.optimizer.variables:
        variable.assign(keras.ops.zeros_like(variable))


def save_trained(model: keras.Model, path: Path) -> int:
    """Write the variables that train, by path; returns the bytes of the file."""
    save_file({v.path: v.numpy() for v in model.trainable_variables}, path)
    return path.stat().st_size


def sweep(study: Study, console: Console) -> None:
    table = Table("method", "learning rate", "validation accuracy", title="Sweep, seed 0")
    for method in METHODS:
        model = trainee(method)
        for rate in method.sweep:
            outcome = study.run(model, method, rate, seed=0)
            table.add_row(method.name, f"{rate:g}", f"{outcome.accuracy:.4f}")
    console.print(table)


def compare(study: Study, seeds: int, console: Console) -> keras.Model:
    """Print one row for each method; returns the LoRA model of the last seed."""
    outcomes: dict[str, list[Outcome]] = {
        "before training": [study.untrained(seed) for seed in range(seeds)]
    }
    for method in METHODS:
        model = trainee(method)
        outcomes[method.name] = [
            study.run(model, method, method.learning_rate, seed) for seed in range(seeds)
        ]
        if method is LORA:
            adapted = model
    console.print(comparison(outcomes))
    return adapted


def comparison(outcomes: Mapping[str, Sequence[Outcome]]) -> Table:
    seeds = len(outcomes[LORA.name])
    runs_of = f"mean of {seeds} seeds" if seeds > 1 else "seed 0"
    table = Table(title=f"Rotten Tomatoes, {runs_of}")
    table.add_column("method")
    for heading in ("test accuracy", "trainable", "step", "saved"):
        table.add_column(heading, justify="right")
    for name, runs in outcomes.items():
        first = runs[0]
        trained = [
            f"{first.trainable:,}",
            f"{1000 * statistics.median(run.step_seconds for run in runs):,.0f} ms",
            megabytes(first.saved_bytes),
        ]
        table.add_row(name, accuracies(runs), *(trained if first.trainable else []))
    return table


def accuracies(runs: Sequence[Outcome]) -> str:
    """The mean, and the single values if there are several."""
    values = [100 * run.accuracy for run in runs]
    mean = f"{statistics.mean(values):.2f}%"
    return f"{mean} ({', '.join(f'{v:.2f}' for v in values)})" if len(values) > 1 else mean


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
    parser.add_argument("--seeds", type=positive, default=1, help="runs of each method; 1")
    parser.add_argument(
        "--sweep", action="store_true", help="try learning rates, on validation rows"
    )
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
        study = Study(train, Scorer(scored), options.steps, folder, progress)
        if options.sweep:
            sweep(study, console)
            return 0
        model = compare(study, options.seeds, console)
        kl.lora_summary(model, console)
        error = serve(model, held_out.texts[:BATCH], folder, console)
    console.print(f"{time.perf_counter() - started:.0f} s in all.")
    return int(not error <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
