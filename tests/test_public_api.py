"""The front door: what `docs/python.md` shows works as it stands there, and importing is cheap."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import openhelix
from openhelix.runtime.core.interfaces import Judgement
from openhelix.runtime.transport.client import System2Client, System2Error
from tests.evaluation.small import WordEngine
from tests.fakes import LATENT, ReachPolicy
from tests.runtime.docs_code import blocks

BLOCKS = blocks("python.md", "python")
ROOT = Path(__file__).resolve().parents[1]
SERVED = "ipc://system2"


def test_importing_costs_nothing_and_every_name_leads_somewhere() -> None:
    code = (
        "import sys, openhelix; openhelix.LatentSpec; openhelix.System2Client; "
        "heavy = {'torch', 'vllm', 'ray', 'pybullet', 'transformers', 'gymnasium', 'scipy'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert set(openhelix.__all__) == set(openhelix._HOME_OF) <= set(dir(openhelix))
    for name, module in openhelix._HOME_OF.items():
        assert getattr(openhelix, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'load_pairs'"):
        _ = openhelix.load_pairs


@pytest.mark.parametrize(
    ("code", "given", "kernels"),
    [
        ("import openhelix, numpy", {}, "Haswell"),
        ("import openhelix, numpy", {"OPENBLAS_CORETYPE": "Sandybridge"}, "Sandybridge"),
        ("import numpy, openhelix", {}, None),  # its own; and so have processes that this starts
    ],
)
def test_numpy_adds_alike_on_every_cpu(code, given, kernels) -> None:
    if " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX2, for which those kernels are")
    names = ("OPENBLAS_CORETYPE", "OPENHELIX_OPENBLAS_AS_IT_IS")
    clean = {k: v for k, v in os.environ.items() if k not in names} | given
    child = "import openhelix, os; print(os.environ.get('OPENBLAS_CORETYPE'))"
    started = f"{code}, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    run = [sys.executable, "-c", started]
    said = subprocess.run(run, env=clean, check=True, capture_output=True, text=True, timeout=60)
    assert said.stdout.split() == [str(kernels)]


def test_the_readme_shows_the_first_block_of_the_page() -> None:
    assert blocks("../README.md", "python") == BLOCKS[:1]


def test_a_missing_package_is_said_with_its_extra() -> None:
    code = (
        "import sys; sys.modules['gymnasium'] = None\n"
        "import openhelix\n"
        "try: openhelix.make_env\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True
    )
    assert "openhelix.make_env: the package 'gymnasium' is not installed" in done.stdout
    assert "openhelix[sim]" in done.stdout


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`openhelix serve` with a System 2 of the tests; gives its address."""
    folder = tmp_path_factory.mktemp("served")
    address = f"ipc://{folder}/s2"
    words = ["serve", address, "--json", "output.metrics_port=null"]
    words += ["system2.engine.target=tests.evaluation.small:WordEngine"]
    words += ["system2.engine.options={broken: 'break'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "openhelix", *words], stdout=log, stderr=log, cwd=ROOT
        )
        yield address
        process.terminate()
        process.wait(120)


@pytest.mark.timeout(900)
def test_every_block_of_the_page_runs(served, tmp_path, monkeypatch, capsys) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    names: dict[str, object] = {"__name__": "page"}
    assert len(BLOCKS) == 5
    for number, block in enumerate(BLOCKS):
        if SERVED in block:
            wait_for(served)
            block = block.replace(SERVED, served)
        exec(compile(block, f"docs/python.md, block {number}", "exec"), names)
        said = capsys.readouterr().out
        if number == 0:
            assert "'open_drawer'" in said, said
        if number == 2:
            want = WordEngine().encode([names["image"]], ["open the drawer"])
            assert np.array_equal(names["latent"], want[0])
            assert np.array_equal(names["goal"].z, want[0])
            agent = openhelix.Agent(names["policy"], names["system2"])
            with pytest.raises(RuntimeError, match="reset"):
                agent.act({})
            with pytest.raises(ValueError, match=r"latent\.kind: System 2 gives 'act_last'"):
                openhelix.Agent(names["policy"], WordEngine())
        if number == 3:
            result = names["result"]
            assert result.score.n == 1 and result.score.low < result.score.value
            assert list(result.per_task) == ["open_drawer"] and result.in_a_row == []
            assert (result.folder / "report.html").is_file()
    result = names["result"]
    assert result.score.value == 1.0  # the button is where the point is
    assert result.report["policy"]["target"] == "page:GoThere"


