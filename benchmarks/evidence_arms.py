"""The evidence study's arms: one table, what error each measures and what it makes of a pair's four errors."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.evidence_beds import Digits, Emoji, Measures, Pairs, Start
from benchmarks.timing import flops_of
from examples.digits import add_lora, new_scheduler
from ncp_loss import NoiseConditionedPerceptualLoss, NoiseSchedule, cpo_loss, dpo_loss, relative_beta, sft_loss

Bed = Digits | Emoji


class Arm(NamedTuple):
    """One way to train. Its rate and kappa are tuned, or inherited, or given."""

    name: str
    inherits: str = ""
    errors: str = "perceptual"  # "latent", or that times B^2, "latent B2"
    objective: str = "dpo"
    encoder: str = "base"
    layer: str = "down_blocks"
    step: int | str = 1
    weighting: str | None = None
    normalize: bool = False
    lr: float | None = None  # in place of tuning, with kappa
    kappa: float | None = None
    anchor: float = 0.0  # over DPO's own slope on the winner
    decay: float = 1.0  # of a moving reference; 1: it stays
    data: str = "pairs"
    beds: tuple[str, ...] = ("digits", "emoji")


PAPERS_ANCHOR = 2 * 1.0 / 2500  # CPO's weight of 1 beside a beta of 2500
MAIN = [
    Arm("latent DPO", errors="latent"),
    Arm("NCP-DPO"),
    Arm("latent DPO, times B²", errors="latent B2"),
    Arm("NCP-DPO, random encoder", encoder="random"),
]


def _both(name: str, **options: Any) -> list[Arm]:
    """An arm with latent errors and one with perceptual ones, at the settings of the main arms."""
    return [
        Arm(f"latent {name}", inherits="latent DPO", errors="latent", **options),
        Arm(f"NCP-{name}", inherits="NCP-DPO", **options),
    ]


def _other(name: str, **options: Any) -> Arm:
    """NCP-DPO with another setting."""
    return Arm(f"NCP-DPO, {name}", inherits="NCP-DPO", **options)


SETTINGS = [
    *_both("DPO, beta per pair", objective="relative"),
    _other("shuffled encoder", encoder="shuffled"),
    _other("early encoder", encoder="early", beds=("emoji",)),
    _other("weighting noise", weighting="noise"),
    *(_other(layer, layer=layer, beds=("emoji",)) for layer in ("down_blocks.0", "mid_block")),
    _other("step clean", step="clean"),
    Arm("latent DPO, times B² of step clean", inherits="latent DPO, times B²", errors="latent B2", step="clean"),
    _other("step clean, beta per pair", step="clean", objective="relative", beds=("digits",)),
    *(_other(f"step {step}", step=step, beds=("emoji",)) for step in (100, 10, 250, "uniform")),
    _other("up_blocks.0", layer="up_blocks.0", beds=("emoji",)),
    _other("normalize", normalize=True),
]
TUNED_PER_PAIR = [
    Arm("latent DPO, tuned beta per pair", errors="latent", objective="relative"),
    Arm("NCP-DPO, tuned beta per pair", objective="relative", beds=("emoji",)),
    Arm("NCP-DPO, step clean, tuned beta per pair", step="clean", objective="relative", beds=("emoji",)),
]
TUNED_CLEAN = [
    Arm("NCP-DPO, step clean, tuned", step="clean"),
    Arm("latent DPO, times B² of step clean, tuned", errors="latent B2", step="clean"),
]
METHODS = [  # that are compared at the same rate and kappa
    *MAIN[:3],
    *(arm._replace(name=arm.name.removesuffix(", tuned")) for arm in reversed(TUNED_CLEAN)),
    Arm("latent DPO, beta per pair", errors="latent", objective="relative"),
    Arm("NCP-DPO, beta per pair", objective="relative"),
    Arm("NCP-DPO, step clean, beta per pair", step="clean", objective="relative"),
]
SAME_RATE, SAME_KAPPAS = 1e-3, {"emoji": (3.0, 1.0, 8.0), "digits": (1.0,)}


def at_same(method: str, kappa: float) -> str:
    """The name of the arm that has a method at a kappa and at the rate that all share."""
    return f"{method}, at kappa {kappa:.0f}"


SAME_SETTINGS = [
    arm._replace(
        name=at_same(arm.name, kappa),
        lr=SAME_RATE,
        kappa=kappa,
        beds=tuple(bed for bed, kappas in SAME_KAPPAS.items() if kappa in kappas),
    )
    for kappa in SAME_KAPPAS["emoji"]
    for arm in METHODS
]
OBJECTIVES = [
    Arm("latent CPO", errors="latent", objective="cpo", anchor=PAPERS_ANCHOR),
    Arm("NCP-CPO", objective="cpo", anchor=PAPERS_ANCHOR),
    Arm("NCP-CPO, step clean", objective="cpo", anchor=PAPERS_ANCHOR, step="clean"),
    Arm("latent CPO, times B² of step clean", errors="latent B2", objective="cpo", anchor=PAPERS_ANCHOR, step="clean"),
    Arm("latent SFT", errors="latent", objective="sft"),
    Arm("NCP-SFT", objective="sft"),
    *_both("DPO, anchor", anchor=0.5, beds=("emoji",)),
    *_both("Linear-DPO", objective="linear", decay=0.99, beds=("emoji",)),
    *_both("DPO, safeguard", objective="safeguard", beds=("emoji",)),
]
ON_CAPTIONS = [
    Arm(f"{arm.name}, caption pairs", inherits=arm.name, **{key: getattr(arm, key) for key in ("errors", "encoder")})
    ._replace(data="captions", beds=("emoji",))
    for arm in MAIN
]  # fmt: skip
BY_DATA = [
    arm
    for data in ("all", "winners", "all, flipped", "winners, flipped")
    for arm in _both(f"DPO, {data}", data=data, beds=("digits",))
]
ARMS = [*MAIN, *SETTINGS, *TUNED_PER_PAIR, *TUNED_CLEAN, *OBJECTIVES, *ON_CAPTIONS, *BY_DATA, *SAME_SETTINGS]


def same_training(one: Arm, other: Arm) -> bool:
    """Whether two arms differ in nothing but their names, testbeds and where their rate and kappa come from."""
    blank: dict[str, Any] = {"name": "", "inherits": "", "lr": None, "kappa": None, "beds": ()}
    return one._replace(**blank) == other._replace(**blank)


def rivals(name: str) -> list[str]:
    """The arms that one is compared with, seed by seed, on the same data. That which it is most like comes first."""
    arm = next(arm for arm in ARMS if arm.name == name)
    if arm in SAME_SETTINGS:
        names = [other.name for other in SAME_SETTINGS if other.kappa == arm.kappa]
    elif arm.data == "pairs":
        others = [a for a in ARMS if a not in SAME_SETTINGS]
        twins = [a.name for a in others if (a.errors, a.objective, a.inherits) == ("latent", arm.objective, "")]
        names = [arm.inherits, "NCP-DPO" if arm.encoder != "base" else "", *twins, *(other.name for other in MAIN[:3])]
        names += ["latent DPO, beta per pair", "latent DPO, tuned beta per pair"]  # the cheapest of the good ones
        names += [TUNED_CLEAN[0].name]  # the fastest
        # The same with latent errors, and the same with step 1.
        alike = name.replace("NCP-", "latent "), name.removesuffix(", step clean")
        names += [a.name for a in others if a.name in alike]
        weighted = ("latent B2", arm.step, arm.objective, arm.data)
        names += [a.name for a in others if (a.errors, a.step, a.objective, a.data) == weighted]
    elif arm in ON_CAPTIONS:
        names = [other.name for other in ON_CAPTIONS[:3]]
    else:
        alike = [other for other in BY_DATA if other.data == arm.data.replace("winners", "all")]
        names = [other.name for other in sorted(alike, key=lambda other: other.errors != arm.errors)]
    return [other for other in dict.fromkeys(names) if other not in ("", name)]


class Batch(NamedTuple):
    """Noised winners, then their losers."""

    noisy: Tensor
    noise: Tensor
    timesteps: Tensor
    pairs: Pairs

    @property
    def question(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.noisy, self.timesteps, self.pairs.states


# A batch, a prediction and the reference's or None, to errors (2P,) and the reference's.
Errors = Callable[[Batch, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def noised(pairs: Pairs, timesteps: Tensor, generator: torch.Generator) -> Batch:
    noise = torch.randn(pairs.winners.shape, generator=generator).repeat(2, 1, 1, 1)
    timesteps = timesteps.repeat(2)
    noisy = new_scheduler().add_noise(torch.cat([pairs.winners, pairs.losers]), noise, timesteps)
    return Batch(noisy, noise, timesteps, pairs.rows(torch.arange(len(pairs.winners)).repeat(2)))


def drawn(pairs: Pairs, count: int, generator: torch.Generator) -> Batch:
    """`count` pairs, each with its own timestep and noise."""
    rows = torch.randint(len(pairs.winners), (count,), generator=generator)
    return noised(pairs.rows(rows), torch.randint(1000, (count,), generator=generator), generator)


def latent_errors(batch: Batch, prediction: Tensor, ref_prediction: Tensor | None) -> tuple[Tensor, Tensor | None]:
    def error(x: Tensor) -> Tensor:
        return (x - batch.noise).square().mean((1, 2, 3))

    return error(prediction), None if ref_prediction is None else error(ref_prediction)


def errors_of(arm: Arm, bed: Bed, seed: int) -> Errors:
    schedule = NoiseSchedule.from_scheduler(new_scheduler())
    if arm.errors == "latent":
        return latent_errors
    if arm.errors == "latent B2":

        def times_b2(batch: Batch, prediction: Tensor, ref: Tensor | None) -> tuple[Tensor, Tensor | None]:
            b2 = schedule.reverse_step(batch.timesteps, arm.step).B.square().float()
            error, ref_error = latent_errors(batch, prediction, ref)
            return b2 * error, None if ref_error is None else b2 * ref_error

        return times_b2
    ncp = NoiseConditionedPerceptualLoss(
        encoder_of(arm.encoder, bed, seed),
        arm.layer,
        schedule=schedule,
        step=arm.step,
        weighting=arm.weighting,
        normalize=arm.normalize,
    )

    def perceptual(batch: Batch, prediction: Tensor, ref: Tensor | None) -> tuple[Tensor, Tensor | None]:
        states = batch.pairs.early if arm.encoder == "early" else batch.pairs.states
        inputs = prediction, batch.noise, batch.noisy, batch.timesteps, states
        return ncp.errors(*inputs, ref_pred=ref, pairs=True)

    return perceptual


def encoder_of(kind: str, bed: Bed, seed: int) -> UNet2DConditionModel:
    """The base model, an early one, one with fresh weights, or the base with each tensor's entries in random order."""
    if kind == "base":
        return bed.base
    if kind == "early":
        return bed.early
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = bed.new_network() if kind == "random" else copy.deepcopy(bed.base)
        if kind == "shuffled":
            with torch.no_grad():
                for weight in network.parameters():
                    weight.copy_(weight.flatten()[torch.randperm(weight.numel())].view_as(weight))
    return network.requires_grad_(False).eval()


