"""Evidence for the constants of ``ncp_loss.difference``: how far from the middle a central difference should look.

For each precision, reach and place of the derivative: the error ratio, the gradient's cosine with float64's, and the
margin's relative error where the prediction is moved by 1%, on random networks and on the trained one. A short reach
shows rounding, a long one curvature. Writes reach.csv, reach.json and reach.png.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from tqdm import tqdm

from benchmarks import report
from benchmarks.compute import COMPUTES, Compute
from benchmarks.networks import NETWORKS
from benchmarks.precision import (
    LITERAL,
    RMS,
    TIMESTEPS,
    Sample,
    in_dtype,
    margins_of,
    measured,
    moved_batches,
    prepared,
    samples_of,
    truth_of,
)
from ncp_loss.difference import Estimator

REACHES = {
    "float16": [0.01, 0.014, 0.02, 0.03],
    "bfloat16": [0.03, 0.04, 0.045, 0.05, 0.06, 0.07],
}
MOVE = 0.01
Key = tuple[str, str, Estimator]  # network, compute


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--compute", nargs="+", choices=list(REACHES), default=list(REACHES))
    parser.add_argument("--reaches", nargs="+", type=float, help=f"default: {REACHES}")
    parser.add_argument("--layers", nargs="+", default=["down_blocks"])
    parser.add_argument("--samples", type=int, default=1)


def run(args: argparse.Namespace) -> None:
    kept = report.Kept(args.out / "reach.partial.json", args.resume)
    timesteps, rms = ([1, 500], [0.05]) if args.tiny else (TIMESTEPS, RMS)
    found: dict[Key, list[Sample]] = defaultdict(list)
    margins: dict[Key, list[float]] = defaultdict(list)
    plan = [(n, s, layer) for n in args.networks for s in range(args.samples) for layer in args.layers]
    for network, sample, layer in tqdm(plan):
        unet, batch = prepared(network, args.seed + sample, args.tiny, timesteps, rms, args.device)
        truth = cache(partial(truth_of, unet, batch, layer, args.device))
        close = {MOVE: moved_batches(network, unet, args.seed + sample, timesteps, args.device)[MOVE]}
        exact = in_dtype(unet, torch.float64)
        true_margins = cache(partial(margins_of, exact, layer, LITERAL, close, COMPUTES["float64"]))
        for name in args.compute:
            compute, reaches = COMPUTES[name], args.reaches or REACHES[name]
            copied = in_dtype(unet, compute.weights)

            def make(estimator: Estimator, copied: Any = copied, compute: Compute = compute) -> Any:
                result = measured(copied, layer, estimator, batch.arguments, compute, args.device)  # noqa: B023
                values = margins_of(copied, layer, estimator, close, compute)[MOVE]  # noqa: B023
                wrong = [abs(m - t) / abs(t) for m, t in zip(values, true_margins()[MOVE], strict=True)]  # noqa: B023
                return samples_of(batch, result, truth()), wrong  # noqa: B023

            for reach in reaches[1:3] if args.tiny else reaches:
                for at_point in (True, False):
                    estimator = Estimator("central", reach, reach, at_point)
                    key = f"{network} {sample} {layer} {name} {reach} {at_point}"
                    rows, wrong = kept.get(key, partial(make, estimator))
                    found[network, name, estimator] += [Sample(*row) for row in rows]
                    margins[network, name, estimator] += wrong

    rows = list(rows_of(found, margins))
    report.write_csv(args.out / "reach.csv", rows)
    content = {"layers": args.layers, "samples": args.samples}
    report.write_json(args.out / "reach.json", report.record(args.device, kept.seconds) | content)
    draw(args.out / "reach.png", rows)
    kept.done()
    formats = dict.fromkeys(("ratio t<=5", "ratio t>=20", "scatter"), ".4f")
    formats |= {"margin": ".3f"} | dict.fromkeys(("cosine t<=5", "cosine t>=20", "cosine", "5th percentile"), ".5f")
    report.print_table("Central differences by reach", rows, formats)


def rows_of(found: dict[Key, list[Sample]], margins: dict[Key, list[float]]) -> Iterator[dict[str, Any]]:
    """Medians over timesteps and error sizes; ``scatter`` is that of the ratio's distance from 1."""
    for (network, name, estimator), samples in found.items():
        early, late = ([s for s in samples if (s.timestep <= 5) == when] for when in (True, False))
        yield {
            "network": network,
            "compute": name,
            "reach": estimator.reach,
            "derivative at": "a point" if estimator.gradient_at_first else "definition's end",
            "samples": len(samples),
            "ratio t<=5": statistics.median(s.ratio for s in early),
            "ratio t>=20": statistics.median(s.ratio for s in late),
            "scatter": statistics.median(abs(s.ratio - 1) for s in samples),
            "cosine t<=5": statistics.median(s.cosine for s in early),
            "cosine t>=20": statistics.median(s.cosine for s in late),
            "cosine": statistics.median(s.cosine for s in samples),
            "margin": statistics.median(margins[network, name, estimator]),
            "5th percentile": sorted(s.cosine for s in samples)[len(samples) // 20],
        }


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Ratio, cosine and margin against the reach, a row of panels for each precision; a color per network."""
    computes = list(dict.fromkeys(row["compute"] for row in rows))
    figure, axes = report.new_figure(3, len(computes), width=13, height=3.6 * len(computes))
    colors = dict(zip(NETWORKS, (report.BLUE, report.GREEN, report.ORANGE), strict=True))
    for i, compute in enumerate(computes):
        ratio, cosine, margin = axes[3 * i : 3 * i + 3]
        ratio.set_title(f"{compute}: error over float64's", fontsize=10)
        cosine.set_title(f"{compute}: cosine of the gradient", fontsize=10)
        margin.set_title(f"{compute}: relative error of a margin", fontsize=10)
        for network, color in colors.items():
            mine = [row for row in rows if row["network"] == network and row["compute"] == compute]
            ends = {at: [row for row in mine if row["derivative at"] == at] for at in ("definition's end", "a point")}
            for key, line in (("ratio t>=20", "-"), ("ratio t<=5", ":")):  # the value does not depend on the derivative
                _line(ratio, ends["a point"], key, color=color, ls=line)
            for at, line in (("definition's end", "-"), ("a point", "--")):
                _line(cosine, ends[at], "cosine", color=color, ls=line)
            _line(margin, ends["a point"], "margin", color=color)
        ratio.axhspan(0.98, 1.02, color=report.GREY, alpha=0.12, lw=0)
        for axis in (ratio, cosine, margin):
            axis.set_xlabel("reach, in rms of the latents")
            axis.locator_params(axis="x", nbins=5)
    for network, color in colors.items():
        axes[0].plot([], [], color=color, label=NETWORKS[network].label)
    axes[0].plot([], [], color=report.GREY, ls=":", label="t <= 5 (solid: t >= 20)")
    axes[1].plot([], [], color=report.GREY, ls="-", label="gradient at the definition's end")
    axes[1].plot([], [], color=report.GREY, ls="--", label="gradient at a point of the stencil")
    for axis in axes[:2]:
        axis.legend(frameon=False, fontsize=8)
    report.save_figure(path, figure)


def _line(axis: Axes, rows: list[dict[str, Any]], key: str, **style: Any) -> None:
    axis.plot([row["reach"] for row in rows], [row[key] for row in rows], marker="o", ms=3, lw=1.4, **style)
