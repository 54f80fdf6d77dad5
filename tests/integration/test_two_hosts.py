"""A cluster of hosts by `ray up`: runs across it, strangers at its doors, a host that dies.

One cluster serves all tests of this file, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.hosts import why_not
from tests.integration.observed import BINARY, MISSING
from tests.integration.two_hosts import AHEAD_S, BIN, Run, TwoHosts, two_hosts, until

WHY_NOT = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]
SMALL = (
    "system2.engine={target: 'openhelix.runtime.robots.fake:PointEngine', options: {}}",
    "system2.hz=5",
    "system1.policy={target: 'tests.fakes:ReachPolicy', "
    "options: {cameras: [[static, 200, 200], [gripper, 84, 84]], speed_m: 0.002}}",
    "tasks.instruction=reach 0.3 0.1 0.7",
    "output.video=false",
)
RECEIVED = "openhelix_latents_received_total"
TICKS = 'openhelix_loop_ticks_total{state="run"}'
STOPS = 'openhelix_safety_stops_total{reason="latent_silent"}'


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoHosts]:
    with two_hosts(bare=True) as hosts:
        hosts.up()
        hosts.await_gpu()
        yield hosts


@pytest.fixture(scope="module")
def endless(cluster: TwoHosts) -> Run:
    """A run that goes on until it is interrupted."""
    run = cluster.start(
        *(*SMALL, "tasks.steps_limit=100000", "control.hold_limit_s=900"),
        *("safety.latent_max_age_s=2", "safety.latent_grace_s=2"),
        # All hosts share this machine's cores; a frame that is late for that is no matter here.
        *("safety.camera_max_age_s=20", "safety.proprioception_max_age_s=10"),
    )
    until("work", lambda: run.counts(90)[RECEIVED] > 10, 60)
    return run


def test_a_run_spans_both_hosts_and_knows_the_offset_of_their_clocks(cluster: TwoHosts) -> None:
    run = cluster.start(*SMALL, "tasks.steps_limit=240")
    assert run.wait(180) == 0, run.output
    report = run.report()
    assert report["tasks"][0]["env_steps"] == 240 and report["stopped"] is None
    assert report["latents_received"] >= 1 and report["latents_missed"] == 0
    # By the robot's clock alone: System 2's is more than an hour ahead.
    assert 0 < report["latent_age_s"]["p50"] < AHEAD_S / 2
    clocks = report["clock_offset_s"]
    assert 0 < clocks["uncertainty"] < 0.1
    assert abs(clocks["offset"] - AHEAD_S) <= clocks["uncertainty"] + 1e-6


def test_only_system2_is_on_the_network(cluster: TwoHosts, endless: Run) -> None:
    ask = f"source ~/.bashrc; {BIN}/python -c 'import openhelix.runtime.launch.node as n; print(n.__file__)'"
    where = cluster.on(cluster.gpu, ask).strip()
    assert where.startswith("/srv/home/openhelix/") and where.endswith("runtime/launch/node.py")
    theirs = cluster.gpu.run("ss", "-Hltn")
    ours = cluster.robot.run("ss", "-Hltn")
    for port in (5700, 5701, 5713):
        assert f"{cluster.gpu.address}:{port} " in theirs and f":{port} " not in ours
    assert endless.running


@pytest.mark.skipif(BINARY is None, reason=MISSING)
def test_a_prometheus_beside_the_robot_sees_both_hosts_rays(
    cluster: TwoHosts, endless: Run
) -> None:
    with cluster.prometheus():
        both = {f"{host.address}:9140" for host in (cluster.robot, cluster.gpu)}

        def there(expr: str) -> set[str]:
            return {str(s["metric"].get("instance")) for s in cluster.ask(expr)}

        until("both Rays", lambda: both <= there('up{job="ray"} == 1'), 120, every_s=2.0)
        until("what they count", lambda: both <= there("ray_node_cpu_count"), 60, every_s=2.0)
        ticks = 'rate(openhelix_loop_ticks_total{state="run"}[20s]) > 0'
        until("the run's own", lambda: there(ticks) == {"127.0.0.1:9108"}, 60, every_s=2.0)
    assert ":9120 " not in cluster.robot.run("ss", "-Hltn")  # the status page's
    assert endless.running


def test_a_host_without_a_gpu_is_refused_in_log_and_metric(cluster: TwoHosts, endless: Run) -> None:
    said = "bare refuses to be a system2 host: no GPU"
    until("the refusal", lambda: said in cluster.monitor_log(), 90, every_s=2.0)
    failed = cluster.metrics(cluster.robot, "http://127.0.0.1:44217/metrics")
    assert sum(v for name, v in failed.items() if "failed_updates" in name) >= 1, failed
    assert cluster.status().count("s2_gpu") == 1
    endless.grows(RECEIVED)


def test_a_strangers_key_and_token_open_nothing(cluster: TwoHosts, endless: Run) -> None:
    keys = cluster.bare.home / "keys"
    keys.mkdir()
    public = cluster.robot.home / ".openhelix" / "keys" / "server.public"
    (keys / "server.public").write_text(public.read_text())
    cluster.bare.run(
        str(BIN / "python"),
        "-c",
        "from openhelix.runtime.transport.sockets import generate; generate('~/keys', 'mallory')",
    )
    ask = (
        "from openhelix.runtime.transport.rpc import RpcClient; "
        f"RpcClient('tcp://{cluster.gpu.address}:5713', keys='~/keys').call('health', timeout_s=2)"
    )
    assert "refuses this host's CURVE key" in cluster.bare.run(
        *(str(BIN / "python"), "-c", ask), check=False
    )
    address = f"{cluster.robot.address}:6379"
    for token in ("RAY_AUTH_MODE=disabled", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=" + "0" * 64):
        said = cluster.on(cluster.bare, f"{token} {BIN}/ray status --address {address}")
        assert "s2_gpu" not in said and "robot" not in said
    endless.grows(RECEIVED)
    assert endless.counts().get(STOPS, 0) == 0


def test_a_second_run_on_the_same_robot_is_refused(cluster: TwoHosts, endless: Run) -> None:
    second = cluster.start(*SMALL, "output.metrics_port=0", "transport.base_port=5800")
    assert second.wait(90) == 2
    assert "in use by another run" in second.output and "Traceback" not in second.output
    endless.grows(RECEIVED)


def test_the_gpu_host_dies_and_comes_back(cluster: TwoHosts, endless: Run) -> None:
    cluster.bare.kill()  # Ray calls it again and again
    cluster.gpu.kill()
    until("the safe stop", lambda: endless.counts().get(STOPS, 0) >= 1, 30)
    assert endless.counts()['openhelix_safety_mode{mode="stop"}'] == 1
    assert endless.running
    before = endless.counts()[RECEIVED]
    cluster.lab.power_on(cluster.gpu)
    until("latents again", lambda: endless.counts()[RECEIVED] > before, 300, every_s=2.0)
    endless.grows(TICKS)
    assert endless.counts()['openhelix_safety_mode{mode="run"}'] == 1
    endless.interrupt()
    assert endless.wait(60) == 130, endless.output
    report = endless.report()
    assert report["interrupted"] and report["stopped"] is None
    assert report["safe_stops"] == {"latent_silent": 1}
