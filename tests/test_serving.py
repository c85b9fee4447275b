"""A server and unmodified clients of TensorFlow Serving: answers, errors, versions.

The server is the stand-in, which follows TensorFlow Serving's sources, and TensorFlow Serving
itself if one is found (`servers.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from support import servers
from support.served_models import EXPORTS, Call
from support.servers import GrpcClient, RestClient, Server
from tensorflow.core.framework.types_pb2 import DataType

pytest_plugins = ["support.servers"]

AVAILABLE, END = 30, 50  # of ModelVersionStatus.State
Served = Callable[[str], list[Call]]


@pytest.fixture(scope="session")
def served(server: Server) -> Served:
    """A function that exports and serves a model of `EXPORTS` once, and returns its calls."""
    calls: dict[str, list[Call]] = {}

    def serve(name: str) -> list[Call]:
        if name not in calls:
            calls[name] = EXPORTS[name](server.models / name / "1")
            server.serve(name, server.models / name)
        return calls[name]

    return serve


def check(received: Mapping[str, Any], expected: Mapping[str, np.ndarray]) -> None:
    assert sorted(received) == sorted(expected)
    for name, value in expected.items():
        array = np.asarray(received[name])
        if value.dtype == object:
            text = [v if isinstance(v, bytes) else v.encode() for v in array.ravel()]
            assert text == list(value.ravel())
        else:
            np.testing.assert_allclose(array, value, rtol=1e-5, atol=1e-5)


def columns(predictions: list[Any], expected: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """Rows of a response by output; a row is the value itself if there is one output."""
    if len(expected) == 1:
        return {next(iter(expected)): predictions}
    return {name: [row[name] for row in predictions] for name in predictions[0]}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(EXPORTS))
def test_each_protocol_gives_the_answers(name: str, server: Server, served: Served) -> None:
    for call in served(name):
        received = GrpcClient(server).predict(name, call.feeds, call.signature)
        check(received, call.expected)
        for output, value in call.expected.items():
            assert received[output].dtype == value.dtype
        rows = RestClient(server).predict(name, call.feeds, call.signature)
        check(columns(rows, call.expected), call.expected)
        by_column = RestClient(server, rows=False).predict(name, call.feeds, call.signature)
        one = len(call.expected) == 1
        check({next(iter(call.expected)): by_column} if one else by_column, call.expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(EXPORTS))
def test_status_and_metadata_describe_what_is_served(
    name: str, server: Server, served: Served
) -> None:
    (call, *_) = served(name)
    client, rest = GrpcClient(server), RestClient(server)
    assert client.states(name) == {1: AVAILABLE}
    status = {"error_code": "OK", "error_message": ""}
    available = {"version": "1", "state": "AVAILABLE", "status": status}
    for path in (name, f"{name}/versions/1"):
        assert rest.get(path).json() == {"model_version_status": [available]}
    signature_name = call.signature or "serving_default"
    signature = client.signatures(name)[signature_name]
    assert set(signature.inputs) == set(call.feeds)
    assert set(signature.outputs) == set(call.expected)
    metadata = rest.get(f"{name}/metadata").json()
    assert metadata["model_spec"]["version"] == "1"
    described = metadata["metadata"]["signature_def"]["signature_def"][signature_name]
    for side, tensors in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        for key, info in tensors.items():
            assert described[side][key]["dtype"] == DataType.Name(info.dtype)


def test_json_has_forms_for_what_it_lacks(server: Server, served: Served) -> None:
    """Bytes as base64 in inputs and in outputs named `..._bytes`; NaN and infinity; scalars."""
    served("kinds")
    rest = RestClient(server)
    binary = {"signature_name": "binary", "instances": [{"b64": "AP/+"}, "abc"]}
    assert rest.post("kinds", binary).json() == {"predictions": [{"b64": "//4="}, {"b64": "YmM="}]}
    body = b'{"signature_name": "logarithm", "instances": [0, NaN, 1.0, Infinity]}'
    assert repr(rest.post("kinds", body).json()) == "{'predictions': [-inf, nan, 0.0, inf]}"
    scalar = {"signature_name": "scalar", "inputs": {"x": 0.1}}
    assert rest.post("kinds", scalar).json() == {"outputs": pytest.approx(0.01)}
    tenth = {"signature_name": "logarithm", "inputs": {"x": [1.1051709]}}
    assert len(rest.post("kinds", tenth).text) < 40, "a float32 has no more digits than it needs"


def test_grpc_gives_the_outputs_that_are_asked_for(server: Server, served: Served) -> None:
    call = served("kinds")[0]
    request = servers.message("kinds", call.feeds)
    request.model_spec.version.value = 1
    request.output_filter.append("ids")
    response = GrpcClient(server).prediction.Predict(request, timeout=servers.TIMEOUT)
    assert list(response.outputs) == ["ids"]
    assert list(response.outputs["ids"].int64_val) == list(call.expected["ids"])
    assert response.model_spec.signature_name == "serving_default"


INVALID, NOT_FOUND, PRECONDITION = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
)
TEXT, X = {"text": np.array(["a"], object)}, {"x": np.ones(2, "float32")}
# Model, feeds, signature; the code, and a text of the message.
BAD_CALLS: dict[str, tuple[str, Mapping[str, Any], str, grpc.StatusCode, str]] = {
    "model": ("absent", X, "", NOT_FOUND, "Servable not found"),
    "signature": ("kinds", X, "absent", PRECONDITION, 'signature key "absent" not found'),
    "missing input": ("kinds", {}, "logarithm", INVALID, "input size does not match"),
    "unknown input": ("kinds", {**X, "z": X["x"]}, "logarithm", INVALID, "Sent extra: {z}"),
    "type": ("kinds", TEXT | {"text": X["x"]}, "strings", INVALID, "to be string but float"),
    "shape": ("kinds", {"x": np.ones((2, 3), "float32")}, "matrix", INVALID, "Matrix size"),
}


@pytest.mark.parametrize("name", list(BAD_CALLS))
def test_grpc_answers_a_bad_request_with_its_error(
    name: str, server: Server, served: Served
) -> None:
    served("kinds")
    model, feeds, signature, code, text = BAD_CALLS[name]
    with pytest.raises(grpc.RpcError) as caught:
        GrpcClient(server).predict(model, feeds, signature)
    assert caught.value.code() == code
    assert text in caught.value.details()


def test_grpc_answers_bytes_that_are_no_request_with_an_error(
    server: Server, served: Served
) -> None:
    call = served("kinds")[0]
    serialized = servers.message("kinds", call.feeds).SerializeToString()
    for garbage in (serialized[:-3], b"\xff" * 31):
        with pytest.raises(grpc.RpcError):
            GrpcClient(server).send(garbage)
    huge = servers.message("kinds", {"x": np.ones(3, "float32")}, "logarithm")
    huge.inputs["x"].tensor_content = b"abc"
    with pytest.raises(grpc.RpcError, match="tensor parsing error: x"):
        GrpcClient(server).prediction.Predict(huge, timeout=servers.TIMEOUT)


@pytest.mark.slow
def test_an_unknown_adapter_fails_its_request_with_the_known_names(
    server: Server, served: Served
) -> None:
    (call,) = served("adapters by name")
    unknown = np.array([*call.feeds["adapter"][:-1], "absent"], object)
    feeds = {**call.feeds, "adapter": unknown}
    text = "Expected adapter to be one of: fr, de, pt"
    with pytest.raises(grpc.RpcError, match=text) as caught:
        GrpcClient(server).predict("adapters by name", feeds)
    assert caught.value.code() == INVALID
    rest = RestClient(server)
    response = rest.post("adapters by name", rest.body(feeds))
    assert response.status_code == 400
    assert text in response.json()["error"]
    assert "absent" in response.json()["error"]


def rows(*values: Any, signature: str = "logarithm") -> dict[str, Any]:
    return {"signature_name": signature, "instances": list(values)}


# Body; the status, and a text of the message.
BAD_BODIES: dict[str, tuple[Any, int, str]] = {
    "nothing": (b"", 400, "JSON Parse error: The document is empty"),
    "no JSON": (b"{nonsense", 400, "JSON Parse error"),
    "cut short": (b'{"instances": [1, 2', 400, "JSON Parse error"),
    "no object": ([1], 400, "Is not object"),
    "no rows": (rows(), 400, "No values in 'instances' array"),
    "no list": ({"instances": 3}, 400, "Expecting 'instances' to be an list/array"),
    "neither": ({}, 400, "Missing 'inputs' or 'instances' key"),
    "both": ({"inputs": 1, "instances": [1]}, 400, "expecting only one of"),
    "signature": (rows(1, signature="absent"), 400, '"absent" not found in signature def'),
    "signature's type": ({"signature_name": 3, "instances": [1]}, 400, "must be a string value"),
    "list for several": ({"instances": [1]}, 400, "expecting list of objects"),
    "value for several": ({"inputs": [1]}, 400, "expecting an object"),
    "missing column": ({"inputs": {"ids": [1]}}, 400, "Missing named input"),
    "unknown name": (rows({"z": 1}), 400, "z"),
    "text for a number": (rows("1"), 400, "is not of expected type: float"),
    "bool for a number": (rows(True), 400, "is not of expected type: float"),
    "number for text": (rows(1, signature="strings"), 400, "is not of expected type: string"),
    "base64": (rows({"b64": "*"}, signature="strings"), 400, "Unable to base64 decode"),
    "object among values": (rows(1, {"x": 1}), 400, "got object at item 1"),
    "value among objects": (rows({"x": 1}, 1), 400, "got list at item 1"),
    "shapes": (rows([1], [1, 2]), 400, "1"),
    "depths": (rows([[1], 1]), 400, "found at incorrect level"),
    "lengths": (rows([[1, 2], [1]]), 400, "Encountered list at unexpected size"),
    "inner sizes": (rows([1.0, 2.0, 3.0], signature="matrix"), 400, "Matrix size"),
}


@pytest.mark.parametrize("name", list(BAD_BODIES))
def test_rest_answers_a_bad_request_with_its_error(
    name: str, server: Server, served: Served
) -> None:
    served("kinds")
    body, status, text = BAD_BODIES[name]
    response = RestClient(server).post("kinds", body)
    assert response.status_code == status
    assert text in response.json()["error"]


def test_rest_answers_unknown_places_with_404(server: Server, served: Served) -> None:
    served("kinds")
    rest = RestClient(server)
    for path in ("absent", "absent/metadata", "kinds/versions/7"):
        assert rest.get(path).status_code == 404, path
    for model in ("absent", "kinds/versions/7"):
        response = rest.post(model, rows(1))
        assert response.status_code == 404
        assert "Servable not found" in response.json()["error"]
    malformed = rest.post("kinds", rows(1), verb="nonsense")
    assert malformed.status_code == 400
    assert "Malformed request: POST" in malformed.json()["error"]


class Constant(tf.Module):
    """Answers with the number of its version."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = tf.Variable(number)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, "x")])
    def serve(self, x: Any) -> Any:
        return {"version": x * 0 + self.number}


