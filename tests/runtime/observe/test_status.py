"""The board that the observer keeps, and how another process finds a run and asks it."""

from __future__ import annotations

import json
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openhelix.runtime.control.loop import Tick
from openhelix.runtime.control.talk import Entry
from openhelix.runtime.core.config import load
from openhelix.runtime.core.interfaces import (
    Action,
    ActionChunk,
    CameraFrame,
    LatentGoal,
    Observation,
)
from openhelix.runtime.observe.observer import MAX_SIDE_PX, SHOWN_ENTRIES, StatusBoard
from openhelix.runtime.observe.robot import Robot
from openhelix.runtime.observe.status_source import (
    RECORD,
    NoRun,
    RunSource,
    StatusRecord,
    newest_run,
)
from openhelix.runtime.observe.ticks import TickMessage
from openhelix.runtime.transport.rpc import RpcServer

S = 1_000_000_000
POSE = np.array([0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0])
LATENT = LatentGoal(np.zeros((1, 4), np.float32), 0, 1, 0, 0, "spec")
CHUNK = ActionChunk(0, S // 30, np.tile(POSE, (4, 1)), np.ones(4), 1)


def frame(t_ns: int, side: int = 20) -> CameraFrame:
    return CameraFrame(t_ns, np.full((side, side, 3), 7, np.uint8), None, np.eye(3), np.eye(4))


def message(index: int, t_ns: int, **changes: Any) -> TickMessage:
    values = {"state": "run", "reason": "", "new_latent": None, "new_chunk": None, "age_s": 0.5}
    values |= changes
    tick = Tick(
        index=index,
        t_ns=t_ns,
        observation=Observation(t_ns, {}, POSE, 0.05, True, np.zeros(7)),
        state=values["state"],
        reason=values["reason"],
        sent=Action(POSE, 1.0),
        new_latent=values["new_latent"],
        new_chunk=values["new_chunk"],
        latent_age_s=values["age_s"],
        duration_s=1e-4,
    )
    return TickMessage(tick, "open_drawer", "open the drawer", 3, 11, 2, 1)


class Here:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.ns = 100 * S

    def __call__(self) -> int:
        return self.ns


def test_nothing_is_known_before_the_first_tick() -> None:
    status = StatusBoard(load(None)).snapshot()
    assert not status["started"] and status["latent_age_s"] is None
    assert status["rates_hz"] == {"loop": 0.0, "system1": 0.0, "system2": 0.0}
    json.dumps(status)


def test_a_running_robot_is_shown_with_its_rates_and_ages() -> None:
    here, robot = Here(), 5 * S  # the robot's host has another clock
    board = StatusBoard(load(None, ["robot.id=arm7"]), here)
    for index in range(600):
        here.ns += S // 30
        robot += S // 30
        board.take(
            message(
                index,
                robot,
                new_latent=LATENT if index % 30 == 0 else None,
                new_chunk=CHUNK if index % 8 == 0 else None,
            ),
            {"static": frame(robot - S // 10)},
        )
    here.ns += S // 4
    status = board.snapshot()
    assert status["robot"] == "arm7" and status["started"] and status["state"] == "run"
    assert status["rates_hz"]["loop"] == pytest.approx(30.0, rel=0.04)
    assert status["rates_hz"]["system1"] == pytest.approx(30 / 8, rel=0.06)
    assert status["rates_hz"]["system2"] == pytest.approx(1.0, abs=0.11)
    assert status["silent_s"] == pytest.approx(0.25)
    assert status["latent_age_s"] == pytest.approx(0.75)
    assert status["cameras"]["static"]["age_s"] == pytest.approx(0.35)
    assert (status["judged"], status["succeeded"], status["steps"]) == (2, 1, 11)
    here.ns += 20 * S
    assert board.snapshot()["rates_hz"]["loop"] == 0.0
    json.dumps(status)


def test_each_stop_is_remembered_once_with_its_reason() -> None:
    here = Here()
    board = StatusBoard(load(None), here)
    states = ["run", "stop", "stop", "run", "stop"]
    for index, state in enumerate(states):
        here.ns += S
        reason = f"reason {index}" if state == "stop" else ""
        board.take(message(index, here.ns, state=state, reason=reason), {})
    stops = board.snapshot()["stops"]
    assert [stop["reason"] for stop in stops] == ["reason 1", "reason 4"]
    assert [stop["ago_s"] for stop in stops] == [3.0, 0.0]


def test_large_images_are_thinned_and_absent_ones_are_nothing() -> None:
    board = StatusBoard(load(None))
    board.take(message(0, 1), {"big": frame(9, 2 * MAX_SIDE_PX + 10), "small": frame(8)})
    big, small = board.frame("big"), board.frame("small")
    assert max(big["rgb"].shape) <= MAX_SIDE_PX and big["rgb"].flags.c_contiguous
    assert small["rgb"].shape == (20, 20, 3) and small["t_ns"] == 8
    assert board.frame("none") == {}


def test_what_happened_and_the_plan_in_the_images_are_shown() -> None:
    here = Here()
    board = StatusBoard(load(None, ["system1.replan_steps=1"]), here)
    ahead = np.tile(POSE, (4, 1))
    ahead[:, 0] = np.linspace(-0.25, 0.25, 4)  # 1 m before a camera of 1 m focal width
    K = np.array([[20.0, 0, 10], [0, 20, 10], [0, 0, 1]])
    looks_down = np.diag([1.0, -1.0, -1.0, 1.0])
    looks_down[2, 3] = 1.5
    seen = replace(frame(5 * S), K=K, T_world_cam=looks_down)
    told = [Entry(i, i * S, "said", str(i), who="anna") for i in range(1, 60)]
    made = message(1, 60 * S, new_chunk=replace(CHUNK, poses=ahead, instruction_id=0))
    board.take(replace(made, entries=tuple(told)), {"static": seen})
    here.ns += S // 2
    status = board.snapshot()
    committed, rest = status["cameras"]["static"]["plan"]
    np.testing.assert_allclose(committed[0], [0.25, 0.5], atol=1e-3)
    np.testing.assert_allclose(rest[-1], [0.75, 0.5], atol=1e-3)
    assert len(status["entries"]) == SHOWN_ENTRIES
    assert status["entries"][-1]["line"] == "anna: 59"
    assert status["entries"][-1]["ago_s"] == pytest.approx(1.5)
    assert [e["number"] for e in board.journal(57)["entries"]] == [58, 59]
    later = message(2, 61 * S)
    moved = replace(later.tick.observation, instruction_id=1)
    board.take(replace(later, tick=replace(later.tick, observation=moved)), {"static": seen})
    assert board.snapshot()["cameras"]["static"]["plan"] == []  # of another instruction
    json.dumps(status)


def record(folder: Path, **changes: Any) -> StatusRecord:
    values = {"robot": "arm", "observer": None, "control": f"ipc://{folder}/c", "keys": None}
    return StatusRecord(**values | {"token": "secret"} | changes)


def test_a_record_lives_as_long_as_its_run_and_is_its_owners(tmp_path: Path) -> None:
    folder = tmp_path / "run-0001"
    folder.mkdir()
    with record(tmp_path).kept(folder):
        path = folder / RECORD
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert StatusRecord.read(folder) == record(tmp_path)
        assert newest_run(tmp_path) == folder
    assert list(folder.iterdir()) == []
    with pytest.raises(NoRun, match="no run is alive"):
        newest_run(tmp_path)
    with pytest.raises(NoRun, match="no run is alive"):
        StatusRecord.read(folder)
    for text, said in (
        *(('{"robot": 1}', "robot: "), ('{"robot": "x"}', "observer: "), ("{", "not JSON")),
        *(("[1]", "must be a JSON object"), ("[" * 100_000, "nested too deep")),
    ):
        (folder / RECORD).write_text(text)
        with pytest.raises(NoRun, match=said) as caught:
            StatusRecord.read(folder)
        assert str(folder / RECORD) in str(caught.value)


def test_every_run_has_a_token_of_its_own() -> None:
    ends = {"observer": "o", "control": "c"}
    records = [StatusRecord.of(ends, True, load(None)) for _ in range(2)]
    assert records[0].token != records[1].token and len(records[0].token) >= 20


def test_a_source_asks_the_observer_and_orders_the_stop_from_control(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def answer(arguments: dict[str, Any]) -> dict[str, Any]:
        asked.append(arguments)
        if arguments["question"] == "frame":
            return {"t_ns": 3, "rgb": np.zeros((4, 4, 3), np.uint8)}
        return {"robot": "arm"}

    ends = {"observer": f"ipc://{tmp_path}/o", "control": f"ipc://{tmp_path}/c"}
    servers = [RpcServer(end, {"ask": answer}) for end in ends.values()]
    for server in servers:
        server.start()
    folder = tmp_path / "run-0001"
    folder.mkdir()
    source = RunSource(tmp_path)
    with record(tmp_path, **ends).kept(folder):
        assert source.token == "secret"
        assert source.snapshot() == {"robot": "arm", "run": "run-0001"}
        assert source.frame("static")["rgb"].shape == (4, 4, 3)
        source.stop("somebody")
    assert asked[-1] == {"question": "safe_stop", "who": "somebody"}
    assert source.token is None
    with pytest.raises(NoRun, match="no run is alive"):
        source.snapshot()
    for server in servers:
        server.close()
    source.close()
    source.close()


def test_a_run_that_does_not_answer_is_told_and_a_stop_waits_for_nobody(tmp_path: Path) -> None:
    ends = {"observer": f"ipc://{tmp_path}/o", "control": f"ipc://{tmp_path}/c"}
    server = RpcServer(ends["control"], {"ask": lambda _: {}})
    server.start()
    folder = tmp_path / "run-0001"
    folder.mkdir()
    source = RunSource(tmp_path)
    with record(tmp_path, **ends).kept(folder):
        told: list[str] = []

        def ask() -> None:
            try:
                source.snapshot()
            except NoRun as error:
                told.append(str(error))

        thread = threading.Thread(target=ask)
        thread.start()
        source.stop("somebody")  # while the question above still waits
        assert not told
        thread.join()
        assert "does not answer" in told[0]
        server.close()
        with pytest.raises(NoRun, match="NOT stopped"):
            source.stop("somebody")
    source.close()


def test_a_run_at_which_nobody_looks_says_how_to_change_that(tmp_path: Path) -> None:
    folder = tmp_path / "run-0001"
    folder.mkdir()
    with record(tmp_path).kept(folder), pytest.raises(NoRun, match=r"output\.status=true"):
        RunSource(tmp_path, folder).snapshot()


def test_who_asks_once_is_more_patient_than_a_page_that_asks_all_the_time(tmp_path: Path) -> None:
    def answer(_: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.3)
        return {"robot": "arm"}

    server = RpcServer(f"ipc://{tmp_path}/o", {"ask": answer})
    server.start()
    folder = tmp_path / "run-0001"
    folder.mkdir()
    with record(tmp_path, observer=f"ipc://{tmp_path}/o").kept(folder):
        with pytest.raises(NoRun, match="does not answer"):
            RunSource(tmp_path, timeout_s=0.05).snapshot()
        with Robot(outputs=tmp_path) as robot:
            assert robot.status()["robot"] == "arm"
    server.close()
