"""Every benchmark runs at its smallest size, and every committed result says where it comes from."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from programs import ROOT, called, started

from benchmarks import __main__ as benchmarks
from benchmarks.report import Kept
from benchmarks.timing import interleaved
from examples import demo

RESULTS = ROOT / "benchmarks" / "results"


def written(name: str, out: Path) -> dict:
    """The record of a benchmark, with its table and its figure beside it."""
    assert len(list(csv.DictReader((out / f"{name}.csv").open()))) > 1
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / f"{name}.json").read_text())


# Kernels and the evidence study have tests of their own.
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(benchmarks.BENCHMARKS.keys() - {"kernels", "evidence"}))
def test_a_benchmark_runs_at_its_smallest_size(name, tmp_path, monkeypatch):
    def run(command, **_):  # the processes of the benchmark of the demo
        assert command[1:3] == ["-m", demo.__name__]
        called(demo.main, *command[3:])

    monkeypatch.setattr("benchmarks.demo.subprocess", SimpleNamespace(run=run, DEVNULL=None))
    called(benchmarks.main, name, "--tiny", "--out", tmp_path)
    assert {"command", "machine", "versions"} <= set(written(name, tmp_path))


def test_interrupted_timings_go_on_with_the_rounds_that_were_kept(tmp_path):
    ran = []
    steps = {name: lambda name=name: ran.append(name) for name in ("one", "other")}
    first = interleaved(steps, 2, 1, Kept(tmp_path / "kept.json", resume=False))
    assert ran == ["one", "other"] * 3  # one round warms up
    ran.clear()
    whole = interleaved(steps, 3, 1, Kept(tmp_path / "kept.json", resume=True))
    assert ran == ["one", "other"] * 2
    assert {name: seconds[:2] for name, seconds in whole.items()} == first


def test_committed_results_name_machine_versions_and_command():
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        assert record["command"].startswith("python -m benchmarks")
        assert "--tiny" not in record["command"]
        assert record["machine"]["cpu"]
        assert {"torch", "diffusers", "ncp_loss"} <= set(record["versions"])


def kernels(out: Path, **environment: str):
    """The benchmark in a process where kernels are not interpreted, as they may be in this one."""
    return started("-m", "benchmarks", "kernels", "--tiny", "--out", out, **environment)


@pytest.mark.slow
def test_compiled_kernels_spill_nothing_touch_no_local_memory_and_load_sixteen_bytes_at_a_time(tmp_path):
    done = kernels(tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cold"))  # nothing was kept
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = written("kernels", tmp_path)["compiled"]
    assert {row["GPU"] for row in compiled} == {"A100", "H100", "B200"}
    for row in compiled:
        assert (row["stack bytes"], row["local bytes"], row["local accesses"]) == (0, 0, 0), row
        assert row["widest load, bits"] == 128, row
        assert row["registers"] <= 64, row


@pytest.mark.slow
def test_interpreted_kernels_are_refused_in_one_line_where_they_would_be_compiled(tmp_path):
    done = kernels(tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert done.stderr == "TRITON_INTERPRET must be unset to compile; it was '1'\n"
