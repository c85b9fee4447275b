"""What a person sees of an adapted model: `lora_summary`, one line, and Keras's `summary`."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import keras
import keras_hub
import pytest
from rich.console import Console
from support.models import composite, functional, subclassed

import keras_lora as kl
from keras_lora.summary.paths import joined, shortened

SCREEN_LINES, SCREEN_COLUMNS = 24, 80
LAYERS = 11
NAMES = (
    "self_attention_query",
    "self_attention_key",
    "self_attention_value",
    "self_attention_attention_output",
    "feedforward_intermediate_dense",
    "feedforward_gate_dense",
    "feedforward_output_dense",
)


class Decoder(keras.layers.Layer):
    """Seven matrices with the names of Llama's."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.dense = [keras.layers.Dense(5, name=name) for name in NAMES]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for layer in self.dense:
            layer.build(input_shape)

    def call(self, inputs: object) -> object:
        for layer in self.dense:
            inputs = layer(inputs)
        return inputs


@pytest.fixture(scope="module")
def deep() -> keras.Model:
    """A model of many layers, with seven adapted matrices each."""
    layers = [Decoder(name=f"transformer_layer_{i}") for i in range(LAYERS)]
    model = keras.Sequential([keras.Input((5,)), *layers])
    return kl.apply_lora(model, kl.LoRAConfig(rank=2, alpha=4, targets="all"))


def printed(model: keras.Model, width: int, **options: bool) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    kl.lora_summary(model, console, **options)
    return console.export_text().splitlines()


def rows(lines: list[str]) -> list[list[str]]:
    """The cells of the lines that end in a percentage, which the captions do not."""
    return [line.split() for line in lines if line.rstrip().endswith("%")]


# --- lora_summary -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [SCREEN_COLUMNS, 100, 240])
def test_a_deep_model_is_one_screen_of_lines_that_differ(deep: keras.Model, width: int) -> None:
    lines = printed(deep, width)
    assert len(lines) <= SCREEN_LINES
    assert all(len(line) <= width for line in lines)
    assert lines[0].strip() == "Adapter default, rank 2, scale 2"
    found = rows(lines)
    assert len({path for path, *_ in found}) == len(found) == len(NAMES)
    assert all("[0-10]" in path and count == str(LAYERS) for path, count, *_ in found)
    summary = kl.lora_summary(deep, Console(quiet=True))
    counts = [int(parameters.replace(",", "")) for *_, parameters, _ in found]
    assert sum(counts) == sum(row.parameters for row in summary.rows)
    assert len(summary.rows) == LAYERS * len(NAMES)


def test_the_whole_table_has_a_row_for_each_layer(deep: keras.Model) -> None:
    found = rows(printed(deep, SCREEN_COLUMNS, whole=True))
    assert len({path for path, *_ in found}) == len(found) == LAYERS * len(NAMES)
    for (shown, *_), path in zip(found, kl.lora_layers(deep), strict=True):
        pattern = ".*".join(map(re.escape, shown.split("…")))
        assert re.fullmatch(pattern, path)


def test_adapters_of_the_same_layers_share_a_table() -> None:
    model = functional()
    for name in ("fr", "de", "it", "es", "nl"):
        kl.apply_lora(model, kl.LoRAConfig(rank=2, alpha=4, targets=["up"]), name=name)
    kl.apply_lora(model, kl.LoRAConfig(rank=3, rank_pattern={"up": 5}), name="wide")
    text = "\n".join(line.rstrip() for line in printed(model, SCREEN_COLUMNS))
    assert "Adapters fr, de, it and 2 more (inactive), rank 2, scale 2" in text
    assert "Adapter wide\n" in text
    assert [line.split()[:3] for line in text.splitlines() if line.startswith((" up", " mid"))] == [
        ["up", "Dense", "24"],
        ["up", "Dense", "5"],
        ["middle", "Dense", "3"],
    ]


