"""The servers that the tests ask: the stand-in always, TensorFlow Serving if one is found.

TensorFlow Serving is `tensorflow_model_server` on the PATH, or one that runs elsewhere, with all of

    TF_SERVING_GRPC=host:8500 TF_SERVING_REST=host:8501 TF_SERVING_MODELS=/a/directory

where the directory is one that both sides have under the same path. Models reach a server as they
do in operation: written under a directory and named in a `HandleReloadConfigRequest`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import requests
import tensorflow as tf
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc
from tensorflow_serving.apis.get_model_metadata_pb2 import (
    GetModelMetadataRequest,
    GetModelMetadataResponse,
    SignatureDefMap,
)
from tensorflow_serving.apis.get_model_status_pb2 import GetModelStatusRequest
from tensorflow_serving.apis.model_management_pb2 import ReloadConfigRequest
from tensorflow_serving.apis.predict_pb2 import PredictRequest

from support.processes import ROOT

STANDIN, REAL = "stand-in", "TensorFlow Serving"
TIMEOUT = 60.0  # seconds for one request
ABSENT = (
    "no TensorFlow Serving: tensorflow_model_server is not on the PATH, and TF_SERVING_GRPC, "
    "TF_SERVING_REST and TF_SERVING_MODELS are not all set"
)


@dataclass(frozen=True)
class Server:
    """Addresses, and a directory that the server can read."""

    rpc: str
    rest: str
    models: Path
    _served: dict[str, Path] = field(default_factory=dict)

    def serve(self, name: str, path: Path) -> None:
        """Serve a model too; returns when it answers."""
        self._served[name] = path
        request = ReloadConfigRequest()
        for served, base_path in self._served.items():
            request.config.model_config_list.config.add(
                name=served, base_path=str(base_path), model_platform="tensorflow"
            )
        with grpc.insecure_channel(self.rpc) as channel:
            stub = model_service_pb2_grpc.ModelServiceStub(channel)
            stub.HandleReloadConfigRequest(request, timeout=TIMEOUT)


@contextlib.contextmanager
def started(kind: str, models: Path) -> Iterator[Server]:
    """A server of a kind; the test is skipped if it needs TensorFlow Serving and none is found."""
    names = ("TF_SERVING_GRPC", "TF_SERVING_REST", "TF_SERVING_MODELS")
    given = [os.environ[name] for name in names if name in os.environ]
    binary = shutil.which("tensorflow_model_server")
    if kind == STANDIN:
        program = [sys.executable, str(ROOT / "tests/support/standin.py")]
        with run(program, ("0", "0"), models) as server:
            yield server
    elif len(given) == len(names):
        yield Server(given[0], given[1], Path(given[2]))
    elif binary is not None:
        with run([binary], (_free_port(), _free_port()), models) as server:
            yield server
    else:
        pytest.skip(ABSENT)


@contextlib.contextmanager
def run(command: list[str], ports: tuple[str, str], models: Path) -> Iterator[Server]:
    """A server process on this machine without models, which polls for versions all the time."""
    config = models / "models.config"
    config.write_text("model_config_list {}")
    flags = {
        "port": ports[0],
        "rest_api_port": ports[1],
        "model_config_file": config,
        "file_system_poll_wait_seconds": 1,
    }
    arguments = [*command, *(f"--{name}={value}" for name, value in flags.items())]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        log: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # A thread reads all the time, since a full pipe would stop the server.
        reader = threading.Thread(target=_read, args=(process, log))
        reader.start()
        try:
            yield Server(*_addresses(log), models)
        finally:
            process.terminate()
            reader.join()


def _read(process: subprocess.Popen[str], log: queue.SimpleQueue[str | None]) -> None:
    for line in process.stdout or ():
        log.put(line)
    log.put(None)


def _addresses(log: queue.SimpleQueue[str | None]) -> tuple[str, str]:
    """The addresses that the server prints when it listens on them."""
    found: dict[str, str] = {}
    lines = []
    for line in iter(log.get, None):
        lines.append(line)
        match = re.search(r"(gRPC ModelServer|HTTP/REST API) at:? ?\S*?:(\d+)", line)
        if match:
            found[match[1]] = f"127.0.0.1:{match[2]}"
        if len(found) == 2:
            return found["gRPC ModelServer"], found["HTTP/REST API"]
    raise AssertionError(f"Expected a server that runs. Received: {''.join(lines)}")


def _free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


Arrays = dict[str, np.ndarray]


class GrpcClient:
    """A client of TensorFlow Serving, as in its documentation."""

    def __init__(self, server: Server) -> None:
        self._channel = grpc.insecure_channel(server.rpc)
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self._channel)

    def predict(self, name: str, feeds: Mapping[str, Any], signature: str = "") -> Arrays:
        return self.respond(name, feeds, signature)[0]

    def respond(
        self, name: str, feeds: Mapping[str, Any], signature: str = ""
    ) -> tuple[Arrays, int]:
        """The outputs, and the version that gave them."""
        response = self.prediction.Predict(message(name, feeds, signature), timeout=TIMEOUT)
        outputs = {key: tf.make_ndarray(value) for key, value in response.outputs.items()}
        return outputs, response.model_spec.version.value

    def send(self, serialized: bytes) -> None:
        """The bytes of a request, whatever they are."""
        call = self._channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
        call(serialized, timeout=TIMEOUT)

    def signatures(self, name: str) -> dict[str, Any]:
        request = GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = name
        response: GetModelMetadataResponse = self.prediction.GetModelMetadata(
            request, timeout=TIMEOUT
        )
        signatures = SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        return dict(signatures.signature_def)

    def states(self, name: str) -> dict[int, int]:
        """The state of each version."""
        request = GetModelStatusRequest()
        request.model_spec.name = name
        response = self.models.GetModelStatus(request, timeout=TIMEOUT)
        return {status.version: status.state for status in response.model_version_status}


def message(name: str, feeds: Mapping[str, Any], signature: str = "") -> PredictRequest:
    request = PredictRequest()
    request.model_spec.name = name
    request.model_spec.signature_name = signature
    for key, value in feeds.items():
        request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
    return request


class RestClient:
    """A client of the REST API, in one of its two forms."""

    def __init__(self, server: Server, rows: bool = True) -> None:
        self._url = f"http://{server.rest}/v1/models"
        self._rows = rows
        self._session = requests.Session()

    def predict(self, name: str, feeds: Mapping[str, Any], signature: str = "") -> Any:
        """The outputs: rows, or columns by name; the value alone where there is one output."""
        response = self.post(name, self.body(feeds, signature))
        response.raise_for_status()
        return response.json()["predictions" if self._rows else "outputs"]

    def body(self, feeds: Mapping[str, Any], signature: str = "") -> dict[str, Any]:
        columns = {name: _plain(value) for name, value in feeds.items()}
        named = {"signature_name": signature} if signature else {}
        if not self._rows:
            return {**named, "inputs": columns}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return {**named, "instances": rows}

    def post(self, name: str, body: Any, verb: str = "predict") -> requests.Response:
        """The response to a body, serialized or not."""
        data = {"data": body} if isinstance(body, bytes) else {"json": body}
        return self._session.post(f"{self._url}/{name}:{verb}", timeout=TIMEOUT, **data)

    def get(self, path: str) -> requests.Response:
        return self._session.get(f"{self._url}/{path}", timeout=TIMEOUT)


def _plain(value: Any) -> Any:
    """An array as JSON values, strings as text."""
    array = np.asarray(value)
    if array.dtype == object:
        decoded = [v.decode() if isinstance(v, bytes) else v for v in array.ravel()]
        return np.array(decoded, object).reshape(array.shape).tolist()
    return array.tolist()


@pytest.fixture(scope="session", params=[STANDIN, REAL])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with started(request.param, tmp_path_factory.mktemp("models")) as running:
        yield running
