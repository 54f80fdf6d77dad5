"""Refused and broken connections are told apart and counted; those that are fine are not."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zmq

from openhelix.runtime.core.interfaces import GoalRequest
from openhelix.runtime.observe.collectors import PeerMetrics
from openhelix.runtime.transport.codec import MAX_FRAME_BYTES
from openhelix.runtime.transport.sockets import generate
from openhelix.runtime.transport.wire import NewestPerTopic, PeerWatch, Publisher

REQUEST = GoalRequest(np.zeros((8, 8, 3), np.uint8), "open the drawer", "arm", 0, 0, 0)


def until(test: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not test():
        assert time.monotonic() < end_s, "it did not come about"
        time.sleep(0.01)


def copy_keys(source: Path, target: Path, *names: str) -> Path:
    target.mkdir(mode=0o700)
    for name in names:
        (target / name).write_bytes((source / name).read_bytes())
        (target / name).chmod(0o600)
    return target


def test_wrong_keys_and_rubbish_are_counted_by_what_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = tmp_path / "keys"
    for name in ("server", "arm"):
        generate(keys, name)
    generate(tmp_path / "strange", "stranger")
    stranger = copy_keys(keys, tmp_path / "stranger", "server.public")
    for path in (tmp_path / "strange").iterdir():
        path.rename(stranger / path.name)
    reader = NewestPerTopic("tcp://127.0.0.1:*", GoalRequest, keys=keys)
    watch = PeerWatch("requests", reader.port)
    address = reader.bound
    with caplog.at_level(logging.WARNING):
        wrong = Publisher(address, "arm", bind=False, keys=stranger)
        bare = Publisher(address, "arm", bind=False)
        host, port = address.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port))):
            pass  # comes and goes
        good = Publisher(
            address,
            "arm",
            bind=False,
            keys=copy_keys(keys, tmp_path / "good", "server.public", "arm.secret"),
        )

        def seen() -> bool:
            watch.poll()
            # Which side notices first that the other has no key is a matter of luck.
            others = watch.refused["protocol"] + watch.refused["unfinished"]
            return bool(watch.refused["key"]) and others >= 2

        until(seen)

        def heard() -> bool:
            good.send(REQUEST)
            return "arm" in reader.poll()

        until(heard)
        assert reader.key("arm") == (keys / "arm.public").read_text().strip()
        watch.poll()
    families = {family.name: family for family in PeerMetrics({"requests": watch}).collect()}
    values = {s.labels["reason"]: s.value for s in families["openhelix_wire_refused"].samples}
    assert values == {reason: watch.refused[reason] for reason in values} and values["key"] >= 1
    assert watch.admitted == 1
    assert "not on the list" in caplog.text
    for part in (wrong, bare, good, watch, watch, reader):
        part.close()


def test_a_frame_beyond_the_limit_ends_its_senders_connection_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    address = f"ipc://{tmp_path}/requests"
    reader = NewestPerTopic(address, GoalRequest)
    watch = PeerWatch("requests", reader.port)
    good = Publisher(address, "arm", bind=False)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    raw = context.socket(zmq.PUB)
    raw.connect(address)

    def both() -> bool:
        good.send(REQUEST)
        raw.send(b"rubbish\0")
        watch.poll()
        return "arm" in reader.poll() and reader.stats.dropped["truncated"] > 0

    until(both)
    assert (watch.admitted, watch.ended) == (2, 0)
    raw.send(bytes(MAX_FRAME_BYTES + 1))

    def cut_off() -> bool:
        watch.poll()
        return watch.ended == 1

    until(cut_off)
    assert "requests: a connection ended" in caplog.text and "beyond 64 MiB" in caplog.text
    gaps = reader.stats.gaps

    def heard() -> bool:
        good.send(REQUEST)
        return "arm" in reader.poll()

    until(heard)
    assert reader.stats.gaps == gaps
    raw.close(linger=0)
    context.term()
    for part in (good, watch, reader):
        part.close()
