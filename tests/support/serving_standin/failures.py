"""The errors of requests, and the status that each protocol has for them."""

from __future__ import annotations

import grpc
from run_saved_model import ModelError

_OF_NUMBER = {code.value[0]: code for code in grpc.StatusCode}
# `ToHTTPStatusCode` of http_server.cc; all others are 500.
_HTTP = {
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}


class RequestError(Exception):
    """An error that is the answer to a request."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def http_status(self) -> int:
        return _HTTP.get(self.code, 500)


def invalid_argument(message: str) -> RequestError:
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, message)


def of_model(error: ModelError) -> RequestError:
    """The answer for an error of the model; TF_Code and gRPC have the same numbers."""
    return RequestError(_OF_NUMBER[error.code], str(error))


def number(code: grpc.StatusCode) -> int:
    return code.value[0]
