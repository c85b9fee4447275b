"""A server under load: four clients at once, mixed adapters, malformed requests, a new version.

Every answer is compared with the one that Keras gives with that adapter active. Errors are for
malformed requests alone, and each of these gets one. Meanwhile an adapter is added to the exported
model, and the server goes over to the new version without one failed request.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import requests
from support import servers
from support.models import data
from support.served_models import answers, of_adapters
from support.servers import GrpcClient, RestClient, Server

import keras_lora as kl

pytest_plugins = ["support.servers"]

MODEL = "many"
SECONDS = 30.0
LIMIT = 300.0  # seconds in which every kind of request must have been answered
EACH = 100  # one of this many requests is malformed
SERVED, ADDED = ["fr", "de", "pt"], "it"
POOL = 16  # the number of rows that requests are made of

Feeds = dict[str, np.ndarray]


@dataclass
class Load:
    """What all clients share."""

    rows: np.ndarray
    answers: Mapping[str, np.ndarray]  # for each row, by adapter
    started: threading.Event = field(default_factory=threading.Event)
    added: threading.Event = field(default_factory=threading.Event)
    begin: float = field(default_factory=time.monotonic)

    def request(self, rng: np.random.Generator) -> tuple[Feeds, np.ndarray]:
        """A batch of random rows with random adapters, and the expected answer."""
        names = ["", *SERVED, *([ADDED] if self.added.is_set() else [])]
        places = rng.integers(0, POOL, rng.integers(1, 8))
        wanted = rng.choice(names, len(places))
        expected = [self.answers[n][i] for n, i in zip(wanted, places, strict=True)]
        feeds = {"sequence": self.rows[places], "adapter": wanted.astype(object)}
        return feeds, np.stack(expected)

    def elapsed(self) -> float:
        return time.monotonic() - self.begin


@dataclass
class Tally:
    """What one client has seen."""

    right: int = 0
    of_added: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)


# The name of each malformed request, and the call that sends it.
Malformed = Mapping[str, Callable[[Any, Feeds], object]]


def _send_cut(client: GrpcClient, feeds: Feeds) -> None:
    client.send(servers.message(MODEL, feeds).SerializeToString()[:-3])


RPC_MALFORMED: Malformed = {
    "shape": lambda c, f: c.predict(MODEL, {**f, "sequence": f["sequence"][..., :3]}),
    "type": lambda c, f: c.predict(MODEL, {**f, "sequence": f["sequence"].astype("float64")}),
    "adapter": lambda c, f: c.predict(MODEL, {**f, "adapter": f["adapter"] + "?"}),
    "one adapter more": lambda c, f: c.predict(
        MODEL, {**f, "adapter": np.append(f["adapter"], "fr")}
    ),
    "input missing": lambda c, f: c.predict(MODEL, {"sequence": f["sequence"]}),
    "signature": lambda c, f: c.predict(MODEL, f, "absent"),
    "truncated protobuf": _send_cut,
}


def _post(change: Callable[[dict[str, Any]], Any]) -> Callable[[RestClient, Feeds], None]:
    """A call that posts a changed body."""

    def call(client: RestClient, feeds: Feeds) -> None:
        client.post(MODEL, change(client.body(feeds))).raise_for_status()

    return call


def _with(key: str, value: Any) -> Callable[[RestClient, Feeds], None]:
    """A call that posts another value for `key` of the first row."""

    def change(body: dict[str, Any]) -> dict[str, Any]:
        first, *others = body["instances"]
        return {"instances": [{**first, key: value}, *others]}

    return _post(change)


REST_MALFORMED: Malformed = {
    "shape": _with("sequence", [[1.0, 2.0, 3.0]]),
    "type": _with("sequence", [["1"] * 5] * 11),
    "adapter": _with("adapter", "absent"),
    "adapter's type": _with("adapter", 1),
    "unknown input": _with("absent", 1),
    "signature": _post(lambda body: {**body, "signature_name": "absent"}),
    "garbage": _post(lambda body: b"\x00\xff{]"),
    "truncated JSON": _post(lambda body: str(body)[:-5].replace("'", '"').encode()),
}


def ask_rpc(client: GrpcClient, feeds: Feeds) -> tuple[np.ndarray, int | None]:
    """The answer, and the version that gave it."""
    outputs, version = client.respond(MODEL, feeds)
    return outputs["head"], version


def ask_rest(client: RestClient, feeds: Feeds) -> tuple[np.ndarray, int | None]:
    """The answer, and None, since REST does not give the version."""
    return np.array(client.predict(MODEL, feeds)), None


REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INTERNAL,  # bytes that are no message
}


def is_refusal(error: Any) -> bool:
    """Whether an error blames the request, and not the server or the connection."""
    if isinstance(error, grpc.RpcError):
        return error.code() in REFUSALS
    return error.response.status_code == 400 and bool(error.response.json()["error"])


@dataclass(frozen=True)
class Client:
    connection: Any
    ask: Callable[[Any, Feeds], tuple[np.ndarray, int | None]]
    malformed: Malformed

    def work(self, load: Load, seed: int) -> Tally:
        tally, rng, kinds = Tally(), np.random.default_rng(seed), itertools.cycle(self.malformed)
        try:
            while load.elapsed() < SECONDS or not self._has_seen_all(tally):
                assert load.elapsed() < LIMIT, f"not all was seen in time: {tally}"
                for _ in range(EACH - 1):
                    self._ask(load, rng, tally)
                self._ask_wrongly(next(kinds), load.request(rng)[0], tally)
                load.started.set()
        finally:
            load.started.set()  # so that the test does not wait for a client that failed
        return tally

    def _has_seen_all(self, tally: Tally) -> bool:
        return set(self.malformed) == tally.refused and tally.of_added > 0

    def _ask(self, load: Load, rng: np.random.Generator, tally: Tally) -> None:
        feeds, expected = load.request(rng)
        try:
            received, version = self.ask(self.connection, feeds)
        except (grpc.RpcError, requests.RequestException) as error:
            tally.wrong.append(f"{error}")
            return
        if version == 2:
            load.added.set()
        if np.allclose(received, expected, rtol=1e-4, atol=1e-5):
            tally.right += 1
            tally.of_added += ADDED in feeds["adapter"]
        else:
            tally.wrong.append(f"{feeds['adapter']}: {received} and not {expected}")

    def _ask_wrongly(self, kind: str, feeds: Feeds, tally: Tally) -> None:
        try:
            self.malformed[kind](self.connection, feeds)
        except (grpc.RpcError, requests.HTTPError) as error:
            if is_refusal(error):
                tally.refused.add(kind)
            else:
                tally.wrong.append(f"{kind}: {error}")
        else:
            tally.wrong.append(f"{kind}: answered")


@pytest.mark.slow
def test_no_answer_is_wrong_and_errors_are_for_the_malformed_alone(
    server: Server, tmp_path: Path
) -> None:
    model = of_adapters([*SERVED, ADDED])
    x, _ = data(model, POOL)
    load = Load(x, {name: answers(model, name, x) for name in ("", *SERVED, ADDED)})
    base = server.models / MODEL
    kl.export_saved_model(model, base / "1", adapters=SERVED)
    kl.save_adapter(model, tmp_path / ADDED, ADDED)
    server.serve(MODEL, base)
    clients = [
        *(Client(GrpcClient(server), ask_rpc, RPC_MALFORMED) for _ in range(2)),
        *(Client(RestClient(server), ask_rest, REST_MALFORMED) for _ in range(2)),
    ]
    load.begin = time.monotonic()
    with ThreadPoolExecutor(len(clients)) as threads:
        working = [threads.submit(client.work, load, i) for i, client in enumerate(clients)]
        load.started.wait(LIMIT)
        kl.add_adapter_to_saved_model(base / "1", tmp_path / ADDED, ADDED)
        tallies = [client.result() for client in working]
    assert [wrong for tally in tallies for wrong in tally.wrong] == []
    assert GrpcClient(server).respond(MODEL, load.request(np.random.default_rng(0))[0])[1] == 2
