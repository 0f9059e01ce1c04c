"""What exactly a bad argument is told, where it is more than its name and type; test_bad_input.py tries all others."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, KarrasVeScheduler
from models import batch, sdxl, small
from torch import Tensor, nn

from ncp_loss import NoiseConditionedPerceptualLoss as NCP
from ncp_loss import (
    NoiseSchedule,
    by_timestep,
    cpo_loss,
    dpo_loss,
    frozen_view,
    kto_loss,
    mapo_loss,
    ncp_cpo_loss,
    ncp_dpo_loss,
    ncp_sft_loss,
    preference_metrics,
    sft_loss,
)

SIZE = {"height": 8, "width": 8}
NAN, INF = float("nan"), float("inf")
ONES, EIGHT = torch.ones(4), torch.ones(8)
Call = Callable[..., Any]


class Bad(NamedTuple):
    """A call that must raise ``error``, with a message that starts with ``message``."""

    id: str
    call: Callable[[], Any]
    message: str
    error: type[Exception] = ValueError


@cache
def unet() -> nn.Module:
    return small(torch.float32)


@cache
def ncp() -> NCP:
    return NCP(unet())


@cache
def xl_unet() -> nn.Module:
    return sdxl(dtype=torch.float32)


@cache
def xl() -> NCP:
    return NCP(xl_unet(), "down_blocks.0")


def changed(arguments: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """With some arguments replaced, by a value or by a function of what was there."""
    new = {k: v(arguments[k].detach()) if callable(v) else v for k, v in changes.items()}
    return arguments | new


def built(id: str, message: str, error: type[Exception] = ValueError, **options: Any) -> Bad:
    return Bad(f"built {id}", lambda: NCP(**{"unet": unet()} | options), message, error)


def errors(id: str, message: str, error: type[Exception] = ValueError, **changes: Any) -> Bad:
    return Bad(id, lambda: ncp().errors(**changed(batch(unet(), **SIZE), changes)), message, error)


def pairs(id: str, message: str, error: type[Exception] = ValueError, use: Call = ncp_dpo_loss, **changes: Any) -> Bad:
    def call() -> Any:
        arguments = batch(unet(), pairs=True, **SIZE)
        if use is ncp_cpo_loss:
            del arguments["ref_pred"]
        return use(ncp(), **changed(arguments, changes))

    return Bad(f"pairs {id}", call, message, error)


def xl_errors(**changes: Any) -> Any:
    return xl().errors(**changed(batch(xl_unet(), **SIZE), changes))


def added(id: str, message: str, error: type[Exception] = ValueError, **changes: Any) -> Bad:
    cond = batch(xl_unet(), **SIZE)["added_cond_kwargs"]
    return Bad(f"added {id}", partial(xl_errors, added_cond_kwargs=changed(cond, changes)), message, error)


def objective(use: Call, message: str, error: type[Exception] = ValueError, **changes: Any) -> Bad:
    return Bad(f"{use.__name__} {changes}"[:70], lambda: use(**changed(GOOD[use], changes)), message, error)


def on_meta(x: Tensor) -> Tensor:
    return x.to("meta")


PAIR = ("chosen_error", "rejected_error")
GOOD: dict[Call, dict[str, Any]] = {
    dpo_loss: dict.fromkeys((*PAIR, "ref_chosen_error", "ref_rejected_error"), torch.ones(4)),
    cpo_loss: dict.fromkeys(PAIR, torch.ones(4)),
    sft_loss: dict.fromkeys(PAIR[:1], torch.ones(4)),
    mapo_loss: dict.fromkeys(PAIR, torch.ones(4)),
    kto_loss: {"error": torch.ones(4), "ref_error": torch.ones(4), "desirable": torch.ones(4).bool()},
    preference_metrics: {
        **dict.fromkeys(("loss", *PAIR), torch.ones(4)),
        "ref": (torch.ones(4), torch.ones(4)),
        "beta": 1.0,
    },
    by_timestep: {"values": torch.ones(4), "timesteps": torch.tensor([1, 2, 3, 4])},
}
WRONG_SHAPE: dict[str, Callable[[Tensor], Tensor]] = {
    "rank": lambda x: x[0],
    "channels": lambda x: x[:, :3],
    "batch": lambda x: x[:1],
    "width": lambda x: x[..., :4],
}
LIKE_LATENTS = ("model_pred", "target", "ref_pred", "variance_noise")
ROWS: list[Bad] = []

for name in LIKE_LATENTS:
    ROWS += [
        errors(f"{name}: {what}", f"{name} must be shaped like noisy_latents, shaped (2, 4, 8, 8)", **{name: wrong})
        for what, wrong in WRONG_SHAPE.items()
    ]
ROWS += [
    *[
        errors(f"{name}: device", f"{name} must be on the device of noisy_latents", **{name: on_meta})
        for name in LIKE_LATENTS
    ],
    errors("noisy_latents: rank", "noisy_latents must be shaped (B, 4, H, W)", noisy_latents=lambda x: x[0]),
    errors("noisy_latents: channels", "noisy_latents must be shaped (B, 4, H, W)", noisy_latents=lambda x: x[:, :3]),
    errors("noisy_latents: device", "target must be on the device of noisy_latents, meta", noisy_latents=on_meta),
    Bad("no rows", lambda: ncp().errors(**{k: v[:0] for k, v in batch(unet(), **SIZE).items()}), "noisy_latents must"),
    # timesteps
    errors("timesteps: negative", "timesteps must be in [0, 1000); it was in [-1, 5]", timesteps=torch.tensor([-1, 5])),
    errors("timesteps: T", "timesteps must be in [0, 1000); it was in [5, 1000]", timesteps=torch.tensor([5, 1000])),
    errors("timesteps: past T", "timesteps must be in [0, 1000)", timesteps=torch.tensor(2000)),
    errors("timesteps: fraction", "timesteps must be whole numbers", timesteps=torch.tensor([3.5, 5.0])),
    errors(
        "timesteps: nan", "timesteps must be in [0, 1000); it was in [nan, nan]", timesteps=torch.tensor([NAN, 5.0])
    ),
    errors("timesteps: batch", "timesteps must be 0-dimensional or of shape (2,)", timesteps=lambda t: t[:1]),
    errors("timesteps: rank", "timesteps must be 0-dimensional or of shape (2,)", timesteps=lambda t: t[:, None]),
    errors("timesteps: device", "timesteps must be on the device of noisy_latents", timesteps=on_meta),
    # text
    errors("text: none", "encoder_hidden_states must be given", encoder_hidden_states=None),
    errors("text: batch", "encoder_hidden_states must be one row per sample, 2", encoder_hidden_states=lambda c: c[:1]),
    errors("text: no batch", "encoder_hidden_states must be one row per", encoder_hidden_states=lambda c: c[0]),
    errors(
        "text: a number",
        "encoder_hidden_states must be one row per sample, 2; it was shaped ()",
        encoder_hidden_states=torch.ones(()),
    ),
    errors("text: rank", "encoder_hidden_states must be", encoder_hidden_states=lambda c: c[:, 0]),
    errors("text: width", "encoder_hidden_states must be", encoder_hidden_states=lambda c: c[..., :7]),
    errors("text: device", "encoder_hidden_states must be on", encoder_hidden_states=on_meta),
]

for name in ("text_embeds", "time_ids"):
    key = f"added_cond_kwargs['{name}'] must be"
    ROWS += [
        added(f"{name}: batch", f"{key} one row per sample, 2", **{name: lambda x: x[:1]}),
        added(f"{name}: no batch", f"{key} one row per sample, 2", **{name: lambda x: x[0]}),
        added(f"{name}: width", "added_cond_kwargs", **{name: lambda x: x[:, :3]}),
        added(f"{name}: device", f"{key} on", **{name: on_meta}),
    ]
ROWS.append(added("text_embeds: rank", "added_cond_kwargs['text_embeds'] must be", text_embeds=lambda x: x[:, None]))
ROWS += [
    Bad(
        f"added: {list(value or [])}",
        partial(xl_errors, added_cond_kwargs=value),
        "added_cond_kwargs must be a dict with text_embeds and time_ids",
    )
    for value in (None, {}, {"text_embeds": torch.ones(2, 8)}, {"time_ids": torch.ones(2, 6)})
]

SAME = "must be the same for both members of a pair (winners first, then losers)"
BETA, SMOOTHING = "beta must be a positive number, or a tensor with one for each pair, (B,)", "label_smoothing must be"
LOSSES = (dpo_loss, cpo_loss, sft_loss, mapo_loss, kto_loss)
WITH_BETA = (dpo_loss, cpo_loss, mapo_loss, kto_loss, preference_metrics)
LOSS_TYPES = "'dmpo', 'hinge', 'ipo', 'linear', 'robust', 'sigmoid'"
ROWS += [
    pairs("odd", "noisy_latents must be an even batch", noisy_latents=lambda x: x[:3]),
    pairs("odd, cpo", "noisy_latents must be an even batch", use=ncp_cpo_loss, noisy_latents=lambda x: x[:3]),
    pairs("timesteps", f"timesteps {SAME}", timesteps=torch.tensor([1, 2, 3, 4])),
    pairs("timesteps, cpo", f"timesteps {SAME}", use=ncp_cpo_loss, timesteps=torch.tensor([1, 2, 3, 4])),
    pairs("noise", f"target (noise, for a schedule that predicts epsilon) {SAME}", target=torch.randn_like),
    pairs("variance_noise", f"variance_noise {SAME}", variance_noise=torch.randn_like),
    # Half the rows: what a loop has before it repeats them for winners and losers.
    pairs("half the timesteps", "timesteps must be 0-dimensional or of shape (4,)", timesteps=torch.tensor([1, 2])),
    pairs("half the target", "target must be shaped like noisy_latents", target=lambda x: x[:2]),
    pairs("half the z", "variance_noise must be shaped like noisy_latents", variance_noise=lambda x: x[:2]),
    pairs(
        "both references",
        "ref_pred or ref_error must be given, and only one of them; it was both",
        ref_error=torch.ones(4),
    ),
    pairs("no reference", "ref_pred or ref_error must be given, and only one of them; it was neither", ref_pred=None),
    *[
        pairs(f"ref_error: {id}", f"ref_error must be {must}", error, ref_pred=None, ref_error=value)
        for id, value, must, error in [
            ("column", torch.ones(4, 1), "shaped like the batch's errors, shaped (4,)", ValueError),
            ("half", torch.ones(2), "shaped like the batch's errors, shaped (4,)", ValueError),
            ("device", torch.ones(4, device="meta"), "on the device of the batch's errors", ValueError),
        ]
    ],
    pairs("beta", BETA, beta=0.0),
    pairs("loss_type", f"loss_type must be one of {LOSS_TYPES}; it was 'kto'", loss_type="kto"),
    pairs("smoothing", f"{SMOOTHING} in [0, 0.5)", label_smoothing=0.5),
    pairs("more smoothing", f"{SMOOTHING} in [0, 0.5)", label_smoothing=0.7),
    pairs("reduction", "reduction must be one of 'mean', 'none', 'sum'; it was 'avg'", reduction="avg"),
    # the objectives alone
    *[
        objective(use, message, error, beta=beta)
        for use in WITH_BETA
        for beta, message, error in [
            (torch.tensor(1.0), "beta must be shaped like the errors, shaped (4,); it was shaped ()", ValueError),
            (torch.ones(4, 1), "beta must be shaped like the errors, shaped (4,)", ValueError),
            (torch.ones(4, device="meta"), "beta must be on the device of the errors, cpu", ValueError),
            (torch.tensor([1.0, 0.0, 1.0, 1.0]), f"{BETA}; it was [1.0, 0.0, 1.0, 1.0]", ValueError),
            (torch.tensor([1.0, 1.0, NAN, 1.0]), f"{BETA}; it was [1.0, 1.0, nan, 1.0]", ValueError),
            (torch.tensor([1.0, -1.0, 1.0, 1.0]), f"{BETA}; it was [1.0, -1.0, 1.0, 1.0]", ValueError),
        ]
    ],
    *[
        objective(dpo_loss, f"{SMOOTHING} 0 for loss_type={name!r}", label_smoothing=0.1, loss_type=name)
        for name in ("hinge", "ipo", "linear", "dmpo")
    ],
    objective(dpo_loss, f"loss_type must be one of {LOSS_TYPES}; it was 'x'", loss_type="x"),
    objective(kto_loss, "kl must be a number; it was nan", kl=NAN),
    objective(kto_loss, "kl must be a number or a 0-dim tensor; it was shaped (4,)", kl=torch.ones(4)),
    objective(kto_loss, "desirable must be a bool tensor; it was torch.float32", TypeError, desirable=torch.ones(4)),
    objective(kto_loss, "desirable must be shaped like error, shaped (4,)", desirable=lambda x: x[:2]),
    objective(kto_loss, "desirable must be on the device of error", desirable=on_meta),
    objective(kto_loss, "ref_error must be shaped like error", ref_error=torch.ones(4, 1)),
    objective(mapo_loss, "rejected_error must be shaped like chosen_error", rejected_error=torch.ones(3)),
    objective(preference_metrics, "ref must be the reference's errors on winners and on losers", TypeError, ref=EIGHT),
    objective(preference_metrics, "loss must be of one value or more; it was shaped (0,)", loss=lambda x: x[:0]),
    objective(preference_metrics, "ref_rejected_error must be shaped like chosen_error", ref=(ONES, torch.ones(3))),
    objective(by_timestep, "values must be one for each sample or pair, shape (B,)", values=torch.ones(4, 1)),
    objective(by_timestep, "timesteps must be shaped like values, shaped (4,); it was shaped (8,)", timesteps=EIGHT),
    *[
        objective(by_timestep, "edges must be two numbers or more, in rising order", edges=edges)
        for edges in ((), (0,), (0, 0), (500, 0))
    ],
    objective(dpo_loss, "rejected_error must be shaped like chosen_error", rejected_error=torch.ones(4, 1)),
    objective(dpo_loss, "ref_rejected_error must be shaped like chosen_error", ref_rejected_error=torch.ones(1)),
    objective(dpo_loss, "ref_chosen_error must be on the device of chosen_error", ref_chosen_error=on_meta),
    objective(cpo_loss, "rejected_error must be shaped like chosen_error", rejected_error=torch.ones(3)),
    *[
        objective(use, "chosen_error must be one error per sample", chosen_error=torch.ones(4, 1))
        for use in (dpo_loss, sft_loss)
    ],
    objective(sft_loss, "chosen_error must be one error per sample", chosen_error=torch.tensor(1.0)),
    objective(
        sft_loss, "chosen_error must be one error per sample, shape (B,), of one or more", chosen_error=lambda x: x[:0]
    ),
]

ROWS += [
    built("with a string", "unet must be a torch.nn.Module; it was str", TypeError, unet="stabilityai/sdxl"),
    built("with a method", "unet must be a torch.nn.Module; it was method", TypeError, unet=nn.Identity().forward),
    Bad("view of a string", lambda: frozen_view("sdxl"), "model must be a torch.nn.Module; it was str", TypeError),
    *[
        built(f"layer {layer}", f"layer must be {must}", layer=layer)
        for layer, must in {
            "": "a module path of the model",
            "down_block": "a module path of the model, such as ['down_blocks', 'down_blocks.0', 'down_blocks.1'",
            "down_blocks.7": "a module path of the model, such as ['down_blocks', 'down_blocks.0', ",
            "down_blocks.-3": "a module path of the model, such as ['down_blocks', 'down_blocks.0', ",
            "down_blocks.0.resnet.0": "a module path of the model, such as ['down_blocks.0.resnets'",
            (): "one module path or more",
            ("down_blocks", "down_blocks.1"): "different modules",
            ("down_blocks", "down_blocks"): "different modules",
        }.items()
    ],
    *[
        built(
            f"weight {weight}",
            "layer['mid_block'] must be a positive weight; it was",
            layer={"mid_block": weight},
        )
        for weight in (0, -1.0, NAN, float("inf"))
    ],
    built("no weights", "layer must be one module path or more", layer={}),
    built("no layer", "layer must be", TypeError, layer=None),
    *[
        built(f"step {x}", "step must be a positive int, 'uniform' or 'clean'", step=x)
        for x in (0, -1, True, 2.5, "all", None, 2**63)
    ],
    built("difference", "difference must be one of 'auto', ", difference="exact"),
    built("weighting", "weighting must be one of 'noise', None; it was 'snr'", weighting="snr"),
    built("impl", "impl must be one of 'eager', 'triton'; it was 'cuda'", impl="cuda"),
    built("impl: auto", "impl must be one of 'eager', 'triton'; it was 'auto'", impl="auto"),
    built("difference: gone", "difference must be one of 'auto', 'central', 'literal', 'scaled'", difference="tangent"),
    built("chunk_size: 0", "chunk_size must be None or a positive int; it was 0", chunk_size=0),
    built("reduction", "reduction must be one of 'mean', 'none', 'sum'", reduction="avg"),
    *[
        built(
            f"schedule {type(x).__name__}",
            "schedule must be a NoiseSchedule, a diffusers scheduler",
            TypeError,
            schedule=x,
        )
        for x in ("ddpm", 1000, DDPMScheduler, KarrasVeScheduler())
    ],
    built(
        "epsilon, zero terminal SNR",
        "prediction_type must be 'v_prediction' or 'sample' for a schedule with zero terminal SNR",
        schedule=DDPMScheduler(rescale_betas_zero_snr=True),
    ),
    *[
        Bad(
            f"betas {betas}",
            lambda betas=betas: NoiseSchedule(betas),
            "betas must be a 1-D sequence of values in (0, 1]",
        )
        for betas in ([], [0.1, 0.0], [-0.1], [0.1, 1.1], [NAN], [[0.1]], 0.1)
    ],
    Bad(
        "prediction",
        lambda: NoiseSchedule([0.1], "noise"),
        "prediction_type must be one of 'epsilon', 'sample', 'v_pred",
    ),
    Bad("terminal", lambda: NoiseSchedule([0.1, 1.0]), "prediction_type must be 'v_prediction' or 'sample'"),
    Bad(
        "flow from data to noise",
        lambda: NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(invert_sigmas=True)),
        "schedule must be a NoiseSchedule, a diffusers scheduler that has `betas` or a flow's `shift`, or None",
        TypeError,
    ),
    *(
        Bad(
            name,
            lambda name=name: NoiseSchedule.from_scheduler(getattr(diffusers, name)()),
            "schedule must be a NoiseSchedule, a diffusers scheduler that has",
            TypeError,
        )
        for name in ("HeliosScheduler", "MiniMaxH3Scheduler")
        if hasattr(diffusers, name)
    ),
]


def features(**changes: Any) -> Any:
    arguments = changed(batch(unet(), **SIZE), changes)
    return ncp().features(*[arguments[name] for name in ("noisy_latents", "timesteps", "encoder_hidden_states")])


ROWS += [
    Bad("features: rank", lambda: features(noisy_latents=lambda x: x[0]), "latents must be shaped (B, 4, H, W)"),
    Bad("features: integer", lambda: features(noisy_latents=Tensor.byte), "latents must be a floating", TypeError),
    Bad(
        "features: timesteps",
        lambda: features(timesteps=lambda t: t[:1]),
        "timesteps must be 0-dimensional or of shape",
    ),
    Bad("features: text", lambda: features(encoder_hidden_states=None), "encoder_hidden_states must be given"),
]


def drawn(**given: Any) -> Any:
    loss, arguments = NCP(unet(), step="uniform"), batch(unet(), pairs=True, **SIZE)
    del arguments["ref_pred"]
    return ncp_dpo_loss(loss, **arguments, ref_error=torch.ones(4), **given)


ROWS += [
    Bad("kept error, drawn steps", drawn, "ref_error must be None for step='uniform' without a generator"),
]


@pytest.mark.parametrize(
    ("layer", "there"),
    [
        ("down_block", "(UNet2DConditionModel has ['conv_in', 'time_proj', "),
        ("down_blocks.0.resnet.0", "(down_blocks.0 has ['attentions', 'resnets', 'downsamplers']); it was 'down_"),
    ],
)
def test_a_layer_that_is_not_there_is_told_what_is_there(layer: str, there: str) -> None:
    with pytest.raises(ValueError, match=re.escape(there)):
        NCP(unet(), layer)


@pytest.mark.parametrize("row", ROWS, ids=[f"{i}: {row.message[:70]}" for i, row in enumerate(ROWS)])
def test_a_bad_argument_is_named_and_told_what_it_must_be(row: Bad) -> None:
    with pytest.raises(row.error, match="^" + re.escape(row.message)) as raised:
        row.call()
    assert type(raised.value) is row.error


def test_without_the_change_every_row_is_a_good_call() -> None:
    for use in (ncp_dpo_loss, ncp_cpo_loss, ncp_sft_loss):
        arguments = batch(unet(), pairs=True, **SIZE)
        if use is not ncp_dpo_loss:
            del arguments["ref_pred"]
        assert use(ncp(), **arguments).loss.isfinite()
    for loss, of in ((ncp(), unet()), (xl(), xl_unet())):
        assert all(error.isfinite().all() for error in loss.errors(**batch(of, **SIZE)))
    assert features()
    assert all(use(**arguments) is not None for use, arguments in GOOD.items())


def test_pairs_may_differ_in_a_target_that_is_not_the_noise() -> None:
    velocity = NCP(unet(), schedule=DDPMScheduler(prediction_type="v_prediction"))
    arguments = changed(batch(unet(), pairs=True, **SIZE), {"target": torch.randn_like})
    assert ncp_dpo_loss(velocity, **arguments).loss.isfinite()
