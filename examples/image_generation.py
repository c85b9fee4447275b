"""Pictures of a class that a diffusion model never saw: LoRA on its convolutions and dense layers.

    python examples/image_generation.py            # three seeds
    python examples/image_generation.py --sweep    # how the learning rates were chosen
    python examples/image_generation.py --quick    # few steps, one seed: whether all works

A small latent diffusion model is trained on eight classes of Fashion-MNIST (once; its weights are
kept beside the data). Then it learns bags: by low-rank adapters, by full fine-tuning, and by
training of the last convolution alone. The test is the Fréchet distance between features of
generated bags and of the 1,000 test images of bags; the features are those of a classifier that is
trained too. A second adapter learns ankle boots. The picture has samples of the base, of each
adapter, and of mixtures of both by weight, all from the same noise; it is written to
`image_generation.png`, or into the folder of `--out`.

Needs `pip install keras-lora[plot]`; downloads 31 MB on the first run (see `assets.py`).
"""

from __future__ import annotations

import os

from keras_lora_cli.quiet import silenced

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

with silenced():
    import keras

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import assets
import diffusion
import numpy as np
import tensorflow as tf
from comparing import (
    Measure,
    Method,
    Plain,
    Study,
    comparison_options,
    report,
    train_everything,
)
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from training import (
    CROSS_ENTROPY,
    Features,
    Steps,
    batches,
    compile_for_training,
    output_folder,
    progress_bars,
)

import keras_lora as kl

STEPS, QUICK_STEPS = 200, 2
BATCH = 64
BAG, BOOT = 8, 9
MEASURE = Measure("distance", "{:.2f}", min)
CONFIG = kl.LoRAConfig(rank=8, alpha=16, targets="all")
PICTURE = Path("image_generation.png")
BLENDS = (0.75, 0.5, 0.25)
COLUMNS = 12
RATE = 2e-3


@dataclass(frozen=True)
class Effort:
    """Steps of training, by model, and of sampling, and the number of samples that are scored."""

    autoencoder: int
    denoiser: int
    judge: int
    sampling: int
    samples: int


FULL, QUICK = Effort(500, 1500, 400, 20, 1000), Effort(2, 2, 2, 2, 40)


@dataclass(frozen=True)
class Models:
    """What the adaptation starts from; `features` is the part of a classifier before its scores."""

    autoencoder: diffusion.Autoencoder
    denoiser: Path
    features: keras.Model


@dataclass(frozen=True)
class Images:
    """Images between 0 and 1, to train on and others."""

    train: np.ndarray
    held_out: np.ndarray


def scaled(pixels: np.ndarray) -> np.ndarray:
    return (pixels[..., None] / 255).astype("float32")


def of_class(label: int, validate: bool) -> Images:
    """The images of a class; the last thousand for training are there to validate."""
    train, test = assets.fashion_mnist("train"), assets.fashion_mnist("t10k")
    own = scaled(train.pixels[train.labels == label])
    middle = len(own) * 5 // 6
    others = own[middle:] if validate else scaled(test.pixels[test.labels == label])
    return Images(own[:middle], others)


class Training:
    """Trains the models from which the adaptation starts, and keeps their weights in a folder."""

    def __init__(self, effort: Effort, folder: Path, progress: Progress) -> None:
        self._effort, self._folder, self._progress = effort, folder, progress
        self._images = assets.fashion_mnist("train")

    def run(self) -> None:
        """The autoencoder and the denoiser see the old classes only."""
        keras.utils.set_random_seed(0)
        old = scaled(self._images.pixels[self._images.labels < BAG])
        self._denoiser(self._latents(old))
        judge = diffusion.judge(len(assets.FASHION_CLASSES))
        rows = scaled(self._images.pixels), self._images.labels
        self._fit(judge, CROSS_ENTROPY, rows, self._effort.judge, "judge")
        self._keep(judge, "judge")

    def _latents(self, images: np.ndarray) -> np.ndarray:
        encoder, decoder = diffusion.encoder(), diffusion.decoder()
        both = keras.Sequential([encoder, decoder])
        self._fit(both, "mse", (images, images), self._effort.autoencoder, "autoencoder")
        latents = diffusion.Autoencoder(encoder, decoder, 1.0).latents(images)
        self._keep(encoder, "encoder")
        self._keep(decoder, "decoder")
        scale = float(latents.std())
        np.save(self._folder / "scale.npy", scale)
        return latents / scale

    def _denoiser(self, latents: np.ndarray) -> None:
        model, steps = diffusion.denoiser(), self._effort.denoiser
        self._fit(model, "mse", diffusion.noised(latents, steps * BATCH, 0), steps, "denoiser")
        self._keep(model, "denoiser")

    def _fit(
        self,
        model: keras.Model,
        loss: object,
        rows: tuple[Features, np.ndarray],
        steps: int,
        name: str,
    ) -> None:
        compile_for_training(model, loss)
        bar = Steps(RATE, steps, self._progress, name)
        model.fit(batches(*rows, steps, 0, BATCH), shuffle=False, verbose=0, callbacks=[bar])

    def _keep(self, model: keras.Model, name: str) -> None:
        model.save_weights(self._folder / f"{name}.weights.h5")


