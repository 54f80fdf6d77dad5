"""The status page's server: who may read, who may stop, and that a foreign page may neither."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from PIL import Image

from openhelix.runtime.control.talk import Entry, row
from openhelix.runtime.core.config import checked_sentence
from openhelix.runtime.observe import status_server
from openhelix.runtime.observe.status_server import HEADERS, StatusServer, host_name, is_loopback
from openhelix.runtime.observe.status_source import NoRun
from tests.integration.browser import CHROMIUM, browse

TOKEN = "a-token-of-some-length"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


NOT_LOOPBACK = (
    *("[::1]evil.example", "[::1]evil.example:80", "[::1].evil.example", "[[::1]]", "[127.0.0.1]]"),
    *("[::1", "::1]", "[evil.example]", "127.0.0.1@evil.example", "localhost.evil.example:1"),
    *("127.0.0.1:80:90", "127.0.0.1:x", "localhost:", "", "local host", "[::2]:80"),
)


class FakeSource:
    """One run, with a camera, that counts what it is asked."""

    def __init__(self) -> None:
        self.token: str | None = TOKEN
        self.asked, self.stops, self.said = 0, [], []
        self.alive = True
        self.t_ns = 1

    def snapshot(self) -> dict[str, Any]:
        self.asked += 1
        if not self.alive:
            raise NoRun("arm: does not answer")
        return {"robot": "arm", "instruction": "<script>alert(1)</script>"}

    def frame(self, camera: str) -> dict[str, Any]:
        if camera != "static":
            return {}
        return {"t_ns": self.t_ns, "rgb": np.full((20, 30, 3), (200, 10, 10), np.uint8)}

    def fleet(self) -> dict[str, Any]:
        self.asked += 1
        return {"runs": [{"run": "run-0001", "robot": "arm"}], "system2": None}

    def say(self, text: Any, who: str) -> dict[str, Any]:
        sentence = checked_sentence(text, "text")
        if not self.alive:
            raise NoRun("arm: does not answer")
        self.said.append((sentence, who))
        return {"said": 1, "text": sentence, "word": "", "replaces": "", "replaces_who": ""}

    def stop(self, who: str) -> None:
        if not self.alive:
            raise NoRun("arm: NOT stopped")
        self.stops.append(who)


Answer = tuple[int, Mapping[str, str], bytes]
Ask = Callable[..., Awaitable[Answer]]


def serve(
    source: FakeSource, talk: Callable[[Ask], Awaitable[None]], host: str = "127.0.0.1"
) -> StatusServer:
    """Serve while `talk` asks."""
    server: Any = None

    async def main() -> None:
        nonlocal server
        server = StatusServer(source, host)  # type: ignore[arg-type]
        url = (await server.start()).replace("0.0.0.0", "127.0.0.1")
        async with aiohttp.ClientSession() as session:

            async def ask(
                path: str, method: str = "GET", body: bytes | None = None, **headers: str
            ) -> Answer:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                async with session.request(method, url + path, headers=named, data=body) as answer:
                    return answer.status, answer.headers, await answer.read()

            await talk(ask)
        await server.close()
        await server.close()

    asyncio.run(main())
    return server


def test_the_page_needs_nothing_from_elsewhere_and_every_answer_is_guarded() -> None:
    async def talk(ask: Ask) -> None:
        status, headers, body = await ask("")
        assert status == 200 and b'<script src="/page.js" defer>' in body
        for path in ("", "page.js", "page.css"):
            status, headers, body = await ask(path)
            assert status == 200 and b"http://" not in body and b"https://" not in body
            assert b"innerHTML" not in body
        for path in ("", "api/status", "nowhere", "api/camera/none"):
            _, headers, _ = await ask(path)
            assert HEADERS.items() <= dict(headers).items()
        assert (await ask("nowhere"))[0] == 404
        assert (await ask("page.js/../../status.py"))[0] == 404
        assert (await ask("%2e%2e/status.py"))[0] == 404

    serve(FakeSource(), talk)


def test_on_loopback_reading_is_free_and_the_run_is_asked_once_for_many() -> None:
    source = FakeSource()

    async def talk(ask: Ask) -> None:
        answers = await asyncio.gather(*(ask("api/status") for _ in range(20)))
        assert {status for status, _, _ in answers} == {200}
        status, headers, body = await ask("api/camera/static")
        assert status == 200 and headers["X-Time-Ns"] == "1"
        image = Image.open(io.BytesIO(body))
        assert image.size == (30, 20)
        red, green, _ = image.getpixel((15, 10))
        assert red > 180 and green < 40
        assert (await ask("api/camera/none"))[0] == 404

    serve(source, talk)
    assert 1 <= source.asked < 20  # how often depends on how long the twenty take


def test_a_new_image_is_shown_when_the_camera_has_one() -> None:
    source = FakeSource()

    async def talk(ask: Ask) -> None:
        assert (await ask("api/camera/static"))[1]["X-Time-Ns"] == "1"
        source.t_ns = 2
        await asyncio.sleep(0.15)
        assert (await ask("api/camera/static"))[1]["X-Time-Ns"] == "2"

    serve(source, talk)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Cookie": f"token={TOKEN}"},
    ],
)
def test_without_the_token_nobody_stops_the_robot(headers: dict[str, str]) -> None:
    source = FakeSource()

    async def talk(ask: Ask) -> None:
        status, _, body = await ask("api/stop", "POST", **headers)
        assert status == 401 and b"token" in body
        assert (await ask(f"api/stop?token={TOKEN}", "POST"))[0] == 401

    assert serve(source, talk).refused == 2
    assert source.stops == []


def test_bytes_that_are_no_text_are_refused_as_any_others(caplog: pytest.LogCaptureFixture) -> None:
    source = FakeSource()
    head = b" HTTP/1.1\r\nHost: 127.0.0.1\r\n"

    async def first_line(port: int, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        line = await reader.readline()
        writer.close()
        return line

    async def main() -> None:
        server = StatusServer(source)  # type: ignore[arg-type]
        port = int((await server.start()).rsplit(":", 1)[1].strip("/"))
        for token in (b"\xff\xfe", TOKEN.encode() + b"\x80", "ü".encode()):
            claim = b"Authorization: Bearer " + token + b"\r\nContent-Length: 0\r\n\r\n"
            assert b" 401 " in await first_line(port, b"POST /api/stop" + head + claim)
        for name in (b"\xff", b"%FF", b"st%00atic", b"%ED%A0%80"):
            answer = await first_line(port, b"GET /api/camera/" + name + head + b"\r\n")
            assert b" 404 " in answer or b" 400 " in answer, answer
        await server.close()

    asyncio.run(main())
    assert source.stops == []
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_who_speaks_is_text_whatever_the_request_says() -> None:
    source = FakeSource()

    async def talk(ask: Ask) -> None:
        body = b'{"text": "open the drawer", "who": "me\\ud800"}'
        assert (await ask("api/say", "POST", body, **BEARER))[0] == 200

    serve(source, talk)
    ((_, who),) = source.said
    assert who.encode().startswith(b"me? at ")


def test_with_the_token_a_post_stops_the_robot_and_nothing_else_does() -> None:
    source = FakeSource()

    async def talk(ask: Ask) -> None:
        assert (await ask("api/stop", "GET", **BEARER))[0] == 405
        assert source.stops == []
        status, _, body = await ask("api/stop", "POST", **BEARER)
        assert status == 200 and body == b'{"stopped": true}'
        source.alive = False
        status, _, body = await ask("api/stop", "POST", **BEARER)
        assert status == 503 and b"NOT stopped" in body

    serve(source, talk)
    assert source.stops == ["the page at 127.0.0.1"]


def test_with_the_token_a_post_talks_to_the_robot_and_without_it_nothing_does() -> None:
    source = FakeSource()
    body = json.dumps({"text": " open  the drawer "}).encode()

    async def talk(ask: Ask) -> None:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": f"token={TOKEN}"}):
            assert (await ask("api/say", "POST", body, **headers))[0] == 401
        assert (await ask("api/say", "GET", **BEARER))[0] == 405
        assert source.said == []
        status, _, told = await ask("api/say", "POST", body, **BEARER)
        assert status == 200 and json.loads(told)["text"] == "open the drawer"
        named = json.dumps({"text": "stop", "who": "anna"}).encode()
        assert (await ask("api/say", "POST", named, **BEARER))[0] == 200
        source.alive = False
        assert (await ask("api/say", "POST", body, **BEARER))[0] == 503

    serve(source, talk)
    assert source.said == [
        ("open the drawer", "the page at 127.0.0.1"),
        ("stop", "anna at 127.0.0.1"),
    ]


@pytest.mark.parametrize(
    ("body", "expected", "why"),
    [
        (b"", 400, "not JSON"),
        (b"\xff", 400, "not JSON"),
        (b"[]", 400, "expected a sentence"),
        (b"{}", 400, "expected a sentence"),
        (b'{"text": 7}', 400, "expected a sentence"),
        (b'{"text": ""}', 400, "is empty"),
        (b'{"text": "a\\u0007b"}', 400, "control character"),
        (json.dumps({"text": "x" * 10_000}).encode(), 400, "10000 characters; at most 500"),
        (json.dumps({"text": "x" * 100_000}).encode(), 413, ""),
    ],
)
def test_what_is_no_sentence_is_told_in_one_line(body: bytes, expected: int, why: str) -> None:
    source = FakeSource()

    async def talk(ask: Ask) -> None:
        status, _, told = await ask("api/say", "POST", body, **BEARER)
        error = json.loads(told)["error"]
        assert status == expected and why in error and "\n" not in error

    serve(source, talk)
    assert source.said == []


def test_all_robots_are_asked_once_for_many_pages() -> None:
    source = FakeSource()

    async def talk(ask: Ask) -> None:
        answers = await asyncio.gather(*(ask("api/fleet") for _ in range(10)))
        assert {status for status, _, _ in answers} == {200}
        assert json.loads(answers[0][2])["runs"][0]["robot"] == "arm"

    serve(source, talk)
    assert source.asked == 1


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 421),  # a name that was made to resolve to this host
        ({"Host": "evil.example:9120"}, 421),
        *(({"Host": name}, 421) for name in NOT_LOOPBACK),
    ],
)
def test_a_foreign_page_may_neither_read_nor_stop(headers: dict[str, str], expected: int) -> None:
    source = FakeSource()

    async def talk(ask: Ask) -> None:
        assert (await ask("api/status", **headers))[0] == expected
        assert (await ask("api/camera/static", **headers))[0] == expected
        # Even a page that had got hold of the token.
        assert (await ask("api/stop", "POST", **headers, **BEARER))[0] == expected
        body = b'{"text": "open the drawer"}'
        assert (await ask("api/say", "POST", body, **headers, **BEARER))[0] == expected
        preflight = await ask("api/stop", "OPTIONS", **headers)
        assert preflight[0] >= 400 and "Access-Control-Allow-Origin" not in preflight[1]

    serve(source, talk)
    assert source.stops == [] and source.said == [] and source.asked == 0


def test_beyond_loopback_reading_needs_the_token_too() -> None:
    source = FakeSource()

    async def talk(ask: Ask) -> None:
        assert (await ask(""))[0] == 200  # the empty page, which asks for the token
        for path in ("api/status", "api/camera/static"):
            assert (await ask(path))[0] == 401
            assert (await ask(path, **BEARER))[0] == 200
        source.token = None  # the run has ended: there is nothing to compare with
        assert (await ask("api/status", Authorization="Bearer -"))[0] == 401
        assert (await ask("api/stop", "POST", Authorization="Bearer -"))[0] == 401

    serve(source, talk, host="0.0.0.0")
    assert source.stops == []


def test_a_run_that_has_ended_is_told_and_a_large_body_refused() -> None:
    source = FakeSource()
    source.alive = False

    async def talk(ask: Ask) -> None:
        status, _, body = await ask("api/status")
        assert status == 503 and b"does not answer" in body

    serve(source, talk)


def test_a_taken_port_is_told() -> None:
    async def main() -> None:
        first = StatusServer(FakeSource())  # type: ignore[arg-type]
        port = int((await first.start()).rstrip("/").rpartition(":")[2])
        second = StatusServer(FakeSource(), port=port)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"--listen: 127\.0\.0\.1"):
            await second.start()
        await first.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((name, True) for name in ("127.0.0.1", "127.9.9.9", "localhost", "::1")),
        *(
            (name, False)
            for name in ("0.0.0.0", "10.0.0.1", "example.org", "", "127.0.0.1.org", "[::1]")
        ),
    ],
)
def test_loopback_is_told_from_the_rest(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1:9120", "127.0.0.1"),
        ("[::1]", "::1"),
        ("[::1]:9120", "::1"),
        ("robot-1.example:80", "robot-1.example"),
        ("a_b", ""),
    ],
)
def test_a_host_header_is_read_whole(header: str, name: str) -> None:
    assert host_name(header) == name


@pytest.mark.parametrize("header", NOT_LOOPBACK)
def test_what_only_looks_like_loopback_is_not(header: str) -> None:
    assert not is_loopback(host_name(header))


def test_where_others_can_log_in_reading_needs_the_token_on_loopback_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(status_server, "other_users", lambda: ["alice"])

    async def talk(ask: Ask) -> None:
        assert (await ask("api/status"))[0] == 401
        assert (await ask("api/status", **BEARER))[0] == 200
        assert (await ask("api/status", Host="evil.example", **BEARER))[0] == 421

    assert not serve(FakeSource(), talk).open


NOT_HTTP = (
    *(
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ),
    *(
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"x" * 10_000 + b"\r\n\r\n",
    ),
    *(b"POST /api/stop HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"GET \xff\xfe HTTP/1.1\r\n\r\n"),
)


def test_what_is_no_http_is_told_in_one_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    source = FakeSource()

    async def main() -> None:
        server = StatusServer(source)  # type: ignore[arg-type]
        url = await server.start()
        port = int(url.rstrip("/").rpartition(":")[2])
        for _ in range(3):
            for data in NOT_HTTP:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(data)
                answer = await asyncio.wait_for(reader.read(), 30)
                assert b" 200 " not in answer.split(b"\r\n")[0]
                writer.close()
        async with aiohttp.ClientSession() as session, session.get(url + "api/status") as answer:
            assert answer.status == 200
        await server.close()

    asyncio.run(main())
    assert source.stops == []
    lines = [record.getMessage() for record in caplog.records]
    assert lines and all("not HTTP, refused" in text and "\n" not in text for text in lines)
    assert all(record.exc_info is None for record in caplog.records)
    counts = [int(text.rpartition("; ")[2].split()[0]) for text in lines]
    assert counts == [2**i for i in range(len(counts))]


class Shop(FakeSource):
    """Three robots at work, of which one is shown and one does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = threading.Event()
        self.answers.set()

    def snapshot(self) -> dict[str, Any]:
        entries = (
            Entry(1, 0, "said", "open the drawer", who="ann", said=1),
            Entry(2, 0, "begun", "open the drawer", said=1),
            Entry(3, 0, "answer", "understood (98 %)", said=1, success=True),
            Entry(4, 0, "seen", "open_drawer", task="open_drawer", steps=41, said=1),
        )
        seen = {
            **{"robot": "arm1", "driver": "sim", "run": "run-0001", "steps_limit": 360},
            **{"expected_hz": {"loop": 30.0, "system2": 1.0}, "latent_max_age_s": 4.0},
            **{"finished": False, "started": True, "stops": [], "task": "", "number": 2},
            **{"rates_hz": {"loop": 30.0, "system1": 7.5, "system2": 1.0}, "judged": 0},
            **{"instruction": "open the drawer", "steps": 52, "succeeded": 0, "ticks": 900},
            **{"state": "wait", "reason": "first plan due", "silent_s": 0.02, "latent_age_s": 0.8},
            "understood": 0.98,
        }
        plan = [[[0.4, 0.4], [0.5, 0.5]], [[0.5, 0.5], [0.6, 0.4]]]
        return seen | {
            "cameras": {"static": {"t_ns": self.t_ns, "age_s": 0.05, "plan": plan}},
            "entries": [row(entry) | {"ago_s": 4.0 - entry.number} for entry in entries],
        }

    def fleet(self) -> dict[str, Any]:
        self.answers.wait()
        robot = {"published": 120, "skipped": 3, "error": ""}
        kept = {"robot": "arm1", "instruction": "open the drawer", "state": "run"}
        runs = [
            {"run": "run-0001", **kept, "latent_age_s": 0.8, "finished": False},
            {"run": "run-0002", "error": "arm2: does not answer"},
        ]
        robots = {"arm1": robot, "elsewhere": {**robot, "published": 80}}
        return {"runs": runs, "system2": {"hz": 1.0, "published": 200, "robots": robots}}


