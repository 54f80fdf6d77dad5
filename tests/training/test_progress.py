"""What a training shows: time left, curves, and five lines at the end."""

from __future__ import annotations

import importlib.util
import io
import logging
import time

import pytest
from rich.console import Console

from openhelix.benchmarks.training import progress
from openhelix.benchmarks.training.curves import check_tracker
from openhelix.benchmarks.training.progress import Showing, ending
from openhelix.runtime.core.config import ConfigError
from openhelix.system1.train_loop import Pace, run_loop

SLOW = 3600 * 10**9  # an hour from now, for a deadline


class Steps:
    """A training whose loss is known."""

    def __init__(self, step=0) -> None:
        self.step, self.history, self.saved = step, [], []

    def train_step(self):
        self.step += 1
        return {"step": self.step, "loss": 10.0 / self.step}

    def evaluate(self):
        return {"val_loss": 1.0 / self.step}

    def save(self) -> None:
        self.saved.append(self.step)


def test_without_a_terminal_every_logged_row_says_how_long_it_takes(tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    with Showing()("stage1", tmp_path) as watch:
        assert run_loop(Steps(), Pace(40, 40, 40, 10), watch)
    said = [r.getMessage() for r in caplog.records if "to go" in r.getMessage()]
    assert said[0].startswith("stage1: step 10 of 40, 0:0") and len(said) == 4
    assert said[-1] == "stage1: step 40 of 40, 0:00:00 to go"
    assert not list(tmp_path.iterdir())


def test_a_terminal_gets_a_bar(tmp_path) -> None:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=80)
    with Showing(terminal)("policy", tmp_path) as watch:
        run_loop(Steps(), Pace(30, 30, 30, 100), watch)
    text = out.getvalue()
    assert "policy" in text and "step 30 of 30, 0:00:00 to go, loss 0.333" in text


def test_the_time_left_is_the_deadlines_where_that_comes_first(tmp_path) -> None:
    shown = Showing()("policy", tmp_path)
    now = time.monotonic_ns()
    pace = Pace(10**9, 1, 1, 1, now + SLOW)
    shown({"step": 1}, pace, logged=False)
    left_s, share = shown._left(2, pace, shown._begun_ns + SLOW // 2)
    assert left_s == pytest.approx(1800, abs=60) and share == pytest.approx(0.5, abs=0.05)
    # Ten steps of a second each, by steps.
    shown = Showing()("policy", tmp_path)
    pace = Pace(110, 1, 1, 1)
    for step in range(11):
        shown._times.append((step, step * 10**9))
    assert shown._left(10, pace, 10 * 10**9) == (pytest.approx(100.0), pytest.approx(10 / 110))


def test_the_time_left_where_only_some_steps_are_shown(tmp_path, monkeypatch) -> None:
    now_ns = [10**15]
    monkeypatch.setattr(progress.time, "monotonic_ns", lambda: now_ns[0])
    shown, pace = Showing()("vlm", tmp_path), Pace(500, 0, 0, 0)
    shown.begins(400)
    for stage, step, left_s in (("tune", 410, 90), ("tune", 420, 80), ("more", 10, 490)):
        now_ns[0] += 10 * 10**9
        shown({"stage": stage, "step": step}, pace, logged=True)
        assert shown._left(step, pace, now_ns[0])[0] == pytest.approx(left_s)


def test_curves_for_tensorboard(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Steps()
    with Showing(curves=True)("stage1", tmp_path) as watch:
        run_loop(run, Pace(20, 10, 20, 5), watch)
    # A run that was killed after step 20 goes on from step 10: its later curves are replaced.
    with Showing(curves=True)("stage1", tmp_path) as watch:
        run_loop(Steps(10), Pace(20, 10, 20, 5), watch)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"training/loss", "held out/loss"}
    assert [e.step for e in found.Scalars("training/loss")] == [5, 10, 15, 20]
    assert found.Scalars("held out/loss")[-1].value == pytest.approx(1 / 20)


def test_figures_without_tensorboard_are_said_to_be_in_the_log(
    tmp_path, monkeypatch, caplog
) -> None:
    found = importlib.util.find_spec
    hidden = ("tensorboard",)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in hidden else found(name)
    )
    with Showing(curves=True)("stage1", tmp_path) as watch:
        assert run_loop(Steps(), Pace(4, 4, 4, 2), watch)
    assert "tensorboard is not installed" in caplog.text
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_said_at_once(monkeypatch, tracker) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"tracker: {tracker} .*'openhelix\[{tracker}\]'"):
        check_tracker(tracker)
    check_tracker("")


def watched(tracker, folder, run) -> None:
    with Showing(None, True, tracker, {"seed": 3})("stage1", folder / "stage1") as watch:
        run_loop(run, Pace(20, 10, 20, 5), watch)


def test_figures_go_to_mlflow_into_one_run(tmp_path, monkeypatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"file:{tmp_path / 'mlruns'}")
    watched("mlflow", tmp_path, Steps())
    watched("mlflow", tmp_path, Steps(10))  # goes on
    (run,) = mlflow.search_runs(experiment_names=["openhelix"], output_format="list")
    assert run.data.params == {"seed": "3"}
    assert run.data.metrics["training/loss"] == pytest.approx(0.5)
    assert run.data.metrics["held out/loss"] == pytest.approx(1 / 20)


def test_figures_go_to_weights_and_biases_without_a_network(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    watched("wandb", tmp_path, Steps())
    (file,) = (tmp_path / "stage1" / "wandb").glob("offline-run-*/*.wandb")
    end, names = time.monotonic() + 120, (b"training/loss", b"held out/loss")
    while not all(name in file.read_bytes() for name in names):
        assert time.monotonic() < end, "wandb's own process has written no figures"
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("stage", "words", "then"),
    [
        ({"stage": "policy"}, ["policy", "seed=3", "--json"], "openhelix train stage1 seed=3"),
        ({"stage": "stage1"}, ["stage1"], "openhelix train stage2"),
        ({"stage": "prepare", "for": "stage2"}, ["prepare"], "openhelix train stage2"),
        ({"stage": "vlm"}, ["vlm"], "openhelix train all latent.model=/x"),
        (
            {"stage": "export"},
            ["all"],
            "openhelix run system1.policy.options.path=/x/system1-laptop",
        ),
    ],
)
def test_five_lines_and_the_next_command(stage, words, then) -> None:
    result = {"finished": True, "folder": "/x", "stages": [{"folder": "/x", **stage}]}
    lines = ending(result, words, 3725.0)
    assert len(lines) == 5 and lines[0] == f"trained  {stage['stage']} in 1:02:05"
    assert lines[4] == f"next     {then}"


def test_a_time_limit_ends_with_the_same_command(tmp_path) -> None:
    why = "policy: stopped at step 3 of 9 by the time limit"
    result = {"finished": False, "why": why, "folder": str(tmp_path), "stages": []}
    lines = ending(result, ["policy", "data=x"], 1.0)
    assert lines[0] == f"stopped  {why}" and lines[4] == "next     openhelix train policy data=x"


def test_held_out_figures_have_units() -> None:
    stage = {"stage": "policy", "folder": "/x", "val_loss": 2.1, "val_position_m": 0.0199}
    lines = ending({"finished": True, "folder": "/x", "stages": [stage]}, ["policy"], 1.0)
    assert lines[1] == "figures  policy: held-out loss 2.1, position 1.99 cm"
