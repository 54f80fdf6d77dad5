"""The GPU bench: parts in processes of their own, and a report whatever becomes of them."""

from __future__ import annotations

import json

import pytest

from openhelix.benchmarks.perf import bench_gpu


def test_a_part_that_takes_too_long_is_ended_and_said(tmp_path):
    found = bench_gpu.spawn("system2", "cpu", tmp_path, 0.2)
    assert found == {"error": "took longer than 0 s"}


def test_a_part_that_fails_says_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu.sys, "executable", "/bin/ls")
    found = bench_gpu.spawn("training", "cpu", tmp_path, 60.0)
    assert set(found) == {"error"} and "ls" in found["error"]


def test_the_report_is_kept_after_every_part(tmp_path, monkeypatch, capsys):
    out, seen = tmp_path / "gpu.json", []

    def spawn(name, device, folder, limit_s):
        seen.append((name, round(limit_s)))
        if name == "system2":
            assert set(json.loads(out.read_text())["parts"]) == {"tests", "system1"}
        return {"error": "it broke"} if name == "system1" else {"fine": 1}

    monkeypatch.setattr(bench_gpu, "spawn", spawn)
    words = ["--device", "cpu", "--seconds", "100", "--out", str(out)]
    assert bench_gpu.main(words) == 1
    assert seen == [("tests", 30), ("system1", 30), ("system2", 25), ("training", 15)]
    parts = json.loads(out.read_text())["parts"]
    assert parts["system1"]["error"] == "it broke" and parts["training"]["fine"] == 1
    assert bench_gpu.main([*words, "--only", "tests"]) == 0


@pytest.mark.skipif(bench_gpu.torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        bench_gpu.main(["--device", "cuda"])
    assert ended.value.code == 2
    assert "--device cuda: torch sees no CUDA device here" in capsys.readouterr().err


def test_training_is_counted_in_samples(monkeypatch):
    monkeypatch.setattr(bench_gpu, "SIZES", {"cpu": (1,)})
    assert bench_gpu._samples_per_s("cpu", 1, bf16=False, seconds=0.0) > 0
