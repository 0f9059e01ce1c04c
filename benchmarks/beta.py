"""Which beta? A number, tuned, against two rules that set it, on the digits, with latent and perceptual errors.

The rules: "relative", a beta for each pair, kappa over the reference's mean error on it; "controller", such a beta that
the mean of sigmoid(-beta margin) is held at a target. A number has its best setting for either kind of errors, found on
the very seeds that it is then judged by. Then what the heavy tail of perceptual errors does where gradients are not
clipped, and how far a mean of few batches' errors is from that of many. Writes beta.csv (a row for each run), beta.json
and beta.png.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.runs import Measure, Pair, Rule, drawn, latent, number, perceptual, prepared, relative, trained
from examples.demo import win_rate
from examples.digits import Judge

SPACES = {"latent": report.ORANGE, "perceptual": report.BLUE}
SETTINGS = {"number": [0.5, 2.0, 8.0, 32.0], "relative": [0.5, 2.0, 8.0], "controller": [0.2, 0.4]}
FEW = 8  # batches
QUANTILES = (0.1, 0.5, 0.9, 0.99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8, help="pairs per step")
    parser.add_argument("--pairs", type=int, default=200, help="pairs sampled; the judge decides about half of them")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    for rule, values in SETTINGS.items():
        parser.add_argument(f"--{rule}", type=float, nargs="*", default=values, help="the rule's settings")
    parser.add_argument(
        "--unclipped", type=float, nargs="*", default=[2.0], help="settings to run without clipping too"
    )


class Controller:
    """beta by the running mean of |margin|; at most ``MOST`` over the running mean of the reference's errors."""

    MOST, DECAY = 1000.0, 0.9

    def __init__(self, target: float) -> None:
        self.logit = math.log(1 / target - 1)
        self.margin = self.ref = self.seen = 0.0

    def __call__(self, error: Pair, ref: Pair) -> tuple[Pair, Pair, float]:
        margin = ((error[1] - ref[1]) - (error[0] - ref[0])).detach().abs().mean().item()
        self.margin += (1 - self.DECAY) * (margin - self.margin)
        self.ref += (1 - self.DECAY) * (torch.stack(ref).mean().item() - self.ref)
        self.seen += (1 - self.DECAY) * (1 - self.seen)
        beta = min(self.logit * self.seen / max(self.margin, 1e-30), self.MOST * self.seen / self.ref)
        return error, ref, beta


