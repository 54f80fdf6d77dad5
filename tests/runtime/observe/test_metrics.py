"""openhelix.runtime.observe.metrics and openhelix.runtime.observe.collectors: declared names only, and what a real scrape gives."""

from __future__ import annotations

import re
import sys
import threading
import time
import urllib.request
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from openhelix.runtime.control.plans import ChunkBuffer
from openhelix.runtime.core.clock import FakeClock, Pacer
from openhelix.runtime.core.config import METRICS_PARTS, SafetyLimits
from openhelix.runtime.core.interfaces import Action, ActionChunk, LatentGoal
from openhelix.runtime.core.safety import SafetyState, Watchdog
from openhelix.runtime.observe.collectors import (
    DROP_REASONS,
    LoopMetrics,
    SinkMetrics,
    System2Metrics,
    WireMetrics,
)
from openhelix.runtime.observe.metrics import (
    GpuMetrics,
    Group,
    Histogram,
    Library,
    catalogue,
    counter,
    gauge,
    histograms,
    sections,
    serve,
)
from openhelix.runtime.transport import codec
from openhelix.runtime.transport.wire import ReaderStats

MS = 1_000_000


# What Prometheus 2 sends. It prefers OpenMetrics, in which names with a colon would be garbled.
ACCEPT = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)


def scrape(endpoint):
    request = urllib.request.Request(endpoint.url, headers={"Accept": ACCEPT})
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = answer.read().decode()
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples[(sample.name, *sorted(sample.labels.items()))] = sample.value
    return samples, text


@pytest.fixture
def served():
    endpoints = []

    def start(*parts):
        endpoints.append(serve(0, *parts))
        return endpoints[-1]

    yield start
    for endpoint in endpoints:
        endpoint.close()
        endpoint.close()  # twice is fine


def make_loop(clock):
    return SimpleNamespace(
        planner=SimpleNamespace(latencies_s=deque(maxlen=8), failures=2),
        goals=SimpleNamespace(
            received=5, void=1, missed=3, mismatched=4, mistimed=Counter(old=6), refusals=6
        ),
        chunks=ChunkBuffer(),
        safety=SafetyState(),
        watchdog=Watchdog(SafetyLimits(), cameras=("static",)),
        clock=clock,
        period_ns=33_333_333,
        instruction_id=2,
        understood=0.75,
    )


def make_tick(clock, state="run", age_s=0.2, info=None, latent=None):
    return SimpleNamespace(
        state=state,
        duration_s=1e-4,
        latent_age_s=age_s,
        new_latent=latent,
        t_ns=clock.now_ns(),
        sent=Action(np.zeros(7), 1.0, info=info or {}),
    )


def test_names_are_unique_prefixed_explained_and_in_base_units():
    names = [entry.name for entry in catalogue()]
    assert len(set(names)) == len(names)
    for entry in catalogue():
        assert re.fullmatch(r"openhelix_[a-z0-9_]+", entry.name)
        assert entry.help.endswith(".")
        assert entry.name.endswith("_total") == (entry.kind == "counter")
        assert bool(entry.buckets) == (entry.kind == "histogram")
        assert not re.search(r"_(ms|us|ns|millis|micros)(_|$)", entry.name)
        assert not {"episode", "seq", "instruction_id"} & set(entry.labels)
        assert list(entry.buckets) == sorted(entry.buckets)


def test_a_name_that_is_not_in_the_catalogue_fails():
    for make in (counter, gauge):
        with pytest.raises(KeyError):
            make("surprises", 1)
    with pytest.raises(KeyError):
        Histogram("surprises")


def test_histogram_buckets_are_cumulative_and_include_their_bound():
    histogram = Histogram("system1_latency_seconds")
    for value in (1e-4, 0.003, 0.003, 99.0):
        histogram.observe(value)
    samples = {s.labels.get("le"): s.value for s in histogram.family().samples}
    assert samples["0.0001"] == 1
    assert samples["0.0025"] == 1
    assert samples["0.005"] == 3
    assert samples["10.0"] == 3
    assert samples["+Inf"] == 4


