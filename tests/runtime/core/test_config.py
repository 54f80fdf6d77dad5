"""Every wrong value gives one line that names the field and what is valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from openhelix.runtime.core.config import (
    MAX_YAML_BYTES,
    ConfigError,
    RunConfig,
    apply_overrides,
    load,
    validate,
)
from openhelix.runtime.core.paths import CONFIGS


def test_defaults_are_valid_and_the_shipped_file_loads() -> None:
    assert load(None) == RunConfig()
    assert load(CONFIGS / "run.yaml").world.scene == "D"
    assert load(CONFIGS / "helix.yaml").control.hz == 200.0


def test_overrides_reach_nested_fields_with_yaml_types() -> None:
    config = load(None, ["system2.hz=2", "tasks.stop-at-failure=true", "--world.cameras=[static]"])
    assert config.system2.hz == 2.0
    assert config.tasks.stop_at_failure is True
    assert config.world.cameras == ("static",)
    assert config.interval_steps == 15


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("system2.hzz=2", ["system2.hzz", "did you mean 'hz'"]),
        ("safety.box_min=1", ["safety.box_min", "did you mean 'box_min_m'"]),
        ("safety.box_min_m=[1,1,1]", ["safety", "empty"]),
        ("control.hz=-1", ["control.hz", "greater than 0", "-1"]),
        ("control.clock=sundial", ["control.clock", "'realtime' or 'lockstep'"]),
        ("world.scene=E", ["world.scene", "'A', 'B', 'C' or 'D'"]),
        ("tasks.sequence=1000", ["tasks.sequence", "999"]),
        ("tasks.steps_limit=many", ["tasks.steps_limit", "integer", "many"]),
        ("xyzzy=1", ["xyzzy", "valid: seed"]),
        ("system2.engine.target=nope", ["system2.engine.target"]),
        ("seed.deep=1", ["seed"]),
        ("system2", ["section.field=value"]),
        ("tasks.instruction=", ["tasks.instruction", "nothing follows", "null"]),
        ("system2.hz= ", ["system2.hz", "nothing follows"]),
    ],
)
def test_wrong_values_get_one_clear_line(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [override])
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("- a\n- b\n", "mapping"),
        ("a: [", "not YAML"),
        ("seed: 1\nseed: 2\n", "line 2: 'seed' is there twice"),
        ("tasks:\n  count: 1\n  sequence: 2\n  count: 3\n", "line 4: 'count' is there twice"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("# " + "x" * MAX_YAML_BYTES, "larger than 4 MiB"),
        ("sead: 1\n", "did you mean 'seed'"),
    ],
)
def test_wrong_files_get_one_clear_line(tmp_path: Path, content: str, word: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=word) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "word",
    [
        *("control.hz=.inf", "control.hz=1e9", "control.hz=.nan", "world.camera_hz=1e6"),
        *("system2.hz=.inf", "control.hold_limit_s=.inf", "system2.connect_timeout_s=.inf"),
        *(f"seed={10**20}", f"world.seed={10**20}", f"tasks.steps_limit={10**20}"),
    ],
)
def test_numbers_beyond_reason_are_refused_by_name(word: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{word.partition('=')[0]}: ") as caught:
        load(None, [word])
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*nothing\.yaml"):
        load(tmp_path / "nothing.yaml")


def test_the_configuration_cannot_be_changed_afterwards() -> None:
    config = load(None)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_another_target_leaves_the_options_of_the_first_behind() -> None:
    data = {
        "system1": {"policy": {"target": "ours:P", "options": {"path": "shipped"}}},
        "system2": {"engine": {"options": {"model": "laptop"}}},
    }

    def read(*words: str) -> RunConfig:
        return validate(RunConfig, apply_overrides(data, words, RunConfig))

    assert read().system1.policy.options == {"path": "shipped"}
    assert read("system1.policy.target=mine:P").system1.policy.options == {}
    assert read("system1.policy.target=ours:P").system1.policy.options == {"path": "shipped"}
    own = "system1.policy.options.speed=2"
    for words in ((own, "system1.policy.target=mine:P"), ("system1.policy.target=mine:P", own)):
        assert read(*words).system1.policy.options == {"speed": 2}
    default = f"system2.engine.target={RunConfig().system2.engine.target}"
    assert read(default).system2.engine.options == {"model": "laptop"}
    assert read("system2.engine.target=mine:E").system2.engine.options == {}
    assert data["system1"]["policy"]["options"] == {"path": "shipped"}  # the caller's own
