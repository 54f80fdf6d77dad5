"""What breaks while a command works ends it in one line, and what was measured is kept."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from openhelix.runtime.cli import run as run_command
from openhelix.runtime.cli.main import main
from openhelix.runtime.core.interfaces import BadLatent, encode_one
from openhelix.runtime.launch import run as launch
from openhelix.runtime.launch.node import Interrupts
from openhelix.runtime.observe.display import Display
from openhelix.runtime.robots.fake import PointEngine
from tests.fakes import LATENT, ReachPolicy

RUN = (
    *("control.clock=lockstep", "robot.name=fake", "tasks.steps_limit=20"),
    *("output.video=false", "output.metrics_port=null", "output.live=false"),
    "tasks.instruction=reach 0.3 0 0.5",
)
POLICY, ENGINE = "tests.fakes:ReachPolicy", "openhelix.runtime.robots.fake:PointEngine"


def marked(path: str) -> None:
    """What a recording may not have called."""
    Path(path).touch()


class Raising(ReachPolicy):
    """Fails at its third plan."""

    def __init__(self) -> None:
        super().__init__(fail_at=3)


class Silent(ReachPolicy):
    """Returns nothing."""

    def act(self, observation, latents):
        return None


class Unbuilt(ReachPolicy):
    """Cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("no weights")


class Deaf(PointEngine):
    """Fails at once."""

    def encode(self, images, instructions):
        raise RuntimeError("no ears")


class Spoilt(PointEngine):
    """Gives what is no latent of its spec."""

    def __init__(self, how: str = "nan") -> None:
        super().__init__()
        self._how = how

    def encode(self, images, instructions):
        z = super().encode(images, instructions)
        if self._how == "nan":
            z[0, 0, 5] = np.nan
            return z
        made = {"shape": z[..., :4], "dtype": z.astype(np.float64), "kind": z.tolist()}
        return made[self._how]


def run(folder: Path, policy: str = POLICY, engine: str = ENGINE, *words: str) -> int:
    parts = (f"system1.policy.target={policy}", f"system2.engine.target={engine}")
    return main(["run", "--json", *RUN, *parts, f"output.folder={folder}", *words])


def line(captured) -> str:
    """The one line on standard error."""
    lines = [text for text in captured.err.splitlines() if "WARNING" not in text]
    assert len(lines) == 1, captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("policy", "engine", "said"),
    [
        ("Raising", None, "system1: RuntimeError: the policy fails as configured"),
        ("Silent", None, "system1: TypeError: act returned NoneType, not an ActionChunk"),
        (None, "Deaf", "system2: RuntimeError: no ears"),
        (None, "Spoilt", "system2: BadLatent: the latent is not finite"),
    ],
)
def test_a_part_that_fails_in_a_run_is_named_and_the_report_says_what_ran(
    tmp_path, capsys, policy, engine, said
) -> None:
    code = run(
        tmp_path,
        f"{__name__}:{policy}" if policy else POLICY,
        f"{__name__}:{engine}" if engine else ENGINE,
    )
    captured = capsys.readouterr()
    assert code == 1
    assert line(captured) == f"openhelix run: {said}"
    report = json.loads((tmp_path / "latest" / "report.json").read_text())
    assert report == json.loads(captured.out)
    assert report["error"] == report["tasks"][0]["reason"] == said
    assert report["tasks"][0]["success"] is None  # nobody judges a sentence of one's own
    assert (report["ticks"] > 0) == (policy == "Raising")


def test_a_part_that_cannot_be_made_is_named(tmp_path, capsys) -> None:
    assert run(tmp_path, f"{__name__}:Unbuilt") == 1
    assert line(capsys.readouterr()) == "openhelix run: system1: RuntimeError: no weights"
    assert run(tmp_path, "fractions:Fraction") == 2
    assert "is no policy: no warm_up, reset, act" in line(capsys.readouterr())


@pytest.mark.parametrize("how", ["nan", "shape", "dtype", "kind"])
def test_latents_are_checked_where_they_are_made(how) -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    assert encode_one(PointEngine(), image, "reach 1 2 3").shape == (1, LATENT.dim)
    with pytest.raises(
        BadLatent, match=r"not finite|the spec says float32\(1, 1, 8\)|not an array"
    ):
        encode_one(Spoilt(how), image, "reach 1 2 3")


def test_a_recording_runs_no_code_that_the_command_line_does_not_name(tmp_path, capsys) -> None:
    assert run(tmp_path, POLICY, ENGINE, "output.record=true") == 0
    capsys.readouterr()
    recording = tmp_path / "latest" / "recording.mcap"
    assert main(["replay", str(recording), "--json"]) == 2
    said = line(capsys.readouterr())
    assert "repeat these words" in said and f"system1.policy.target={POLICY}" in said
    assert main(["replay", str(recording), "--json", f"system1.policy.target={POLICY}"]) == 0


