"""What a router answers itself: its health, its metrics, and the list of its replicas, in SGLang's words."""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.cluster.exchange import Exchange
from headrace.cluster.health import Watch
from headrace.cluster.http_parts import Head
from headrace.cluster.metrics import CONTENT_TYPE, RouterMetrics
from headrace.cluster.replicas import RemoteReplica, Replicas
from headrace.cluster.routes import WORKERS_PATH
from headrace.ipc.codec import DECODE_ERRORS
from headrace.server.errors import error_body
from headrace.types.errors import RequestError

_ACCEPTED = 202
_KINDS = (None, "", "regular")


class WorkerBody(msgspec.Struct):
    """POST /workers. What only replicas that split prefill and decode have is refused; other keys are for other
    routers."""

    url: str
    worker_type: str | None = None
    bootstrap_port: int | None = None
    api_key: str | None = None


class OwnCalls:
    """Answers that need no replica."""

    def __init__(self, replicas: Replicas, watch: Watch, metrics: RouterMetrics) -> None:
        self._replicas = replicas
        self._watch = watch
        self._metrics = metrics
        self.is_draining = False

    def answer(self, head: Head, body: bytes, exchange: Exchange) -> None:
        """One of these calls."""
        path = head.path
        if path == "/metrics":
            exchange.reply(200, [(b"content-type", CONTENT_TYPE)], self._metrics.render())
        elif path == "/liveness":
            exchange.reply(200, [], b"")
        elif path in ("/health", "/health_generate"):
            self._health(exchange)
        elif path == "/ready":
            self._ready(exchange)
        elif path != WORKERS_PATH:
            self._one_worker(head, exchange)
        elif head.method == "POST":
            self._add(body, exchange)
        else:
            workers = [_shown(each) for each in self._replicas]
            _json(exchange, {"workers": workers, "total": len(workers)})

    def _health(self, exchange: Exchange) -> None:
        """A replica is healthy."""
        if any(each.is_healthy for each in self._replicas):
            exchange.reply(200, [], b"")
        else:
            exchange.error(error_body(503, "no replica is healthy", retryable=True))

    def _ready(self, exchange: Exchange) -> None:
        """A request that came now would start now, somewhere. `weight_version` is what all ready replicas hold."""
        ready = [each for each in self._replicas if each.is_ready]
        if self.is_draining or not ready:
            why = "draining" if self.is_draining else "no replica is ready"
            exchange.error(error_body(503, f"not ready: {why}", retryable=True))
            return
        versions = {each.weight_version for each in ready}
        common = versions.pop() if len(versions) == 1 else None
        counts = {"num_replicas": len(self._replicas), "num_ready": len(ready)}
        _json(exchange, {"ready": True, "weight_version": common, **counts})

    def _add(self, body: bytes, exchange: Exchange) -> None:
        try:
            ask = msgspec.json.decode(body, type=WorkerBody)
        except DECODE_ERRORS as error:
            raise RequestError(f"body: {error}", field="body") from None
        if ask.worker_type not in _KINDS:
            raise RequestError(f"worker_type {ask.worker_type!r} is not supported: regular", field="worker_type")
        if ask.bootstrap_port is not None:
            raise RequestError("bootstrap_port is not supported: replicas do not split prefill", field="bootstrap_port")
        if ask.api_key is not None:
            message = "api_key is not supported here: all replicas have one, --replica-api-key"
            raise RequestError(message, field="api_key")
        replica = self._replicas.add(ask.url)
        self._watch.begin(replica)
        told = {"status": "accepted", "worker_id": replica.id, "location": f"{WORKERS_PATH}/{replica.id}"}
        _json(exchange, {**told, **_shown(replica)}, _ACCEPTED)

    def _one_worker(self, head: Head, exchange: Exchange) -> None:
        identity = head.path.removeprefix(f"{WORKERS_PATH}/")
        if head.method != "DELETE":
            _json(exchange, _shown(self._replicas.find(identity)))
            return
        replica = self._replicas.remove(identity)
        self._watch.end(replica)
        _json(exchange, {"status": "accepted", "worker_id": replica.id, "url": replica.url}, _ACCEPTED)


def _shown(replica: RemoteReplica) -> dict[str, Any]:
    return {
        "id": replica.id,
        "url": replica.url,
        "worker_type": "regular",
        "connection_mode": "http",
        "is_healthy": replica.is_healthy,
        "is_ready": replica.is_ready,
        "is_current": replica.is_current,
        "ailment": replica.ailment,
        "load": replica.num_requests,
        "num_tokens": replica.num_tokens,
        "num_sent": replica.num_sent,
        "weight_version": replica.weight_version,
    }


def _json(exchange: Exchange, value: Any, status: int = 200) -> None:
    exchange.reply(status, [(b"content-type", b"application/json")], msgspec.json.encode(value))