def wait_for(address: str) -> None:
    for _ in range(240):
        try:
            System2Client(address, "waits", timeout_s=60).close()
        except System2Error:
            time.sleep(0.5)
        else:
            return
    raise AssertionError("openhelix serve did not start")


def test_a_client_gets_what_the_engine_gives_or_an_error(served) -> None:
    wait_for(served)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (40, 60, 3), dtype=np.uint8) for _ in range(3)]
    texts = ["lift it", "push it", "lift it"]
    with System2Client(served, "first", timeout_s=120) as client:
        assert client.spec == WordEngine().spec
        assert np.array_equal(client.encode(images, texts), WordEngine().encode(images, texts))
        assert client.encode([], []).shape == (0, 1, 8)
        latents = client.encode(images, texts)
        assert client.judge(texts, latents) == [Judgement()] * 3  # this engine doubts nothing
        with pytest.raises(ValueError, match="not given by this client for 'lift it'"):
            client.judge(texts, latents + 1)
        with pytest.raises(System2Error, match=r"'first' is in use"):
            System2Client(served, "first", timeout_s=60)
        with pytest.raises(System2Error, match="broken as configured"):
            client.encode(images[:1], ["break"])
        with pytest.raises(ValueError, match="uint8"):
            client.encode([images[0] / 255], ["lift it"])
        with pytest.raises(ValueError, match="H and W above 0"):
            client.encode([images[0][:0]], ["lift it"])
        with pytest.raises(ValueError, match="instructions: is one text"):
            client.encode(images, "abc")
    with pytest.raises(System2Error, match="closed"):
        client.ask(images[0], "lift it")


def test_a_client_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(System2Error, match=r"nobody.*openhelix serve"):
        System2Client(f"ipc://{tmp_path}/nobody", timeout_s=0.3)
    with pytest.raises(System2Error) as caught:
        System2Client(f"ipc://{tmp_path}/nobody", timeout_s=0.3)
    assert str(caught.value).count("nobody") == 1
    with pytest.raises(ValueError, match="keys"):
        System2Client("tcp://192.0.2.1:5800")


