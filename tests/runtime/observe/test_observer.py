"""The process that looks on: no tick goes missing without being counted."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from openhelix.runtime.core.config import load
from openhelix.runtime.launch import run as launch
from openhelix.runtime.launch.node import Interrupts
from openhelix.runtime.observe import observer as module
from openhelix.runtime.observe.observer import ObserverProcess
from openhelix.runtime.observe.recorder import FILE_NAME, Reader
from openhelix.runtime.observe.ticks import TOPIC, EveryReader, TickMessage, TickPublisher
from openhelix.runtime.transport.rpc import RpcError, RpcTimeout
from openhelix.runtime.transport.wire import Publisher
from tests.runtime.ticks import ticks

QUIET = SimpleNamespace(since=lambda _: ())
RUNNER = SimpleNamespace(current=None, results=[], steps=0, judged=0, succeeded=0, journal=QUIET)


class Ticks:
    """What the control process sends with, to one endpoint."""

    def __init__(self, endpoint: str) -> None:
        self.publisher = Publisher(endpoint, TOPIC, bind=False, awaited=True)
        self.send = TickPublisher(self.publisher, RUNNER)  # type: ignore[arg-type]

    def __enter__(self) -> Ticks:
        return self

    def __exit__(self, *error: object) -> None:
        self.publisher.close()


def join(sender: Ticks, reader: EveryReader[Any]) -> None:
    """Let a reader subscribe, which it does while it is asked for messages."""
    for _ in range(600):
        assert reader.poll() == []
        if sender.publisher.await_reader(0.05):
            return
    raise AssertionError("the publisher has heard of nobody")


def test_a_publisher_knows_when_somebody_hears_it(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/ticks"
    with Ticks(endpoint) as sender:
        assert not sender.publisher.await_reader(0.05)
        reader = EveryReader(endpoint, TOPIC, TickMessage)
        join(sender, reader)
        assert sender.publisher.await_reader(0.0)  # and remembers it
        for tick in ticks(3):
            sender.send(tick)
        got: list[Any] = []
        while len(got) < 3:
            assert reader.wait(30.0)
            got += reader.poll()
        assert [message.tick.index for message in got] == [1, 2, 3] and reader.stats.gaps == 0
        reader.close()


def test_what_was_sent_before_anybody_heard_is_counted(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/ticks"
    with Ticks(endpoint) as sender:
        run = ticks(5)
        for tick in run[:2]:
            sender.send(tick)
        reader = EveryReader(endpoint, TOPIC, TickMessage)
        join(sender, reader)
        for tick in run[2:]:
            sender.send(tick)
        got = 0
        while got < 3:
            assert reader.wait(30.0)
            got += len(reader.poll())
        assert reader.stats.gaps == 2
        reader.close()


@pytest.mark.parametrize(("first", "last", "total"), [(0, 20, 20), (2, 20, 20), (0, 15, 20)])
def test_a_recording_that_lacks_ticks_says_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, last: int, total: int
) -> None:
    monkeypatch.setattr(module, "LATE_S", 0.2)
    words = ("output.record=true", "output.video=false", "output.metrics_port=null")
    words += ("output.track=false",)
    config = load(None, words).model_dump(mode="json")
    endpoint = f"ipc://{tmp_path}/ticks"
    observer = ObserverProcess(config, endpoint, ("static", "gripper"), str(tmp_path))
    observer.setup()
    stop = threading.Event()
    thread = threading.Thread(target=observer.run, args=(stop,))
    thread.start()
    try:
        with Ticks(endpoint) as sender:
            assert sender.publisher.await_reader(30.0)
            run = ticks(total)
            sender.publisher._seq = first  # as if the others had been sent, to nobody
            for tick in run[first:last]:
                sender.send(tick)
            summary = observer.handlers()["finish"]({"told": total})
    finally:
        stop.set()
        thread.join(60.0)
        observer.close()
    missing = first + total - last
    assert summary["ticks_lost"] == missing
    assert summary["recording"] == {"written": last - first, "dropped": 0, "error": ""}
    reader = Reader(tmp_path / FILE_NAME)
    assert [m.message.index for m in reader if m.topic == "/tick"] == list(
        range(first + 1, last + 1)
    )
    assert reader.meta["missed"] == missing and reader.complete == (missing == 0)


class Asked:
    """A graph whose observer does not answer any more."""

    def ended(self) -> dict[str, str]:
        return {}

    def health(self, name: str, timeout_s: float) -> dict[str, Any]:
        return {"state": "ready"}

    def ask(self, *words: object, **more: object) -> dict[str, Any]:
        raise RpcTimeout("no answer to 'finish'")


class Heard:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, text: str) -> None:
        self.lines.append(text)


def test_an_observer_that_dies_while_it_finishes_costs_its_files_and_not_the_report() -> None:
    display = Heard()
    assert launch._finish(Asked(), display, Interrupts(), 9) is None  # type: ignore[arg-type]
    assert display.lines == ["observer: was not waited for; video and recording may be incomplete"]
    assert issubclass(RpcTimeout, RpcError)
