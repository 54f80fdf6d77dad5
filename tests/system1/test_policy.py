"""The policy as the runtime sees it: spec, determinism, history, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from openhelix.runtime.control.plans import PlanRequest, SyncPlanner
from openhelix.runtime.core.interfaces import (
    ActionChunk,
    CameraFrame,
    LatentGoal,
    Observation,
    PolicyFault,
    SpecMismatch,
)
from openhelix.runtime.core.quaternion import angle_between, from_rotation_vector, multiply
from openhelix.runtime.launch.parts import System1Process
from openhelix.system1.config import CameraConfig, PolicyConfig, small
from openhelix.system1.geometry import matrix_to_6d, quat_to_matrix, xyzw_to_wxyz
from openhelix.system1.policy import DiffusionPolicy, to_absolute


def tiny(**changes) -> PolicyConfig:
    base = {
        "cameras": (
            CameraConfig("static", 32, 32, 16, 16),
            CameraConfig("gripper", 16, 16, 16, 16),
        ),
        "dim": 48,
        "heads": 4,
        "encoder_width": 8,
        "layers": 2,
        "latent_dim": 12,
        "horizon": 6,
    }
    return small(**{**base, **changes})


def observe(
    config: PolicyConfig, t_ns: int = 1_000, instruction_id: int = 0, seed: int = 0
) -> Observation:
    rng = np.random.default_rng(seed)
    frames = {}
    for c in config.cameras:
        k = np.array([[c.width, 0, c.width / 2], [0, c.width, c.height / 2], [0, 0, 1.0]])
        rgb = rng.integers(0, 256, (c.height, c.width, 3), dtype=np.uint8)
        depth = rng.uniform(0.3, 1.0, (c.height, c.width)).astype(np.float32)
        frames[c.name] = CameraFrame(t_ns, rgb, depth, k, np.eye(4))
    quat = np.array([1.0, 0.02, -0.01, 0.03])
    pose = np.concatenate(([0.1, -0.2, 0.5], quat / np.linalg.norm(quat)))
    return Observation(t_ns, frames, pose, 0.04, True, np.zeros(7), instruction_id)


def goal(config: PolicyConfig, seq: int = 0, instruction_id: int = 0, t_ns: int = 0) -> LatentGoal:
    z = np.random.default_rng(seq).normal(size=(config.latent_tokens, config.latent_dim))
    return LatentGoal(z.astype(np.float32), seq, instruction_id, t_ns, t_ns, "")


def test_a_seed_fixes_the_chunk():
    config = tiny()
    policy = DiffusionPolicy.build(config, 0)
    policy.warm_up()
    obs, latents = observe(config), [goal(config)]
    policy.reset(5)
    first, second = policy.act(obs, latents), policy.act(obs, latents)
    policy.reset(5)
    again = policy.act(obs, latents)
    np.testing.assert_array_equal(first.poses, again.poses)
    assert not np.array_equal(first.poses, second.poses)
    twin = DiffusionPolicy.build(config, 0)
    twin.reset(5)
    np.testing.assert_array_equal(first.poses, twin.act(obs, latents).poses)


def test_the_chunk_is_on_the_time_grid_and_in_the_world_frame():
    config = tiny()
    policy = DiffusionPolicy.build(config, 0)
    obs = observe(config, t_ns=7_000_000_000, instruction_id=3)
    chunk = policy.act(
        obs, [goal(config, seq=4, instruction_id=3), goal(config, seq=9, instruction_id=2)]
    )
    assert chunk.dt_ns == round(1e9 / 30)
    assert chunk.t_start_ns == obs.t_ns + chunk.dt_ns
    assert (chunk.instruction_id, chunk.latent_seq, chunk.t_obs_ns) == (3, 4, obs.t_ns)
    assert chunk.poses.shape == (6, 7)
    assert chunk.poses.dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(chunk.poses[:, 3:], axis=1), 1, atol=1e-6)
    assert np.abs(chunk.poses[:, :3] - obs.tcp_pose[:3]).max() < 1
    assert ((chunk.gripper >= 0) & (chunk.gripper <= 1)).all()


@pytest.mark.parametrize("rotation", ["so3", "euler"])
def test_relative_rows_become_absolute_poses(rotation):
    tcp = torch.tensor([0.1, 0.2, 0.3, 1.0, 0.02, 0.05, 0.04], dtype=torch.float64)
    tcp[3:] /= tcp[3:].norm()
    rows = torch.zeros(2, 8, dtype=torch.float64)
    rows[:, 3] = 1
    rows[1, :3] = torch.tensor([0.01, 0.0, -0.02])
    position, quat = to_absolute(rows, tcp, rotation)
    torch.testing.assert_close(position, tcp[:3] + rows[:, :3])
    torch.testing.assert_close(
        quat_to_matrix(xyzw_to_wxyz(quat)),
        quat_to_matrix(xyzw_to_wxyz(tcp[3:])).expand(2, 3, 3),
    )


def test_invalid_points_are_masked_and_counted():
    config = tiny()
    policy = DiffusionPolicy.build(config, 0)
    obs = observe(config)
    holes = obs.frames["static"].depth.copy()
    holes[:9] = np.nan
    holes[9] = 0.0
    frames = {**obs.frames, "static": replace(obs.frames["static"], depth=holes)}
    chunk = policy.act(replace(obs, frames=frames), [goal(config)])
    assert np.isfinite(chunk.poses).all()
    assert policy.counters.invalid_points == 5 * 16


def test_what_lies_under_an_invalid_pixel_does_not_matter():
    config = tiny()
    policy = DiffusionPolicy.build(config, 0)
    obs = observe(config)
    chunks = []
    for bad in (np.nan, np.inf, -1.0):
        depth = obs.frames["static"].depth.copy()
        depth[:16] = bad
        frames = {**obs.frames, "static": replace(obs.frames["static"], depth=depth)}
        policy.reset(1)
        chunks.append(policy.act(replace(obs, frames=frames), [goal(config)]).poses)
    np.testing.assert_array_equal(chunks[0], chunks[1])
    np.testing.assert_array_equal(chunks[0], chunks[2])


def test_a_policy_without_latents_acts_on_its_task():
    config = tiny(use_latent=False)
    policy = DiffusionPolicy.build(config, 0)
    assert policy.spec.latent is None
    obs = observe(config)
    torch.nn.init.normal_(policy.model.encoder.cameras[0].block1.film.weight)
    poses = []
    for task in (-1, 3, 4):
        policy.set_task(task)
        policy.reset(0)
        poses.append(policy.act(obs, []).poses)
    assert not np.array_equal(poses[0], poses[1])
    assert not np.array_equal(poses[1], poses[2])
    with pytest.raises(ValueError, match=r"task: 34 is not in -1\.\.33"):
        policy.set_task(34)


def executed(config: PolicyConfig, obs: Observation, rows: int) -> ActionChunk:
    """A plan that leads away from the arm, turning."""
    step = np.arange(1, rows + 1)[:, None]
    place = obs.tcp_pose[:3] + step * np.array([0.004, -0.002, 0.001])
    turns = [
        multiply(from_rotation_vector((0, 0, 0.02 * i)), tuple(obs.tcp_pose[3:]))
        for i in range(1, rows + 1)
    ]
    dt_ns = config.dt_ns
    poses = np.hstack([place, np.array(turns)])
    return ActionChunk(obs.t_ns + dt_ns, dt_ns, poses, np.full(rows, 0.25), obs.instruction_id)


@pytest.mark.parametrize("rotation", ["so3", "euler"])
@pytest.mark.parametrize("join", ["inpaint", "prefix"])
def test_a_chunk_goes_on_from_the_plan_that_is_being_executed(join, rotation):
    config = tiny(given_rows=3, rotation=rotation)
    policy = DiffusionPolicy.build(config, 0)
    assert policy.spec.joins == ("blend", "inpaint", "prefix")
    torch.nn.init.normal_(policy.model.head.given)
    obs, latents = observe(config), [goal(config)]
    plan = executed(config, obs, 5)
    policy.reset(1)
    free = policy.act(obs, latents)
    policy.reset(1)
    led = policy.go_on(obs, latents, plan, 3, join)
    np.testing.assert_allclose(led.poses[:3, :3], plan.poses[:3, :3], atol=1e-6)
    for made, given in zip(led.poses[:3], plan.poses[:3], strict=True):
        assert angle_between(tuple(made[3:]), tuple(given[3:])) < 1e-4
    assert (led.gripper[:3] == 0.25).all()
    assert np.linalg.norm(free.poses[:3, :3] - plan.poses[:3, :3], axis=1).max() > 1e-3
    off = np.linalg.norm(led.poses[:, :3] - free.poses[:, :3], axis=1)
    assert (off[3:] > 1e-7).any()  # the rest is not what it would have been
    asked = []
    inner = policy.model.sample_inputs
    policy.model.sample_inputs = lambda *given: (asked.append(given[2]), inner(*given))[1]
    policy.go_on(obs, latents, plan, 2, join)
    weight, first = asked[0].weight[0].tolist(), asked[0].given
    if join == "inpaint":  # firm, then ever less, and nothing where the plan has ended
        assert weight[:2] == [1, 1] and weight[5] == 0 and first is None
        assert 1 > weight[2] > weight[3] > weight[4] > 0
    else:
        assert weight == [1, 1, 0, 0, 0, 0] and first.tolist() == [2]
    policy.reset(1)
    assert policy.go_on(obs, latents, plan, 5, join).poses.shape == (6, 7)


def test_a_policy_that_cannot_go_on_says_so():
    policy = DiffusionPolicy.build(tiny(), 0)
    assert policy.spec.joins == ("blend", "inpaint")
    obs = observe(tiny())
    with pytest.raises(SpecMismatch, match="join: 'prefix'; this policy can blend, inpaint"):
        policy.go_on(obs, [goal(tiny())], executed(tiny(), obs, 4), 1, "prefix")
    assert tiny(head="lstm").spec().joins == ("blend",)


def wrong_frames(obs: Observation) -> dict[str, dict[str, CameraFrame]]:
    good = obs.frames["static"]
    return {
        "missing": {"gripper": obs.frames["gripper"]},
        "size": {**obs.frames, "static": replace(good, rgb=good.rgb[:-1], depth=good.depth[:-1])},
        "dtype": {**obs.frames, "static": replace(good, rgb=good.rgb.astype(np.float32))},
        "depth": {**obs.frames, "static": replace(good, depth=None)},
    }


@pytest.mark.parametrize("kind", ["missing", "size", "dtype", "depth"])
def test_a_frame_that_breaks_the_spec_is_refused(kind):
    config = tiny()
    policy = DiffusionPolicy.build(config, 0)
    obs = observe(config)
    with pytest.raises(SpecMismatch, match="camera 'static'"):
        policy.act(replace(obs, frames=wrong_frames(obs)[kind]), [goal(config)])


def test_bad_latents_are_refused_or_skipped():
    config = tiny()
    policy = DiffusionPolicy.build(config, 0)
    obs, good = observe(config), goal(config, seq=1)
    with pytest.raises(SpecMismatch, match=r"latent.z: shape \(1, 5\), the policy needs \(1, 12\)"):
        policy.act(obs, [replace(good, z=np.zeros((1, 5), np.float32))])
    broken = replace(good, seq=2, z=np.full((1, 12), np.nan, np.float32))
    chunk = policy.act(obs, [good, broken])
    assert chunk.latent_seq == 1
    assert policy.counters.bad_latents == 1


def test_an_output_that_is_not_finite_never_leaves():
    config = tiny()
    policy = DiffusionPolicy.build(config, 0)
    policy.model.head.out.weight.fill_(torch.nan)
    with pytest.raises(PolicyFault, match="not finite"):
        policy.act(observe(config), [goal(config)])
    assert policy.counters.faults == 1


def test_a_fault_is_counted_on_both_clocks_and_the_policy_asked_again():
    config = tiny()
    policy = DiffusionPolicy.build(config, 0)
    weight = policy.model.head.out.weight
    kept = weight.clone()
    planner = SyncPlanner(policy, replan_ns=1)
    node = System1Process({"target": "openhelix.system1.policy:DiffusionPolicy.load"}, "", "")
    node._policy = policy
    replies = []
    node._replies = type("Sent", (), {"send": lambda self, reply: replies.append(reply)})()
    for t_ns, broken in ((0, True), (10**9, False)):
        weight.copy_(torch.full_like(kept, torch.nan) if broken else kept)
        obs = observe(config, t_ns=t_ns)
        planner.offer(obs, [goal(config)])
        assert (planner.poll(obs.t_ns) is None) == broken
        node._answer(PlanRequest(obs, (goal(config),), seed=0))
        assert (replies[-1].chunk is None) == broken
    assert planner.failures == node._failed == 1
    assert policy.counters.faults == 2
    assert len(planner.latencies_s) == 1


def test_history_is_forgotten_at_a_new_instruction():
    config = tiny(nhist=3)
    policy = DiffusionPolicy.build(config, 0)
    for i in range(3):
        moved = observe(config, t_ns=i)
        moved.tcp_pose[0] += 0.1 * i
        seen = policy.prepare(moved, [])
    assert len(torch.unique(seen.proprio[0, :, 0])) == 3
    policy.act(observe(config, instruction_id=1), [])
    assert len(policy._history) == 1


def test_latent_memory_carries_ages():
    config = tiny(latent_memory=3)
    policy = DiffusionPolicy.build(config, 0)
    obs = observe(config, t_ns=2_000_000_000)
    inputs = policy.prepare(obs, [goal(config, 0), goal(config, 1, t_ns=1_500_000_000)])
    assert inputs.latent_mask.tolist() == [[False, True, True]]
    np.testing.assert_allclose(inputs.latent_age_s[0, 1:], [2.0, 0.5], rtol=1e-6)
    with torch.inference_mode():
        scene = policy.model.encode(inputs)
    assert scene.condition.shape[1] == 1 + 3
    # A latent takes the place of the task table's row, which therefore is not looked at.
    assert scene.condition_mask.tolist() == [[False, False, True, True]]


def test_rotation_target_of_no_motion_is_the_identity():
    torch.testing.assert_close(matrix_to_6d(torch.eye(3)), torch.tensor([1.0, 0, 0, 0, 1, 0]))
