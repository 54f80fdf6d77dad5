"""deploy/prometheus: valid, tested rule by rule, explained alert by alert."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from openhelix.runtime.core.config import METRICS_PARTS, OutputConfig
from openhelix.runtime.observe.metrics import catalogue

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None,
    reason="promtool is not installed; deploy/install-debian.sh prometheus installs it",
)


def rules(name: str) -> list[dict]:
    groups = yaml.safe_load((FOLDER / "rules" / f"{name}.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def checks(kind: str) -> Iterator[tuple[dict, dict]]:
    """Every check of a kind in the rules' tests, with the case that it belongs to."""
    for path in sorted((FOLDER / "tests").glob("*.yml")):
        for case in yaml.safe_load(path.read_text())["tests"]:
            yield from ((case, check) for check in case.get(kind, ()))


def promtool(*words: str) -> str:
    done = subprocess.run(
        [str(PROMTOOL), *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_the_configuration_is_valid() -> None:
    assert "SUCCESS" in promtool("check", "config", str(FOLDER / "prometheus.yml"))


@needs_promtool
@pytest.mark.parametrize("name", ["recording", "alerts", "success"])
def test_rules_do_what_their_tests_say(name: str) -> None:
    assert "SUCCESS" in promtool("test", "rules", str(FOLDER / "tests" / f"{name}.yml"))


def test_every_recording_rule_is_tested() -> None:
    asked = " ".join(check["expr"] for _, check in checks("promql_expr_test"))
    for rule in rules("recording"):
        assert rule["record"] in asked


def test_every_alert_is_seen_to_fire_and_to_stay_quiet() -> None:
    fired: set[str] = set()
    quiet: set[str] = set()
    for case, check in checks("alert_rule_test"):
        instances = set(re.findall(r'instance="(\w+)"', str(case["input_series"])))
        loud = {alert["exp_labels"]["instance"] for alert in check["exp_alerts"]}
        fired |= {check["alertname"]} if loud else set()
        quiet |= {check["alertname"]} if instances - loud else set()
    names = {rule["alert"] for rule in rules("alerts")}
    assert fired == quiet == names


def test_every_alert_says_what_it_is_and_what_to_do() -> None:
    text = (ROOT / "docs" / "operate.md").read_text()
    for rule in rules("alerts"):
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        notes = rule["annotations"]
        assert notes["summary"] and notes["description"]
        assert notes["runbook"] == f"docs/operate.md#{rule['alert'].lower()}"
        section = re.search(
            rf"^### {rule['alert']}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL
        )
        assert section, f"docs/operate.md has no section {rule['alert']}"
        assert "**First:**" in section[1] and len(section[1]) > 150


def test_rules_use_metrics_that_exist() -> None:
    families = {entry.name for entry in catalogue()}
    families |= {
        f"{entry.name}_{end}"
        for entry in catalogue()
        if entry.kind == "histogram"
        for end in ("bucket", "sum", "count")
    }
    recorded = {rule["record"] for rule in rules("recording")}
    for rule in (*rules("recording"), *rules("alerts")):
        for name in re.findall(r"[\w:]*openhelix_\w+(?::\w+)?", rule["expr"]):
            assert name in families | recorded, name


def test_the_laptop_targets_are_the_ports_of_a_run() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    job = next(c for c in config["scrape_configs"] if c["job_name"] == "openhelix")
    found = {group["labels"]["part"]: group["targets"] for group in job["static_configs"]}
    output = OutputConfig()
    assert found == {
        part: [f"{output.metrics_host}:{output.metrics_port_of(part)}"] for part in METRICS_PARTS
    }


def test_the_example_of_a_site_is_a_list_of_targets() -> None:
    groups = yaml.safe_load((FOLDER / "targets" / "site.yml.example").read_text())
    for group in groups:
        assert group["targets"] and set(group["labels"]) >= {"part", "site"}
        assert group["labels"]["part"] in METRICS_PARTS