def loss_of(
    arm: Arm, beta: float, kappa: float, errors: Errors, batch: Batch, prediction: Tensor, ref: Tensor | None
) -> Tensor:
    """`beta` is kappa over the mean error; an arm with a beta for each pair takes its own from kappa."""
    error, ref_error = errors(batch, prediction, ref)
    chosen, rejected = error.chunk(2)
    weight = arm.anchor * beta / 2
    if arm.objective == "sft":
        return beta * sft_loss(chosen)  # AdamW does not notice beta, but for its epsilon and the clipping
    if arm.objective == "cpo" or ref_error is None:
        return cpo_loss(chosen, rejected, beta=beta, sft_weight=weight)
    if arm.objective == "relative":
        return dpo_loss(*error.chunk(2), *ref_error.chunk(2), beta=relative_beta(*ref_error.chunk(2), kappa))
    if arm.objective == "safeguard":
        rejected = safeguarded(error, prediction)
    kind = "linear" if arm.objective == "linear" else "sigmoid"
    return dpo_loss(chosen, rejected, *ref_error.chunk(2), beta=beta, sft_weight=weight, loss_type=kind)


def safeguarded(error: Tensor, prediction: Tensor, mu: float = 0.9) -> Tensor:
    """The losers' errors, their slope scaled so that a step on both lowers the winners' (Diffusion-SDPO)."""
    (slope,) = torch.autograd.grad(error.sum(), prediction, retain_graph=True)
    winner, loser = slope.flatten(1).chunk(2)
    overlap = (winner * loser).sum()
    scale = torch.where(overlap > 0, ((1 - mu) * winner.square().sum() / overlap).clamp(max=1), 1.0)
    rejected = error.chunk(2)[1]
    return rejected.detach() + scale * (rejected - rejected.detach())


