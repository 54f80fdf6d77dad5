"""Before Ray is asked to place anything: is there a host for it, and is it free?"""

from __future__ import annotations

from typing import Any

import pytest

from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.launch.actors import check_free, check_offers
from openhelix.runtime.launch.node import NodeSpec

ROBOT = NodeSpec("control", "m:C", "ipc:///x", cpus=0.5, resources={"robot": 1}, here=True)
SLOW = NodeSpec("system2", "m:C", "tcp://b:1", cpus=1.0, gpus=1.0, resources={"s2_gpu": 1})
EDGE: dict[str, Any] = {
    "NodeID": "edge",
    "Alive": True,
    "NodeManagerAddress": "10.0.0.1",
    "Resources": {"CPU": 4.0, "robot": 1.0, "memory": 1e9, "node:10.0.0.1": 1.0},
}
GPU = {
    "NodeID": "gpu",
    "Alive": True,
    "NodeManagerAddress": "10.0.0.2",
    "Resources": {"CPU": 8.0, "GPU": 1.0, "s2_gpu": 1.0},
}


def test_a_cluster_with_a_host_for_each_node_is_accepted() -> None:
    check_offers([ROBOT, SLOW], [EDGE, GPU], here="edge")


def test_without_a_gpu_host_it_is_said_what_is_missing_and_what_there_is() -> None:
    without = GPU | {"Resources": {"CPU": 8.0}}
    for hosts in ([EDGE], [EDGE, without], [EDGE, GPU | {"Alive": False}]):
        with pytest.raises(ConfigError) as refusal:
            check_offers([ROBOT, SLOW], hosts, here="edge")
        text = str(refusal.value)
        assert text.startswith("system2.placement: no host of the cluster offers CPU 1, GPU 1, s2_")
        assert "10.0.0.1 with CPU 4, robot 1" in text and "memory" not in text
        assert len(text.splitlines()) == 1


def test_a_resource_split_over_two_hosts_is_no_host() -> None:
    halves = [GPU | {"Resources": {"CPU": 8.0, "GPU": 1.0}}, EDGE]
    halves[1] = EDGE | {"Resources": {"CPU": 8.0, "s2_gpu": 1.0}}
    with pytest.raises(ConfigError, match="system2"):
        check_offers([SLOW], halves, here="edge")


def test_what_belongs_beside_the_robot_is_not_placed_elsewhere() -> None:
    with pytest.raises(
        ConfigError, match=r"control\.placement: this host does not offer .*robot 1"
    ):
        check_offers([ROBOT], [EDGE, GPU], here="gpu")


def test_a_robot_that_another_run_uses_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"control\.placement: robot is in use by another run"):
        check_free([ROBOT], lambda: {"CPU": 4.0}, patience_s=0.0)


def test_what_is_just_given_back_is_waited_for() -> None:
    answers = iter([{"CPU": 1.0}, {"CPU": 0.0, "robot": 1.0}])
    check_free([ROBOT], lambda: next(answers), patience_s=5.0)
    assert next(answers, None) is None
