"""Evidence for the constants of ``ncp_loss.difference``: how far from the middle a central difference should look.

For each precision, reach and place of the derivative, the error ratio and the gradient's cosine with float64's, on
random networks and on the trained one. A short reach shows rounding, a long one curvature. Writes reach.csv, reach.json
and reach.png.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from tqdm import tqdm

from benchmarks import report
from benchmarks.compute import COMPUTES, Compute
from benchmarks.networks import NETWORKS
from benchmarks.precision import RMS, TIMESTEPS, Sample, in_dtype, measured, prepared, samples_of, truth_of
from ncp_loss.difference import Estimator

REACHES = {
    "float16": [0.01, 0.015, 0.02, 0.03],
    "bfloat16": [0.03, 0.04, 0.05, 0.055, 0.06, 0.07, 0.08],
}
Found = dict[tuple[str, str, Estimator], list[Sample]]  # by network and compute


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--compute", nargs="+", choices=list(REACHES), default=list(REACHES))
    parser.add_argument("--reaches", nargs="+", type=float, help=f"default: {REACHES}")
    parser.add_argument("--layers", nargs="+", default=["down_blocks"])
    parser.add_argument("--samples", type=int, default=1)


def run(args: argparse.Namespace) -> None:
    kept = report.Kept(args.out / "reach.partial.json", args.resume)
    timesteps, rms = ([1, 500], [0.05]) if args.tiny else (TIMESTEPS, RMS)
    found: Found = defaultdict(list)
    plan = [(n, s, layer) for n in args.networks for s in range(args.samples) for layer in args.layers]
    for network, sample, layer in tqdm(plan):
        unet, batch = prepared(network, args.seed + sample, args.tiny, timesteps, rms, args.device)
        truth = cache(partial(truth_of, unet, batch, layer, args.device))
        for name in args.compute:
            compute, reaches = COMPUTES[name], args.reaches or REACHES[name]
            copied = in_dtype(unet, compute.weights)

            def make(estimator: Estimator, copied: Any = copied, compute: Compute = compute) -> list[Sample]:
                result = measured(copied, layer, estimator, batch.arguments, compute, args.device)  # noqa: B023
                return samples_of(batch, result, truth())  # noqa: B023

            for reach in reaches[1:3] if args.tiny else reaches:
                for at_end in (True, False):
                    estimator = Estimator("central", reach, at_end)
                    rows = kept.get(f"{network} {sample} {layer} {name} {estimator}", partial(make, estimator))
                    found[network, name, estimator] += [Sample(*row) for row in rows]

    rows = list(rows_of(found))
    report.write_csv(args.out / "reach.csv", rows)
    content = {"layers": args.layers, "samples": args.samples}
    report.write_json(args.out / "reach.json", report.record(args.device, kept.seconds) | content)
    draw(args.out / "reach.png", rows)
    kept.done()
    formats = dict.fromkeys(("ratio t<=5", "ratio t>=20", "scatter"), ".4f")
    formats |= dict.fromkeys(("cosine t<=5", "cosine t>=20", "cosine", "5th percentile"), ".5f")
    report.print_table("Central differences by reach", rows, formats)


def rows_of(found: Found) -> Iterator[dict[str, Any]]:
    """Medians over timesteps and error sizes; ``scatter`` is that of the ratio's distance from 1."""
    for (network, name, estimator), samples in found.items():
        early, late = ([s for s in samples if (s.timestep <= 5) == when] for when in (True, False))
        yield {
            "network": network,
            "compute": name,
            "reach": estimator.reach,
            "derivative at": "plus end" if estimator.graph_at_end else "definition's end",
            "samples": len(samples),
            "ratio t<=5": statistics.median(s.ratio for s in early),
            "ratio t>=20": statistics.median(s.ratio for s in late),
            "scatter": statistics.median(abs(s.ratio - 1) for s in samples),
            "cosine t<=5": statistics.median(s.cosine for s in early),
            "cosine t>=20": statistics.median(s.cosine for s in late),
            "cosine": statistics.median(s.cosine for s in samples),
            "5th percentile": sorted(s.cosine for s in samples)[len(samples) // 20],
        }


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Ratio and cosine against the reach, a pair of panels for each precision; a color per network."""
    computes = list(dict.fromkeys(row["compute"] for row in rows))
    figure, axes = report.new_figure(2 * len(computes), width=7 * len(computes), height=3.8)
    colors = dict(zip(NETWORKS, (report.BLUE, report.GREEN, report.ORANGE), strict=True))
    for i, compute in enumerate(computes):
        ratio, cosine = axes[2 * i : 2 * i + 2]
        ratio.set_title(f"{compute}: error over float64's", fontsize=10)
        cosine.set_title(f"{compute}: cosine of the gradient", fontsize=10)
        for network, color in colors.items():
            mine = [row for row in rows if row["network"] == network and row["compute"] == compute]
            ends = {at: [row for row in mine if row["derivative at"] == at] for at in ("definition's end", "plus end")}
            for key, line in (("ratio t>=20", "-"), ("ratio t<=5", ":")):  # the value does not depend on the derivative
                _line(ratio, ends["plus end"], key, color=color, ls=line)
            for at, line in (("definition's end", "-"), ("plus end", "--")):
                _line(cosine, ends[at], "cosine", color=color, ls=line)
        ratio.axhspan(0.98, 1.02, color=report.GREY, alpha=0.12, lw=0)
        for axis in (ratio, cosine):
            axis.set_xlabel("reach, in rms of the latents")
    for network, color in colors.items():
        axes[0].plot([], [], color=color, label=NETWORKS[network].label)
    axes[0].plot([], [], color=report.GREY, ls=":", label="t <= 5 (solid: t >= 20)")
    axes[1].plot([], [], color=report.GREY, ls="-", label="derivative at the definition's end")
    axes[1].plot([], [], color=report.GREY, ls="--", label="derivative at the plus end")
    for axis in axes[:2]:
        axis.legend(frameon=False, fontsize=8)
    report.save_figure(path, figure)


def _line(axis: Axes, rows: list[dict[str, Any]], key: str, **style: Any) -> None:
    axis.plot([row["reach"] for row in rows], [row[key] for row in rows], marker="o", ms=3, lw=1.4, **style)