def pretrained(effort: Effort, progress: Progress) -> Models:
    """The models of this effort; trained if they are not in the cache."""

    def make(workspace: Path) -> Path:
        folder = workspace / "trained"
        folder.mkdir()
        Training(effort, folder, progress).run()
        return folder

    name = f"fashion-diffusion-{effort.autoencoder}-{effort.denoiser}-{effort.judge}"
    folder = assets.cached(name, make)
    encoder, decoder = diffusion.encoder(), diffusion.decoder()
    judge = diffusion.judge(len(assets.FASHION_CLASSES))
    for file, model in {"encoder": encoder, "decoder": decoder, "judge": judge}.items():
        model.load_weights(folder / f"{file}.weights.h5")
    return Models(
        diffusion.Autoencoder(encoder, decoder, float(np.load(folder / "scale.npy"))),
        folder / "denoiser.weights.h5",
        keras.Model(judge.input, judge.get_layer("features").output),
    )


def adapt(model: keras.Model) -> None:
    kl.apply_lora(model, CONFIG, name="bag")


def train_head(model: keras.Model) -> None:
    for layer in model.layers:
        layer.trainable = layer.name == "out"


# The distances are those of `--sweep`, on one H200 with JAX.
METHODS = (
    Method("LoRA", adapt, {1e-3: 8.41, 3e-3: 4.10, 1e-2: 3.62}),
    Method("full fine-tuning", train_everything, {3e-4: 4.95, 1e-3: 3.35, 3e-3: 4.00}),
    Method("last layer only", train_head, {1e-3: 64.1, 3e-3: 52.3, 1e-2: 51.0, 3e-2: 51.4}),
)


@dataclass(frozen=True)
class Studio:
    """Trains denoisers for a class of images, and samples from them."""

    models: Models
    effort: Effort
    plain: Plain

    def base(self) -> keras.Model:
        model = diffusion.denoiser()
        model.load_weights(self.models.denoiser)
        compile_for_training(model, "mse")
        return model

    def batches(self, images: np.ndarray, steps: int, seed: int) -> tf.data.Dataset:
        latents = self.models.autoencoder.latents(images)
        rows = diffusion.noised(latents, steps * BATCH, seed)
        return batches(*rows, steps, seed, BATCH)

    def images(self, model: keras.Model, count: int, seed: int) -> np.ndarray:
        latents = diffusion.sample(self.plain.like(model), count, self.effort.sampling, seed)
        return self.models.autoencoder.images(latents)

    def distance(self, first: np.ndarray, second: np.ndarray) -> float:
        """The Fréchet distance between images, of at most as many as are sampled."""
        features = (
            self.models.features.predict(rows[: self.effort.samples], verbose=0)
            for rows in (first, second)
        )
        return diffusion.frechet(*features)


def study(studio: Studio, images: Images, steps: int, outputs: tuple[Path, Progress]) -> Study:
    samples = studio.effort.samples
    return Study(
        title="Bags, Fréchet distance to real ones",
        base=studio.base,
        methods=METHODS,
        batches=lambda seed: studio.batches(images.train, steps, seed),
        score=lambda model: studio.distance(studio.images(model, samples, 0), images.held_out),
        measure=MEASURE,
        steps=steps,
        folder=outputs[0],
        progress=outputs[1],
    )


def floors(studio: Studio, images: Images) -> dict[str, float]:
    """The distances that no denoiser can be expected to go below."""
    autoencoder = studio.models.autoencoder
    again = autoencoder.images(autoencoder.latents(images.train[: studio.effort.samples]))
    return {
        "other real bags": studio.distance(images.train, images.held_out),
        "the same, encoded and decoded": studio.distance(again, images.held_out),
    }


def learn_boots(model: keras.Model, studio: Studio, steps: int, progress: Progress) -> None:
    """Add an adapter of ankle boots to the model that has one of bags, and mixtures of both."""
    kl.apply_lora(model, CONFIG, name="boot")
    compile_for_training(model, "mse")
    rate = MEASURE.learning_rate(METHODS[0])
    bar = Steps(rate, steps, progress, "LoRA, ankle boots")
    rows = studio.batches(of_class(BOOT, validate=False).train, steps, 0)
    model.fit(rows, shuffle=False, verbose=0, callbacks=[bar])
    for bag in BLENDS:
        kl.combine_adapters(model, {"bag": bag, "boot": 1 - bag}, blend(bag))


def blend(bag: float) -> str:
    return f"{bag:.0%} bag, {1 - bag:.0%} boot"


def sheet(model: keras.Model, studio: Studio) -> dict[str, np.ndarray]:
    """Rows of samples: of the base, and by the name of the active adapter."""
    rows = {"base": studio.images(studio.base(), COLUMNS, 1)}
    for name in ("bag", *map(blend, BLENDS), "boot"):
        kl.set_adapter(model, name)
        rows[name] = studio.images(model, COLUMNS, 1)
    return rows


def draw(rows: Mapping[str, np.ndarray], path: Path) -> None:
    figure = Figure(figsize=(COLUMNS * 0.6 + 1.6, len(rows) * 0.65), layout="constrained")
    for axes, (name, images) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        axes.imshow(np.concatenate(images[..., 0], axis=1), cmap="gray_r", vmin=0, vmax=1)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main(arguments: Sequence[str] | None = None) -> int:
    options = comparison_options(__doc__, STEPS, QUICK_STEPS, arguments, BATCH)
    console, started = Console(), time.perf_counter()
    effort, images = QUICK if options.quick else FULL, of_class(BAG, options.sweep)
    with output_folder(options.out) as folder, progress_bars(console) as progress:
        studio = Studio(pretrained(effort, progress), effort, Plain(diffusion.denoiser()))
        methods = study(studio, images, options.steps, (folder, progress))
        models = report(methods, options, console, floors(studio, images))
        if models:
            model = models["LoRA"]
            learn_boots(model, studio, options.steps, progress)
            draw(sheet(model, studio), PICTURE if options.out is None else folder / PICTURE.name)
    console.print(f"{time.perf_counter() - started:.0f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