def test_a_robot_that_does_not_answer_does_not_hold_up_the_one_that_is_shown() -> None:
    source = Shop()

    async def talk(ask: Ask) -> None:
        source.answers.clear()
        waiting = asyncio.create_task(ask("api/fleet"))
        await asyncio.sleep(0.1)
        status, _, told = await asyncio.wait_for(ask("api/status"), 60.0)
        assert status == 200 and json.loads(told)["robot"] == "arm1" and not waiting.done()
        source.answers.set()
        assert (await waiting)[0] == 200

    serve(source, talk)


@pytest.mark.skipif(
    CHROMIUM is None,
    reason="Chromium is not installed; deploy/install-debian.sh browser installs it",
)
def test_all_robots_are_on_the_page_of_one_at_the_width_of_a_desk_and_of_a_hand(
    tmp_path: Path,
) -> None:
    text = "document.getElementById('{}').textContent"

    async def look() -> None:
        server = StatusServer(Shop())  # type: ignore[arg-type]
        async with browse(f"{await server.start()}#token={TOKEN}", tmp_path / "profile") as tab:
            await tab.until("document.querySelectorAll('#robots tr').length === 3")
            rows = await tab.evaluate(text.format("robots"))
            for word in ("arm1", "arm2: does not answer", "elsewhere", "120", "80"):
                assert word in rows
            told = await tab.evaluate(text.format("fleet-line"))
            assert told == "3 robots; System 2 gives each 1 latent per second, 200 so far"
            assert await tab.evaluate(text.format("succeeded")) == "\u2013"  # nobody judged
            happened = await tab.evaluate(text.format("history"))
            assert "ann: open the drawer" in happened and "open_drawer after 41 steps" in happened
            colour = "getComputedStyle(document.getElementById('state')).color"
            red = "getComputedStyle(document.getElementById('trouble')).color"
            assert await tab.evaluate(f"{colour} !== {red}")  # to wait is not to be in trouble
            for width in (1180, 390):
                await tab.screenshot(tmp_path / f"{width}.png", width, 1500)
                wide = await tab.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{wide} pixels at a width of {width}"
                sharp = "(c => c.width === c.clientWidth)(document.getElementById('ages'))"
                assert await tab.evaluate(sharp)
            assert not tab.told
        await server.close()

    asyncio.run(look())
