"""What each layer costs, and how the cost grows: a perceptual DPO step over latent DPO's.

Block by block: FLOPs at the models' real sizes (SD 1.5 at 64 x 64 latents, SDXL at 128 x 128), counted on the "meta"
device without computing anything, and times on a small model. Growth: time and FLOPs of the loss alone, forward and
backward, over pairs and over pixels. Writes layers.csv (costs), layers.json (both) and layers.png.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.steps import LATENTS, MODELS, Steps
from benchmarks.timing import COUNTED_ON, flops_of, interleaved

REAL = {"sd15": 64, "sdxl": 128}
LABELS = {"sd15": "SD 1.5, 64 x 64 latents", "sdxl": "SDXL, 128 x 128 latents", "tiny": "tiny"}
BASE = "latent DPO"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=list(MODELS), default="small", help="that times are measured on")
    parser.add_argument("--rounds", type=int, default=7)


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    counted, sizes, pairs, every = REAL, [16, 24, 32, 48], [1, 2, 4], 1
    if args.tiny:
        args.model, args.rounds, counted, sizes, pairs, every = "tiny", 1, {"tiny": 8}, [8, 16], [1, 2], 3
    rows = []
    for model, size in (counted | {args.model: LATENTS[args.model]}).items():
        steps = Steps(model, size, 1, "mid_block", torch.float32, COUNTED_ON)
        flops = {name: flops_of(step) for name, step in at_layers(steps, every).items()}
        rows += [{"model": model, "layer": n, "FLOPs": flops[n] / flops[BASE], "time": None} for n in flops]
    steps = Steps(args.model, LATENTS[args.model], 1, "mid_block", torch.float32, args.device)
    times = interleaved(at_layers(steps, every), args.rounds, args.threads)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for row in rows:
        if row["model"] == args.model:
            row["time"] = medians[row["layer"]] / medians[BASE]

    growth = grown("pairs", {n: (LATENTS[args.model], n) for n in pairs}, args)
    growth += grown("pixels", {size * size: (size, 1) for size in sizes}, args)
    content = {"settings": {"model": args.model, "rounds": args.rounds}, "layers": rows, "growth": growth}
    report.write_csv(args.out / "layers.csv", rows)
    report.write_json(args.out / "layers.json", report.record(args.device, time.perf_counter() - start) | content)
    draw(args.out / "layers.png", rows, growth, list(counted))
    report.print_table("A perceptual DPO step over latent DPO's", rows, {"FLOPs": ".3f", "time": ".3f"})
    report.print_table("The loss alone", growth, dict.fromkeys(("time", "FLOPs", "seconds"), ".3f"))


def at_layers(steps: Steps, every: int) -> dict[str, Callable[[], Any]]:
    """Latent DPO, then the perceptual step at the end of every block down, in the middle, and of the first block up."""
    layers = [f"down_blocks.{i}" for i in range(len(steps.unet.down_blocks))] + ["mid_block", "up_blocks.0"]
    layers = layers[::every]
    found: dict[str, Callable[[], Any]] = {BASE: steps.latent}
    for layer in layers:
        found[layer] = partial(steps.perceptual, steps.new_loss(layer))
    return found


def grown(what: str, cases: dict[int, tuple[int, int]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The loss's own forward and backward pass as the batch or the latents grow, in multiples of the smallest."""
    alone, counted = (
        {
            n: partial(loss_alone, Steps(args.model, *case, "mid_block", torch.float32, device))
            for n, case in cases.items()
        }
        for device in (args.device, COUNTED_ON)
    )
    seconds = {n: statistics.median(s) for n, s in interleaved(alone, args.rounds, args.threads).items()}
    flops, first = {n: flops_of(step) for n, step in counted.items()}, min(cases)
    return [
        {
            "over": what,
            "size": n,
            "seconds": seconds[n],
            "time": seconds[n] / seconds[first],
            "FLOPs": flops[n] / flops[first],
            "linear": n / first,
        }
        for n in cases
    ]


def loss_alone(steps: Steps) -> None:
    prediction = steps.fixed_ref_pred.detach().requires_grad_()
    steps.dpo(steps.ncp, prediction, ref_pred=steps.fixed_ref_pred).backward()


def draw(path: Path, rows: list[dict[str, Any]], growth: list[dict[str, Any]], counted: list[str]) -> None:
    figure, axes = report.new_figure(2, rows=(len(counted) + 3) // 2, width=9, height=6.6)
    for axis, model in zip(axes, counted, strict=False):
        mine = [row for row in rows if row["model"] == model and row["layer"] != BASE]
        axis.barh(
            [row["layer"] for row in mine], [row["FLOPs"] for row in mine], color=report.BLUE, alpha=0.85, height=0.6
        )
        for i, row in enumerate(mine):
            axis.annotate(
                f"{row['FLOPs']:.2f}", (row["FLOPs"], i), (4, 0), textcoords="offset points", va="center", fontsize=9
            )
        axis.axvline(1, color=report.GREY, lw=1, ls="--")
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_xlim(0, max(row["FLOPs"] for row in mine) * 1.15)
        axis.set_xlabel("FLOPs of a step, latent DPO = 1")
        axis.set_title(LABELS[model], fontsize=10)
    for axis, what in zip(axes[-2:], ("pairs", "pixels"), strict=True):
        mine = [row for row in growth if row["over"] == what]
        sizes = [row["size"] for row in mine]
        axis.plot(sizes, [row["linear"] for row in mine], color=report.GREY, ls="--", lw=1, label="linear")
        axis.plot(sizes, [row["FLOPs"] for row in mine], color=report.ORANGE, marker="s", ms=4, label="FLOPs")
        axis.plot(sizes, [row["time"] for row in mine], color=report.BLUE, marker="o", ms=4, label="time")
        axis.set_xlabel({"pairs": "pairs", "pixels": "latent pixels"}[what])
        axis.set_title(f"the loss alone, by {what}", fontsize=10)
        axis.legend(frameon=False, fontsize=9)
    report.save_figure(path, figure)
