"""One command line for all commands, and the faults that each of them must not have."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import pytest
from PIL import Image
from pydantic import BaseModel

from openhelix.runtime.cli import completion
from openhelix.runtime.cli.arguments import (
    Many,
    Options,
    Positional,
    Words,
    fitted,
    help_of_settings,
    option,
    parse,
)
from openhelix.runtime.cli.main import main
from openhelix.runtime.control.assembly import make
from openhelix.runtime.core import plugins
from openhelix.runtime.core.config import ConfigError, EnginePart, RunConfig, load
from openhelix.runtime.robots.fake import LATENT


class Some(Options):
    """Options of a command that is only here."""

    what: Annotated[str, Positional()] = option(..., "what")
    number: int = option(3, "how many", "N")
    names: Words = option((), "names")
    files: Annotated[tuple[Path, ...], Many()] = option((), "files")
    loud: bool = option(False, "say it loudly")


class Section(BaseModel):
    """A section."""

    size: float = 1.0
    label: str = "none"


class Settings(BaseModel):
    """Settings with a section."""

    part: Section = Section()
    steps: int = 1


def read(*words: str, settings: type[BaseModel] | None = Settings):
    return parse("some", Some, words, "", settings)


def test_options_and_settings_stand_in_any_order() -> None:
    words = ("part.size=2", "--number", "5", "it", "--loud", "--names", "a,b", "--part.label", "x")
    options, overrides = read(*words, "--files", "one", "two", "--steps=4", "--json")
    assert (options.what, options.number, options.loud, options.as_json) == ("it", 5, True, True)
    assert options.names == ("a", "b") and options.files == (Path("one"), Path("two"))
    assert overrides == ["part.size=2", "part.label=x", "steps=4"]
    assert read("it", "--names", "a=b")[0].names == ("a=b",)  # an option's value, no setting


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("it", "--numbr", "2"), "--numbr: unknown option; did you mean --number?"),
        (("it", "--stps", "2"), "--stps: unknown option; did you mean --steps?"),
        (("it", "--number", "two"), "--number: input should be a valid integer"),
        (("it", "--number"), "--number: expected one argument"),
        ((), "WHAT"),
        (("it", "them"), "unrecognized arguments: them"),
        (("it", "--part.size"), "--part.size: needs a value"),
    ],
)
def test_a_wrong_word_is_named_in_one_line(words, message) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_command_without_settings_takes_none() -> None:
    with pytest.raises(ConfigError, match=r"part\.size=2: some takes no settings"):
        read("it", "part.size=2", settings=None)


def test_a_command_without_settings_takes_no_file_of_them(tmp_path) -> None:
    with pytest.raises(ConfigError, match="--config: unknown option"):
        read("it", "--config", str(tmp_path), settings=None)
    assert read("it", "--config", str(tmp_path))[0].config == tmp_path


def help_of(*words: str, capsys) -> str:
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    return capsys.readouterr().out


def test_help_lists_the_settings_that_a_command_uses_one_by_one(capsys) -> None:
    said = help_of("run", capsys=capsys)
    assert "  system1.placement.nice=5" in said  # not the default of any placement
    assert "  safety.box_min_m=[-0.6, -0.7, 0.26]" in said and "SafetyLimits(" not in said
    said = help_of("status", capsys=capsys)
    assert "  output.folder=outputs" in said and "tasks.sequence" not in said
    assert "openhelix record" in help_of("record", capsys=capsys)


def test_help_lists_the_commands_in_an_order_of_its_own(monkeypatch, capsys) -> None:
    found = plugins.entries(plugins.COMMANDS)
    by_name = dict(sorted((found | {"aaa": "nowhere:main"}).items()))  # as a wheel's metadata
    monkeypatch.setattr(plugins, "entries", lambda _: by_name)
    assert main(["--help"]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:2] == "  "]
    assert rows == [*found, "aaa"]


def test_a_wrong_name_of_a_robot_leaves_no_key(tmp_path, capsys) -> None:
    folder = tmp_path / "k"
    assert main(["keys", str(folder), "--robot", "arm", "a b"]) == 2
    assert "'a b'" in capsys.readouterr().err and not folder.exists()


def test_texts_and_paths_are_taken_as_they_stand() -> None:
    words = ["tasks.instruction=now: lift it", "output.folder=007", "system2.connect=null"]
    config = load(None, words)
    assert config.tasks.instruction == "now: lift it"
    assert config.output.folder == Path("007") and config.system2.connect is None


def test_version_and_help(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("openhelix ")
    assert main(["evla"]) == 2
    assert "did you mean 'eval'?" in capsys.readouterr().err


def test_the_shipped_pair_is_what_a_run_has_unless_something_else_is_named() -> None:
    policy = make(RunConfig().system1.policy)
    assert not policy.untrained
    assert policy.spec == make(load(None, ["system1.policy.options.steps=2"]).system1.policy).spec
    assert make(load(None, ["system1.policy.options.untrained=true"]).system1.policy).untrained


class Fresh:
    """An engine that has learned nothing."""

    untrained = True
    closed = 0

    def __init__(self, untrained: bool = False) -> None: ...

    def close(self) -> None:
        type(self).closed += 1


def test_a_system2_with_random_weights_is_refused_unless_asked_for() -> None:
    target = f"{__name__}:Fresh"
    with pytest.raises(ConfigError, match=r"random.*latent_projector=FILE.*untrained=true"):
        make(EnginePart(target=target))
    assert Fresh.closed == 1
    assert make(EnginePart(target=target, options={"untrained": True})).untrained


LOCKSTEP = ("control.clock=lockstep", "robot.name=fake", "tasks.steps_limit=6", "--json")
PARTS = (
    "system1.policy={target: 'tests.fakes:ReachPolicy', options: {horizon: 9}}",
    "system2.engine.target=openhelix.runtime.robots.fake:PointEngine",
    "tasks.instruction=reach 0.3 0 0.5",
)
FILES = ("output.video=false", "output.metrics_port=null", "output.live=false")


def test_in_lockstep_the_loop_has_the_world_s_rate(tmp_path, capsys) -> None:
    words = ["run", "control.clock=lockstep", "control.hz=60", f"output.folder={tmp_path / 'out'}"]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "control.hz: 60; on the lockstep clock this robot takes 30" in line


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("system1.policy.options.path=/nope", "system1.policy.options.path: there is nothing at"),
        ("system2.engine.options.modle=laptop", "options.modle: .* did you mean 'model'"),
        ("system2.engine.options.latent_projector=/nope", "latent_projector: there is nothing at"),
        ("system1.policy.target=tests.fakes:Reach", "system1.policy.target: .* has no 'Reach'"),
        ("system1.policy.target=tests.fakse:Reach", "no module named 'tests.fakse'"),
        ("transport.keys=/nope", "transport.keys: no folder /nope"),
        ("system1.policy.options.path=docs", "docs holds no checkpoint"),
        ("world.cameras=[static]", "camera 'gripper': the robot has static"),
        ("system2.connect=foo", "system2.connect: endpoint 'foo': expected ipc://PATH, tcp://"),
        ("control.hz=20", "control.hz: 20, must be at least 30, the rate of this policy"),
        ("system2.camera=wrist", "system2.camera: 'wrist', the robot has gripper, static"),
        (
            "system2.trigger_floor_s=20",
            "trigger_floor_s: 20, must be less than trigger_ceiling_s=10",
        ),
        ("system2.trigger=learnt", "system2.trigger: input should be 'cadence', 'change' or 'le"),
        ("system2.trigger_weights=gate.json", "trigger_weights: belongs to trigger=learned"),
        ("system2.trigger_floor_s=0", "system2.trigger_floor_s: input should be greater than 0"),
        (
            "tasks.task=open_drawr",
            "tasks.task: 'open_drawr' is unknown; did you mean 'open_drawer'",
        ),
        ("tasks.instruction=open\x07", "tasks.instruction: has a control character"),
        ("--task=open_drawr", "did you mean 'open_drawer'"),
        ("--scene=Q", "world.scene: must be 'A', 'B', 'C' or 'D'"),
    ],
)
def test_a_wrong_part_is_one_line_and_nothing_is_written(word, message, tmp_path, capsys) -> None:
    folder = tmp_path / "out"
    assert main(["run", "--no-ray", word, f"output.folder={folder}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not folder.exists()


def test_a_summary_in_lockstep_has_no_figures_of_real_time(tmp_path, capsys) -> None:
    words = ["run", *LOCKSTEP[:-1], *PARTS, *FILES, f"output.folder={tmp_path}"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert re.search(r"ticks +6$", said, re.M)
    assert not re.search("deadlines|lateness|seconds| ms| Hz", said)
    assert max(map(len, said.splitlines()[:-3])) <= 80  # paths may be longer, and are not broken


def test_replay_uses_what_the_recording_carries(tmp_path, capsys) -> None:
    words = ["record", "--no-ray", *LOCKSTEP, *PARTS, *FILES, f"output.folder={tmp_path}"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["untrained"] == [] and report["config"] is None
    assert len(report["config_sha256"]) == 12 and report["policy"]["sha256"] is None
    assert [entry["kind"] for entry in report["journal"]][:2] == ["begun", "acting"]
    assert report["policy"]["target"] == "tests.fakes:ReachPolicy"
    assert report["system2"]["spec_id"] == report["policy"]["spec_id"] == LATENT.spec_id
    trusted = "system1.policy.target=tests.fakes:ReachPolicy"
    assert main(["replay", str(tmp_path / "latest"), "--json", trusted]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert replayed["policy"]["target"] == "tests.fakes:ReachPolicy"
    assert replayed["policy"]["options"] == {"horizon": 9}


def test_film_and_viewer_are_made_from_what_a_run_left(tmp_path, capsys) -> None:
    world = [word for word in LOCKSTEP if not word.startswith("robot.name")]
    small = "system1.policy.options={horizon: 9, cameras: [[static, 200, 200], [gripper, 84, 84]]}"
    words = ["run", "--no-ray", *world, *PARTS, small, *FILES, f"output.folder={tmp_path}"]
    assert main(words) == 0
    capsys.readouterr()
    run = str(tmp_path / "latest")
    out = tmp_path / "moving.webp"
    part = ["--seconds", "0.2", "--height", "180", "--no-title", "--out", str(out), "--json"]
    assert main(["film", run, *part]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["path"] == str(out) and made["frames"] >= 2
    with Image.open(out) as image:
        assert image.size == (320, 180)
    assert main(["film", run, "--out", str(tmp_path / "film.avi")]) == 2
    assert "a film is .mp4, .webp or .gif" in capsys.readouterr().err
    assert main(["film", str(tmp_path / "none")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "none") in line
    pytest.importorskip("rerun")
    assert main(["view", run, "--out", str(tmp_path / "run.rrd"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] > 10_000


def test_an_evaluation_in_a_world_that_is_not_there_is_refused(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("OPENHELIX_CALVIN_ENV", str(tmp_path / "none"))
    out = tmp_path / "out"
    words = ["eval", "--suite", "tasks", "--world", "calvin", "--out", str(out)]
    assert main([*words, "output.metrics_port=null"]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "results in" not in x]
    assert "calvin_env is not installed" in line
    assert not out.exists()


# What the commands say of themselves -------------------------------------------------------------


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What `--help` of every command prints."""
    found = {}
    for name in plugins.entries(plugins.COMMANDS):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
            main([name, "--help"])
        found[name] = said.getvalue()
    return found


