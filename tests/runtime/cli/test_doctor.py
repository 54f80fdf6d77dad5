"""openhelix.runtime.cli.doctor: every check answers here, and says what to do where something is missing."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from openhelix.runtime.cli import doctor
from openhelix.runtime.cli.doctor import CHECKS, GIB, Check, diagnose, healthy


def test_every_check_answers_in_one_go_and_what_fails_has_a_remedy():
    checks = diagnose()
    assert [check.name for check in checks] == list(CHECKS)
    for check in checks:
        assert check.detail
        if not check.ok:
            assert check.remedy, check.name
        assert "could not be examined" not in check.detail


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from openhelix.runtime.cli.doctor import diagnose; diagnose(); "
        "assert not {'torch', 'vllm', 'ray', 'pybullet'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_only_what_a_run_needs_decides():
    fine, missing = Check("a", True, "x", required=True), Check("b", False, "x", "y")
    assert healthy([fine, missing])
    assert not healthy([fine, Check("c", False, "x", "y", required=True)])


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def broken():
        raise OSError("no such device")

    monkeypatch.setitem(doctor.CHECKS, "gpu", broken)
    (found,) = [check for check in diagnose() if check.name == "gpu"]
    assert not found.ok
    assert "no such device" in found.detail


@pytest.mark.parametrize(
    ("flags", "ok", "says"),
    [
        ("fpu avx2 avx512f avx512_bf16 amx_bf16", True, "amx_bf16"),
        ("fpu avx2", True, "avx2"),
        ("fpu sse2", False, "none of the wanted"),
    ],
)
def test_cpu_flags(monkeypatch, tmp_path, flags, ok, says):
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n")
    monkeypatch.setattr(doctor, "CPUINFO", path)
    check = doctor.cpu()
    assert check.ok == ok
    assert says in check.detail
    assert "Some CPU" in check.detail
    assert bool(check.remedy) == ("bf16" not in flags)


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", None), ("150000 100000", 1.5), ("nonsense", None)]
)
def test_a_containers_limit_on_cores(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert doctor.cgroup_cores(tmp_path / "cpu.max") == cores
    assert doctor.cgroup_cores(tmp_path / "missing") is None


def test_little_memory_and_little_disk(monkeypatch):
    short = SimpleNamespace(available=1 * GIB, total=2 * GIB, free=1 * GIB)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: short)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: short)
    assert "1.0 of 2.0 GiB" in doctor.memory().detail
    assert not doctor.memory().ok
    assert "OPENHELIX_CACHE" in doctor.disk().remedy


def test_a_gpu_and_a_broken_driver(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/" + name)
    answer = SimpleNamespace(returncode=0, stdout="NVIDIA H200, 143771 MiB, 580.1\n", stderr="")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: answer)
    assert "H200" in doctor.gpu().detail
    answer.returncode = 9
    answer.stdout, answer.stderr = "", "NVIDIA-SMI has failed"
    assert not doctor.gpu().ok
    assert "has failed" in doctor.gpu().detail


def test_refused_real_time_says_how_to_get_it(monkeypatch):
    refused = SimpleNamespace(fifo=False, reason="SCHED_FIFO: Operation not permitted")
    monkeypatch.setattr(doctor, "enter", lambda **_: refused)
    monkeypatch.setattr(doctor, "leave", lambda _: None)
    check = doctor.realtime()
    assert not check.ok
    assert "rtprio" in check.remedy


def test_missing_calvin_env_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENHELIX_CALVIN_ENV", str(tmp_path))
    check = doctor.calvin_env()
    assert not check.ok
    assert check.detail.startswith("calvin_env is not installed")
    assert "git clone" in check.remedy


def test_missing_packages_and_programs(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda _: "")
    for check in (doctor.vllm(), doctor.ray(), doctor.simulator(), doctor.viewer()):
        assert not check.ok
        assert check.remedy
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "rsync" in doctor.programs().remedy


def test_what_to_install_is_shown_whole_and_fits_a_wheel(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKOUT", None)
    monkeypatch.setattr(doctor, "installed", lambda _: "")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "CHECKS", {"gpu": doctor.gpu, "viewer": doctor.viewer})
    for columns in ("40", "80", "200"):  # a command is never broken: it is there to be copied
        monkeypatch.setenv("COLUMNS", columns)
        doctor.main([])
        said = capsys.readouterr().out
        assert "pip install 'openhelix[viewer]'" in said and "pip install 'openhelix[gpu]'" in said
        assert "make setup" not in said