@pytest.mark.parametrize(
    "target",
    [
        f"{__name__}:marked",
        "openhelix.runtime.launch.processes:subprocess.check_output",
        "openhelix.runtime.launch.processes:main",
        "openhelix.runtime.core.plugins:resolve",
        "openhelix.__main__:main",
    ],
)
def test_a_recorded_target_is_not_called(tmp_path, monkeypatch, capsys, target) -> None:
    from openhelix.runtime.core.config import RunConfig
    from openhelix.runtime.observe.recorder import Reader

    mark = tmp_path / "mark"
    data = {"system1": {"policy": {"target": target, "options": {"path": str(mark)}}}}
    monkeypatch.setattr(Reader, "__init__", lambda self, path: setattr(self, "path", path))
    monkeypatch.setattr(Reader, "config", lambda self, words: RunConfig.model_validate(data))
    assert main(["replay", str(tmp_path)]) == 2
    assert target in line(capsys.readouterr())
    assert not mark.exists()


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse(monkeypatch, refused) -> None:
    """Let the disk refuse the files whose paths `refused` says yes to."""
    given = run_command.replace_file

    def write(path: Path, data: bytes) -> None:
        full() if refused(path) else given(path, data)

    monkeypatch.setattr(run_command, "replace_file", write)


@pytest.mark.parametrize("record", ["true", "false"])
def test_a_full_disk_costs_the_file_and_not_the_figures(
    tmp_path, monkeypatch, capsys, record
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    refuse(monkeypatch, lambda path: path.name == "report.json")
    out = tmp_path / "out"
    assert run(out, POLICY, ENGINE, f"output.record={record}") == 1
    captured = capsys.readouterr()
    (place,) = elsewhere.iterdir()
    assert line(captured) == (
        f"openhelix run: output.folder: no room in {out}/run-0001; the report is in {place}"
    )
    report = json.loads(captured.out)
    assert report["ticks"] > 0 and json.loads(place.read_text()) == report
    assert place.stat().st_mode & 0o077 == 0
    assert not list(out.rglob("*.part")) and not (out / "latest").exists()


def test_where_no_disk_has_room_the_figures_are_printed(tmp_path, monkeypatch, capsys) -> None:
    refuse(monkeypatch, lambda path: True)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    assert run(tmp_path) == 1
    captured = capsys.readouterr()
    report = tmp_path / "run-0001" / "report.json"
    assert line(captured) == (
        f"openhelix run: output.folder: cannot write {report}: No space left on device"
    )
    assert json.loads(captured.out)["ticks"] > 0


LIMITED = """
import resource, sys
from openhelix.runtime.cli.main import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
raise SystemExit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("command", ["run", "record"])
@pytest.mark.parametrize("limit", [0, 30_000])
def test_with_no_room_for_its_files_a_run_goes_on_and_says_what_is_lost(
    tmp_path, command, limit
) -> None:
    parts = (f"system1.policy.target={POLICY}", f"system2.engine.target={ENGINE}")
    words = [command, "--json", *RUN, *parts, f"output.folder={tmp_path}", "output.video=true"]
    words.append("output.track=false")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *words, "tasks.steps_limit=120"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stderr, done.stderr
    if command == "record" and limit == 0:  # nothing has been moved yet, and nothing can be kept
        assert done.returncode == 1 and done.stdout == ""
        assert "recording.mcap: File too large" in done.stderr
        return
    report = json.loads(done.stdout)
    assert report["ticks"] == 120
    assert done.returncode == (0 if limit == 30_000 and command == "run" else 1), done.stderr
    for name in ("video", "recording")[: 2 if command == "record" else 1]:
        sink = report["sinks"][name]
        # A message for each tick, and one for what happened after the last.
        assert sink["written"] + sink["dropped"] == 121 and sink["dropped"] > 0
        assert f"{name}: is incomplete ({sink['dropped']} lost)" in done.stderr


def test_any_refusal_of_the_machine_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run_command, "make_output_folder", full)
    assert run(tmp_path) == 1
    assert line(capsys.readouterr()) == "openhelix run: No space left on device"


class Gone:
    """A graph whose observer died."""

    def ended(self) -> dict[str, str]:
        return {"observer": "was ended by signal 9"}


@pytest.mark.parametrize("live", [True, False])
def test_an_observer_that_died_is_told_with_and_without_a_display(live, capsys) -> None:
    assert launch._finish(Gone(), Display(live=live), Interrupts(), 9) is None
    captured = capsys.readouterr()
    assert "observer: is gone; video and recording are incomplete" in captured.err
    assert captured.out == ""
