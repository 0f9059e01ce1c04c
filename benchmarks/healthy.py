"""What a good run looks like, and five bad ones: digits aligned with NCP-DPO, the same pairs and noise in each.

The bad ones: beta 300 times too small, and as much too large; the velocity given as the target of a model that predicts
noise; a reference that was already aligned; and a reference whose predictions were made under bf16 autocast, while the
model's were not. Writes healthy.csv (by run and range of timesteps), healthy.json (a row for each run), a picture for
each run, healthy-good.png and so on, and healthy.png, all runs' margins side by side.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from benchmarks import report
from benchmarks.runs import Batch, Start, Step, drawn, perceptual, prepared, relative, trained
from examples.digits import Judge, new_scheduler
from ncp_loss import by_timestep

EDGES = (0, 250, 500, 750, 1000)
RANGES = [f"{low}-{high}" for low, high in pairwise(EDGES)]
COLORS = dict(zip(RANGES, ("#b7d3ee", "#6aa5d8", "#2b6cb0", "#123a66"), strict=True))
QUANTILES = (0.1, 0.5, 0.9)  # of the gradient's norms
FACTOR = 300.0  # by which beta is too small, or too large


Model = Callable[[], nn.Module]


class Case(NamedTuple):
    """A run: what is wrong with its beta or its batches, which may ask for the model that the good run trained."""

    name: str
    title: str
    factor: float = 1.0
    change: Callable[[list[Batch], Start, Model], list[Batch]] = lambda batches, *_: batches


def with_velocity(batches: list[Batch], *_: Any) -> list[Batch]:
    scheduler = new_scheduler()
    return [b._replace(noise=scheduler.get_velocity(b.clean, b.noise, b.timesteps)) for b in batches]


def with_autocast(batches: list[Batch], start: Start, _: Model) -> list[Batch]:
    with torch.autocast("cpu", torch.bfloat16):
        return predicted(start.base, batches)


def with_aligned(batches: list[Batch], _: Start, good: Model) -> list[Batch]:
    return predicted(good(), batches)


@torch.no_grad()
def predicted(reference: nn.Module, batches: list[Batch]) -> list[Batch]:
    return [b._replace(ref_pred=reference(b.noisy, b.timesteps, b.states).sample.float()) for b in batches]


CASES = [
    Case("good", "A good run"),
    Case("beta-small", "beta too small", 1 / FACTOR),
    Case("beta-large", "beta too large", FACTOR),
    Case("target", "Wrong target", change=with_velocity),
    Case("reference", "Reference not the base", change=with_aligned),
    Case("autocast", "Reference under autocast", change=with_autocast),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kappa", type=float, default=2.0, help="beta of each pair times the reference's mean error on it"
    )
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8, help="pairs per step")
    parser.add_argument("--pairs", type=int, default=200, help="pairs sampled; the judge decides about half of them")
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--clip", type=float, default=1.0, help="the gradient's largest norm")
    parser.add_argument("--window", type=int, default=10, help="steps that a point of a curve is the mean of")


def run(args: argparse.Namespace) -> None:
    if args.tiny:
        args.steps, args.batch, args.pairs, args.held_out, args.window = 2, 2, 10, 10, 1
    kept = report.Kept(args.out / "healthy.partial.json", args.resume)
    begin = cache(lambda: prepared(Judge(), args.seed, args.pairs, args.held_out))
    before = kept.get("before", lambda: begin().before.rewards.mean().item())

    @cache
    def trained_as(case: Case) -> tuple[nn.Module, list[Step]]:
        start, measure = begin(), perceptual(begin(), pairs=False)  # as pairs, a wrong target is refused on a CPU
        batches = drawn(start, args.steps, args.batch)
        rule = relative(args.kappa * case.factor)
        changed = case.change(batches, start, lambda: trained_as(CASES[0])[0])
        return trained(start, changed, measure, rule, args.lr, args.clip)

    def shown(case: Case) -> dict[str, Any]:
        unet, steps = trained_as(case)
        return curves(steps, args.window) | {"reward": begin().judged(unet).rewards.mean().item()}

    found = {case.name: kept.get(case.name, partial(shown, case)) for case in CASES}
    summary = [row(case, found[case.name]) for case in CASES]
    names = ("kappa", "steps", "batch", "pairs", "held_out", "lr", "clip", "window")
    content = {"settings": {name: getattr(args, name) for name in names} | {"factor": FACTOR}}
    content |= {"reward of the base": before, "summary": summary}
    report.write_csv(args.out / "healthy.csv", [line for case in CASES for line in table(case, found[case.name])])
    report.write_json(args.out / "healthy.json", report.record(args.device, kept.seconds) | content)
    for case in CASES:
        draw_run(args.out / f"healthy-{case.name}.png", case, found, before)
    draw_margins(args.out / "healthy.png", found)
    kept.done()
    report.print_table("Runs, good and bad", summary, dict.fromkeys(summary[0], ".3g") | {"run": ""})


def curves(steps: list[Step], window: int) -> dict[str, Any]:
    """Curves over training, a point for each window of steps, by range of timesteps where that is told."""
    parts = [steps[i : i + window] for i in range(0, len(steps), window)]

    def split(values: Callable[[list[Step]], Tensor]) -> dict[str, list[float]]:
        found = [by_timestep(values(part), torch.cat([s.timesteps for s in part]), EDGES) for part in parts]
        return {name: [one[name].item() for one in found] for name in RANGES}

    def joined(name: str) -> Callable[[list[Step]], Tensor]:
        return lambda part: torch.cat([getattr(step, name) for step in part])

    margins = [joined("margins")(part) for part in parts]
    return {
        "step": [min((i + 1) * window, len(steps)) - window / 2 for i in range(len(parts))],
        "margin": split(joined("margins")),
        "miss": split(joined("miss")),
        "reference's miss": split(joined("ref_miss")),
        "accuracy": [(0.5 * (1 + m.sign())).mean().item() for m in margins],
        "gradient factor": [(-m).sigmoid().mean().item() for m in margins],
        "norm": torch.tensor([step.norm for step in steps]).quantile(torch.tensor(QUANTILES)).tolist(),
        "first |margin|": steps[0].margins.abs().mean().item(),
        "loss": [-torch.nn.functional.logsigmoid(m).mean().item() for m in margins],
    }


def table(case: Case, found: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run's curves hold, a row for each point and range of timesteps."""
    return [
        {"run": case.name, "step": step, "timesteps": part}
        | {key: found[key][part][i] for key in ("margin", "miss", "reference's miss")}
        | {key: found[key][i] for key in ("accuracy", "gradient factor", "loss")}
        for i, step in enumerate(found["step"])
        for part in RANGES
    ]


