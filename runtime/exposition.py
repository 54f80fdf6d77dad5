"""How metrics leave a process: collectors joined, and the endpoint that Prometheus scrapes.

On loopback unless an address is named, and read only: what is behind it cannot be changed by
whoever reads it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server
from prometheus_client.core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"


class Group(Collector):
    """Collectors that belong together; register it once."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = parts

    def collect(self) -> Iterable[Metric]:
        """Return one family a name, though several parts may give it (two readers do)."""
        merged: dict[str, Metric] = {}
        for part in self._parts:
            for family in part.collect():
                if family.name in merged:
                    merged[family.name].samples.extend(family.samples)
                else:
                    merged[family.name] = family
        return list(merged.values())


class Library:
    """What a library inside this process registers with prometheus_client by itself.

    Args:
        prefixes: of the names that are wanted, for example `vllm:`.
    """

    def __init__(self, *prefixes: str) -> None:
        self._prefixes = prefixes

    def collect(self) -> Iterable[Metric]:
        """Return the library's families."""
        return [f for f in REGISTRY.collect() if f.name.startswith(self._prefixes)]


class _Visits:
    """Notes when somebody scrapes: a part that gives no family."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._times_s: deque[float] = deque(maxlen=2)
        self._count = 0

    def collect(self) -> Iterable[Metric]:
        with self._changed:
            self._times_s.append(time.monotonic())
            self._count += 1
            self._changed.notify_all()
        return ()

    def await_next(self, limit_s: float) -> bool:
        with self._changed:
            if len(self._times_s) < 2:
                return False
            before, (first_s, last_s) = self._count, self._times_s
            due_s = last_s + 1.5 * (last_s - first_s) - time.monotonic()
            wait_s = min(limit_s, due_s)
            return wait_s > 0 and self._changed.wait_for(lambda: self._count > before, wait_s)


class Endpoint:
    """`http://<host>:<port>/metrics`."""

    def __init__(
        self, host: str, server: WSGIServer, thread: threading.Thread, visits: _Visits
    ) -> None:
        self._host, self._visits = host, visits
        self._server, self._thread = server, thread
        self.port: int = server.server_port

    def await_scrape(self, limit_s: float = 10.0) -> bool:
        """Wait until what is counted by now has been scraped; False when it was not.

        What a process counted after the last scrape is lost with it: the outcome of a run's
        last task, always. Returns at once where nobody scrapes regularly, or often enough.
        """
        return self._visits.await_next(limit_s)

    @property
    def url(self) -> str:
        """Where to scrape."""
        return f"http://{self._host}:{self.port}/metrics"

    def close(self) -> None:
        """Stop serving; safe to call twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=2.0)


def _as_plain_text(app: Any) -> Any:
    """Answer in Prometheus' own text format, whatever is asked for.

    Prometheus 2 asks for OpenMetrics, and prometheus_client 0.26 writes `vllm:name` there as
    `vllm_name`: no dashboard would find it.
    """

    def plain(environ: dict[str, Any], start_response: Any) -> Any:
        environ.pop("HTTP_ACCEPT", None)
        return app(environ, start_response)

    return plain


def serve(port: int, *parts: Any, host: str = LOOPBACK) -> Endpoint:
    """Serve `parts` and this process's own figures.

    Args:
        port: TCP port; 0 for a free one.
        parts: objects with `collect()`; see `runtime.collectors`.
        host: address to bind. Nothing is encrypted and nobody is asked who they are: beyond
            loopback, an address of a network that only those who may read can reach.

    Raises:
        ValueError: the port is taken, or the address is none of this host.
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    visits = _Visits()
    registry.register(Group((visits, *parts)))  # noted before the parts are read
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ValueError(
            f"output.metrics_port: {port} at {host} cannot be used ({error.strerror}); "
            "0 takes a free one"
        ) from None
    server.set_app(_as_plain_text(server.get_app()))
    endpoint = Endpoint(host, server, thread, visits)
    log.info("metrics at %s", endpoint.url)
    return endpoint