def test_more_than_a_screen_says_how_many_rows_more_there_are() -> None:
    widths = range(3, 40)
    layers = [keras.layers.Dense(width, name=f"{chr(75 + width)}") for width in widths]
    model = kl.apply_lora(keras.Sequential([keras.Input((5,)), *layers]), kl.LoRAConfig(rank=1))
    lines = printed(model, SCREEN_COLUMNS)
    assert len(lines) <= SCREEN_LINES
    adapted, shown = len(kl.lora_layers(model)), len(rows(lines))
    assert f"and {adapted - shown} more rows: lora_summary(model, whole=True)" in lines
    assert len(rows(printed(model, SCREEN_COLUMNS, whole=True))) == adapted


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["up"], "up"),
        (["layer_3/up"], "layer_3/up"),
        (["block_7", "block_9", "block_10", "block_11"], "block_[7,9-11]"),
        (["a1_b0/x2", "a1_b1/x2", "a2_b0/x2"], "a[1-2]_b[0-1]/x2"),
    ],
)
def test_paths_that_differ_in_numbers_are_one_text(paths: list[str], expected: str) -> None:
    assert joined(paths) == expected


@pytest.mark.parametrize("path", ["up", "a_long_name_of_one_layer_17", "outer_3/inner/query/dense"])
def test_a_path_is_shortened_to_every_width_between_its_ends(path: str) -> None:
    for width in range(1, len(path)):
        text = shortened(path, width)
        assert len(text) <= width
        assert text.count("/") == path.count("/") or width < len("outer_3/inner/query/dense")
        assert text.endswith(("…", path[-1]))
    assert shortened(path, len(path)) == path


@pytest.mark.parametrize("width", [30, 40, 50])
def test_layers_of_a_block_stay_apart(width: int) -> None:
    names = ("feedforward_intermediate_dense", "feedforward_output_dense")
    paths = [f"bert_backbone_2/transformer_layer_[0-5]/{name}" for name in names]
    assert shortened(paths[0], width) != shortened(paths[1], width)


# --- One line ---------------------------------------------------------------------------------


def test_the_line_is_pefts(capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    base = torch.nn.Sequential(torch.nn.Linear(5, 701), torch.nn.Linear(701, 3))
    peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["0"])
    ).print_trainable_parameters()
    dense = [keras.layers.Dense(701, name="up"), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((5,)), *dense])
    kl.print_trainable_parameters(kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up"])))
    theirs, ours = capsys.readouterr().out.splitlines()
    assert ours == theirs == "trainable params: 1,412 || all params: 7,724 || trainable%: 18.2807"


# --- model.summary() --------------------------------------------------------------------------


def shown(summary: Callable[..., None], **options: bool) -> str:
    """Keras's table without its frame and the widths of its columns."""
    text = io.StringIO()
    summary(print_fn=text.write, line_length=300, **options)
    return re.sub(r"[━┳┏┓┡╇┩└┴┘─├┼┤]+", "", re.sub(r"[ \n]+", " ", text.getvalue()))


def nested() -> keras.Model:
    inner = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(7, name="up"), keras.layers.Dense(3, name="out")],
        name="inner",
    )
    return keras.Sequential([keras.Input((5,)), inner, keras.layers.Dropout(0.1, name="drop")])


def task() -> keras.Model:
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=31, num_layers=1, num_heads=3, hidden_dim=15, intermediate_dim=17
    )
    return keras_hub.models.BertTextClassifier(backbone, num_classes=5, preprocessor=None)


NAMED = {
    "functional": (functional, {}, {"up (Dense)": "up (LoRADense)"}),
    "composite": (composite, {}, {"(Block)": "(Block, 1 adapted)"}),
    "subclassed": (subclassed, {"show_trainable": True}, {"up (Dense)": "up (LoRADense)"}),
    "nested": (nested, {}, {"(Sequential)": "(Sequential, 1 adapted)"}),
    "expanded": (
        nested,
        {"expand_nested": True},
        {"(Sequential)": "(Sequential, 1 adapted)", "up (Dense)": "up (LoRADense)"},
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_keras_names_adapted_layers(case: str) -> None:
    make, options, names = NAMED[case]
    model = make()
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up"]))
    expected = shown(lambda **options: type(model).summary(model, **options), **options)
    for plain, adapted in names.items():
        assert plain in expected
        expected = expected.replace(plain, adapted)
    assert shown(model.summary, **options) == expected
    with kl.merged(model):
        assert "adapted" not in shown(model.summary, **options)
    assert shown(model.summary, **options) == expected
    kl.unload_lora(model)
    assert "summary" not in vars(model)


def test_the_summary_of_a_task_names_adapted_layers() -> None:
    model = kl.apply_lora(task(), kl.LoRAConfig(rank=2, targets=["logits", "query"]))
    found = shown(model.summary)
    assert "(BertBackbone, 1 adapted)" in found
    assert "logits (LoRADense)" in found