def test_a_tapped_deque_stays_what_it_was():
    histogram = Histogram("system1_latency_seconds")
    values = histogram.tap(deque([9.0], maxlen=2))
    values.append(0.2)
    values.append(0.3)
    assert list(values) == [0.2, 0.3]
    assert histogram.family().samples[-2].value == 2  # the count: what was there before is not in


def test_the_loop_on_a_scrape(served):
    clock = FakeClock(10**9)
    loop, pacer = make_loop(clock), Pacer(clock, 33_333_333)
    result = SimpleNamespace(task="open_drawer", success=True, env_steps=42)
    free = SimpleNamespace(task="", success=None, env_steps=60)
    episode_runner = SimpleNamespace(results=[result, free], chains=[1])
    status = SimpleNamespace(fifo=True, memory_locked=False, gc_frozen=True)
    metrics = LoopMetrics(loop, pacer, episode_runner, lambda: status, ("push_into_drawer",), 0.3)
    endpoint = served(metrics)
    loop.watchdog.arm(clock.now_ns())
    chunk = ActionChunk(
        clock.now_ns(), 10 * MS, np.tile([0, 0, 0, 0, 0, 0, 1.0], (9, 1)), np.ones(9), 0
    )
    loop.chunks.put(chunk, clock.now_ns())
    loop.chunks.sample(clock.now_ns())
    latent = LatentGoal(np.zeros((1, 4), np.float32), 0, 0, clock.now_ns() - 400 * MS, 0, "x")
    loop.planner.latencies_s.append(0.03)
    loop.safety.update(None, "chunk_ran_out")
    loop.safety.trip("camera_frozen", "static")
    for i in range(3):
        pacer.wait()
        metrics(
            make_tick(
                clock, latent=latent if i == 0 else None, info={"speed": 0.1, "policys_own": 1.0}
            )
        )
    metrics(make_tick(clock, state="stop"))
    samples, text = scrape(endpoint)

    def value(name, **labels):
        return samples[("openhelix_" + name, *sorted(labels.items()))]

    assert value("loop_ticks_total", state="run") == 3
    assert value("loop_ticks_total", state="stop") == 1
    assert value("loop_tick_lateness_seconds_count") == 4
    assert value("latent_age_seconds_count") == 3  # only while running
    assert value("latent_latency_seconds_sum") == pytest.approx(0.4, abs=0.05)
    assert value("latents_missed_total") == 3
    assert value("latents_mismatched_total") == 4
    assert value("latents_refused_total") == 6
    assert value("instruction_understood") == 0.75
    assert value("latents_mistimed_total", reason="old") == 6
    assert value("latents_mistimed_total", reason="future") == 0
    assert value("safety_stops_total", reason="latent_mismatch") == 0  # from the start
    assert value("chunks_total", outcome="accepted") == value("chunks_used_total") == 1
    assert value("chunk_rows_total", fate="consumed") == 1
    assert value("system1_latency_seconds_sum") == pytest.approx(0.03)
    assert value("system1_failures_total") == 2
    assert value("safety_stops_total", reason="camera_frozen") == 1
    assert value("safety_holds_total", reason="chunk_ran_out") == 1
    assert value("safety_mode", mode="stop") == 1
    assert value("safety_limited_total", limit="speed") == 3
    assert value("source_age_seconds", source="camera:static") == pytest.approx(0.1, abs=0.01)
    assert value("tasks_total", task="open_drawer", outcome="success") == 1
    assert value("tasks_total", task="free", outcome="unjudged") == 1
    assert value("tasks_total", task="push_into_drawer", outcome="success") == 0  # from the start
    assert value("task_env_steps_sum") == 42
    assert value("chain_successes_bucket", le="1.0") == 1
    assert value("chain_successes_bucket", le="0.0") == 0
    assert value("latents_late_total") == 1  # 0.4 s at a period of 0.3 s
    assert value("latent_period_seconds") == 0.3
    assert value("safety_stops_total", reason="latent_silent") == 0
    limit_s = value("source_limit_seconds", source="latent")
    assert limit_s == SafetyLimits().latent_max_age_s + SafetyLimits().latent_grace_s
    assert value("realtime_granted", what="memory_lock") == 0
    assert ("process_resident_memory_bytes",) in samples
    assert "policys_own" not in text
    again, _ = scrape(endpoint)  # results are counted once
    assert again[("openhelix_tasks_total", ("outcome", "success"), ("task", "open_drawer"))] == 1


