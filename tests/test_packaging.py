"""The wheel: what is in it, and that it imports with the core dependencies alone."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import processes

import keras_lora as kl

EXTRAS = (
    *("keras_hub", "keras_nlp", "peft", "torch", "transformers", "jax", "matplotlib"),
    *("onnx", "onnxruntime", "tf2onnx", "ai_edge_litert", "typer"),
)


@pytest.mark.slow
def test_the_wheel_imports_without_any_extra(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run(build, cwd=processes.ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "keras_lora/py.typed" in names
    (entries,) = (name for name in names if name.endswith("entry_points.txt"))
    text = (tmp_path / "site" / entries).read_text()
    assert text == "[console_scripts]\nkeras-lora = keras_lora_cli:main\n"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"keras_lora", "keras_lora_cli"}
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import keras_lora
assert keras_lora.__file__.startswith(sys.argv[1]), keras_lora.__file__
print(keras_lora.__version__)
"""
    output = processes.run(script, tmp_path / "site", block=EXTRAS)
    assert output.split()[-1] == kl.__version__


def test_every_public_name_is_there_and_documented() -> None:
    for name in kl.__all__:
        assert getattr(kl, name).__doc__, name
