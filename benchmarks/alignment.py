"""Does half precision change what training arrives at? The digits model aligned as by `python -m examples.demo`.

Three arms, the same seeds, pairs and noise in each: the loss's encoder in float32, in bf16 with "auto", and in bf16
with the published definition, "literal". Only the loss's encoder changes: the model in training and its reference are
float32 in all arms. Writes alignment.csv (the curves), alignment.json (final rewards and win rates) and alignment.png.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks import report
from examples.demo import BETA, Verdict, align, preference_pairs, win_rate
from examples.digits import CLASSES, Judge, load_unet, sample, seeded_noise
from ncp_loss import NoiseConditionedPerceptualLoss


class Arm(NamedTuple):
    label: str
    dtype: torch.dtype  # of the loss's encoder
    difference: str
    color: str


ARMS = [
    Arm("float32, auto", torch.float32, "auto", report.GREY),
    Arm("bfloat16, auto", torch.bfloat16, "auto", report.BLUE),
    Arm("bfloat16, literal", torch.bfloat16, "literal", report.RED),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=16, help="pairs per step")
    parser.add_argument("--pairs", type=int, default=300, help="pairs sampled; the judge decides about half of them")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=BETA["perceptual"])


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    args.space = "perceptual"
    if args.tiny:
        args.seeds, args.steps, args.batch, args.pairs, args.held_out = 1, 2, 2, 20, 20
    judge, rows = Judge(), list[dict[str, Any]]()
    final = defaultdict(list)
    for seed in range(args.seed, args.seed + args.seeds):
        base, first = load_unet(), seed * 1_000_000
        pairs = preference_pairs(base, judge, range(first, first + 2 * args.pairs))
        held_out = torch.arange(args.held_out) % CLASSES
        noise = seeded_noise(range(first + 500_000, first + 500_000 + args.held_out))
        before = judged(base, judge, held_out, noise)
        for arm in ARMS:
            curve = trained(arm, base, pairs, judge, held_out, noise, before, seed, args)
            for step, verdict in curve.items():
                reward, right = verdict.rewards.mean().item(), verdict.right.double().mean().item()
                rows.append({"arm": arm.label, "seed": seed, "step": step, "reward": reward, "requested digit": right})
            share, _, _ = win_rate(before, curve[args.steps])
            final[arm.label].append({"seed": seed, "reward": rows[-1]["reward"], "win rate": share})
            print(f"{arm.label}, seed {seed}: reward {rows[-1]['reward']:.3f}, win rate {share:.3f}", flush=True)

    summary = [
        {
            "arm": label,
            **{f"seed {row['seed']}": row["reward"] for row in results},
            **spread("reward", [row["reward"] for row in results]),
            **spread("win rate", [row["win rate"] for row in results]),
        }
        for label, results in final.items()
    ]
    settings = {key: getattr(args, key) for key in ("seeds", "steps", "batch", "pairs", "held_out", "lr", "beta")}
    content = {"settings": settings, "summary": summary, "final": final}
    report.write_csv(args.out / "alignment.csv", rows)
    report.write_json(args.out / "alignment.json", report.record(args.device, time.perf_counter() - start) | content)
    draw(args.out / "alignment.png", rows, args)
    report.print_table(
        "Held-out reward and win rate after training", summary, dict.fromkeys(summary[0], ".3f") | {"arm": ""}
    )


def trained(
    arm: Arm,
    base: UNet2DConditionModel,
    pairs: tuple[Tensor, Tensor, Tensor],
    judge: Judge,
    held_out: Tensor,
    noise: Tensor,
    before: Verdict,
    seed: int,
    args: argparse.Namespace,
) -> dict[int, Verdict]:
    """The demo's own loop, with the arm's loss in the place of its own; held-out verdicts by step."""
    unet, encoder = copy.deepcopy(base), copy.deepcopy(base).to(arm.dtype)
    curve = {0: before}

    def loss(_: UNet2DConditionModel, **options: Any) -> NoiseConditionedPerceptualLoss:
        return NoiseConditionedPerceptualLoss(encoder, difference=arm.difference, **options)

    def evaluate(step: int) -> None:
        curve[step] = judged(unet, judge, held_out, noise)

    torch.manual_seed(seed)  # the same adapters, rows, noise and timesteps in every arm
    with mock.patch("examples.demo.NoiseConditionedPerceptualLoss", loss):
        align(unet, pairs, args, evaluate)
    return curve


def judged(unet: UNet2DConditionModel, judge: Judge, labels: Tensor, noise: Tensor) -> Verdict:
    images = sample(unet, labels, noise)
    return Verdict(images, *judge(images, labels))


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    return {name: statistics.mean(values), f"{name} sd": statistics.stdev(values) if len(values) > 1 else 0.0}


def draw(path: Path, rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Held-out reward against the training step: the mean over seeds, and each seed."""
    figure, (axis,) = report.new_figure()
    for arm in ARMS:
        curves: dict[int, dict[int, float]] = defaultdict(dict)
        for row in rows:
            if row["arm"] == arm.label:
                curves[row["seed"]][row["step"]] = row["reward"]
        for curve in curves.values():
            axis.plot(list(curve), list(curve.values()), color=arm.color, lw=0.8, alpha=0.35)
        steps = list(next(iter(curves.values())))
        mean = [statistics.mean(curve[step] for curve in curves.values()) for step in steps]
        axis.plot(steps, mean, color=arm.color, lw=2.2, marker="o", ms=4.5, label=arm.label)
    axis.set(xlabel="training step", ylabel="mean held-out reward", xlim=(0, None))
    axis.set_title(f"The loss's encoder in float32 and in bfloat16, {args.seeds} seeds", fontsize=11)
    axis.legend(frameon=False, loc="upper left")
    report.save_figure(path, figure)
