"""A language model learns the style of the King James Bible, and its adapter goes to PEFT and back.

    make causal-lm                          # installs what it needs and runs the line below
    python examples/causal_lm.py            # 40 steps of 4 rows
    python examples/causal_lm.py --quick    # 3 steps: only whether everything works

SmolLM2-135M-Instruct, a Llama in KerasHub, is trained by LoRA. Its adapter is saved for PEFT, which
loads it over the same weights in transformers, on torch. Then PEFT trains an adapter of its own, of
another rank and on other layers, which is loaded into the Keras model, beside the first.

For each adapter, the two libraries are compared on the same tokens. The exit status is 1 unless

- their logits differ by at most 1e-3;
- greedy decoding gives the same tokens, 30 for each prompt;
- training made the perplexity on chapters held out lower (unless `--quick`).

Needs `pip install keras-lora[nlp,peft] gguf`, `apt-get`, and 1 GB of disk; downloads 96 MB on the
first run (see `assets.py`).
"""

from __future__ import annotations

import os

from keras_lora_cli.quiet import silenced

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
# All files are local, so the Hugging Face Hub is not asked.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Otherwise torch's threads spin while they wait, which is ten times as slow on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

with silenced():
    import keras

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import assets
import numpy as np
import smollm2
import tensorflow as tf
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from training import Steps, folder_bytes, megabytes, output_folder, positive, progress_bars

import keras_lora as kl

STEPS, QUICK_STEPS = 40, 3
BATCH = 4
SEQUENCE_LENGTH = 64
SCORED_ROWS, SCORED_AT_ONCE = 64, 8
SEED = 0
TOLERANCE = 1e-3

CONFIG = kl.LoRAConfig(rank=8, alpha=16)
LEARNING_RATE = 1e-3
# Another rank, scale and choice of layers than `CONFIG`, so that the way back is tested too.
PEFT_CONFIG = LoraConfig(
    r=4,
    lora_alpha=8,
    use_rslora=True,
    target_modules=["q_proj", "v_proj"],
    task_type="CAUSAL_LM",
)
PEFT_LEARNING_RATE = 5e-3
PEFT_STEPS = 10

PROMPTS = ("The king answered and said", "The capital of France is", "In the morning, a young man")
NEW_TOKENS = 30

Tokens = np.ndarray


@dataclass(frozen=True)
class Text:
    """The prompts, and rows of tokens, each one token longer than the model's input."""

    train: Tokens
    held_out: Tokens
    prompts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Answers:
    """The outputs of a model for the held-out tokens and the prompts, in either library."""

    perplexity: float
    logits: np.ndarray
    completions: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Exchange:
    """An adapter that one library has trained and the other one has loaded."""

    title: str
    untrained: float
    trained: Answers
    loaded: Answers
    adapter_bytes: int

    @property
    def moved(self) -> float:
        """The largest difference between two logits."""
        return float(np.abs(self.trained.logits - self.loaded.logits).max())

    @property
    def tokens(self) -> int:
        return sum(map(len, self.trained.completions))

    @property
    def same_tokens(self) -> int:
        """The number of tokens before the first difference, summed over the completions."""
        pairs = zip(self.trained.completions, self.loaded.completions, strict=True)
        return sum(same_start(*pair) for pair in pairs)

    def failures(self, learns: bool) -> list[str]:
        better = self.trained.perplexity < self.untrained
        passed = {
            f"logits differ by {self.moved:.1e}": self.moved <= TOLERANCE,
            "completions differ": self.trained.completions == self.loaded.completions,
            "training made the text no likelier": better or not learns,
        }
        return [f"{self.title}: {failure}" for failure, fine in passed.items() if not fine]


ROWS: Mapping[str, Callable[[Exchange], str]] = {
    "perplexity before training": lambda x: f"{x.untrained:.3f}",
    "after it, where it was trained": lambda x: f"{x.trained.perplexity:.3f}",
    "after it, where it was loaded": lambda x: f"{x.loaded.perplexity:.3f}",
    "adapter's directory": lambda x: megabytes(x.adapter_bytes),
    "largest difference of a logit": lambda x: f"{x.moved:.1e}",
    "the largest logit": lambda x: f"{np.abs(x.trained.logits).max():.1f}",
    "greedy tokens that are equal": lambda x: f"{x.same_tokens} of {x.tokens}",
}


