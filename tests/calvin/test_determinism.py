"""Equal inputs give equal bits: after other episodes, in other envs, in another process."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from openhelix.benchmarks.calvin.env import PlayTableEnv
from tests.calvin.helpers import ROBOT_OBS, scene_obs


def crowded():
    """A start in which the arm soon hits blocks, door and table."""
    start = scene_obs(slide=0.1, drawer=0.1)
    start[12:14] = (0.10, -0.12)
    return start


def actions(count, seed):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        if i % 12 == 0:
            move = rng.uniform(-1, 1, 6) * (1, 1, 1, 0.3, 0.3, 1)
            gripper = rng.choice([-1, 1])
        made.append([*move[:2], -1.0 if i < 8 else move[2], *move[3:], gripper])
    return made


def rollout(env, moves):
    rows, contacts = [], 0
    for move in moves:
        obs, _, _, info = env.step(move)
        rows.append(np.concatenate([obs["robot_obs"], obs["scene_obs"]]))
        contacts += len(info["robot_info"]["contacts"])
    return np.array(rows), contacts


def episode(env, moves):
    obs = env.reset(ROBOT_OBS, crowded())
    rows, contacts = rollout(env, moves)
    first = np.concatenate([obs["robot_obs"], obs["scene_obs"]])
    return np.concatenate([first[None], rows]), contacts


def digest(rows):
    return hashlib.sha256(rows.tobytes()).hexdigest()


def test_same_bits_after_other_episodes_and_in_another_env():
    moves = actions(80, 1)
    with PlayTableEnv("D", cameras=()) as env, PlayTableEnv("D", cameras=()) as other:
        wanted, contacts = episode(env, moves)
        assert contacts > 50
        assert np.abs(wanted[-1, 21:24] - wanted[0, 21:24]).max() > 0.01  # a block was moved
        env.reset()
        rollout(env, actions(40, 2))
        assert (episode(env, moves)[0] == wanted).all()
        other.reset()
        assert (episode(other, moves)[0] == wanted).all()


def test_same_bits_in_another_process():
    moves = actions(50, 3)
    with PlayTableEnv("D", cameras=()) as env:
        env.reset()
        rollout(env, actions(10, 4))
        wanted = digest(episode(env, moves)[0])
    code = (
        "import json,sys; from tests.calvin.test_determinism import *;"
        "print(digest(episode(PlayTableEnv('D', cameras=()), json.loads(sys.argv[1]))[0]))"
    )
    arguments = json.dumps([[float(v) for v in move] for move in moves])
    found = subprocess.run(
        [sys.executable, "-c", code, arguments], capture_output=True, text=True, check=True
    )
    assert found.stdout.split()[-1] == wanted


@pytest.mark.parametrize("cut", [6, 25, 45])
def test_a_restored_state_goes_on_to_the_same_bits(cut):
    moves = actions(70, 1)
    with PlayTableEnv("D", cameras=()) as env, PlayTableEnv("D", cameras=()) as other:
        whole, _ = episode(env, moves)
        episode(env, moves[:cut])
        state = env.state()
        rest, _ = rollout(env, moves[cut:])
        assert (rest == whole[cut + 1 :]).all()  # asking for the state changes nothing
        rollout(env, actions(20, 5))
        for again in (env, other):
            again.restore(state)
            assert (rollout(again, moves[cut:])[0] == rest).all()


def test_a_state_holds_what_hooks_did():
    def drift(world):
        world.set_block_velocity("block_red", (0.1, 0.0, 0.0))

    still = [[0, 0, 0, 0, 0, 0, 1]]
    with PlayTableEnv("D", cameras=()) as env:
        env.reset(ROBOT_OBS, scene_obs())
        env.add_substep_hook(drift)
        rollout(env, still * 5)
        state = env.state()
        env.remove_substep_hook(drift)
        wanted, _ = rollout(env, still * 5)
        assert wanted[0, 21] - 0.05 > 0.01
        env.reset()
        env.restore(state)
        assert (rollout(env, still * 5)[0] == wanted).all()


def test_a_state_of_another_scene_is_refused():
    with PlayTableEnv("A", cameras=()) as env:
        state = env.state()
    with PlayTableEnv("B", cameras=()) as env, pytest.raises(ValueError, match=r"state.scene: 'A'"):
        env.restore(state)


def test_default_resets_follow_the_seed():
    with PlayTableEnv("D", cameras=(), seed=3) as a, PlayTableEnv("D", cameras=(), seed=3) as b:
        first = a.reset()["scene_obs"]
        assert (first == b.reset()["scene_obs"]).all()
        assert (first != a.reset()["scene_obs"]).any()