def test_every_help_has_examples_and_their_options_are_there(helps) -> None:
    for name, text in helps.items():
        examples = re.findall(rf"^    openhelix {name}\b(.*)$", text, re.M)
        assert examples, f"{name} --help shows no example"
        known = set(re.findall(r"(--[a-z][\w-]*)", text.partition("options:")[2]))
        for flags in ([*re.findall(r"(--[a-z][\w-]*)", line)] for line in examples):
            assert name == "probe" or known.issuperset(flags), (name, flags, known)


def test_every_help_fits_80_columns_and_its_long_examples_can_be_copied(
    helps, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    pages = {**helps, "": capsys.readouterr().out}
    wide = [line for text in pages.values() for line in text.splitlines() if len(line) > 80]
    assert not wide
    monkeypatch.setenv("COLUMNS", "60")
    typed = "it go" + " --farther" * 7
    doc = f"What it does:\nin two lines of prose.\n\n    {typed}     a remark\n    it go   home"
    head, example = fitted(doc).split("\n\n")
    assert head == "What it does: in two lines of prose."
    *command, remark, short = example.split("\n")
    assert len(command) == 2 and all(len(line) < 60 for line in command)
    assert "".join(line.strip().removesuffix("\\") for line in command) == typed
    assert remark == "        a remark" and short.split() == ["it", "go", "home"]


def test_settings_are_listed_with_units_ranges_and_what_they_are(capsys) -> None:
    assert main(["config", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = {row.split("=")[0].strip() for row in help_of_settings(RunConfig)}
    assert set(told) == names  # every one, and no other
    found = {"value": 1.0, "unit": "Hz", "valid": "above 0, at most 1000", "says": ""}
    assert told["system2.hz"] == found
    assert told["control.clock"]["valid"] == "one of realtime, lockstep"
    assert told["safety.max_linear_speed_m_s"]["unit"] == "m/s"
    assert told["control.fifo_priority"]["valid"] == "at least 0, at most 99"
    assert "no SCHED_FIFO" in told["control.fifo_priority"]["says"]
    assert "addresses of single nodes" in told["transport.hosts"]["says"]
    assert told["safety.latent_grace_s"]["says"].startswith("how long to go on")


def test_some_settings_as_they_would_be(capsys) -> None:
    assert main(["config", "lockstep", "lockstep.latency_steps=7"]) == 0
    said = capsys.readouterr().out
    assert "lockstep.latency_steps=7  environment steps, at least 0" in said
    assert "safety." not in said
    assert main(["config", "latnt"]) == 2
    assert "did you mean 'latent'" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_options_and_settings(helps, tmp_path, monkeypatch, capsys) -> None:
    own = {name: completion.taken(text) for name, text in helps.items()}
    monkeypatch.setattr(completion, "words", lambda: own)
    assert main(["completion", "bash"]) == 0
    (tmp_path / "openhelix").write_text(capsys.readouterr().out)

    def completed(*typed: str) -> list[str]:
        asked = f"""
            source {tmp_path}/openhelix
            compopt() {{ :; }}
            COMP_WORDS=({" ".join(typed)} ) COMP_CWORD={len(typed) - 1}
            _openhelix
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("openhelix", "sw") == ["sweep"]
    assert completed("openhelix", "run", "--int") == ["--interactive"]
    assert completed("openhelix", "run", "system2.h") == ["system2.hz="]
    assert completed("openhelix", "eval", "--clock", "") == ["lockstep", "realtime"]
    assert completed("openhelix", "eval", "--suite", "calvin-") == [
        "calvin-e",
        "calvin-d",
        "calvin-r",
    ]
    assert completed("openhelix", "eval", "--world", "") == ["playtable", "calvin"]
    for shell in ("zsh", "fish"):
        assert main(["completion", shell]) == 0
        said = capsys.readouterr().out
        assert "--interactive" in said and "Tell a running robot what to do." in said
    assert main(["completion", "bsh"]) == 2
    assert "did you mean 'bash'" in capsys.readouterr().err


TYPED_AT_ZSH = r"""
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z "autoload -Uz compinit; compinit -u -D; source ./_openhelix; compdef _openhelix openhelix"
zpty -w z 'openhelix() { print -r -- $@ >> got }'
zpty -w z $'openhelix ev\t--sui\tcalvin-e --clock lock\tsystem2.trigger_flo\t5'
zpty -w z exit
while zpty -r z line; do :; done
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes_commands_options_values_and_settings(helps, tmp_path) -> None:
    own = {name: completion.taken(text) for name, text in helps.items()}
    (tmp_path / "_openhelix").write_text(completion.zsh(own))
    subprocess.run(["zsh", "-f", "-c", TYPED_AT_ZSH], cwd=tmp_path, capture_output=True, timeout=60)
    said = (tmp_path / "got").read_text().strip()
    assert said == "eval --suite calvin-e --clock lockstep system2.trigger_floor_s=5"


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes_options_and_their_values(helps, tmp_path) -> None:
    own = {name: completion.taken(text) for name, text in helps.items()}
    (tmp_path / "openhelix.fish").write_text(completion.fish(own))

    def completed(typed: str) -> set[str]:
        asked = f"source {tmp_path}/openhelix.fish; complete -C '{typed}'"
        done = subprocess.run(
            ["fish", "--no-config", "-c", asked], capture_output=True, text=True, check=True
        )
        return {line.split("\t")[0] for line in done.stdout.splitlines()}

    assert "sweep" in completed("openhelix sw")
    assert completed("openhelix eval --clock ") == {"lockstep", "realtime"}
    assert "system2.hz=" in completed("openhelix run system2.h")


def test_defaults_are_shown_as_they_are_typed() -> None:
    rows = [row.strip() for row in help_of_settings(RunConfig)]
    whole = [row for row in rows if not row.endswith(" ...")]
    assert len(whole) > 90
    assert load(None, whole) == RunConfig()


def test_a_section_is_that_section_and_a_word_is_looked_for_everywhere(capsys) -> None:
    assert main(["config", "world", "--json"]) == 0
    assert all(name.startswith("world.") for name in json.loads(capsys.readouterr().out))
    assert main(["config", "world.scene", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["world.scene"]
    assert main(["config", "latent", "--json"]) == 0
    names = set(json.loads(capsys.readouterr().out))
    assert {"safety.latent_grace_s", "lockstep.latency_steps"} & names == {"safety.latent_grace_s"}
