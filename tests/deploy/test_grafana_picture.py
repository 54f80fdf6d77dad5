"""deploy/grafana/picture.py draws every kind of panel from what a Prometheus answers."""

from __future__ import annotations

import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from openhelix.deploy.grafana.picture import Source, _heat, _joined, main
from tests.deploy.dashboards import dashboards, panels, queries

LABELS = {"instance": "r:1", "part": "control", "task": "turn_on_led", "suite": "calvin"}


class Answers(BaseHTTPRequestHandler):
    """Two series for every question; buckets where the legend will ask for them."""

    asked: list[str]
    ends_s: list[float]

    def do_GET(self) -> None:
        address = urllib.parse.urlparse(self.path)
        asked = {k: v[0] for k, v in urllib.parse.parse_qs(address.query).items()}
        type(self).asked.append(asked["query"])
        several = [("0.1", 1.0), ("0.5", 3.0), ("+Inf", 3.0)]
        metrics = [LABELS | {"le": le, "interval": str(round(10 * v))} for le, v in several]
        end_s = float(asked.get("end", asked.get("time", "0")))
        type(self).ends_s.append(end_s)
        values = [
            [[end_s - 60, str(v)], [end_s - 30, str(2 * v)], [end_s, str(v)]] for _, v in several
        ]
        rows = [
            {"metric": m, "values": v, "value": v[-1]} for m, v in zip(metrics, values, strict=True)
        ]
        body = json.dumps({"status": "success", "data": {"result": rows}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    Answers.asked, Answers.ends_s = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("name", ["realtime", "success"])  # all kinds of panels between them
def test_a_dashboard_is_drawn_whole(name: str, url: str, tmp_path: Path) -> None:
    out = tmp_path / "board.png"
    now_s = time.time()
    main([name, "--prometheus", url, "--minutes", "2", "--ago", "3", "--out", str(out)])
    assert all(now_s - 180 <= end_s <= time.time() - 180 for end_s in Answers.ends_s)
    with Image.open(out) as image:
        width, height = image.size
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert width > 1000 and height > 1000
    # Background, frames and titles are grey: what has a colour is what the panels show.
    assert (np.ptp(pixels, axis=-1) > 60).mean() > 0.01
    targets = [query.filled(120, 20) for query in queries() if query.board == name]
    assert set(Answers.asked) == set(targets)


def test_tables_are_sorted_by_number_and_joined_by_label(url: str) -> None:
    (panel,) = [
        p for p in panels(dashboards()["asynchrony"]) if p["title"] == "Success by interval"
    ]
    labels, titles, rows = _joined(panel, Source(url, 0.0, 60))
    assert labels == ["interval"]
    assert titles == ["success", "95 % from", "to"]
    assert [row[0] for row in rows] == ["10", "30"]
    assert rows[0][1:] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("moments", [1, 3])
def test_a_distribution_in_a_single_bucket_is_seen(
    moments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """System 2's latency often falls into one; the panel was blank."""
    (panel,) = [p for p in panels(dashboards()["realtime"]) if p["title"] == "System 2 latency"]
    at = [-30.0 + 10 * i for i in range(moments)]
    found = [(le, at, [n] * moments) for le, n in (("0.1", 0.0), ("0.2", 4.0), ("+Inf", 4.0))]
    monkeypatch.setattr(Source, "over_time", lambda *_: found)
    axes = Figure().add_axes((0, 0, 1, 1))
    _heat(axes, panel, Source("", 0.0, 60))
    (mesh,) = axes.collections
    box = mesh.get_datalim(axes.transData)
    assert box.height == 1 and box.x0 < at[0] and box.x1 > at[-1]
    assert np.asarray(mesh.get_array()).tolist() == [[4.0] * moments]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["200 ms"]


def test_a_prometheus_that_is_not_there_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fleet", "--prometheus", "http://127.0.0.1:9", "--out", str(tmp_path / "x.png")]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and "does not answer" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
