"""One System 2 for several robots: each gets its own latents, and no client harms another.

Two simulators run throughout, over TCP with keys; each test does something bad, looks for the
refusal in log and metrics, and asserts that the two robots did not notice.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zmq
from prometheus_client.parser import text_string_to_metric_families

from openhelix.runtime.control.episodes import Assignment
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.interfaces import GoalRequest, LatentGoal
from openhelix.runtime.transport.codec import MAX_FRAME_BYTES
from openhelix.runtime.transport.rpc import RpcClient, RpcError
from openhelix.runtime.transport.sockets import CurveClient, generate
from openhelix.runtime.transport.sockets import served as endpoints_of
from openhelix.runtime.transport.wire import NewestReader, Publisher
from tests.integration.session import SMALL, Session, session
from tests.integration.test_network import free_port

PATIENCE_S = 40.0
HERE = Assignment("", "reach 0.0 -0.3 0.5")
LIMIT = "tasks.steps_limit"
# Starting more processes on two busy cores starves a simulated camera, which is no business of
# System 2's; what is asserted is that latents go on coming.
LENIENT = (
    *("safety.camera_max_age_s=60", "safety.proprioception_max_age_s=60"),
    *("safety.latent_max_age_s=60", "control.hold_limit_s=600"),
)


def until(what: str, test: Callable[[], object]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not test():
        assert time.monotonic() < end_s, f"{what} did not come about"
        time.sleep(0.05)


def metrics(url: str) -> dict[tuple[str, ...], float]:
    """Every sample that an endpoint serves, by its name and label values."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            (s.name.removeprefix("openhelix_"), *s.labels.values()): s.value
            for family in families
            for s in family.samples
        }


