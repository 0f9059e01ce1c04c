"""Every benchmark runs at its smallest size, and every committed result says where it comes from."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS
from benchmarks.report import Kept
from benchmarks.timing import interleaved

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def ran(name: str, out: Path) -> dict:
    """The record of a benchmark at its smallest size, with its table and its figure beside it."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", name, "--tiny", "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(csv.DictReader((out / f"{name}.csv").open()))) > 1
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / f"{name}.json").read_text())


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "kernels"])
def test_a_benchmark_runs_at_its_smallest_size(name, tmp_path):
    assert {"command", "machine", "versions"} <= set(ran(name, tmp_path))


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


def test_compiled_kernels_spill_nothing_touch_no_local_memory_and_load_sixteen_bytes_at_a_time(tmp_path):
    compiled = ran("kernels", tmp_path)["compiled"]
    assert {row["GPU"] for row in compiled} == {"A100", "H100", "B200"}
    for row in compiled:
        assert (row["stack bytes"], row["local bytes"], row["local accesses"]) == (0, 0, 0), row
        assert row["widest load, bits"] == 128, row
        assert row["registers"] <= 64, row
