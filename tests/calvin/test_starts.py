"""Start states: the task can be done from them, and they differ."""

from __future__ import annotations

import numpy as np
import pytest

from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.expert_control import View
from openhelix.benchmarks.calvin.scene import get_scene
from openhelix.benchmarks.calvin.starts import (
    Layout,
    LayoutError,
    StartError,
    begin,
    feasible,
    lay_out,
    layout_for,
    random_arm,
    random_layout,
    scene_obs,
)
from openhelix.benchmarks.calvin.tasks import UnknownTaskError, is_completed

KINDS = (
    "rotate_red_block_left",
    "lift_blue_block_slider",
    "lift_pink_block_drawer",
    "place_in_slider",
    "stack_block",
    "unstack_block",
    "push_into_drawer",
    "turn_off_lightbulb",
)


@pytest.mark.parametrize("scene", "AC")
@pytest.mark.parametrize("task", KINDS)
def test_a_start_allows_its_task_and_is_not_its_end(task: str, scene: str) -> None:
    with PlayTableEnv(scene, cameras=()) as env:
        info = begin(env, task, np.random.default_rng(5))
        assert task in feasible(View(env.scene, info))
        assert not is_completed(task, info, info)


def test_starts_come_from_their_generator_alone() -> None:
    seen = []
    for _ in range(2):
        with PlayTableEnv("D", cameras=()) as env:
            begin(env, "place_in_drawer", np.random.default_rng(3))
            seen.append(env.visual_state())
    assert np.array_equal(seen[0], seen[1])
    with PlayTableEnv("D", cameras=()) as env:
        begin(env, "place_in_drawer", np.random.default_rng(4))
        assert not np.array_equal(seen[0], env.visual_state())


def test_blocks_do_not_start_inside_one_another() -> None:
    with PlayTableEnv("B", cameras=()) as env:
        for seed in range(30):
            rng = np.random.default_rng(seed)
            layout = random_layout(env.scene, rng)
            world = scene_obs(layout, env.scene, rng)
            if world is None:
                continue
            spots = world[6:].reshape(3, 6)[:, :2]
            gaps = [np.linalg.norm(spots[a] - spots[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
            assert min(gaps) > 0.1
            assert world[0] <= env.scene.slide_travel


def test_a_layout_that_cannot_fit_is_none() -> None:
    with PlayTableEnv("D", cameras=()) as env:
        crowd = Layout(place=dict.fromkeys(env.scene.blocks, "slider_left"))
        assert scene_obs(crowd, env.scene, np.random.default_rng(0)) is None


def test_layouts_suit_their_task() -> None:
    with PlayTableEnv("C", cameras=()) as env:
        rng = np.random.default_rng(1)
        for _ in range(20):
            layout = layout_for("lift_red_block_slider", env.scene, rng)
            side = layout.place["block_red"]
            assert (side, layout.slide > 0.1) in {("slider_left", False), ("slider_right", True)}
            assert layout_for("turn_off_led", env.scene, rng).led == 1
            assert "table" in layout_for("unstack_block", env.scene, rng).place.values()


def test_random_arms_are_where_they_say() -> None:
    with PlayTableEnv("D", cameras=()) as env:
        spots = []
        for seed in range(8):
            robot = random_arm(env, np.random.default_rng(seed))
            env.reset(robot, None)
            spots.append(env.robot.tcp()[0])
            assert np.linalg.norm(np.array(spots[-1]) - robot[:3]) < 0.005
    assert np.std(spots, axis=0).min() > 0.02


def test_impossible_starts_say_so() -> None:
    with PlayTableEnv("D", cameras=()) as env:
        with pytest.raises(UnknownTaskError, match="juggle"):
            begin(env, "juggle", np.random.default_rng(0))
        with pytest.raises(StartError, match="open_drawer"):
            begin(env, "open_drawer", np.random.default_rng(0), tries=0)


# Layouts in words --------------------------------------------------------------------------------


def test_a_layout_in_words_is_the_world_that_it_describes() -> None:
    words = {
        "drawer": "open",
        "slider": "left",
        "bulb": True,  # YAML reads `on` so
        "led": "on",
        "blocks": {"red": "drawer", "blue": [0.15, -0.12, 0.3], "pink": "slider_right"},
    }
    with PlayTableEnv("D", cameras=()) as env:
        lay_out(env, words, seed=1)
        slide, drawer, _, _, bulb, led = env.visual_state()[9:15]
        assert drawer == pytest.approx(0.22, abs=0.01)
        assert slide == pytest.approx(env.scene.slide_travel, abs=0.01)
        assert (bulb, led) == (1, 1)
        blue = env.scene.blocks.index("block_blue")
        place = env.visual_state()[15 + 7 * blue :][:2]
        np.testing.assert_allclose(place, [0.15, -0.12], atol=0.005)
        assert "lift_red_block_drawer" in feasible(View(env.scene, env.get_info()))
        before = env.visual_state()
        lay_out(env, words, seed=1)
        np.testing.assert_allclose(env.visual_state(), before, atol=1e-6)
        lay_out(env, words, seed=2)
        assert np.abs(env.visual_state() - before).max() > 0.005


def test_a_stack_can_be_laid_out() -> None:
    with PlayTableEnv("D", cameras=()) as env:
        lay_out(env, {"blocks": {"red": "on blue"}}, seed=3)
        names, state = env.scene.blocks, env.visual_state()
        red, blue = (state[17 + 7 * names.index(f"block_{c}")] for c in ("red", "blue"))
        assert red - blue == pytest.approx(0.04, abs=0.005)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"drawr": "open"}, r"world.layout.'drawr' is none of .*did you mean 'drawer'"),
        ({"drawer": "ajar"}, "drawer: 'ajar'; valid: closed, open, or 0 to 0.22 m"),
        ({"drawer": 0.5}, "drawer: 0.5; valid"),
        ({"led": 0.5}, "led: 0.5; valid: off, on"),
        ({"blocks": {"green": "table"}}, "blocks.'green' is none of red, blue, pink"),
        ({"blocks": {"red": "shelf"}}, "blocks.red: 'shelf'; valid: table"),
        ({"blocks": {"red": [1]}}, r"expected \[x, y, yaw\]"),
        ({"blocks": "red"}, "say {red: drawer"),
    ],
)
def test_a_layout_that_cannot_be_is_told_in_one_line(words: dict, why: str) -> None:
    with pytest.raises(LayoutError, match=why) as caught:
        Layout.of(words, get_scene("D"))
    assert "\n" not in str(caught.value)
