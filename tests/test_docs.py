"""The Python of the README and of the guides runs, as written."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest
from support import guide
from support.forks import Fork
from support.servers import Server

import keras_lora_cli

pytest_plugins = ["support.forks", "support.servers"]

ROOT = Path(__file__).parent.parent
SERVING = ROOT / "docs" / "serving.md"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(set((ROOT / "docs").glob("*.md")) - {SERVING}),
]


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), flags=re.S | re.M)


def run_python(page: Path, folder: Path, fork: Fork) -> None:
    script = "\n".join(blocks(page, "python"))
    if script:
        status, output = fork(f"import os; os.chdir({str(folder)!r})\n{script}")
        assert status == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_and_console_blocks_run_in_order(
    page: Path,
    fork: Fork,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_python(page, tmp_path, fork)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "console"):
        for shown in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, expected = shown.partition("\n")
            program, *arguments = shlex.split(command)
            assert program == "keras-lora"
            assert keras_lora_cli.main(arguments) == 0
            received = capsys.readouterr().out
            options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            same = doctest.OutputChecker().check_output(expected, received, options)
            assert same, f"{command}\n{received}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of Keras and KerasHub, which readers see too
def test_the_serving_guide_is_true_from_fit_to_curl(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = server.models / "guide"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert guide.Reader(server, folder).follow(SERVING) > 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "page"), [("architectures", "architectures"), ("support_matrix", "support")]
)
def test_a_table_is_what_its_script_makes(
    script: str, page: str, fork: Fork, tmp_path: Path
) -> None:
    status, output = fork((ROOT / "docs" / f"{script}.py").read_text(), tmp_path / "page.md")
    assert status == 0, output
    written = (ROOT / "docs" / f"{page}.md").read_text()
    assert written == (tmp_path / "page.md").read_text(), f"run `make {page}`"