def row(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """A run in one line: where it began, where it ended, and its gradients."""
    last = -1 - len(found["step"]) // 4
    ends = {key: statistics.mean(found[key][last:]) for key in ("loss", "accuracy", "gradient factor")}
    return {
        "run": case.title,
        "first |margin|": found["first |margin|"],
        **{f"last {key}": value for key, value in ends.items()},
        **{f"norm {q:.0%}": norm for q, norm in zip(QUANTILES, found["norm"], strict=True)},
        "reward": found["reward"],
    }


def draw_run(path: Path, case: Case, found: dict[str, Any], before: float) -> None:
    """One run in four panels, with the good one's accuracy and gradients in grey."""
    mine = found[case.name]
    figure, (margins, accuracy, norms, misses) = report.new_figure(2, 2, width=5.2, height=5.8)
    draw_margin(margins, mine)
    margins.set_title("beta * margin, by timestep", fontsize=10)
    margins.legend(frameon=False, fontsize=8, loc="lower left", ncols=2, columnspacing=0.6, handlelength=1)
    for run, color, name in [(found["good"], "#b4b9c2", "good run"), (mine, report.BLUE, "this run")]:
        accuracy.plot(run["step"], run["accuracy"], color=color, lw=2)
        low, middle, high = run["norm"]
        norms.plot([name, name], [low, high], color=color, lw=3)
        norms.plot(name, middle, "o", color=color, ms=9)
    accuracy.axhline(0.5, color=report.GREY, ls=":", lw=1)
    accuracy.set(ylim=(0, 1), xlabel="training step")
    accuracy.set_title("accuracy", fontsize=10)
    norms.set(yscale="log", ylim=(3e-4, 3e3), xlim=(-0.6, 1.6), xlabel="median, 10% to 90% of steps")
    norms.set_title("gradient norm", fontsize=10)
    for name, color, style in [("reference's miss", report.ORANGE, "s--"), ("miss", report.BLUE, "o-")]:
        ends = [mean(mine[name][part][-1 - len(mine["step"]) // 4 :]) for part in RANGES]
        misses.plot(RANGES, ends, style, color=color, lw=2, label={"miss": "model"}.get(name, "reference"))
    misses.axhline(1, color=report.GREY, ls=":", lw=1)
    misses.set(yscale="log", ylim=(1e-3, 1e1), xlabel="timesteps")
    misses.set_title("error / target\u00b2, at the end", fontsize=10)
    misses.tick_params("x", labelsize=8, rotation=30)
    misses.legend(frameon=False, fontsize=9, loc="lower left")
    figure.suptitle(f"{case.title}: reward {before:.2f} to {mine['reward']:.2f}", fontsize=13)
    report.save_figure(path, figure)


def mean(values: list[float]) -> float:
    """Of those that there are."""
    there = [value for value in values if not math.isnan(value)]
    return statistics.mean(there) if there else math.nan


def draw_margin(axis: Axes, run: dict[str, Any]) -> None:
    """beta * margin over training, linear up to 0.1, logarithmic beyond; in red, its first size."""
    for part, color in COLORS.items():
        axis.plot(run["step"], run["margin"][part], color=color, lw=2, label=part)
    axis.plot(1, run["first |margin|"], "D", color=report.RED, ms=5, label="first step\u2019s size", zorder=3)
    axis.axhline(0, color=report.GREY, ls=":", lw=1)
    axis.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    axis.set(ylim=(-100, 100), xlabel="training step")
    ticks = [-100, -10, -1, -0.1, 0, 0.1, 1, 10, 100]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()


def draw_margins(path: Path, found: dict[str, Any]) -> None:
    """All runs' margins, side by side."""
    figure, axes = report.new_figure(2, 3, width=5.2, height=7.6)
    for axis, case in zip(axes, CASES, strict=True):
        draw_margin(axis, found[case.name])
        axis.set_title(case.title, fontsize=11)
    compact = {"ncols": 2, "columnspacing": 0.6, "handlelength": 1}
    axes[1].legend(frameon=False, fontsize=8, loc="lower left", title="timesteps", title_fontsize=8, **compact)
    figure.suptitle("beta * margin over training, by timestep", fontsize=12)
    report.save_figure(path, figure)
