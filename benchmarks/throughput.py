"""What a training step costs: latent DPO, the published NCP algorithm and this library, in interleaved rounds.

Each round runs every contender once, in one process; figures are medians over rounds, and ratios of medians. A step is
forward and backward passes, with LoRA on attention, without the optimizer, which all share. Writes throughput.csv
(every time), throughput.json (medians, ratios, FLOPs, encoder evaluations, where time goes) and throughput.png.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import report
from benchmarks.steps import LATENTS, MODELS, Steps
from benchmarks.timing import COUNTED_ON, flops_of, interleaved
from ncp_loss import ncp_dpo_loss
from ncp_loss.difference import choose

BASE, PEER, OURS, COMPILED = "latent DPO", "NCP as published", "ncp_loss", "ncp_loss, compiled"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--latents", type=int, help=f"height and width; default: {LATENTS}")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--layer", choices=["down_blocks", "mid_block"], default="mid_block")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", help="of the steps, besides the two that all are compared with")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)


def run(args: argparse.Namespace) -> None:
    if args.tiny:
        args.model, args.rounds, args.compile = "tiny", 2, False
    latents = args.latents or LATENTS[args.model]
    file = "throughput" if args.model in ("small", "tiny") else f"throughput-{args.model}"
    kept = report.Kept(args.out / f"{file}.partial.json", args.resume)
    dtype = getattr(torch, args.dtype)
    difference = choose("auto", dtype, args.device).kind  # a GPU may compute in TF32, which the counting device cannot
    steps, counted = (
        Steps(args.model, latents, args.pairs, args.layer, dtype, device, difference)
        for device in (args.device, COUNTED_ON)
    )
    evaluations = {name: counted.evaluations(step) for name, step in contenders_of(counted, False).items()}
    points = evaluations[OURS] - 2  # at one more, the encoder runs forward and backward
    contenders, parts = contenders_of(steps, args.compile), parts_of(steps, points)
    if args.only:
        contenders = {name: step for name, step in contenders.items() if name in (BASE, PEER, *args.only)}
    times = interleaved(contenders | parts, args.rounds, args.threads, kept)
    counts = contenders_of(counted, False) | parts_of(counted, points)
    flops = {name: flops_of(step) for name, step in counts.items()}
    flops[COMPILED], evaluations[COMPILED] = flops[OURS], evaluations[OURS]

    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    rows = [
        {
            "step": name,
            "encoder evaluations": evaluations[name],
            "seconds": medians[name],
            "quartiles": statistics.quantiles(times[name], n=4)[::2] if len(times[name]) > 1 else None,
            "over latent DPO": medians[name] / medians[BASE],
            "over the published": medians[name] / medians[PEER],
            "FLOPs over latent DPO": flops[name] / flops[BASE],
        }
        for name in contenders
    ]
    whole, whole_flops = sum(medians[name] for name in parts), sum(flops[name] for name in parts)
    content: dict[str, Any] = {
        "settings": {k: getattr(args, k) for k in ("model", "pairs", "layer", "dtype", "rounds")}
        | {"latents": latents},
        "steps": rows,
        "parts": [{"part": name, "seconds": medians[name], "share": medians[name] / whole} for name in parts],
        "step over its parts": {"time": medians[OURS] / whole, "FLOPs": flops[OURS] / whole_flops},
        "profile": profile_of(steps.trained_encoder_part),
    }
    rounds = enumerate(zip(*times.values(), strict=True), start=1)
    report.write_csv(args.out / f"{file}.csv", [{"round": i} | dict(zip(times, r, strict=True)) for i, r in rounds])
    report.write_json(args.out / f"{file}.json", report.record(args.device, kept.seconds) | content)
    kept.done()
    draw(
        args.out / f"{file}.png",
        rows,
        times,
        f"{args.model}, {latents} x {latents} latents, {args.layer}, {args.dtype}",
    )
    formats = {"seconds": ".3f", "over latent DPO": ".3f", "over the published": ".3f", "FLOPs over latent DPO": ".3f"}
    report.print_table("A training step", [{k: r[k] for k in r if k != "quartiles"} for r in rows], formats)
    report.print_table("Its parts", content["parts"], {"seconds": ".3f", "share": ".3f"})
    print(f"a step over its parts: {content['step over its parts']}")
    report.print_table(
        "Where the encoder's forward and backward pass takes its time", content["profile"], {"share": ".3f"}
    )


def parts_of(steps: Steps, points: int) -> dict[str, Callable[[], Any]]:
    return {
        "model, forward and backward": steps.model_part,
        "reference, forward": steps.predict_reference,
        f"encoder at {points} points, forward": lambda: steps.fixed_encoder_part(points),
        "encoder at one more, forward and backward": steps.trained_encoder_part,
    }


def contenders_of(steps: Steps, compiled: bool) -> dict[str, Callable[[], Any]]:
    contenders: dict[str, Callable[[], Any]] = {
        BASE: steps.latent,
        PEER: steps.published_step,
        "hook on the whole U-Net": steps.hooked,
        OURS: steps.perceptual,
    }
    if compiled:
        whole = torch.compile(ncp_dpo_loss)
        contenders[COMPILED] = lambda: steps.perceptual(dpo=whole)
    contenders["ncp_loss, kept reference prediction"] = steps.kept_prediction
    contenders["ncp_loss, kept reference error"] = steps.kept_error
    return contenders


def profile_of(step: Callable[[], Any]) -> list[dict[str, Any]]:
    """The operations that take most of the time, by their own time."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        step()
    events = profiler.key_averages()
    own = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    total = sum(getattr(event, own) for event in events)
    top = sorted(events, key=lambda event: -getattr(event, own))[:8]
    return [{"operation": event.key, "share": getattr(event, own) / total, "calls": event.count} for event in top]


def draw(path: Path, rows: list[dict[str, Any]], times: dict[str, list[float]], title: str) -> None:
    """Time over latent DPO's, a bar for each contender with its quartiles; a mark where FLOPs alone would put it."""
    figure, (axis,) = report.new_figure(width=8, height=0.45 * len(rows) + 1.4)
    base = statistics.median(times[BASE])
    for i, row in enumerate(rows):
        ours = row["step"].startswith(OURS)
        axis.barh(i, row["over latent DPO"], color=report.BLUE if ours else report.GREY, alpha=0.85, height=0.6)
        low, high = row["quartiles"] or [row["seconds"]] * 2
        axis.plot([low / base, high / base], [i, i], color="black", lw=1.2)
        axis.plot([row["FLOPs over latent DPO"]] * 2, [i - 0.36, i + 0.36], color=report.ORANGE, lw=2)
        axis.annotate(
            f"{row['over latent DPO']:.2f}",
            (max(high / base, row["FLOPs over latent DPO"]), i),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axis.plot([], [], color="black", lw=1.2, label="quartiles of rounds")
    axis.plot([], [], color=report.ORANGE, lw=2, label="by FLOPs alone")
    axis.set_yticks(range(len(rows)), [row["step"] for row in rows])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", alpha=0.25)
    axis.set_xlabel("time of a training step, latent DPO = 1")
    axis.set_title(title, fontsize=11)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    report.save_figure(path, figure)
