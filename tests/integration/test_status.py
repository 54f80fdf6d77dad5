"""A real run, looked at and stopped from outside: over HTTP, in a terminal, in a browser."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.integration.browser import CHROMIUM, browse
from tests.integration.command import CLI, page
from tests.integration.session import SMALL

PATIENCE_S = 90.0


@contextmanager
def running(base: Path) -> Iterator[subprocess.Popen[str]]:
    """`openhelix run` with small parts, until somebody stops it."""
    words = (
        # A browser that starts on two busy cores starves a simulated camera.
        *("safety.camera_max_age_s=60", "safety.proprioception_max_age_s=60"),
        "output.status=true",
        "tasks.instruction=reach 0.3 0.1 0.7",
        "tasks.steps_limit=100000",
    )
    process = subprocess.Popen(
        [*CLI, "run", "--no-ray", "--json", *SMALL, *words, f"output.folder={base}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


def status(base: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, "status", *words, f"output.folder={base}"], capture_output=True, text=True
    )


def fetch(url: str, method: str = "GET", token: str = "") -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def until_working(url: str) -> dict[str, Any]:
    end_s = time.monotonic() + PATIENCE_S
    told = b""
    while time.monotonic() < end_s:
        code, told = fetch(f"{url}api/status")
        if code == 200 and (seen := json.loads(told))["steps"] > 30:
            return dict(seen)
        time.sleep(0.1)
    raise AssertionError(f"the robot did not begin to work: {told!r}")


def report_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3  # stopped for safety
    return dict(json.loads(output))


def test_a_run_is_seen_over_http_and_in_a_terminal_and_stopped_with_its_token(
    tmp_path: Path,
) -> None:
    with page(tmp_path) as url, running(tmp_path) as run:
        seen = until_working(url)
        assert seen["instruction"] == "reach 0.3 0.1 0.7" and seen["state"] == "run"
        assert seen["latent_age_s"] > 0.0 and seen["silent_s"] < PATIENCE_S
        assert seen["rates_hz"]["loop"] > 0 and seen["rates_hz"]["system2"] > 0
        assert set(seen["cameras"]) == {"static", "gripper"}
        code, jpeg = fetch(f"{url}api/camera/static")
        with Image.open(io.BytesIO(jpeg)) as image:
            assert code == 200 and image.size == (200, 200)
            assert len(image.convert("L").getcolors()) > 30  # a scene, not a blank
        terminal = status(tmp_path)
        assert terminal.returncode == 0 and "reach 0.3 0.1 0.7" in terminal.stdout
        assert json.loads(status(tmp_path, "--json").stdout)["robot"] == "robot0"
        token = status(tmp_path, "--token").stdout.strip()
        folder = next(tmp_path.glob("run-*"))
        assert os.stat(folder / "status.json").st_mode & 0o077 == 0
        for wrong in ("", "wrong", token[:-1]):
            assert fetch(f"{url}api/stop", "POST", wrong)[0] == 401
        assert until_working(url)["state"] == "run" and run.poll() is None
        assert fetch(f"{url}api/stop", "POST", token)[0] == 200
        report = report_of(run)
        assert fetch(f"{url}api/status")[0] == 503
    assert report["safe_stops"] == {"operator": 1}
    assert report["stopped"] == "operator (the page at 127.0.0.1)"
    assert not (folder / "status.json").exists()
    ended = status(tmp_path)
    assert ended.returncode == 1 and "no run is alive" in ended.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--web", "--listen", "here"), "expected HOST:PORT"),
        (("--web", "--listen", "127.0.0.1:99999"), "expected HOST:PORT"),
        (("--web", "--tls-cert", "/nowhere"), "not a certificate"),
        (("output.foldr=x",), "did you mean 'folder'"),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    tmp_path: Path, words: tuple[str, ...], expected: str
) -> None:
    told = status(tmp_path, *words)
    assert told.returncode == 2 and expected in told.stderr
    assert len(told.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(
    CHROMIUM is None,
    reason="Chromium is not installed; deploy/install-debian.sh browser installs it",
)
def test_the_page_shows_the_robot_and_its_button_stops_it(tmp_path: Path) -> None:
    async def look(url: str, token: str) -> None:
        async with browse(url, tmp_path / "profile") as tab:
            text = "document.getElementById('{}').textContent"
            await tab.until(text.format("state") + " === 'run'")
            await tab.until("Number(" + text.format("hz-loop") + ") > 5")
            assert await tab.evaluate(text.format("instruction")) == "reach 0.3 0.1 0.7"
            assert 0 < float(await tab.evaluate(text.format("age"))) < 20
            images = "[...document.querySelectorAll('figure img')]"
            await tab.until(f"{images}.length === 2 && {images}.every(i => i.naturalWidth > 0)")
            first = await tab.evaluate(f"{images}[0].src")
            await tab.until(f"{images}[0].src !== {json.dumps(first)}")  # it is live
            assert not await tab.evaluate("document.getElementById('trouble').textContent")
            await press_stop(tab, "wrong")
            await tab.until(text.format("stop-told") + ".startsWith('NOT stopped')")
            assert await tab.evaluate(text.format("state")) == "run"
            await talk(tab, "reach 0.1 -0.1 0.6", "wrong")
            await tab.until(text.format("told") + ".startsWith('not heard')")
            assert await tab.evaluate(text.format("instruction")) == "reach 0.3 0.1 0.7"
            refused = len(tab.told)  # the browser notes the 401s itself
            await talk(tab, "reach 0.1 -0.1 0.6", token)
            await tab.until(text.format("instruction") + " === 'reach 0.1 -0.1 0.6'")
            await tab.until(text.format("history") + ".includes('the page at 127.0.0.1')")
            await tab.until("document.querySelectorAll('.view polyline').length > 0")
            for width in (1180, 390):  # a desk and a hand
                await tab.screenshot(tmp_path / f"{width}.png", width, 900)
                wide = await tab.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{wide} pixels at a width of {width}"
            await press_stop(tab, token)
            await tab.until(text.format("stop-told") + " === 'the robot was told to stop'")
            await tab.until(
                "document.querySelector('#stops li').textContent.startsWith('operator')"
                " || document.getElementById('trouble').textContent"
            )
            assert all("401" in line for line in tab.told[:refused]) and refused >= 2

    with page(tmp_path) as url, running(tmp_path) as run:
        until_working(url)
        asyncio.run(look(url, status(tmp_path, "--token").stdout.strip()))
        assert report_of(run)["safe_stops"] == {"operator": 1}


async def talk(tab: Any, text: str, token: str) -> None:
    await tab.evaluate(f"document.getElementById('token').value = {json.dumps(token)}")
    await tab.evaluate(f"document.getElementById('text').value = {json.dumps(text)}")
    await tab.evaluate("document.getElementById('say').click()")


async def press_stop(tab: Any, token: str) -> None:
    await tab.evaluate(f"document.getElementById('token').value = {json.dumps(token)}")
    await tab.evaluate("document.getElementById('stop-button').click()")