def write_version(base: Path, number: int) -> None:
    """Write a version beside the others and rename it, so that a server sees it whole."""
    module = Constant(number)
    tf.saved_model.save(module, str(base / "new"), {"serving_default": module.serve})
    (base / "new").rename(base / str(number))


def until(reached: Callable[[], bool], attempts: int = 10**5) -> None:
    for _ in range(attempts):
        if reached():
            return
    raise AssertionError("it never came to that")


def test_a_new_version_takes_over_and_a_broken_one_does_not(server: Server) -> None:
    base, feeds = server.models / "constant", {"x": np.array([5], "int32")}
    base.mkdir()
    write_version(base, 2)
    server.serve("constant", base)
    client = GrpcClient(server)

    def answer() -> int:
        outputs, version = client.respond("constant", feeds)
        assert int(outputs["version"][0]) == version, "an answer of another version"
        return version

    assert answer() == 2
    write_version(base, 10)  # the higher number, not the one that is sorted last as text
    until(lambda: answer() == 10)
    until(lambda: client.states("constant") == {10: AVAILABLE, 2: END})
    assert (
        RestClient(server).get("constant/versions/2").json()["model_version_status"][0]["state"]
        == "END"
    )
    request = servers.message("constant", feeds)
    request.model_spec.version.value = 2
    with pytest.raises(grpc.RpcError, match="Servable not found"):
        client.prediction.Predict(request, timeout=servers.TIMEOUT)
    shutil.copytree(base / "10", base / "new")
    (base / "new/saved_model.pb").write_bytes(b"not a graph")
    (base / "new").rename(base / "11")
    until(lambda: client.states("constant").get(11) == END)
    assert answer() == 10