class Study:
    """Runs of the study, each made once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.kept = args, report.Kept(args.out / "beta.partial.json", args.resume)
        judge = cache(Judge)
        self.start = cache(lambda seed: prepared(judge(), seed, args.pairs, args.held_out))
        self.batches = cache(lambda seed: drawn(self.start(seed), args.steps, args.batch))
        self.ref_errors = {space: self.kept.get(f"errors {space}", partial(self.measured, space)) for space in SPACES}
        self.rows: list[dict[str, Any]] = []

    def measure(self, space: str, seed: int) -> Measure:
        return latent if space == "latent" else perceptual(self.start(seed))

    @torch.no_grad()
    def measured(self, space: str) -> list[float]:
        """The reference's errors in the whole run of the first seed."""
        measure, batches = self.measure(space, self.args.seed), self.batches(self.args.seed)
        return torch.cat([torch.cat(measure(batch.ref_pred, batch)[1]) for batch in batches]).tolist()

    def rule(self, name: str, value: float, space: str) -> Rule:
        """With its setting; a number is kappa over the mean error in the run of the first seed."""
        if name == "number":
            return number(value / statistics.mean(self.ref_errors[space]))
        return relative(value) if name == "relative" else Controller(value)

    def run(self, space: str, seed: int, rule: str, value: float, clip: float = 1.0) -> None:
        """A row: what the run was, and what came of it."""

        def result() -> dict[str, float]:
            start, make = self.start(seed), self.rule(rule, value, space)
            unet, steps = trained(start, self.batches(seed), self.measure(space, seed), make, self.args.lr, clip)
            last = torch.cat([step.margins for step in steps[-(len(steps) // 4) - 1 :]])
            norms, after = torch.tensor([step.norm for step in steps]), start.judged(unet)
            return {
                "reward": after.rewards.mean().item(),
                "gain": (after.rewards - start.before.rewards).mean().item(),
                "win rate": win_rate(start.before, after)[0],
                "gradient factor": (-last).sigmoid().mean().item(),
                "median |beta margin|": last.abs().median().item(),
                **{f"norm {q:.0%}": norms.quantile(q).item() for q in QUANTILES},
            }

        key = f"{space} {seed} {rule} {value} {clip}"
        found = self.kept.get(key, result)
        print(f"{key}: gain {found['gain']:.3f}, gradient factor {found['gradient factor']:.2f}", flush=True)
        what = {"errors": space, "rule": rule, "setting": value, "clip": clip, "seed": seed}
        self.rows.append(what | found)


def run(args: argparse.Namespace) -> None:
    if args.tiny:
        args.seeds, args.steps, args.batch, args.pairs, args.held_out = 1, 1, 2, 10, 10
        args.number = args.relative = args.unclipped = [2.0]
    study, seeds = Study(args), range(args.seed, args.seed + args.seeds)
    for seed, space, rule in product(seeds, SPACES, SETTINGS):
        for value in getattr(args, rule):
            study.run(space, seed, rule, value)
    for seed, rule, value in product(seeds, ("number", "relative"), args.unclipped):
        study.run("perceptual", seed, rule, value, clip=math.inf)

    names = ("seeds", "steps", "batch", "pairs", "held_out", "lr", *SETTINGS, "unclipped")
    content = {
        "settings": {name: getattr(args, name) for name in names} | {"few": FEW},
        "means": [spread_of_means(space, torch.tensor(study.ref_errors[space]), args) for space in SPACES],
        "summary": summary(study.rows),
    }
    report.write_csv(args.out / "beta.csv", study.rows)
    report.write_json(args.out / "beta.json", report.record(args.device, study.kept.seconds) | content)
    draw(args.out / "beta.png", content["summary"])
    study.kept.done()
    words = {"errors": "", "rule": ""}
    report.print_table(
        "Gain in held-out reward", content["summary"], dict.fromkeys(content["summary"][0], ".3g") | words
    )


MEANS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda errors: errors.mean(-1),
    "median": lambda errors: errors.median(-1).values,
    "geometric mean": lambda errors: errors.log().mean(-1).exp(),
}


def spread_of_means(space: str, errors: torch.Tensor, args: argparse.Namespace, times: int = 1000) -> dict[str, Any]:
    """Means of the reference's errors, and how far those of few batches are from them, from 10% to 90%."""
    generator = torch.Generator().manual_seed(args.seed)
    few = errors[torch.randint(len(errors), (times, 2 * FEW * args.batch), generator=generator)]
    found: dict[str, Any] = {"errors": space}
    for name, take in MEANS.items():
        low, high = (take(few) / take(errors)).quantile(torch.tensor([0.1, 0.9])).tolist()
        found |= {name: take(errors).item(), f"{name}, 10%": low, f"{name}, 90%": high}
    return found


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over seeds: the mean gain in reward, each seed's, and what the gradient was like."""
    names = ("errors", "rule", "setting", "clip")
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        runs[tuple(row[name] for name in names)].append(row)
    means = ["gain", "win rate", "gradient factor", *(f"norm {q:.0%}" for q in QUANTILES)]
    return [
        dict(zip(names, key, strict=True))
        | {name: statistics.mean(row[name] for row in found) for name in means}
        | {f"gain, seed {row['seed']}": row["gain"] for row in found}
        for key, found in runs.items()
    ]


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """The gain of every setting, and the gradient's norms with a number and with a beta for each pair."""
    figure, axes = report.new_figure(rows=2, width=5.2, height=6.4)
    clipped = [row for row in rows if row["clip"] == 1.0]
    labels = list(dict.fromkeys(f"{row['rule']} {row['setting']:g}" for row in clipped))
    for i, (space, color) in enumerate(SPACES.items()):
        gains = [row["gain"] for row in clipped if row["errors"] == space]
        places = [j + 0.36 * i - 0.18 for j in range(len(labels))]
        axes[0].barh(places, gains, height=0.34, color=color, label=f"{space} errors")
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    axes[0].grid(visible=False)
    axes[0].grid(axis="x", alpha=0.25)
    axes[0].set_xlabel("gain in held-out reward")
    axes[0].legend(frameon=False, fontsize=9)
    styles = {"number": (report.GREY, "o--"), "relative": (report.BLUE, "o-")}
    for row in clipped:
        if row["errors"] == "perceptual" and row["setting"] == 2.0 and row["rule"] in styles:
            color, style = styles[row["rule"]]
            norms = [row[f"norm {q:.0%}"] for q in QUANTILES]
            label = f"{row['rule']} {row['setting']:g}"
            axes[1].plot([f"{q:.0%}" for q in QUANTILES], norms, style, lw=2, color=color, label=label)
    axes[1].set(yscale="log", xlabel="quantile over training steps", ylabel="gradient norm, perceptual")
    axes[1].legend(frameon=False, fontsize=9)
    report.save_figure(path, figure)
