"""Does half precision change what training arrives at? The digits model, aligned by the loop of `examples.demo`.

Three arms, the same seeds, pairs and noise in each: the loss's encoder in float32, in bf16 with "auto", and in bf16
with the published definition, "literal". Only the loss's encoder changes: the model in training and its reference are
float32 in all arms. At each evaluation the arm's margins on 32 pairs are set against float32's. Writes alignment.csv
(the curves), alignment.json (final rewards, win rates and margins) and alignment.png.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections import defaultdict
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks import report
from benchmarks.runs import Start, prepared
from examples.demo import align, win_rate
from examples.digits import Judge, condition, new_scheduler
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
    parser.add_argument("--beta", type=float, default=5e5, help="one number for all pairs")


def run(args: argparse.Namespace) -> None:
    kept = report.Kept(args.out / "alignment.partial.json", args.resume)
    args.max_grad_norm = math.inf
    if args.tiny:
        args.seeds, args.steps, args.batch, args.pairs, args.held_out = 1, 1, 2, 10, 10
    judge, rows = Judge(), list[dict[str, Any]]()
    final = defaultdict(list)
    for seed in range(args.seed, args.seed + args.seeds):
        start = cache(partial(prepared, judge, seed, args.pairs, args.held_out, steps=20))
        for arm in ARMS:
            curve, share = kept.get(f"{seed} {arm.label}", lambda arm=arm, start=start: trained(arm, start(), args))
            rows += [{"arm": arm.label, "seed": seed, **row} for row in curve]
            last = {key: curve[-1][key] for key in ("reward", "same sign", "margin error")}
            final[arm.label].append({"seed": seed, "win rate": share, **last})
            print(f"{arm.label}, seed {seed}: reward {curve[-1]['reward']:.3f}, win rate {share:.3f}", flush=True)

    summary = [
        {
            "arm": label,
            **{f"seed {row['seed']}": row["reward"] for row in results},
            **spread("reward", [row["reward"] for row in results]),
            **spread("win rate", [row["win rate"] for row in results]),
            "same sign": statistics.mean(row["same sign"] for row in results),
            "margin error": statistics.median(row["margin error"] for row in results),
        }
        for label, results in final.items()
    ]
    settings = {key: getattr(args, key) for key in ("seeds", "steps", "batch", "pairs", "held_out", "lr", "beta")}
    content = {"settings": settings, "summary": summary, "final": final}
    report.write_csv(args.out / "alignment.csv", rows)
    report.write_json(args.out / "alignment.json", report.record(args.device, kept.seconds) | content)
    draw(args.out / "alignment.png", rows, args)
    kept.done()
    report.print_table(
        "Held-out reward and win rate after training", summary, dict.fromkeys(summary[0], ".3f") | {"arm": ""}
    )


def trained(arm: Arm, start: Start, args: argparse.Namespace) -> tuple[list[dict[str, float]], float]:
    """The demo's own loop with the arm's loss: a row per evaluation, and the win rate over the base at the end."""
    unet, encoder = copy.deepcopy(start.base), copy.deepcopy(start.base).to(arm.dtype)
    ncp = NoiseConditionedPerceptualLoss(encoder, schedule=new_scheduler(), difference=arm.difference)
    exact = NoiseConditionedPerceptualLoss(start.base, schedule=new_scheduler())
    curve, margins = {0: start.before}, {0: {"same sign": None, "margin error": None}}

    def evaluate(step: int) -> None:
        curve[step] = start.judged(unet)
        margins[step] = agreement(unet, ncp, exact, start)

    torch.manual_seed(start.seed)  # the same adapters, rows, noise and timesteps in every arm
    align(unet, ncp, start.pairs, args, evaluate)
    rows = [
        {"step": step, "reward": v.rewards.mean().item(), "requested digit": v.right.double().mean().item()}
        | margins[step]
        for step, v in curve.items()
    ]
    return rows, win_rate(start.before, curve[args.steps])[0]


@torch.no_grad()
def agreement(
    unet: UNet2DConditionModel,
    ncp: NoiseConditionedPerceptualLoss,
    exact: NoiseConditionedPerceptualLoss,
    start: Start,
    count: int = 32,
) -> dict[str, float]:
    """How the margins of pairs agree with float32's: the share of the same sign, and the median relative error."""
    generator = torch.Generator().manual_seed(start.seed)
    labels, winners, losers = (x[:count] for x in start.pairs)
    noise = torch.randn(winners.shape, generator=generator).repeat(2, 1, 1, 1)
    timesteps = torch.randint(1000, (len(winners),), generator=generator).repeat(2)
    states = condition(labels.repeat(2))
    noisy = new_scheduler().add_noise(torch.cat([winners, losers]), noise, timesteps)
    predictions = {"model_pred": unet(noisy, timesteps, states).sample}
    predictions["ref_pred"] = start.base(noisy, timesteps, states).sample

    def margin(loss: NoiseConditionedPerceptualLoss) -> Tensor:
        inputs = {"target": noise, "noisy_latents": noisy, "timesteps": timesteps, "encoder_hidden_states": states}
        error, ref_error = loss.errors(**inputs, **predictions, pairs=True)
        chosen, rejected = (ref_error - error).chunk(2)
        return chosen - rejected

    found, right = margin(ncp), margin(exact)
    same = (found.sign() == right.sign()).double().mean().item()
    return {"same sign": same, "margin error": ((found - right).abs() / right.abs()).median().item()}


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
