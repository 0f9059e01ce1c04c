"""Align a small text-to-image model with NCP-DPO, from start to end: `python -m examples.demo`.

The base model draws digits, but it learned from captions that are often wrong, so only two in three of its samples show
the requested digit. A judge compares two samples for the same request; the pairs it decides train LoRA adapters, and
noise that no training image came from shows what changed. Writes `samples.png`, `reward.png`, `margins.png` and
`result.json` to `--out`. About two minutes on a CPU.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from tqdm import trange

import ncp_loss
from examples.digits import (
    CLASSES,
    Judge,
    add_lora,
    condition,
    load_unet,
    new_scheduler,
    real_digits,
    sample,
    seeded_noise,
)
from ncp_loss import (
    NoiseConditionedPerceptualLoss,
    by_timestep,
    dpo_loss,
    frozen_view,
    preference_metrics,
)

BLUE, ORANGE, GREY = "#2b6cb0", "#e07b39", "#8a8f98"


class Verdict(NamedTuple):
    """What was drawn for the held-out requests, and what the judge thinks: rewards (N,), right (N,) bool."""

    images: Tensor
    rewards: Tensor
    right: Tensor


def preference_pairs(unet: UNet2DConditionModel, judge: Judge, seeds: range) -> tuple[Tensor, Tensor, Tensor]:
    """Sample a digit twice, from two seeds; returns (labels, winners, losers) of the pairs the judge decides."""
    labels = torch.arange(len(seeds) // 2) % CLASSES
    first, second = sample(unet, labels.repeat(2), seeded_noise(seeds), progress="sampling pairs").chunk(2)
    lead = judge(first, labels)[0] - judge(second, labels)[0]
    decided = lead.abs() > 0.1  # closer than that is a tie, which teaches nothing
    better = (lead > 0)[:, None, None, None]
    return labels[decided], torch.where(better, first, second)[decided], torch.where(better, second, first)[decided]


class Batch(NamedTuple):
    """Noised winners, then their losers; both members of a pair share the noise and the timestep."""

    noisy: Tensor
    noise: Tensor
    timesteps: Tensor
    states: Tensor


def random_batch(pairs: tuple[Tensor, Tensor, Tensor], count: int) -> Batch:
    """`count` of the pairs, each with noise and a timestep of its own."""
    labels, winners, losers = pairs
    scheduler = new_scheduler()
    rows = torch.randint(len(labels), (count,))
    clean = torch.cat([winners[rows], losers[rows]])
    noise = torch.randn_like(winners[rows]).repeat(2, 1, 1, 1)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (count,)).repeat(2)
    return Batch(scheduler.add_noise(clean, noise, timesteps), noise, timesteps, condition(labels[rows].repeat(2)))


def predicted(unet: UNet2DConditionModel, batch: Batch) -> Tensor:
    return unet(batch.noisy, batch.timesteps, batch.states).sample


def errors_of(
    ncp: NoiseConditionedPerceptualLoss | None, batch: Batch, prediction: Tensor, ref_prediction: Tensor
) -> tuple[Tensor, Tensor]:
    """The errors of both predictions, each (2P,): of features, or without `ncp` of latents."""
    if ncp is None:
        error, ref_error = ((p - batch.noise).square().mean((1, 2, 3)) for p in (prediction, ref_prediction))
        return error, ref_error
    inputs = prediction, batch.noise, batch.noisy, batch.timesteps, batch.states
    return ncp.errors(*inputs, ref_pred=ref_prediction, pairs=True)


@torch.no_grad()
def mean_error(ncp: NoiseConditionedPerceptualLoss | None, unet: UNet2DConditionModel, batches: list[Batch]) -> float:
    """Of a model over some batches. It depends on the model, the layer and the step, and beta must fit it."""
    predictions = [predicted(unet, batch) for batch in batches]
    errors = [errors_of(ncp, batch, p, p)[0] for batch, p in zip(batches, predictions, strict=True)]
    return torch.cat(errors).mean().item()


def align(
    unet: UNet2DConditionModel,
    ncp: NoiseConditionedPerceptualLoss | None,
    pairs: tuple[Tensor, Tensor, Tensor],
    args: argparse.Namespace,
    evaluate: Callable[[int], None],
) -> list[dict[str, float]]:
    """An ordinary training loop; calls `evaluate(step)` four times, the last at the end.

    Returns:
        Between one evaluation and the next, the mean of beta * margin by range of timesteps.
    """
    parameters = add_lora(unet)
    reference = frozen_view(unet)  # the base model: the same weights, without the adapters
    optimizer = torch.optim.AdamW(parameters, lr=args.lr)

    beta = args.beta
    if beta is None:
        beta = args.kappa / mean_error(ncp, reference, [random_batch(pairs, args.batch) for _ in range(8)])

    seen: list[tuple[Tensor, Tensor]] = []  # margins and timesteps of pairs since the last evaluation
    margins_by_timestep = []
    progress = trange(1, args.steps + 1, desc="aligning")
    for step in progress:
        batch = random_batch(pairs, args.batch)
        with torch.no_grad():
            ref_prediction = predicted(reference, batch)
        error, ref_error = errors_of(ncp, batch, predicted(unet, batch), ref_prediction)
        (chosen, rejected), (ref_chosen, ref_rejected) = error.chunk(2), ref_error.chunk(2)
        # `ncp_dpo_loss` takes the predictions and does all this in one call; here the margins are drawn too.
        loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
        margins = beta * ((rejected - ref_rejected) - (chosen - ref_chosen)).detach()

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        seen.append((margins, batch.timesteps.chunk(2)[0]))
        metrics = preference_metrics(loss, chosen, rejected, (ref_chosen, ref_rejected), beta)
        progress.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{metrics['rewards/accuracies'].item():.0%}")
        if step == args.steps or step % math.ceil(args.steps / 4) == 0:
            evaluate(step)
            means = by_timestep(*map(torch.cat, zip(*seen, strict=True)), edges=range(0, 1001, 100))
            margins_by_timestep.append({part: mean.item() for part, mean in means.items()})
            seen.clear()
    return margins_by_timestep


def win_rate(base: Verdict, aligned: Verdict) -> tuple[float, float, float]:
    """How often the aligned sample has the higher reward (a tie is half a win), and its 95% Wilson interval."""
    n, z = len(base.rewards), 1.96
    share = (0.5 * (1 + (aligned.rewards - base.rewards).sign())).double().mean().item()
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return share, (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def diversity(images: Tensor, labels: Tensor) -> float:
    """Mean distance of two images of one digit. Rewards say nothing of samples that all look alike."""
    alike = [images[labels == digit].flatten(1) for digit in range(CLASSES)]
    return statistics.mean(torch.pdist(rows).mean().item() for rows in alike)


def draw_samples(path: Path, base: Verdict, aligned: Verdict, method: str, columns: int = 8) -> None:
    """A row per requested digit, the first held-out seeds in order, base and aligned side by side."""
    rows, columns = min(CLASSES, len(base.right)), min(columns, max(1, len(base.right) // CLASSES))
    pitch = base.images.shape[-1] + 3  # a cell: the image and a margin for its frame
    figure, axes = plt.subplots(1, 2, figsize=(columns + 1.2, rows / 2 + 1.1), layout="constrained")
    for axis, verdict, name in zip(axes, (base, aligned), ("Base model", f"Aligned with {method}"), strict=True):
        canvas = np.full((rows * pitch, columns * pitch), np.nan)
        for row in range(rows):
            for column in range(columns):
                index, y, x = column * CLASSES + row, row * pitch + 1, column * pitch + 1
                canvas[y : y + pitch - 3, x : x + pitch - 3] = verdict.images[index, 0].numpy()
                if not verdict.right[index]:
                    axis.add_patch(plt.Rectangle((x - 1, y - 1), pitch - 2, pitch - 2, fill=False, ec=ORANGE, lw=1.8))
        axis.imshow(canvas, cmap="gray_r", vmin=-1, vmax=1)
        axis.set_title(f"{name}\n{verdict.right.sum()} of {len(verdict.right)} show the requested digit", fontsize=11)
        axis.set_yticks(
            [(row + 0.5) * pitch - 1 for row in range(rows)], [str(row) for row in range(rows)], fontsize=11
        )
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("requested digit")
    figure.supxlabel(
        "Same starting noise left and right. Orange frame: the judge reads another digit.", fontsize=9, color=GREY
    )
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.15)


def draw_reward(path: Path, curve: dict[int, Verdict]) -> None:
    """Mean held-out reward against the training step, with its standard error."""
    steps, rewards = list(curve), [verdict.rewards.numpy() for verdict in curve.values()]
    means, errors = (np.array([f(r) for r in rewards]) for f in (np.mean, lambda r: r.std() / math.sqrt(len(r))))
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.axhline(means[0], color=GREY, ls="--", lw=1.2)
    axis.annotate("base model", (steps[-1], means[0]), (0, -12), textcoords="offset points", ha="right", color=GREY)
    axis.fill_between(steps, means - errors, means + errors, color=BLUE, alpha=0.18, lw=0)
    axis.plot(steps, means, color=BLUE, lw=2, marker="o", ms=5)
    axis.set(xlabel="training step", ylabel="mean reward", xlim=(0, None), ylim=(min(0.5, means.min() - 0.05), 1))
    axis.set_title(f"Probability of the requested digit, {len(rewards[0])} held-out samples", fontsize=11)
    axis.annotate(
        f"{means[-1]:.2f}", (steps[-1], means[-1]), (0, 8), textcoords="offset points", ha="center", color=BLUE
    )
    axis.grid(axis="y", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.1)


def draw_margins(path: Path, steps: list[int], margins: list[dict[str, float]]) -> None:
    """beta * margin against the timestep, a line for each stretch of training, the later the darker."""
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for i, (first, last, means) in enumerate(zip(steps, steps[1:], margins, strict=False)):
        middles = [sum(map(float, part.split("-"))) / 2 for part in means]
        share = (i + 1) / len(margins)
        axis.plot(middles, list(means.values()), color=BLUE, alpha=0.25 + 0.75 * share, lw=1 + share, marker="o", ms=4,
            label=f"steps {first + 1} to {last}")  # fmt: skip
    axis.axhline(0, color=GREY, ls="--", lw=1.2)
    axis.set(xlabel="timestep (1000 is noise)", ylabel="mean of beta * margin", xlim=(0, 1000))
    axis.set_title("Margin by timestep, over training", fontsize=11)
    axis.legend(frameon=False, fontsize=9)
    axis.grid(axis="y", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.1)


def main() -> None:
    """Pairs, alignment, held-out comparison, pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument(
        "--space", choices=("perceptual", "latent"), default="perceptual", help="where errors are measured"
    )
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--pairs", type=int, default=300, help="pairs sampled; the judge decides about half of them")
    parser.add_argument("--batch", type=int, default=16, help="pairs per step")
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument(
        "--kappa", type=float, default=2.0, help="beta is kappa over the reference's mean error, measured at the start"
    )
    scale.add_argument("--beta", type=float, help="beta itself")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--held-out", type=int, default=200, help="samples to compare on, two or more a digit")
    parser.add_argument("--seed", type=int, default=200)
    args = parser.parse_args()
    if args.held_out < 2 * CLASSES:
        parser.error(f"--held-out must be at least {2 * CLASSES}, two samples a digit; it was {args.held_out}")
    args.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    torch.set_num_threads(1)  # so small a network gains little from more, and numbers then depend on them
    torch.manual_seed(args.seed)
    unet, judge = load_unet(), Judge()
    first = args.seed * 1_000_000  # every run has a million seeds to itself, the held-out ones in their second half
    pairs = preference_pairs(unet, judge, range(first, first + 2 * args.pairs))
    if not len(pairs[0]):
        parser.error("the judge decided none of the pairs; sample more (--pairs)")
    print(f"the judge decided {len(pairs[0])} of {args.pairs} pairs")

    held_out, noise = (
        (torch.arange(args.held_out) % CLASSES),
        seeded_noise(range(first + 500_000, first + 500_000 + args.held_out)),
    )
    curve: dict[int, Verdict] = {}

    def evaluate(step: int) -> None:
        images = sample(unet, held_out, noise)
        curve[step] = Verdict(images, *judge(images, held_out))

    evaluate(0)
    ncp = None
    if args.space == "perceptual":
        ncp = NoiseConditionedPerceptualLoss(unet, layer="down_blocks", schedule=new_scheduler(), step="clean")
    margins = align(unet, ncp, pairs, args, evaluate)
    base, aligned, real = curve[0], curve[args.steps], diversity(*real_digits()[1])
    share, low, high = win_rate(base, aligned)
    draw_samples(args.out / "samples.png", base, aligned, "NCP-DPO" if args.space == "perceptual" else "latent DPO")
    draw_reward(args.out / "reward.png", curve)
    draw_margins(args.out / "margins.png", list(curve), margins)
    seconds = time.perf_counter() - start

    result = {
        "reward": {"base": base.rewards.mean().item(), "aligned": aligned.rewards.mean().item()},
        "requested digit drawn": {
            "base": base.right.double().mean().item(),
            "aligned": aligned.right.double().mean().item(),
        },
        "diversity, of real digits": {
            name: diversity(verdict.images, held_out) / real for name, verdict in (("base", base), ("aligned", aligned))
        },
        "win rate": {"share": share, "low": low, "high": high},
        "reward by step": {step: verdict.rewards.mean().item() for step, verdict in curve.items()},
        "margins by timestep": margins,
        "pairs": len(pairs[0]),
        "settings": vars(args) | {"out": str(args.out)},
        "command": " ".join(["python -m examples.demo", *sys.argv[1:]]),
        "versions": {"ncp_loss": ncp_loss.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "seconds": seconds,
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'':27}{'base':>8}{'aligned':>10}   on {args.held_out} held-out samples, same noise")
    for name in ("reward", "requested digit drawn", "diversity, of real digits"):
        print(f"{name:27}{result[name]['base']:8.1%}{result[name]['aligned']:10.1%}")
    print(f"{'win rate over the base':27}{share:18.1%}   95% interval {low:.1%} to {high:.1%}; ties count one half")
    print(f"{seconds:.0f} seconds; pictures and numbers in {args.out}/")


if __name__ == "__main__":
    main()