def same_start(one: Sequence[int], other: Sequence[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


def read(tokenizer: keras.layers.Layer) -> Text:
    passages = assets.king_james()
    train, held_out = rows(tokenizer(passages.train)), rows(tokenizer(passages.held_out))
    np.random.default_rng(SEED).shuffle(train)
    return Text(train, held_out[:SCORED_ROWS], tokenizer(list(PROMPTS)))


def rows(texts: Sequence[Sequence[int]]) -> Tokens:
    """All tokens, in rows one longer than the input: the last token is the last target."""
    tokens, length = np.array(list(chain.from_iterable(texts)), "int32"), SEQUENCE_LENGTH + 1
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def features(tokens: Tokens) -> dict[str, np.ndarray]:
    return {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}


def keras_model() -> keras.Model:
    """The model, compiled, with a new adapter, which does not change its answers yet."""
    model = kl.apply_lora(smollm2.in_keras(), CONFIG)
    optimizer = keras.optimizers.Adam()
    # Otherwise TensorFlow traces the first step twice, and a trace takes more than half a minute.
    optimizer.build(model.trainable_variables)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
        sampler="greedy",
    )
    return model


def train(model: keras.Model, tokens: Tokens, progress: Progress, title: str) -> None:
    """One step for each batch, at a learning rate that falls to 0."""
    steps = Steps(LEARNING_RATE, len(tokens) // BATCH, progress, title)
    data = tf.data.Dataset.from_tensor_slices((features(tokens[:, :-1]), tokens[:, 1:]))
    model.fit(data.batch(BATCH), shuffle=False, verbose=0, callbacks=[steps])


def keras_answers(model: keras.Model, text: Text) -> Answers:
    inputs, targets = features(text.held_out[:, :-1]), text.held_out[:, 1:]
    loss = model.evaluate(inputs, targets, batch_size=SCORED_AT_ONCE, verbose=0)
    logits = model(features(text.held_out[:BATCH, :-1]))
    return Answers(
        float(np.exp(loss)),
        keras.ops.convert_to_numpy(logits),
        keras_completions(model, text.prompts),
    )


def keras_completions(
    model: keras.Model, prompts: Sequence[Sequence[int]]
) -> Sequence[Sequence[int]]:
    """The tokens that greedy decoding adds to each prompt."""
    shape = (len(prompts), NEW_TOKENS + max(map(len, prompts)))
    tokens, mask = np.zeros(shape, "int32"), np.zeros(shape, "int32")
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    full = model.generate(
        {"token_ids": tokens, "padding_mask": mask}, stop_token_ids=(smollm2.END_TOKEN,)
    )
    texts = zip(prompts, full["token_ids"], full["padding_mask"], strict=True)
    return [
        ids[np.asarray(used, bool)][len(prompt) :][:NEW_TOKENS].tolist()
        for prompt, ids, used in texts
    ]


def torch_train(model: Any, tokens: Tokens) -> None:
    """One step for each batch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, PEFT_LEARNING_RATE)
    model.train()
    for batch in torch.tensor(tokens, dtype=torch.long).split(BATCH):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


def torch_answers(model: Any, text: Text) -> Answers:
    model.eval()
    with torch.no_grad():
        tokens = torch.tensor(text.held_out, dtype=torch.long)
        losses = [model(input_ids=x, labels=x).loss for x in tokens.split(SCORED_AT_ONCE)]
        logits = model(input_ids=tokens[:BATCH, :-1]).logits
        completions = [torch_completion(model, prompt) for prompt in text.prompts]
    return Answers(float(torch.stack(losses).mean().exp()), logits.numpy(), completions)


def torch_completion(model: Any, prompt: Sequence[int]) -> Sequence[int]:
    tokens = torch.tensor([prompt])
    full = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
    )
    return full[0, len(prompt) :].tolist()


def to_peft(model: keras.Model, text: Text, untrained: float, directory: Path) -> Exchange:
    """The adapter that was trained in Keras, loaded by PEFT."""
    kl.save_peft_adapter(
        model, directory, base_model_name=str(smollm2.checkpoint()), overwrite=True
    )
    loaded = PeftModel.from_pretrained(smollm2.in_torch(), str(directory))
    return Exchange(
        "Keras to PEFT",
        untrained,
        keras_answers(model, text),
        torch_answers(loaded, text),
        folder_bytes(directory),
    )


def from_peft(model: keras.Model, text: Text, steps: int, directory: Path) -> Exchange:
    """An adapter that PEFT trains, loaded into the Keras model and made active."""
    torch.manual_seed(SEED)
    trained = get_peft_model(smollm2.in_torch(), PEFT_CONFIG)
    untrained = torch_answers(trained, text).perplexity
    torch_train(trained, text.train[: steps * BATCH])
    trained.save_pretrained(str(directory))
    kl.load_peft_adapter(model, directory, "back")
    kl.set_adapter(model, "back")
    return Exchange(
        "PEFT to Keras",
        untrained,
        torch_answers(trained, text),
        keras_answers(model, text),
        folder_bytes(directory),
    )


def completions(tokenizer: keras.layers.Layer, before: Answers, after: Answers) -> Table:
    table = Table("prompt", "before training", "after", title="Greedy decoding", show_lines=True)
    texts = (tokenizer.detokenize(answers.completions) for answers in (before, after))
    for row in zip(PROMPTS, *texts, strict=True):
        table.add_row(*(" ".join(cell.split()) for cell in row))
    return table


def report(exchanges: Sequence[Exchange]) -> Table:
    table = Table(title=f"{SCORED_ROWS} rows of chapters held out, and {len(PROMPTS)} prompts")
    table.add_column()
    for exchange in exchanges:
        table.add_column(exchange.title, justify="right")
    for heading, value in ROWS.items():
        table.add_row(heading, *map(value, exchanges))
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--steps", type=positive, default=STEPS, help=f"of {BATCH} rows in Keras; {STEPS}"
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps in each library")
    parser.add_argument("--out", type=Path, help="keep the adapters in this folder")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console = parse(arguments), Console()
    started = time.perf_counter()
    steps, peft_steps = (QUICK_STEPS,) * 2 if options.quick else (options.steps, PEFT_STEPS)
    keras.utils.set_random_seed(SEED)
    with console.status("Downloading and tokenising"):
        tokenizer = smollm2.tokenizer()
        text = read(tokenizer)
    with console.status("Before training"):
        model = keras_model()
        before = keras_answers(model, text)
    with progress_bars(console) as progress:
        train(model, text.train[: steps * BATCH], progress, "LoRA")
    with output_folder(options.out) as folder:
        with console.status("To PEFT"):
            there = to_peft(model, text, before.perplexity, folder / "from_keras")
        console.print(completions(tokenizer, before, there.trained))
        with console.status("Training in PEFT, and back"):
            back = from_peft(model, text, peft_steps, folder / "from_peft")
    console.print(report([there, back]))
    failures = [line for exchange in (there, back) for line in exchange.failures(not options.quick)]
    for failure in failures:
        console.print(f"Failed: {failure}.")
    console.print(f"{time.perf_counter() - started:.0f} s in all.")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
