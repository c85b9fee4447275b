"""The gRPC services."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc
from tensorflow_serving.apis.model_management_pb2 import ReloadConfigResponse
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from support.serving_standin import answers
from support.serving_standin.failures import RequestError, invalid_argument
from support.serving_standin.versions import Catalog

MESSAGE_LIMIT = 1024


def serve(catalog: Catalog, port: int, threads: int = 8) -> tuple[grpc.Server, int]:
    """A started server, bound to a port of this machine alone, and that port; 0 is any free one."""
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(threads), options=unlimited)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Prediction(catalog), server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(Models(catalog), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, bound


class Prediction(prediction_service_pb2_grpc.PredictionServiceServicer):
    """The methods that it does not define answer UNIMPLEMENTED."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def Predict(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return _answer(answers.predict, self._catalog, request, context)

    def GetModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return _answer(answers.metadata, self._catalog, request, context)


class Models(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def GetModelStatus(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return _answer(answers.status, self._catalog, request, context)

    def HandleReloadConfigRequest(  # noqa: N802
        self, request: Any, context: grpc.ServicerContext
    ) -> Any:
        return _answer(_reload, self._catalog, request, context)


def paths(config: ModelServerConfig) -> dict[str, Path]:
    if config.WhichOneof("config") != "model_config_list":
        raise invalid_argument("ServerModelConfig type not supported by HandleReloadConfigRequest.")
    return {entry.name: Path(entry.base_path) for entry in config.model_config_list.config}


def _reload(catalog: Catalog, request: Any) -> ReloadConfigResponse:
    catalog.configure(paths(request.config))
    return ReloadConfigResponse()


def _answer(
    compute: Callable[[Catalog, Any], Any],
    catalog: Catalog,
    request: Any,
    context: grpc.ServicerContext,
) -> Any:
    try:
        return compute(catalog, request)
    except RequestError as error:
        message = str(error)
        if len(message) > MESSAGE_LIMIT:
            message = message[:MESSAGE_LIMIT] + "...TRUNCATED"
        return context.abort(error.code, message)
