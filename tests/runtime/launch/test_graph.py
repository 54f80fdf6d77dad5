"""What a run refuses before anything is started, and what it knows of parts that do not answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from openhelix.runtime.core.config import ConfigError, load
from openhelix.runtime.core.plugins import resolve
from openhelix.runtime.launch.graph import Graph

JOB: dict[str, Any] = {"assignments": [], "initial": None}
ENGINE = "system2.engine={target: 'openhelix.runtime.robots.fake:PointEngine'}"


def graph(folder: Path, *words: str) -> Graph:
    return Graph(load(None, ["ray=false", ENGINE, *words]), JOB, folder)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "system1.policy={target: 'no_such_package.policy:Mine'}",
            r"^system1\.policy\.target: 'no_such_package\.policy:Mine': No module named 'no_such_package'$",
        ),
        (
            "system1.policy={target: 'openhelix.system1.polcy:DiffusionPolicy.load'}",
            r"^system1\.policy\.target: .*: no module named 'openhelix\.system1\.polcy'$",
        ),
        (
            "system2.engine={target: 'tests.fakse:PointEngine'}",
            r"^system2\.engine\.target: .*: no module named 'tests\.fakse'$",
        ),
    ],
)
def test_a_part_that_is_not_there_is_refused_before_any_process_starts(
    tmp_path: Path, words: str, expected: str
) -> None:
    run = graph(tmp_path, words)
    try:
        with pytest.raises(ConfigError, match=expected):
            run.start()
        assert run.ended() == {} and not (tmp_path / "logs").exists()
    finally:
        run.close()


def test_every_part_has_a_whole_health_record_before_it_is_set_up(tmp_path: Path) -> None:
    run = graph(tmp_path, "system1.policy={target: 'tests.fakes:ReachPolicy'}")
    try:
        found = {spec.name: resolve(spec.target)(**spec.options).health() for spec in run.specs}
    finally:
        run.close()
    assert set(found) == {"system1", "control", "system2", "observer", "world", "camera"}
    assert found["system1"]["policy_spec"] is None and found["system2"]["latent_spec"] is None
    assert found["control"]["steps"] == 0 and found["control"]["loop_state"] == "wait"
    assert found["control"]["latent_age_s"] is None and not found["control"]["finished"]
    assert found["world"]["starved_steps"] == found["camera"]["frames"] == 0
    assert found["observer"]["ticks"] == 0


def test_a_part_that_does_not_answer_has_the_fields_that_all_have(tmp_path: Path) -> None:
    run = graph(tmp_path, "system1.policy={target: 'tests.fakes:ReachPolicy'}")
    try:
        health = run.health("system2", 0.05)
    finally:
        run.close()
    assert health == {"name": "system2", "state": "unreachable", "error": "", "pid": None}
