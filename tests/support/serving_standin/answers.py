"""The answers of both protocols, message to message."""

from __future__ import annotations

import grpc
from run_saved_model import ModelError, SavedModel
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef, SignatureDef
from tensorflow_serving.apis.get_model_metadata_pb2 import (
    GetModelMetadataRequest,
    GetModelMetadataResponse,
    SignatureDefMap,
)
from tensorflow_serving.apis.get_model_status_pb2 import (
    GetModelStatusRequest,
    GetModelStatusResponse,
)
from tensorflow_serving.apis.predict_pb2 import PredictRequest, PredictResponse

from support.serving_standin.failures import RequestError, invalid_argument, of_model
from support.serving_standin.tensors import to_array, to_message
from support.serving_standin.versions import Catalog

DEFAULT_SIGNATURE = "serving_default"


def predict(catalog: Catalog, request: PredictRequest) -> PredictResponse:
    number, model = catalog.find(request.model_spec)
    name = request.model_spec.signature_name or DEFAULT_SIGNATURE
    if name not in model.signatures:
        raise RequestError(
            grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{name}" not found.'
        )
    _check_names(model, name, request)
    feeds = {key: to_array(key, tensor) for key, tensor in request.inputs.items()}
    try:
        outputs = model.run(feeds, name)
    except ModelError as error:
        raise of_model(error) from error
    response = PredictResponse()
    response.model_spec.name = request.model_spec.name
    response.model_spec.signature_name = name
    response.model_spec.version.value = number
    for key in request.output_filter or outputs:
        response.outputs[key].CopyFrom(to_message(outputs[key]))
    return response


def _check_names(model: SavedModel, name: str, request: PredictRequest) -> None:
    inputs, outputs = model.signatures[name]
    sent, filtered = set(request.inputs), list(request.output_filter)
    if sent != set(inputs):
        raise invalid_argument(
            f"input size does not match signature: {len(sent)}!={len(inputs)} "
            f"len({{{','.join(sorted(sent))}}}) != len({{{','.join(sorted(inputs))}}}). "
            f"Sent extra: {{{','.join(sorted(sent - set(inputs)))}}}. "
            f"Missing but required: {{{','.join(sorted(set(inputs) - sent))}}}."
        )
    for alias in filtered:
        if alias not in outputs:
            raise invalid_argument(
                f"output tensor alias not found in signature: {alias} Outputs expected to be in "
                f"the set {{{','.join(sorted(outputs))}}}."
            )
    if len(set(filtered)) < len(filtered):
        raise invalid_argument(f"duplicate output tensor alias: {filtered}")


def metadata(catalog: Catalog, request: GetModelMetadataRequest) -> GetModelMetadataResponse:
    if not request.metadata_field:
        raise invalid_argument("GetModelMetadataRequest must specify at least one metadata_field")
    for field in request.metadata_field:
        if field != "signature_def":
            raise invalid_argument(f"Metadata field {field} is not supported")
    number, model = catalog.find(request.model_spec)
    response = GetModelMetadataResponse()
    response.model_spec.name = request.model_spec.name
    response.model_spec.version.value = number
    response.metadata["signature_def"].Pack(SignatureDefMap(signature_def=signatures(model)))
    return response


def signatures(model: SavedModel) -> dict[str, SignatureDef]:
    return dict(MetaGraphDef.FromString(model.meta_graph).signature_def)


def status(catalog: Catalog, request: GetModelStatusRequest) -> GetModelStatusResponse:
    if not request.HasField("model_spec"):
        raise invalid_argument("Missing ModelSpec")
    statuses = catalog.statuses(request.model_spec)
    return GetModelStatusResponse(model_version_status=statuses)