def test_wrong_arguments_are_one_line_that_says_what_is_valid(tmp_path: Path) -> None:
    for call, message in (
        (lambda: openhelix.load_pair(tmp_path), r"name: no pair at .*'shipped'"),
        (lambda: openhelix.load_pair(None), "name: None; say 'shipped'"),
        (lambda: openhelix.make_env("playtabel"), "did you mean 'playtable'"),
        (lambda: openhelix.make_env(None), "world: None is no name"),
        (lambda: openhelix.System2Client(None), "address: None"),
        (lambda: openhelix.System2Client(SERVED, "two words"), "robot: 'two words', must be"),
        (lambda: openhelix.evaluate(object()), "policy: object is no policy: no warm_up"),
        (lambda: openhelix.evaluate(ReachPolicy), "policy: ReachPolicy is a class"),
        (lambda: openhelix.evaluate(ReachPolicy(), object()), "system2: object is no System 2"),
        (lambda: openhelix.completed({}, {}), "start_info: has no robot_info"),
        (lambda: openhelix.make_env(actions="joint"), "neither 'relative' nor 'absolute'"),
        (lambda: openhelix.evaluate(suite="task"), "^suite: 'task' is none of"),
        (lambda: openhelix.evaluate(episodes=3), "episodes: unknown key"),
        (lambda: openhelix.evaluate(settings=["system1.polcy=1"]), "did you mean 'policy'"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_tower_that_would_not_be_read_is_refused(tmp_path: Path) -> None:
    for name in ("system1-laptop", "system2-laptop"):
        (tmp_path / name).mkdir()
    (tmp_path / "system2-laptop" / "vision.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"vision\.safetensors is not the shipped tower"):
        openhelix.load_pair(tmp_path)


class Spoilt(WordEngine):
    """Gives latents that are not finite."""

    def encode(self, images, instructions):
        return np.full((len(instructions), 1, LATENT.dim), np.nan, np.float32)


class NoChunk(ReachPolicy):
    """Returns nothing."""

    def act(self, observation, latents):
        return None


def test_an_agent_passes_on_no_bad_latent_and_takes_no_bad_chunk() -> None:
    with openhelix.make_env(cameras=("static",), actions="absolute") as env:
        obs, _ = env.reset()
        for policy, system2, error, message in (
            (ReachPolicy(), Spoilt(), ValueError, "not finite"),
            (NoChunk(), WordEngine(), TypeError, "NoneType, must be an ActionChunk"),
        ):
            agent = openhelix.Agent(policy, system2)
            agent.reset("lift it")
            with pytest.raises(error, match=message):
                agent.act(obs)


def test_a_closed_env_says_so() -> None:
    env = openhelix.make_env(cameras=())
    env.reset()
    env.close()
    env.close()
    for call in (env.reset, lambda: env.step(np.zeros(7)), env.render):
        with pytest.raises(RuntimeError, match="this environment is closed"):
            call()
    for call in (env.world.get_obs, env.world.reset, env.world.get_info, env.world.visual_state):
        with pytest.raises(RuntimeError, match="this world is closed"):
            call()


def test_an_env_keeps_to_gymnasiums_contract() -> None:
    from gymnasium.utils.env_checker import check_env

    env = openhelix.make_env("playtable", cameras=("gripper",), max_steps=2)
    with pytest.warns(UserWarning, match="infinity"):
        check_env(env, skip_render_check=True)
    obs, _ = env.reset(seed=3, options={"sequence": 5})
    assert env.observation_space.contains(obs)
    _, scene_obs = openhelix.initial_state(openhelix.get_sequences(6)[5][0])
    assert np.allclose(obs["scene_obs"][:6], scene_obs[:6], atol=1e-3)
    still = np.array([0, 0, 0, 0, 0, 0, 1.0])
    assert [env.step(still)[3] for _ in range(2)] == [False, True]
    same = [env.reset(seed=8)[0]["scene_obs"] for _ in range(2)]
    assert np.array_equal(*same) and not np.array_equal(same[0], env.reset(seed=9)[0]["scene_obs"])
    for action, message in ((still[:6], "shape"), (still * np.nan, "finite")):
        with pytest.raises(ValueError, match=message):
            env.step(action)
    with pytest.raises(ValueError, match=r"'tsk'.*task"):
        env.reset(options={"tsk": "open_drawer"})
    env.close()


def test_to_pandas_has_a_row_per_attempt(monkeypatch, tmp_path) -> None:
    rows = [{"task": "a", "success": True, "steps": {"x": 1}}, {"task": "b", "success": False}]
    episode = {"key": "D/0", "scene": "D", "groups": {"pattern": "static"}, "tasks": rows}
    result = openhelix.EvalResult(tmp_path, {}, [episode])
    seen = []
    fake = type(sys)("pandas")
    fake.DataFrame = lambda rows: seen.extend(rows) or "frame"
    monkeypatch.setitem(sys.modules, "pandas", fake)
    assert result.to_pandas() == "frame"
    assert [row["task"] for row in seen] == ["a", "b"]
    assert seen[0] == {
        "episode": "D/0",
        "scene": "D",
        "pattern": "static",
        "task": "a",
        "success": True,
    }
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        result.to_pandas()
