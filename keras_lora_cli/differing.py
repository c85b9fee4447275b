"""`diff`: the differences of two adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keras_lora.checks import invalid, is_finite
from keras_lora.lowrank.combining import WeightedFactors
from keras_lora.lowrank.decomposing import Array
from keras_lora.lowrank.distances import Distance, array_distance, delta_distance
from keras_lora_cli.adapters import Adapter, Layer, PeftOptions, adapter_of, load_into, read_adapter
from keras_lora_cli.bases import Base, load_base
from keras_lora_cli.output import Answer, Steps, facts, shown, table
from keras_lora_cli.paths import ADAPTERS, NAMES, check_kind

_NAMES = ("first", "second")


def diff(
    first: str,
    second: str,
    base: Base | None,
    options: PeftOptions,
    *,
    tolerance: float,
    steps: Steps,
) -> Answer:
    """Compare two adapters: deltas layer by layer, further values, and configs."""
    if not (is_finite(tolerance) and tolerance >= 0):
        raise invalid("tolerance", "a finite number that is not negative", tolerance)
    with steps.step("reading"):
        if base is None:
            pair = _read_alone(first, second)
        else:
            pair = _read_with(base, first, second, options)
    _check_shapes(*pair)
    with steps.step("comparing"):
        layers, values = _layers(*pair), _values(*pair)
    differing = [x["name"] for x in layers if x["relative_distance"] > tolerance]
    differing += [
        x["name"] for x in values if x["relative_distance"] > tolerance or None in x["norms"]
    ]
    data = {
        "equal": not differing,
        "tolerance": tolerance,
        "formats": [adapter.kind.value for adapter in pair],
        "differing": differing,
        "layers": layers,
        "values": values,
        "config": _settings(*pair),
    }
    return Answer(data, _views(data), negative=bool(differing))


def _read_alone(first: str, second: str) -> tuple[Adapter, Adapter]:
    kinds = [check_kind(path, ADAPTERS) for path in (first, second)]
    if kinds[0] is not kinds[1]:
        raise _needs_base(f"{NAMES[kinds[0]]} and {NAMES[kinds[1]]}")
    pair = read_adapter(first), read_adapter(second)
    unclear = {n for adapter in pair for n, v in adapter.layers.items() if v.matrices is None}
    if unclear:
        raise _needs_base(f"factors whose shapes do not tell the matrices: {sorted(unclear)}")
    return pair


def _read_with(
    base: Base, first: str, second: str, options: PeftOptions
) -> tuple[Adapter, Adapter]:
    for path in (first, second):
        check_kind(path, ADAPTERS)
    model = load_base(base, weights=False)
    for name, path in zip(_NAMES, (first, second), strict=True):
        load_into(model, path, name, options)
    one, two = (adapter_of(model, n, p) for n, p in zip(_NAMES, (first, second), strict=True))
    return one, two


def _needs_base(received: str) -> ValueError:
    return ValueError(
        f"Expected adapters that can be compared without a model. Received: {received}; give the "
        "model that they belong to as --base."
    )


def _check_shapes(first: Adapter, second: Adapter) -> None:
    """Refuse adapters of different bases: layers or values of different shapes."""
    problems = []
    for name, layers in _paired(first.layers, second.layers).items():
        terms = [layer.term for layer in layers if layer is not None]
        shapes = {term.shape for term in terms if term is not None}
        if len(shapes) > 1:
            problems.append(f"{name}: matrices {' and '.join(map(str, sorted(shapes)))}")
    for name, (x, y) in _paired(_all_values(first), _all_values(second)).items():
        if x is not None and y is not None and x.shape != y.shape:
            problems.append(f"{name}: shapes {x.shape} and {y.shape}")
    if problems:
        raise ValueError(
            f"Expected two adapters of one base. Received: {'; '.join(problems)}. Compare "
            "adapters of the same model."
        )


def _layers(first: Adapter, second: Adapter) -> list[dict[str, Any]]:
    """A row for each layer of either adapter; the layers farthest apart come first."""
    rows = [_layer(n, *pair) for n, pair in _paired(first.layers, second.layers).items()]
    return sorted(rows, key=lambda row: -row["relative_distance"])


def _layer(name: str, first: Layer | None, second: Layer | None) -> dict[str, Any]:
    one, two = (layer.term if layer else None for layer in (first, second))
    distance = delta_distance(one or _nothing(two), two or _nothing(one))
    return {
        "name": name,
        "ranks": [layer.rank if layer else None for layer in (first, second)],
        "scales": [layer.scale if layer else None for layer in (first, second)],
        **_plain(distance),
    }


def _nothing(like: WeightedFactors | None) -> WeightedFactors:
    """A zero delta of rank 0, for an adapter that does not adapt the layer."""
    assert like is not None
    return WeightedFactors(like.a[..., :0], like.b[:, :0], 0.0)


def _values(first: Adapter, second: Adapter) -> list[dict[str, Any]]:
    pairs = _paired(_all_values(first), _all_values(second))
    return [_value(name, *pair) for name, pair in pairs.items()]


def _value(name: str, first: Array | None, second: Array | None) -> dict[str, Any]:
    if first is not None and second is not None:
        return {"name": name, **_plain(array_distance(first, second))}
    norms = [v if v is None else array_distance(v, v).norms[0] for v in (first, second)]
    return {
        "name": name,
        "norms": norms,
        "distance": None,
        "relative_distance": 1.0,
        "cosine": None,
    }


def _all_values(adapter: Adapter) -> dict[str, Array]:
    extras = {f"{n}/{k}": v for n, layer in adapter.layers.items() for k, v in layer.extras.items()}
    return {**adapter.values, **extras}


def _plain(distance: Distance) -> dict[str, Any]:
    return {
        "norms": list(distance.norms),
        "distance": distance.distance,
        "relative_distance": distance.relative,
        "cosine": distance.cosine,
    }


def _paired(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The values of two mappings by each key of either; None for a missing value."""
    return {key: (first.get(key), second.get(key)) for key in {**first, **second}}


def _settings(first: Adapter, second: Adapter) -> list[dict[str, Any]]:
    """The fields in which the configs differ; nothing for configs of different formats."""
    if first.kind is not second.kind:
        return []
    pairs = _paired(_flat(first.config), _flat(second.config))
    return [{"name": n, "values": list(pair)} for n, pair in pairs.items() if pair[0] != pair[1]]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, Mapping) and value
        found |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def _views(data: Mapping[str, Any]) -> list[Any]:
    headings = ("layer", "ranks", "scales", "norms", "relative distance", "cosine")
    rows = [
        (
            row["name"],
            *(_both(row[key]) for key in ("ranks", "scales", "norms")),
            row["relative_distance"],
            row["cosine"],
        )
        for row in data["layers"]
    ]
    views: list[Any] = [table("Deltas", headings, rows)]
    if data["values"]:
        rows = [(x["name"], _both(x["norms"]), x["relative_distance"]) for x in data["values"]]
        views.append(table("Heads and biases", ("value", "norms", "relative distance"), rows))
    if data["config"]:
        rows = [(x["name"], *x["values"]) for x in data["config"]]
        views.append(table("Config", ("field", *_NAMES), rows))
    answer = "equal" if data["equal"] else f"{len(data['differing'])} differ"
    return [*views, facts({"answer": f"{answer}, at a tolerance of {data['tolerance']:g}"})]


def _both(values: list[Any]) -> str:
    """`4`, or `4 | 8` if two values differ, with `-` for a missing value."""
    texts = [shown(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " | ".join(texts)