def test_every_family_served_is_in_the_catalogue(served):
    clock = FakeClock(10**9)
    metrics = LoopMetrics(make_loop(clock), Pacer(clock, 10**7))
    _, text = scrape(
        served(metrics, SinkMetrics({"video": SimpleNamespace(written=1, dropped=0, queued=0)}))
    )
    known = {entry.name for entry in catalogue()}
    served_names = set(re.findall(r"^# TYPE (openhelix_\S+)", text, re.MULTILINE))
    assert served_names
    assert served_names <= known


def test_system_2_on_a_scrape(served):
    totals = SimpleNamespace(
        published=7,
        batches=4,
        refused=1,
        failed=0,
        skipped=2,
        shed=Counter(too_old=3),
        compute_s=deque(maxlen=8),
        wait_s=deque(maxlen=8),
    )
    clock = FakeClock(3 * 10**9)
    robots = {
        "a": SimpleNamespace(pending=None, seq=4, skipped=1, heard_ns=10**9),
        "b": SimpleNamespace(pending=object(), seq=0, skipped=0, heard_ns=2 * 10**9),
    }
    scheduler = SimpleNamespace(totals=totals, robots=robots)
    endpoint = served(System2Metrics(scheduler, 1.0, clock))
    totals.compute_s.append(0.2)
    samples, _ = scrape(endpoint)
    assert samples[("openhelix_system2_latency_seconds_sum",)] == pytest.approx(0.2)
    assert samples[("openhelix_system2_shed_total", ("reason", "too_old"))] == 3
    assert samples[("openhelix_system2_shed_total", ("reason", "too_many_robots"))] == 0
    assert samples[("openhelix_system2_queue",)] == 1
    assert samples[("openhelix_system2_robot_latents_total", ("robot", "a"))] == 4
    assert samples[("openhelix_system2_robot_skipped_total", ("robot", "a"))] == 1
    assert samples[("openhelix_system2_robot_silence_seconds", ("robot", "a"))] == 2.0
    assert samples[("openhelix_system2_robots",)] == 2


def test_the_wire_on_a_scrape_and_two_parts_with_one_family(served):
    a, b = ReaderStats(received=4, gaps=1), ReaderStats(received=2)
    a.dropped["stale"] += 3
    publisher = SimpleNamespace(sent=9, dropped=1)
    endpoint = served(
        WireMetrics({"latents": a}), WireMetrics({"states": b}, {"actions": publisher})
    )
    samples, text = scrape(endpoint)
    assert samples[("openhelix_wire_received_total", ("channel", "latents"))] == 4
    assert samples[("openhelix_wire_received_total", ("channel", "states"))] == 2
    assert (
        samples[("openhelix_wire_dropped_total", ("channel", "latents"), ("reason", "stale"))] == 3
    )
    assert samples[("openhelix_wire_send_dropped_total", ("channel", "actions"))] == 1
    assert text.count("# TYPE openhelix_wire_received_total") == 1


def test_every_reason_to_drop_a_message_is_there_from_the_start():
    folder = Path(codec.__file__).parent
    text = "".join((folder / f"{m}.py").read_text() for m in ("wire", "codec"))
    told = set(re.findall(r'WireError\(\s*"(\w+)"', text))
    told |= set(re.findall(r'dropped\["(\w+)"\]', text))
    assert len(told) > 8
    assert told <= set(DROP_REASONS)


