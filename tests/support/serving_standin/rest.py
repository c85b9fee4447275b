"""The REST API."""

from __future__ import annotations

import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import grpc
from google.protobuf import json_format
from tensorflow_serving.apis.get_model_metadata_pb2 import (
    GetModelMetadataRequest,
    SignatureDefMap,
)
from tensorflow_serving.apis.get_model_status_pb2 import GetModelStatusRequest
from tensorflow_serving.apis.model_pb2 import ModelSpec
from tensorflow_serving.apis.predict_pb2 import PredictRequest

from support.serving_standin import answers, json_tensors
from support.serving_standin.failures import RequestError, invalid_argument
from support.serving_standin.tensors import to_array, to_message
from support.serving_standin.versions import Catalog

_MODEL = r"(?i)/v1/models/(?P<name>[^/:]+)(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?"
_POST = re.compile(_MODEL + r":(?P<method>classify|regress|predict)")
_GET = re.compile(_MODEL + r"(?P<metadata>/metadata)?")


def serve(catalog: Catalog, port: int) -> ThreadingHTTPServer:
    """A server that is bound to a port of this machine alone; 0 is any free one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Headers and body go in one packet; otherwise the body would wait for an acknowledgement.
        wbufsize = -1
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._answer(lambda: get(catalog, self.path))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(lambda: post(catalog, self.path, body))

        def _answer(self, compute: Callable[[], bytes]) -> None:
            try:
                status, content = 200, compute()
            except RequestError as error:
                status, content = error.http_status, json_tensors.error(str(error))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Requests are not logged, as in the real server."""

    return _Server(("127.0.0.1", port), Handler)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def get(catalog: Catalog, path: str) -> bytes:
    match = _matched(_GET, "GET", path)
    if match["metadata"]:
        return _metadata(catalog, _spec(match))
    response = answers.status(catalog, GetModelStatusRequest(model_spec=_spec(match)))
    return _to_json(response).encode()


def _metadata(catalog: Catalog, spec: ModelSpec) -> bytes:
    request = GetModelMetadataRequest(model_spec=spec, metadata_field=["signature_def"])
    response = answers.metadata(catalog, request)
    signatures = SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    model, definition = _to_json(response.model_spec), _to_json(signatures)
    text = f'{{\n"model_spec":{model},\n"metadata": {{"signature_def": {definition}}}\n}}\n'
    return text.encode()


def _to_json(message: object) -> str:
    return json_format.MessageToJson(
        message, always_print_fields_with_no_presence=True, preserving_proto_field_name=True
    )


def post(catalog: Catalog, path: str, body: bytes) -> bytes:
    match = _matched(_POST, "POST", path)
    if match["method"].lower() != "predict":
        raise RequestError(grpc.StatusCode.UNIMPLEMENTED, "The stand-in has :predict alone.")
    request = PredictRequest(model_spec=_spec(match))
    document = json_tensors.parse(body)
    request.model_spec.signature_name = json_tensors.signature_name(document)
    tensors, rows = json_tensors.inputs(document, _input_types(catalog, request.model_spec))
    for name, tensor in tensors.items():
        request.inputs[name].CopyFrom(to_message(tensor))
    response = answers.predict(catalog, request)
    outputs = {name: to_array(name, tensor) for name, tensor in response.outputs.items()}
    return json_tensors.answer(outputs, rows)


def _input_types(catalog: Catalog, spec: ModelSpec) -> dict[str, int]:
    _, model = catalog.find(spec)
    name = spec.signature_name or answers.DEFAULT_SIGNATURE
    if name not in model.signatures:
        raise invalid_argument(f'Serving signature name: "{name}" not found in signature def')
    inputs = model.signatures[name].inputs
    if not inputs:
        raise invalid_argument(f"Failed to get input map for signature: {name}")
    return {key: dtype for key, (_, dtype) in inputs.items()}


def _matched(pattern: re.Pattern[str], method: str, path: str) -> re.Match[str]:
    if not path.lower().startswith("/v1/"):
        raise RequestError(grpc.StatusCode.NOT_FOUND, "Not Found")
    match = pattern.fullmatch(path)
    if match is None:
        raise invalid_argument(f"Malformed request: {method} {path}")
    return match


def _spec(match: re.Match[str]) -> ModelSpec:
    spec = ModelSpec(name=unquote(match["name"]))
    if match["version"]:
        spec.version.value = int(match["version"])
    if match["label"]:
        spec.version_label = unquote(match["label"])
    return spec
