"""deploy/grafana: the JSON is what the code says, whole, and loads where compose.yaml puts it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from openhelix.deploy.grafana.build import FOLDER, rendered
from openhelix.deploy.grafana.panels import SOURCE
from openhelix.deploy.metrics_page import PAGE, page, seen_where
from openhelix.runtime.observe.metrics import catalogue
from tests.deploy.dashboards import dashboards, panels, queries

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
BOARDS = dashboards()


def test_the_files_are_what_the_code_gives() -> None:
    assert {path.name: path.read_text() for path in FOLDER.glob("*.json")} == rendered(), (
        "run `make dashboards`"
    )


def test_the_page_of_metrics_is_what_the_catalogue_gives() -> None:
    assert PAGE.read_text() == page(), "run `make dashboards`"


def test_there_are_the_four() -> None:
    assert set(BOARDS) == {"realtime", "success", "asynchrony", "fleet"}
    assert len({board["uid"] for board in BOARDS.values()}) == 4


@pytest.mark.parametrize("name", BOARDS)
def test_panels_fit_the_grid_and_do_not_overlap(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARDS[name]["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
    ids = [panel["id"] for panel in BOARDS[name]["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_says_what_it_shows_and_asks_our_prometheus(name: str) -> None:
    for panel in panels(BOARDS[name]):
        assert panel["title"] and panel["description"].endswith(".")
        assert panel["datasource"]["uid"] == SOURCE.uid
        letters = [target["refId"] for target in panel["targets"]]
        assert letters and len(set(letters)) == len(letters)
    assert BOARDS[name]["templating"]["list"][0]["name"] == "instance"


def test_queries_ask_for_metrics_that_exist() -> None:
    names = {entry.name for entry in catalogue()}
    names |= {
        f"{entry.name}_{end}"
        for entry in catalogue()
        if entry.kind == "histogram"
        for end in ("bucket", "sum", "count")
    }
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules" / "recording.yml").read_text())
    recorded = {rule["record"] for group in rules["groups"] for rule in group["rules"]}
    for query in queries():
        for name in re.findall(r"[\w:]*openhelix_\w+(?::\w+)?", query.expr):
            assert name in names | recorded, f"{query.panel}: {name}"


def test_what_no_dashboard_and_no_alert_uses_is_named() -> None:
    # Looked at one by one when something is wrong; the page of metrics says "by hand" of them.
    assert {name for name, seen in seen_where().items() if not seen} == {
        "openhelix_loop_instruction_id",
        "openhelix_chunks_used_total",
        "openhelix_chunk_rows_blended_total",
        "openhelix_chunk_run_outs_total",
        "openhelix_future_stamps_total",
        "openhelix_sink_queue",
        "openhelix_wire_received_total",
        "openhelix_wire_delivered_total",
        "openhelix_wire_restarts_total",
        "openhelix_wire_sent_total",
    }


def test_the_page_of_metrics_says_where_each_is_seen() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", PAGE.read_text(), re.MULTILINE))
    assert rows.keys() == {entry.name for entry in catalogue()}
    assert rows["openhelix_loop_period_seconds"] == "[TicksLate](operate.md#openhelixtickslate)"
    # By way of two recording rules.
    assert "SuccessFalling" in rows["openhelix_tasks_total"]
    assert rows["openhelix_loop_instruction_id"] == "by hand"


def test_compose_mounts_what_is_there_and_starts_the_versions_named() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(compose["services"]) == {"prometheus", "grafana"}
    inside: dict[str, Path] = {}
    for service in compose["services"].values():
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"])
        for mount in service["volumes"]:
            source, target, *mode = mount.split(":")
            if source.startswith("./"):
                assert mode == ["ro"]
                assert (DEPLOY / source).is_dir()
                inside[target] = DEPLOY / source
            else:
                assert source.startswith("/tmp") or source in compose["volumes"]
    provider = DEPLOY / "grafana" / "provisioning" / "dashboards" / "openhelix.yml"
    named = yaml.safe_load(provider.read_text())["providers"][0]["options"]["path"]
    path = compose["services"]["grafana"]["environment"][named.removeprefix("$")]
    assert inside[path] == DEPLOY / "grafana" / "dashboards" or inside[path].samefile(FOLDER)
    home = compose["services"]["grafana"]["environment"][
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"
    ]
    assert (inside[path] / Path(home).name).is_file() and Path(home).parent == Path(path)
    config = compose["services"]["prometheus"]["command"][0].removeprefix("--config.file=")
    assert (inside[str(Path(config).parent)] / Path(config).name).is_file()


def test_the_datasource_is_the_one_that_panels_name() -> None:
    text = (DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    (source,) = yaml.safe_load(text)["datasources"]
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert source["uid"] == SOURCE.uid and source["type"] == SOURCE.type_val
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    (itself,) = [j for j in prometheus["scrape_configs"] if j["job_name"] == "prometheus"]
    assert source["url"] == f"http://{itself['static_configs'][0]['targets'][0]}"