def test_only_loopback_is_bound_and_a_taken_port_is_one_line(served):
    endpoint = served()
    assert endpoint.url.startswith("http://127.0.0.1:")
    with pytest.raises(ValueError, match=r"output\.metrics_port") as caught:
        serve(endpoint.port)
    assert "\n" not in str(caught.value)


def test_another_address_is_bound_when_it_is_named(served):
    endpoint = serve(0, host="127.0.0.2")
    try:
        assert endpoint.url.startswith("http://127.0.0.2:")
        samples, _ = scrape(endpoint)
        assert ("process_cpu_seconds_total",) in samples
    finally:
        endpoint.close()
    with pytest.raises(ValueError, match=r"192\.0\.2\.1 cannot be used"):
        serve(0, host="192.0.2.1")


def test_the_last_scrape_is_awaited_only_where_somebody_scrapes(served):
    endpoint = served()
    assert not endpoint.await_scrape(0.2)
    scrape(endpoint)
    assert not endpoint.await_scrape(0.2)  # one visit is no rhythm
    stop = threading.Event()

    def visit():
        while not stop.wait(0.1):
            scrape(endpoint)

    visitor = threading.Thread(target=visit)
    visitor.start()
    try:
        deadline_s = time.monotonic() + 10.0
        while not endpoint.await_scrape(5.0):
            assert time.monotonic() < deadline_s
    finally:
        stop.set()
        visitor.join()


def test_what_a_library_counts_is_passed_on_by_prefix(served):
    mine = prometheus_client.Gauge("vllm:waiting", "Requests that wait.")
    other = prometheus_client.Gauge("other_things", "Not wanted.")
    try:
        mine.set(3)
        samples, text = scrape(served(Library("vllm:")))
    finally:
        prometheus_client.REGISTRY.unregister(mine)
        prometheus_client.REGISTRY.unregister(other)
    assert samples[("vllm:waiting",)] == 3
    assert "other_things" not in text


def test_gpu_memory_is_told_only_where_a_gpu_is_in_use(served, monkeypatch):
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: False,
        device_count=lambda: 2,
        memory_reserved=lambda index: [5.0, 0.0][index],
        mem_get_info=lambda index: {0: (60, 100)}[index],  # asking for the unused one fails
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert list(GpuMetrics().collect()) == []
    cuda.is_initialized = lambda: True
    samples, _ = scrape(served(GpuMetrics()))
    assert samples[("openhelix_gpu_memory_used_bytes", ("gpu", "0"))] == 40
    assert samples[("openhelix_gpu_memory_total_bytes", ("gpu", "0"))] == 100
    assert samples[("openhelix_gpu_memory_reserved_bytes", ("gpu", "0"))] == 5
    assert ("openhelix_gpu_memory_used_bytes", ("gpu", "1")) not in samples
    monkeypatch.setitem(sys.modules, "torch", None)
    assert list(GpuMetrics().collect()) == []


def test_distributions_with_labels_share_one_family(served):
    a, b = Histogram("eval_chain_successes"), Histogram("eval_chain_successes")
    a.observe(5)
    b.observe(0)
    part = SimpleNamespace(
        collect=lambda: [histograms("eval_chain_successes", {("calvin",): a, ("calvin-e",): b})]
    )
    samples, text = scrape(served(part))
    assert samples[("openhelix_eval_chain_successes_sum", ("suite", "calvin"))] == 5
    assert samples[("openhelix_eval_chain_successes_count", ("suite", "calvin-e"))] == 1
    assert text.count("# TYPE openhelix_eval_") == 1


def test_every_section_names_parts_that_serve():
    for section in sections():
        assert {part.strip() for part in section.served_by.split(",")} <= set(METRICS_PARTS)


def test_group_merges_without_losing_samples():
    parts = [SimpleNamespace(collect=lambda: [counter("sink_written", {"a": 1})])] * 2
    (family,) = Group(parts).collect()
    assert len(family.samples) == 2
