"""The cluster files against Ray's own schema, and the host scripts' refusals."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from openhelix.runtime.core.config import load
from openhelix.runtime.launch.graph import Endpoints, build, stays

REPO = Path(__file__).resolve().parents[2]
DEPLOY = REPO / "deploy"
FILES = ("cluster.yaml", "cluster.aws.yaml")
TOKEN = "0123456789abcdef" * 4


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text())


@pytest.fixture(params=FILES)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read(request.param)


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_the_check_would_notice_a_mistake(cluster: dict[str, Any]) -> None:
    wrong = prepare_config(cluster | {"no_such_field": 1})
    with pytest.raises(ValidationError, match="no_such_field"):
        validate_config(wrong)


def test_everything_that_is_mounted_exists_and_all_code_is(cluster: dict[str, Any]) -> None:
    mounts = cluster["file_mounts"]
    local = [path for path in mounts.values() if not path.startswith("~")]
    assert all((REPO / path).exists() for path in local)
    packages = {p.parent.name for p in REPO.glob("*/__init__.py")} - {"tests"}
    assert packages <= set(local)
    assert {"requirements", "configs", "deploy", "checkpoints"} <= set(local)


def test_what_proves_identity_is_on_every_host_and_not_in_the_checkout(
    cluster: dict[str, Any],
) -> None:
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert cluster["file_mounts"]["~/.openhelix/keys"] == "~/.openhelix/keys"
    assert load(DEPLOY.parent / "configs" / "cluster.yaml").transport.keys == Path(
        "~/.openhelix/keys"
    )


def test_every_host_gets_the_right_lock_and_role(cluster: dict[str, Any]) -> None:
    head, worker = cluster["head_setup_commands"][-1], cluster["worker_setup_commands"][-1]
    assert head.endswith("setup-host.sh cpu") and worker.endswith("setup-host.sh gpu")
    assert cluster["head_start_ray_commands"][-1].endswith("start-host.sh robot")
    assert cluster["worker_start_ray_commands"][-1].endswith("start-host.sh system2")


def test_the_aws_types_offer_what_the_configuration_asks_for() -> None:
    types = read("cluster.aws.yaml")["available_node_types"]
    config = load(REPO / "configs" / "cluster.yaml")
    for placement, kind in (
        (config.control.placement, "robot"),
        (config.system2.placement, "system2"),
    ):
        offered = types[kind]["resources"]
        asked = {"CPU": placement.cpus, "GPU": placement.gpus} | placement.resources
        assert all(offered.get(name, 0) >= amount for name, amount in asked.items() if amount)


def test_the_run_configuration_fits_the_cluster_file(tmp_path: Path) -> None:
    config = load(REPO / "configs" / "cluster.yaml")
    assert list(config.transport.hosts.values()) == read("cluster.yaml")["provider"]["worker_ips"]
    ends = Endpoints.of(config, tmp_path)
    specs = {s.name: s for s in build(config, ends, {"assignments": []}, str(tmp_path))}
    assert specs["system2"].resources == {"s2_gpu": 1} and specs["system2"].gpus == 1
    assert specs["control"].resources == {"robot": 1}
    assert [name for name in specs if not stays(config, name)] == ["system2"]


@pytest.mark.parametrize("name", ["start-host.sh", "setup-host.sh"])
def test_a_script_is_valid_and_can_be_run(name: str) -> None:
    assert os.access(DEPLOY / name, os.X_OK)
    assert subprocess.run(["bash", "-n", DEPLOY / name]).returncode == 0


class Host:
    """A home and a checkout of which only the start script, Ray and nvidia-smi are there."""

    def __init__(self, folder: Path) -> None:
        self.home, self.bin = folder / "home", folder / "bin"
        self.checkout = folder / "openhelix"
        self.calls = folder / "ray-calls"
        (self.checkout / "deploy").mkdir(parents=True)
        shutil.copy(DEPLOY / "start-host.sh", self.checkout / "deploy")
        for path in (self.home / ".ray", self.home / ".openhelix" / "keys", self.bin):
            path.mkdir(parents=True)
        self.script(
            self.checkout / ".venv" / "bin" / "ray", f'echo "$RAY_AUTH_MODE $*" >> {self.calls}'
        )
        (self.home / ".ray" / "auth_token").write_text(TOKEN)
        for name in ("server.public", "server.secret", "robot0.public", "robot0.secret"):
            (self.home / ".openhelix" / "keys" / name).write_text("x" * 40)

    @staticmethod
    def script(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def gpus(self, count: int) -> None:
        lines = "; ".join(f"echo 'GPU {i}: a card'" for i in range(count)) or "exit 9"
        self.script(self.bin / "nvidia-smi", lines)

    def start(self, role: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", self.checkout / "deploy" / "start-host.sh", role],
            env={
                "PATH": f"{self.bin}:/usr/bin:/bin",
                "HOME": str(self.home),
                "RAY_HEAD_IP": "10.0.0.1",
                **environment,
            },
            capture_output=True,
            text=True,
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_the_head_offers_the_robot_and_demands_the_token(host: Host) -> None:
    assert host.start("robot").returncode == 0
    *_, call = host.calls.read_text().splitlines()
    assert call.startswith("token start --head") and "--dashboard-host=127.0.0.1" in call
    assert '--resources={"robot": 1}' in call


def test_a_gpu_host_offers_what_it_has(host: Host) -> None:
    host.gpus(2)
    assert host.start("system2").returncode == 0
    *_, call = host.calls.read_text().splitlines()
    assert "--address=10.0.0.1:6379" in call and "--num-gpus=2" in call
    assert '--resources={"s2_gpu": 1}' in call


def test_a_host_without_a_gpu_offers_nothing_and_says_so(host: Host) -> None:
    host.gpus(0)
    refused = host.start("system2")
    assert refused.returncode == 1 and not host.calls.exists()
    assert re.search(r"refuses to be a system2 host: no GPU", refused.stderr)
    assert len(refused.stderr.splitlines()) == 1
    assert host.start("system2", OPENHELIX_WITHOUT_GPU="1").returncode == 0
    assert "--num-gpus=0" in host.calls.read_text()


@pytest.mark.parametrize(
    ("missing", "role", "expected"),
    [
        (".ray/auth_token", "robot", "get-auth-token"),
        (".openhelix/keys/server.public", "robot", "openhelix keys"),
        (".openhelix/keys/server.secret", "system2", "server.secret"),
    ],
)
def test_without_its_secrets_a_host_does_not_start(
    host: Host, missing: str, role: str, expected: str
) -> None:
    host.gpus(1)
    (host.home / missing).unlink()
    refused = host.start(role)
    assert refused.returncode == 1 and expected in refused.stderr
    assert not host.calls.exists()


def test_secrets_are_closed_to_others(host: Host) -> None:
    secret = host.home / ".openhelix" / "keys" / "robot0.secret"
    token = host.home / ".ray" / "auth_token"
    for path in (secret, token):
        path.chmod(0o644)
    assert host.start("robot").returncode == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in (secret, token))


def test_a_start_that_fails_is_tried_again(host: Host) -> None:
    once = host.checkout / "once"
    host.script(
        host.checkout / ".venv" / "bin" / "ray",
        f'[ "$1" = stop ] || [ -e {once} ] || {{ touch {once}; exit 1; }}; echo "$*" >> {host.calls}',
    )
    host.script(host.bin / "sleep", "exit 0")
    assert host.start("robot").returncode == 0
    assert host.calls.read_text().count("start --head") == 1


def test_an_unknown_role_is_refused(host: Host) -> None:
    assert "expected robot or system2" in host.start("gpu").stderr