@dataclass(frozen=True)
class Fleet:
    """Two robots at work, and the System 2 that they share."""

    arms: tuple[Session, Session]
    process: subprocess.Popen[str]
    ends: dict[str, str]
    keys: Path
    log: Path

    @property
    def system2(self) -> dict[tuple[str, ...], float]:
        return metrics(self.arms[0].graph.health("system2")["metrics_url"])

    def count(self, *names: str) -> float:
        return self.system2.get(names, 0.0)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Assert that both robots went on as if nothing had happened."""
        before = [self._figures(arm) for arm in self.arms]
        yield
        for arm, was in zip(self.arms, before, strict=True):
            enough = was["latents_received_total"] + 4

            def served(arm: Session = arm, enough: float = enough) -> bool:
                return self._figures(arm)["latents_received_total"] >= enough

            until("more latents", served)
            now = self._figures(arm)
            assert now["latents_missed_total"] == was["latents_missed_total"]
            assert now["safety_stops"] == was["safety_stops"] == 0
            assert arm.graph.health("control")["loop_state"] != "stop"
        assert self.process.poll() is None

    @staticmethod
    def _figures(arm: Session) -> dict[str, float]:
        found = metrics(arm.graph.health("control")["metrics_url"])
        stops = sum(value for key, value in found.items() if key[0] == "safety_stops_total")
        names = ("latents_received_total", "latents_missed_total")
        return {name: found[(name,)] for name in names} | {"safety_stops": stops}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    base = tmp_path_factory.mktemp("fleet")
    for name in ("server", "client"):
        generate(base / "keys", name)
    address = f"tcp://127.0.0.1:{free_port(3)}"
    keys = f"transport.keys={base / 'keys'}"
    share = (f"system2.connect={address}", keys, *LENIENT, f"{LIMIT}=100000")
    with (base / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "openhelix.runtime.cli.main", "serve", address, *SMALL, keys],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            with (
                session(base / "one", *share, "robot.id=arm1") as arm1,
                # Its instructions are short, so that it has many of them.
                session(
                    *(base / "two", *share, "robot.id=arm2", f"{LIMIT}=30"),
                    assignments=(HERE,) * 1000,
                ) as arm2,
            ):
                for arm in (arm1, arm2):
                    arm.begin()
                for arm in (arm1, arm2):
                    arm.until("work", lambda h: h["steps"] > 10)
                ends = endpoints_of(address)
                yield Fleet((arm1, arm2), process, ends, base / "keys", base / "log")
        finally:
            process.kill()
            process.communicate()


def test_each_simulator_has_its_own_instructions_and_latents(fleet: Fleet) -> None:
    goals = {"arm1": [0.3, 0.1, 0.7], "arm2": [0.0, -0.3, 0.5]}
    readers = {
        name: NewestReader(fleet.ends["latents"], f"latents/{name}", LatentGoal, keys=fleet.keys)
        for name in goals
    }
    instruction_ids: dict[str, set[int]] = {name: set() for name in goals}

    def heard() -> bool:
        for name, reader in readers.items():
            latent = reader.poll()
            if latent is not None:
                np.testing.assert_allclose(latent.z[0, :3], goals[name], atol=1e-6)
                instruction_ids[name].add(latent.instruction_id)
        return len(instruction_ids["arm2"]) >= 3 and bool(instruction_ids["arm1"])

    with fleet.undisturbed():
        until("three instructions of the second robot", heard)
    assert instruction_ids["arm1"] == {1}
    robots = fleet.arms[0].graph.health("system2")["robots"]
    assert set(robots) == {"arm1", "arm2"}
    assert robots["arm1"]["instruction_id"] == 1 and robots["arm2"]["instruction_id"] >= 3
    for reader in readers.values():
        reader.close()


def test_a_client_that_never_reads_harms_nobody(fleet: Fleet) -> None:
    security = CurveClient(fleet.keys)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stuck = []
    for kind, end in ((zmq.SUB, "latents"), (zmq.DEALER, "control")):
        port = context.socket(kind)
        port.linger, port.rcvhwm = 0, 1
        security.secure(port)
        port.connect(fleet.ends[end])
        stuck.append(port)
    stuck[0].setsockopt(zmq.SUBSCRIBE, b"")
    asker = Publisher(fleet.ends["requests"], "stuck", bind=False, keys=fleet.keys)
    rgb = np.zeros((200, 200, 3), np.uint8)
    with fleet.undisturbed():
        for seq in range(100):
            asker.send(GoalRequest(rgb, "reach 0 0 0", "stuck", seq, seq, time.monotonic_ns()))
            for number in range(20):  # questions whose answers are never fetched
                stuck[1].send_multipart([number.to_bytes(8, "little"), b"?" * 1000])
            time.sleep(0.02)
        robots = fleet.arms[0].graph.health("system2")["robots"]
    assert robots["stuck"]["published"] > 0
    asker.close()
    for port in stuck:
        port.close(linger=0)
    context.term()


def test_wrong_keys_no_keys_and_rubbish_are_refused_before_they_connect(
    fleet: Fleet, tmp_path: Path
) -> None:
    strange = tmp_path / "strange"
    generate(strange, "stranger")
    (strange / "server.public").write_bytes((fleet.keys / "server.public").read_bytes())
    request = GoalRequest(
        np.zeros((8, 8, 3), np.uint8), "reach 0 0 0", "stranger", 0, 0, time.monotonic_ns()
    )
    with fleet.undisturbed():
        ports = [
            Publisher(fleet.ends["requests"], "stranger", bind=False, keys=strange),
            Publisher(fleet.ends["requests"], "stranger", bind=False),
        ]
        with pytest.raises(RpcError):
            RpcClient(fleet.ends["control"], keys=strange).call("health", {}, 1.0)
        for end in fleet.ends.values():
            host, _, port = end.removeprefix("tcp://").rpartition(":")
            with socket.create_connection((host, int(port))) as raw:
                raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 50)
            with socket.create_connection((host, int(port))):
                pass  # comes and goes

        def refused() -> bool:
            for port in ports:
                port.send(request)
            found = fleet.system2
            counts = {
                why: found[("wire_refused_total", "requests", why)]
                for why in ("key", "protocol", "unfinished")
            }
            # Which side notices first that the other has no key is a matter of luck.
            return counts["key"] and counts["protocol"] + counts["unfinished"] >= 2

        until("refusals", refused)
    assert "stranger" not in fleet.arms[0].graph.health("system2")["robots"]
    log = fleet.log.read_text()
    assert "unknown key" in log and "not on the list" in log and "rubbish" in log
    for publisher in ports:
        publisher.close()


def test_messages_that_are_no_requests_are_dropped_and_counted(fleet: Fleet) -> None:
    now = time.monotonic_ns()
    small = np.zeros((8, 8, 3), np.uint8)
    large = np.zeros((3400, 3400, 3), np.uint8)  # 35 MB, beyond what an image may have
    latent = LatentGoal(np.zeros((1, 8), np.float32), 0, 0, 0, 0, "spec")
    bad = {
        ("wire_dropped_total", "requests", "oversize"): GoalRequest(large, "x", "bad1", 0, 0, now),
        ("wire_dropped_total", "requests", "kind"): latent,
        ("system2_shed_total", "bad_name"): GoalRequest(small, "x", "bad\0" * 50, 0, 0, now),
        ("system2_refused_total",): GoalRequest(small, "sing", "bad2", 0, 0, now),
    }
    publishers = {
        key: Publisher(fleet.ends["requests"], f"bad{i}", bind=False, keys=fleet.keys)
        for i, key in enumerate(bad)
    }
    with fleet.undisturbed():

        def counted() -> bool:
            found = fleet.system2
            for key, message in bad.items():
                if not found.get(key):
                    publishers[key].send(message)
            return all(found.get(key) for key in bad)

        until("every refusal", counted)
    assert "requests refused: oversize" in fleet.log.read_text()
    for publisher in publishers.values():
        publisher.close()


def test_a_frame_beyond_all_limits_ends_its_senders_connection(fleet: Fleet) -> None:
    security = CurveClient(fleet.keys)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    raw = context.socket(zmq.PUB)
    raw.linger = 0
    security.secure(raw)
    raw.connect(fleet.ends["requests"])
    before = fleet.count("wire_ended_total", "requests")
    dropped = fleet.count("wire_dropped_total", "requests", "truncated")
    with fleet.undisturbed():

        def connected() -> bool:
            raw.send(b"rubbish")
            return fleet.count("wire_dropped_total", "requests", "truncated") > dropped

        until("a connection", connected)
        raw.send(bytes(MAX_FRAME_BYTES + 1))
        until("its end", lambda: fleet.count("wire_ended_total", "requests") > before)
    assert "requests: a connection ended" in fleet.log.read_text()
    raw.close(linger=0)
    context.term()


def test_a_second_robot_with_a_taken_name_is_refused_before_it_starts(
    fleet: Fleet, tmp_path: Path
) -> None:
    share = (f"system2.connect={fleet.ends['control']}", f"transport.keys={fleet.keys}")
    before = fleet.count("system2_shed_total", "name_taken")
    with (
        fleet.undisturbed(),
        pytest.raises(ConfigError, match=r"robot\.id: 'arm1' is in use"),
        session(tmp_path, *share, "robot.id=arm1") as second,
    ):
        second.begin()
    assert fleet.count("system2_shed_total", "name_taken") == before + 1
    assert "'arm1' refused: name_taken" in fleet.log.read_text()


def test_kill_9_of_every_process_of_a_robot_harms_no_other_and_frees_its_name(
    fleet: Fleet, tmp_path: Path
) -> None:
    words = (
        *(f"system2.connect={fleet.ends['control']}", f"transport.keys={fleet.keys}"),
        *(*LENIENT, f"{LIMIT}=100000", "robot.id=arm3", "output.status=true"),
    )
    with fleet.undisturbed():
        with session(tmp_path / "first", *words) as third:
            third.begin()
            third.until("work", lambda h: h["steps"] > 5)
            for node in ("system1", "camera"):
                third.signal(node, signal.SIGKILL)
                third.until_restarted(node)
            steps = third.graph.health("control")["steps"]
            third.until("work again", lambda h: h["steps"] > steps + 5)
            gone = ("observer", "world", "control")
            for node in gone:
                third.signal(node, signal.SIGKILL)
            until("its end", lambda: set(third.graph.ended()) == set(gone))
        with ExitStack() as stack:
            again: list[Session] = []

            def begun() -> bool:
                try:
                    again.append(stack.enter_context(session(tmp_path / "second", *words)))
                except ConfigError as error:  # a name stays claimed for 10 s
                    if "is in use" not in str(error):
                        raise
                    return False
                again[-1].begin()
                return True

            until("its name again", begun)
            again[-1].until("work under the same name", lambda h: h["steps"] > 5)


def test_whoever_uses_a_taken_name_without_asking_is_not_heard(fleet: Fleet) -> None:
    forged = GoalRequest(
        np.zeros((8, 8, 3), np.uint8), "reach 9 9 9", "arm1", 10**6, 99, time.monotonic_ns()
    )
    ways = {
        "arm1": ("wire_dropped_total", "requests", "taken"),
        "elsewhere": ("system2_shed_total", "name_taken"),
    }
    publishers = {
        topic: Publisher(fleet.ends["requests"], topic, bind=False, keys=fleet.keys)
        for topic in ways
    }
    before = {key: fleet.count(*key) for key in ways.values()}
    with fleet.undisturbed():

        def refused() -> bool:
            for publisher in publishers.values():
                publisher.send(forged)
            found = fleet.system2
            return all(found.get(key, 0.0) > before[key] + 3 for key in ways.values())

        until("refusals on both ways", refused)
        assert fleet.arms[0].graph.health("system2")["robots"]["arm1"]["instruction_id"] == 1
    for publisher in publishers.values():
        publisher.close()


def test_no_client_ends_or_changes_what_all_rely_on(fleet: Fleet) -> None:
    client = RpcClient(fleet.ends["control"], keys=fleet.keys)
    with fleet.undisturbed():
        with pytest.raises(RpcError, match="no method 'stop'"):
            client.call("stop")
        with pytest.raises(RpcError, match="does not answer 'swap'"):
            client.call("ask", {"question": "swap", "path": "/etc/passwd"})
    client.close()
