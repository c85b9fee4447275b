"""The command line: what it refuses, in one line, and what it warns of."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from pathlib import Path

import keras
import pytest
from support.command_line import BASE, REVIEWS, Ask, Run

import keras_lora as kl
from keras_lora_cli.app import TRACEBACK

pytest_plugins = ["support.command_line"]


# --- check ----------------------------------------------------------------------------------


def test_a_saved_model_that_no_server_runs_is_a_no(ask: Ask, run: Run) -> None:
    found = ask("check", "unservable", code=1)
    assert found["problems"] == list(kl.check_saved_model("unservable").problems)
    assert "runs Python" in run("check", "unservable").out


# --- Bad input ------------------------------------------------------------------------------

REFUSED = {
    "no such command": ("mrege", "Did you mean 'merge'?"),
    "no such option": ("inspect x --nope", "No such option: --nope"),
    "an argument is missing": ("merge base out", "Missing argument"),
    "no such path": ("inspect no/where", "Received: nothing; give the path of one"),
    "no such preset": ("inspect bert_nowhere", "a path that exists, or the name of a preset"),
    "another kind of file": ("inspect broken.txt", "Received: a file of another kind"),
    "another kind of directory": ("check presets/gpt2", "Received: a preset directory"),
    "a broken model": ("inspect broken.keras", "expected a whole .keras file"),
    "a broken adapter": ("inspect broken/native", "expected at most 0 bytes of header. Received: "),
    "a broken PEFT": ("inspect broken/peft", "valid JSON"),
    "a broken lora.h5": ("inspect broken.lora.h5", "a whole file of KerasHub's"),
    "a broken SavedModel": ("check broken/saved", "Expected a SavedModel"),
    "python code": ("inspect lambda.keras", "safe_mode=False"),
    "an unknown layer": ("inspect custom.keras", "give --import the module that registers it"),
    "an unknown module": ("inspect custom.keras --import nowhere", "No module named 'nowhere'"),
    "a rank of 0": ("inspect base.keras --rank 0", "expected a positive integer"),
    "a rank of words": ("inspect base.keras --rank four", "Invalid value for '--rank'"),
    "no such layer": ("inspect base.keras --targets nope", "Expected every name in `targets`"),
    "a bad pattern": ("inspect base.keras --targets re:(", "a regular expression after 're:'"),
    "a task for a file": ("inspect base.keras --task CausalLM", "expected a preset for --task"),
    "no such task": ("inspect presets/gpt2 --task Nope", "a class in keras_hub.models"),
    "another base": ("merge base.keras adapters/gpt2 x.keras", "names and shapes of those of"),
    "no form": ("merge base.keras adapters/style out", "a path that tells the format"),
    "no preset": ("merge base.keras adapters/style out --format preset", "a model of KerasHub"),
    "no ending": ("merge base.keras adapters/style out --format keras", "ends in .keras"),
    "no room": ("add-adapter unservable a=adapters/style", "adapters=[...]) wrote"),
    "no native one": ("add-adapter unservable a=peft/gpt2", "expected an adapter's directory."),
    "no class names": ("export base.keras out --class-name a", "class_names"),
    "no name": ("export base.keras out --adapter adapters/style", "expected NAME=VALUE"),
    "a base that is needed": ("convert adapters/gpt2 out", "Expected a --base"),
    "nothing to convert": ("convert gpt2.lora.h5 out.lora.h5", "Expected a --base"),
    "no such dtype": ("convert peft/gpt2 out --to peft --dtype int8", "expected one of"),
    "heads unnamed": (
        "convert peft/bert out --base presets/bert",
        "has no variable for this parameter",
    ),
    "no such config": (
        "convert adapters/gpt2 out --base presets/gpt2 --transformers-config broken.txt",
        "the config.json of a Hugging Face model",
    ),
    "two formats": ("diff adapters/gpt2 peft/gpt2", "directory of PEFT; give the model"),
    "two bases": ("diff adapters/style adapters/other", "Expected two adapters of one base"),
    "no tolerance": ("diff peft/gpt2 peft/gpt2 --tolerance=-1", "that is not negative"),
}


@pytest.fixture(scope="module")
def broken(files: Path) -> None:
    """Files that cannot be read, beside the others."""
    for name in ("broken.txt", "broken.keras", "broken.lora.h5"):
        (files / name).write_text("broken")
    for folder, name in (
        ("native", "adapter.safetensors"),
        ("peft", "adapter_config.json"),
        ("saved", "saved_model.pb"),
    ):
        (files / "broken" / folder).mkdir(parents=True)
        (files / "broken" / folder / name).write_text("broken")
    inputs = keras.Input((5,))
    x = keras.layers.Dense(3)(inputs)
    keras.Model(inputs, keras.layers.Lambda(lambda x: x)(x)).save(files / "lambda.keras")
    (files / "base.keras").write_bytes((files / BASE).read_bytes())
    own = type("Own", (keras.layers.Dense,), {})
    keras.Model(inputs, keras.layers.Dense(2)(own(3)(x))).save(files / "custom.keras")
    wider = keras.Sequential([keras.Input((5,)), keras.layers.Dense(13, name="up")])
    kl.apply_lora(wider, kl.LoRAConfig(rank=2, targets=["up"]))
    kl.save_adapter(wider, files / "adapters" / "other")


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("broken")
def test_bad_input_is_refused_in_one_line(run: Run, files: Path, case: str) -> None:
    command, message = REFUSED[case]
    before = sorted(files.rglob("*"))
    result = run(*shlex.split(command))
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("keras-lora: error: ")
    assert result.err.count("\n") == 1
    assert message in result.err
    assert sorted(files.rglob("*")) == before


@pytest.mark.usefixtures("broken")
def test_the_traceback_is_there_when_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(ValueError, match="a whole .keras file"):
        run("inspect", "broken.keras")


def test_warnings_are_lines(run: Run, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter.safetensors").write_bytes(
        Path(REVIEWS, "adapter.safetensors").read_bytes()
    )
    result = run("inspect", tmp_path, "--json")
    assert result.code == 0
    assert json.loads(result.out)["format"] == "native"
    assert result.err.startswith("keras-lora: warning: Expected in ")
    assert result.err.count("\n") == 1


def test_modules_are_imported_for_layers_of_ones_own(
    ask: Ask, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_layers.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable('own')\n"
        "class Shift(keras.layers.Layer):\n"
        "    def call(self, x): return x + 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shift = importlib.import_module("own_layers").Shift()
    up, head = keras.layers.Dense(3, name="up"), keras.layers.Dense(2)
    keras.Sequential([keras.Input((5,)), up, shift, head]).save(tmp_path / "own.keras")
    keras.saving.get_custom_objects().pop("own>Shift")
    sys.modules.pop("own_layers")
    assert run("inspect", tmp_path / "own.keras").code == 2
    found = ask("inspect", tmp_path / "own.keras", "--import", "own_layers")
    assert [t["path"] for t in found["targets"]] == ["up"]
