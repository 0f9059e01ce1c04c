"""What the demo reaches on seeds that no choice of its settings saw.

Runs `python -m examples.demo` once for each seed, with whatever other options are given after `--`. A seed decides the
pairs, the adapters' start, the order of training and the held-out noise. Writes demo.csv (a row for each seed),
demo.json (means with 95% t intervals over the seeds) and demo.png (reward against the training step).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import report

ROOT = Path(__file__).parents[1]
TINY = "--steps", "2", "--pairs", "10", "--batch", "2", "--held-out", "20"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 201, 202, 203, 204])
    parser.add_argument("options", nargs="*", help="of the demo, after --")


def run(args: argparse.Namespace) -> None:
    seeds, options = (args.seeds[:2], [*TINY, *args.options]) if args.tiny else (args.seeds, args.options)
    kept = report.Kept(args.out / "demo.partial.json", args.resume)
    results = {seed: kept.get(str(seed), lambda seed=seed: result(seed, options)) for seed in seeds}
    rows = [
        {
            "seed": seed,
            "base reward": found["reward"]["base"],
            "reward": found["reward"]["aligned"],
            "requested digit": found["requested digit drawn"]["aligned"],
            "base diversity": found["diversity, of real digits"]["base"],
            "diversity": found["diversity, of real digits"]["aligned"],
            "win rate": found["win rate"]["share"],
        }
        for seed, found in results.items()
    ]
    means = {}
    for name in list(rows[0])[1:]:
        means |= report.interval(name, [row[name] for row in rows])
    settings = {key: value for key, value in results[seeds[0]]["settings"].items() if key not in ("out", "seed")}
    content = {"settings": settings, "means": means, "runs": rows}
    report.write_csv(args.out / "demo.csv", rows)
    report.write_json(args.out / "demo.json", report.record(args.device, kept.seconds) | content)
    draw(args.out / "demo.png", results)
    kept.done()
    report.print_table("The demo, by seed", rows, dict.fromkeys(list(rows[0])[1:], ".3f"))


def result(seed: int, options: list[str]) -> dict[str, Any]:
    """What one run of the demo writes."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "examples.demo", "--seed", str(seed), "--out", folder, *options]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads((Path(folder) / "result.json").read_text())


def draw(path: Path, results: dict[int, dict[str, Any]]) -> None:
    """Thin lines are seeds, the thick one is their mean."""
    figure, (axis,) = report.new_figure(width=6, height=3.6)
    curves = [found["reward by step"] for found in results.values()]
    steps = [int(step) for step in curves[0]]
    for curve in curves:
        axis.plot(steps, list(curve.values()), color=report.BLUE, lw=0.8, alpha=0.5)
    means = [statistics.mean(values) for values in zip(*(curve.values() for curve in curves), strict=True)]
    axis.plot(steps, means, color=report.BLUE, lw=2.2, marker="o", ms=5)
    axis.set(xlabel="training step", ylabel="mean held-out reward", xlim=(0, None))
    report.save_figure(path, figure)
