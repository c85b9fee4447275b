"""The Python of the README and of the guides runs, as written."""

from __future__ import annotations

import re
from pathlib import Path

import guide
import processes
import pytest
from servers import Server

ROOT = Path(__file__).parent.parent
SERVING = ROOT / "docs" / "serving.md"
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {SERVING})]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M)
    if blocks:
        processes.run(f"import os; os.chdir({str(tmp_path)!r})\n" + "\n".join(blocks))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # a reader sees those of Keras and KerasHub and goes on
def test_the_serving_guide_is_true_from_fit_to_curl(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = server.models / "guide"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert guide.Reader(server, folder).follow(SERVING) > 7


@pytest.mark.slow
def test_the_table_of_architectures_is_what_its_script_makes(tmp_path: Path) -> None:
    processes.run((ROOT / "docs" / "architectures.py").read_text(), tmp_path / "page.md")
    written = (ROOT / "docs" / "architectures.md").read_text()
    assert written == (tmp_path / "page.md").read_text(), "run `make architectures`"
