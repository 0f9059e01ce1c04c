"""What the studies of training on digits share: a run's batches, drawn once for all of its arms, and its loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from examples.demo import Verdict, preference_pairs
from examples.digits import CLASSES, Judge, add_lora, condition, load_unet, new_scheduler, sample, seeded_noise
from ncp_loss import NoiseConditionedPerceptualLoss, dpo_loss, relative_beta

T = 1000
Pair = tuple[Tensor, Tensor]  # of winners and of losers, (B,) each
Measure = Callable[[Tensor, "Batch"], tuple[Pair, Pair]]  # a prediction's errors and the reference's
Rule = Callable[[Pair, Pair], tuple[Pair, Pair, float | Tensor]]  # the errors that DPO gets, and beta


class Start(NamedTuple):
    """What all runs of a seed begin with."""

    seed: int
    base: UNet2DConditionModel
    pairs: tuple[Tensor, Tensor, Tensor]  # labels, winners, losers
    judged: Callable[[UNet2DConditionModel], Verdict]  # of the held-out requests
    before: Verdict


def prepared(judge: Judge, seed: int, pairs: int, held_out: int, steps: int = 10) -> Start:
    """The base model, preference pairs of its samples, and how it does on held-out requests, in ``steps`` steps."""
    base, first = load_unet(), seed * 1_000_000
    asked = torch.arange(held_out) % CLASSES
    noise = seeded_noise(range(first + 500_000, first + 500_000 + held_out))

    def judged(unet: UNet2DConditionModel) -> Verdict:
        images = sample(unet, asked, noise, steps)
        return Verdict(images, *judge(images, asked))

    return Start(seed, base, preference_pairs(base, judge, range(first, first + 2 * pairs)), judged, judged(base))


class Batch(NamedTuple):
    """Winners, then their losers; each pair has one noise and one timestep."""

    noisy: Tensor
    timesteps: Tensor
    states: Tensor
    noise: Tensor
    clean: Tensor
    ref_pred: Tensor


class Step(NamedTuple):
    """What one step of training showed: of each pair (B,), and the gradient's norm before it is clipped."""

    timesteps: Tensor
    margins: Tensor  # times beta, as the sigmoid gets them
    miss: Tensor  # (prediction - target)^2 over target^2, of the pair's two samples: 1 for a model that predicts 0
    ref_miss: Tensor
    norm: float


@torch.no_grad()
def drawn(start: Start, steps: int, size: int, low: int = 0) -> list[Batch]:
    """The batches of a run, with the base model's predictions; timesteps from ``low`` up."""
    generator = torch.Generator().manual_seed(start.seed)
    labels, winners, losers = start.pairs
    batches = []
    for _ in range(steps):
        rows = torch.randint(len(labels), (size,), generator=generator)
        clean = torch.cat([winners[rows], losers[rows]])
        noise = torch.randn(winners[rows].shape, generator=generator).repeat(2, 1, 1, 1)
        timesteps = (low + (T - low) * torch.rand(size, generator=generator)).long().repeat(2)
        states = condition(labels[rows].repeat(2))
        noisy = new_scheduler().add_noise(clean, noise, timesteps)
        ref_pred = start.base(noisy, timesteps, states).sample
        batches.append(Batch(noisy, timesteps, states, noise, clean, ref_pred))
    return batches


def latent(prediction: Tensor, batch: Batch) -> tuple[Pair, Pair]:
    error, ref_error = ((p - batch.noise).square().mean((1, 2, 3)) for p in (prediction, batch.ref_pred))
    return error.chunk(2), ref_error.chunk(2)


def number(beta: float) -> Rule:
    return lambda error, ref: (error, ref, beta)


def relative(kappa: float) -> Rule:
    """A beta for each pair, by the reference's errors on it."""
    return lambda error, ref: (error, ref, relative_beta(*ref, kappa))


def perceptual(start: Start, weighting: str | None = None, pairs: bool = True) -> Measure:
    ncp = NoiseConditionedPerceptualLoss(start.base, schedule=new_scheduler(), weighting=weighting)

    def measure(prediction: Tensor, batch: Batch) -> tuple[Pair, Pair]:
        inputs = prediction, batch.noise, batch.noisy, batch.timesteps, batch.states
        error, ref_error = ncp.errors(*inputs, ref_pred=batch.ref_pred, pairs=pairs)
        return error.chunk(2), ref_error.chunk(2)

    return measure


def missed(prediction: Tensor, target: Tensor) -> Tensor:
    """(2B, C, H, W), winners, then losers -> (B,)."""
    off, whole = ((x.square().flatten(1).sum(1)).chunk(2) for x in (prediction - target, target))
    return (off[0] + off[1]) / (whole[0] + whole[1])


def trained(
    start: Start, batches: Iterable[Batch], measure: Measure, rule: Rule, lr: float, clip: float
) -> tuple[torch.nn.Module, list[Step]]:
    """The model with adapters that DPO trained, and what each step showed; ``clip``: the gradient's largest norm."""
    unet = copy.deepcopy(start.base)
    torch.manual_seed(start.seed)  # of the adapters' first weights
    parameters = add_lora(unet)
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    shown = []
    for batch in batches:
        prediction = unet(batch.noisy, batch.timesteps, batch.states).sample
        error, ref, beta = rule(*measure(prediction, batch))
        dpo_loss(*error, *ref, beta=beta).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip).item()
        optimizer.step()
        optimizer.zero_grad()
        margins = beta * ((error[1] - ref[1]) - (error[0] - ref[0])).detach()
        misses = (missed(p, batch.noise) for p in (prediction.detach(), batch.ref_pred))
        shown.append(Step(batch.timesteps.chunk(2)[0], margins, *misses, norm))
    return unet, shown