def mean_error(errors: Errors, bed: Bed, pairs: Pairs, seed: int, batches: int = 8) -> float:
    """Of the base model, over batches that no training step draws."""
    generator, found = torch.Generator().manual_seed(seed + 500_000), []
    with torch.no_grad():
        for _ in range(batches):
            batch = drawn(pairs, bed.batch, generator)
            found.append(errors(batch, bed.base(*batch.question).sample, None)[0].mean().item())
    return math.fsum(found) / batches


class Run:
    """One training run: its steps, and the errors of winners and losers against the reference's."""

    def __init__(self, arm: Arm, bed: Bed, start: Start, seed: int, lr: float, kappa: float) -> None:
        self.arm, self.bed, self.start = arm, bed, start
        self.errors = errors_of(arm, bed, seed)
        self.mean_error = mean_error(self.errors, bed, start.pairs, seed)
        self.kappa, self.beta = kappa, kappa / self.mean_error
        torch.manual_seed(seed)  # the same adapters in every arm
        self.unet = copy.deepcopy(bed.base)
        self.parameters = add_lora(self.unet)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr)
        self.generator = torch.Generator().manual_seed(seed)  # the same rows, timesteps and noise
        self.trained = {name: value for name, value in self.unet.named_parameters() if value.requires_grad}
        self.average = {name: value.detach().clone() for name, value in self.trained.items()}

    def gradients(self) -> bool:
        """Of one batch, clipped; False where they are not finite."""
        batch = drawn(self.start.pairs, self.bed.batch, self.generator)
        prediction = self.unet(*batch.question).sample
        inputs = batch, prediction, self.reference(batch)
        loss = loss_of(self.arm, self.beta, self.kappa, self.errors, *inputs)
        self.optimizer.zero_grad()
        loss.backward()
        return bool(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0).isfinite())

    @torch.no_grad()
    def reference(self, batch: Batch) -> Tensor | None:
        if self.arm.objective in ("cpo", "sft"):
            return None
        if self.arm.decay == 1:
            return self.bed.base(*batch.question).sample
        return functional_call(self.unet, self.average, batch.question).sample

    def step(self) -> bool:
        if not self.gradients():
            return False
        self.optimizer.step()
        if self.arm.decay < 1:
            with torch.no_grad():
                for name, average in self.average.items():
                    average.lerp_(self.trained[name], 1 - self.arm.decay)
        return True

    def flops(self) -> int:
        """Of a step's networks; attention is written out, since the counter cannot see the fused one on a CPU."""
        state = self.generator.get_state()
        with sdpa_kernel(SDPBackend.MATH):
            found = flops_of(self.gradients)
        self.generator.set_state(state)
        return found

    @torch.no_grad()
    def error_ratios(self) -> dict[str, float]:
        """Latent errors of winners and of losers that training does not see, over the base model's."""
        spare, generator = self.start.spare, torch.Generator().manual_seed(0)
        timesteps = torch.linspace(0, 999, len(spare.winners)).long()
        batch = noised(spare, timesteps, generator)
        ours, base = (latent_errors(batch, net(*batch.question).sample, None)[0] for net in (self.unet, self.bed.base))
        pairs = zip(("winner", "loser"), ours.chunk(2), base.chunk(2), strict=True)
        return {f"{name} error": (mine.mean() / theirs.mean()).item() for name, mine, theirs in pairs}


