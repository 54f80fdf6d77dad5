"""openhelix.benchmarks.perf.places: figures go where they can be written."""

from __future__ import annotations

from pathlib import Path

from openhelix.benchmarks.paper import command, costs
from openhelix.benchmarks.perf import places
from openhelix.runtime.core.paths import ROOT


def test_figures_of_an_installed_package_go_to_the_working_directory(monkeypatch):
    in_checkout = ROOT / "benchmarks" / "perf" / "results" / "wire.json"
    assert places.results_file("wire.json") == in_checkout and places.CONFIG.is_file()
    monkeypatch.setattr(places, "CHECKOUT", None)
    assert places.results_file("wire.json") == Path("outputs/perf/wire.json")


def test_results_of_experiments_do_too(monkeypatch, tmp_path):
    class Request:
        scale_name = "laptop"

        class scale:
            official = True

    assert command.default_out(Request()) == command.RESULTS
    monkeypatch.setattr(command, "RESULTS", tmp_path / "nowhere")
    assert command.default_out(Request()) == Path("outputs/experiments-laptop")


def test_measured_costs_lie_beside_the_code_that_reads_them():
    assert costs.COSTS.parent == Path(costs.__file__).parent
    assert costs.costs()["evaluation"]["env_step_s"] > 0
