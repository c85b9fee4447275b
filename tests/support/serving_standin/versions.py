"""Which versions of which models are served: TensorFlow Serving's default version policy."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
from run_saved_model import ModelError, SavedModel
from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus
from tensorflow_serving.apis.model_pb2 import ModelSpec

from support.serving_standin.failures import RequestError, invalid_argument, number, of_model


@dataclass(frozen=True)
class Version:
    """A version of a model: served, taken out of service, or failed to load."""

    number: int
    state: ModelVersionStatus.State
    model: SavedModel | None = None
    error: RequestError | None = None

    def status(self) -> ModelVersionStatus:
        status = ModelVersionStatus(version=self.number, state=self.state)
        status.status.SetInParent()
        if self.error is not None:
            status.status.error_code = number(self.error.code)
            status.status.error_message = str(self.error)
        return status


class Catalog:
    """The models by name, each at its highest version.

    While `load_new` and `configure` load, requests go on, and need no lock, since the catalog is
    replaced as a whole. A version that was taken out of service closes its session when the last
    request to it has been answered.
    """

    def __init__(self) -> None:
        self._loading = threading.Lock()
        self._paths: Mapping[str, Path] = {}
        self._versions: Mapping[str, Mapping[int, Version]] = {}

    def configure(self, paths: Mapping[str, Path]) -> None:
        """Serve these models and no others."""
        with self._loading:
            self._paths = dict(paths)
            known = self._versions
            self._versions = {n: known.get(n, {}) for n in paths}
            self._load_new()

    def load_new(self) -> None:
        """Load the versions that have appeared since."""
        with self._loading:
            self._load_new()

    def _load_new(self) -> None:
        for name, path in self._paths.items():
            found = {int(p.name): p for p in path.glob("*") if p.name.isdigit()}
            newest = max(found, default=None)
            if newest is not None and newest not in self._versions[name]:
                self._put(name, _load(newest, found[newest]))

    def _put(self, name: str, loaded: Version) -> None:
        versions = dict(self._versions[name])
        if loaded.model is not None:
            ended = ModelVersionStatus.State.END
            versions = {n: Version(n, ended, error=v.error) for n, v in versions.items()}
        versions[loaded.number] = loaded
        self._versions = {**self._versions, name: versions}

    def find(self, spec: ModelSpec) -> tuple[int, SavedModel]:
        """Number and model of the version that a request asks for; by default the served one."""
        if spec.version_label:
            raise invalid_argument(f"Unrecognized servable version label: {spec.version_label}")
        versions = self._versions.get(spec.name, {})
        wanted = spec.version.value if spec.HasField("version") else None
        for version in versions.values():
            if version.model is not None and wanted in (None, version.number):
                return version.number, version.model
        asked = f"Latest({spec.name})" if wanted is None else f"Specific({spec.name}, {wanted})"
        raise _not_found(f"Servable not found for request: {asked}")

    def statuses(self, spec: ModelSpec) -> list[ModelVersionStatus]:
        versions = self._versions.get(spec.name, {})
        if not spec.HasField("version"):
            if not versions:
                raise _not_found(f"Could not find any versions of model {spec.name}")
            return [versions[n].status() for n in sorted(versions, reverse=True)]
        wanted = spec.version.value
        if wanted not in versions:
            raise _not_found(f"Could not find version {wanted} of model {spec.name}")
        return [versions[wanted].status()]


def _not_found(message: str) -> RequestError:
    return RequestError(grpc.StatusCode.NOT_FOUND, message)


def _load(version: int, directory: Path) -> Version:
    states = ModelVersionStatus.State
    try:
        return Version(version, states.AVAILABLE, SavedModel(directory))
    except ModelError as error:
        return Version(version, states.END, error=of_model(error))