def trained(
    arm: Arm,
    bed: Bed,
    start: Start,
    before: Measures,
    seed: int,
    lr: float,
    kappa: float,
    points: tuple[int, ...],
    flops: dict[str, int],
    last: Callable[[Measures], None] = lambda measures: None,
) -> dict[str, Any]:
    """A run's record; it ends early where a gradient is not finite, and says so.

    `flops` keeps what a step of each arm costs; `last` gets the samples at the end.
    """
    run = Run(arm, bed, start, seed, lr, kappa)
    if arm.name not in flops:
        flops[arm.name] = run.flops()
    record: dict[str, Any] = {"arm": arm.name, "seed": seed, "lr": lr, "kappa": kappa, "beta": run.beta}
    record |= {"mean error": run.mean_error, "FLOPs a step": flops[arm.name], "finite": True}
    record["points"] = [
        {"step": 0, "seconds": 0.0, **measured(before, before), "winner error": 1.0, "loser error": 1.0}
    ]
    seconds = 0.0
    for done, point in itertools.pairwise((0, *points)):
        begun = time.perf_counter()
        record["finite"] = all(run.step() for _ in range(done, point))
        seconds += time.perf_counter() - begun
        if not record["finite"]:
            break
        measures = start.measure(run.unet)
        row = {"step": point, "seconds": seconds, **measured(measures, before), **run.error_ratios()}
        record["points"].append(row)
        if point == points[-1]:
            last(measures)
    return record


def measured(measures: Measures, before: Measures) -> dict[str, Any]:
    wins = 0.5 * (1 + (measures.rewards - before.rewards).sign())
    return {
        "reward": measures.rewards.double().mean().item(),
        "win rate": wins.double().mean().item(),
        **{key: getattr(measures, key) for key in ("match", "distance", "diversity", "variety", "style")},
    }
