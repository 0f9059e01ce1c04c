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

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def ran(name: str, out: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", name, "--tiny", "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_at_its_smallest_size(name, tmp_path):
    ran(name, tmp_path)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert {"command", "machine", "versions"} <= set(record)
    assert len(list(csv.DictReader((tmp_path / f"{name}.csv").open()))) > 1
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_committed_results_name_machine_versions_and_command():
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        assert record["command"].startswith("python -m benchmarks")
        assert "--tiny" not in record["command"]
        assert record["machine"]["cpu"]
        assert {"torch", "diffusers", "ncp_loss"} <= set(record["versions"])


def test_compiled_kernels_spill_nothing_touch_no_local_memory_and_load_sixteen_bytes_at_a_time(tmp_path):
    ran("kernels", tmp_path)
    compiled = json.loads((tmp_path / "kernels.json").read_text())["compiled"]
    assert {row["GPU"] for row in compiled} == {"A100", "H100", "B200"}
    for row in compiled:
        assert (row["stack bytes"], row["local bytes"], row["local accesses"]) == (0, 0, 0), row
        assert row["widest load, bits"] == 128, row
        assert row["registers"] <= 64, row
