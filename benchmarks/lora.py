"""The gradient that training takes: of the NCP-DPO loss with respect to LoRA parameters."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.compute import COMPUTES
from benchmarks.networks import NETWORKS, converted, rounded
from benchmarks.report import Kept
from examples.digits import CLASSES, add_lora, condition, new_scheduler, real_digits
from ncp_loss import NoiseConditionedPerceptualLoss, frozen_view, ncp_dpo_loss

PAIRS, BATCHES = 4, 4
DIFFERENCES = ["literal", "auto"]


def lora_gradients(network: str, args: argparse.Namespace, kept: Kept) -> Iterator[dict[str, Any]]:
    """A row per precision and estimator: the cosine of the whole LoRA gradient with that of float64, over batches.

    Model and reference predict in bf16 or fp16, and these predictions are fed to all: to the definition in float64 as
    to every estimator. The gradient that each sends to the predictions goes through one float64 model to its adapters.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for batch in range(1 if args.tiny else BATCHES):
        for name in ("bfloat16",) if args.tiny else ("float16", "bfloat16"):
            make = partial(_cosines, network, COMPUTES[name].weights, args, args.seed + batch)
            for difference, cosine in kept.get(
                f"lora {network} {batch} {name}", lambda make=make: dict(make())
            ).items():
                found.setdefault((name, difference), []).append(cosine)
    for (name, difference), cosines in found.items():
        yield {
            "network": network,
            "compute": name,
            "estimator": difference,
            "batches": len(cosines),
            "cosine": statistics.median(cosines),
            "worst": min(cosines),
        }


def _cosines(network: str, dtype: torch.dtype, args: argparse.Namespace, seed: int) -> Iterator[tuple[str, float]]:
    torch.manual_seed(seed)
    base = NETWORKS[network].make(seed, args.tiny).to(args.device)
    model = copy.deepcopy(base)
    _adapt(model)
    inputs = converted(_pairs(network, base), args.device)
    at = [inputs[key] for key in ("noisy_latents", "timesteps", "encoder_hidden_states")]
    extra = {key: inputs[key] for key in inputs.keys() & {"added_cond_kwargs"}}

    # Predictions as a trainer in half precision makes them.
    half, half_extra = copy.deepcopy(model).to(dtype), converted(extra, args.device, dtype)
    half_at = [at[0].to(dtype), at[1], at[2].to(dtype)]
    with torch.no_grad():
        prediction = half(*half_at, **half_extra).sample.float()
        reference = frozen_view(half)(*half_at, **half_extra).sample.float()
    if network != "digits":  # a random network predicts no noise: move its predictions near it, both by the same
        moved = inputs["target"] + 0.1 * torch.randn_like(reference)
        prediction, reference = prediction + (moved - reference), moved
    inputs |= {"model_pred": prediction, "ref_pred": reference}

    exact = copy.deepcopy(model).double()
    exact_prediction = exact(
        at[0].double(), at[1], at[2].double(), **converted(extra, args.device, torch.float64)
    ).sample
    parameters = [p for p in exact.parameters() if p.requires_grad]

    def gradient(unet: UNet2DConditionModel, difference: str, inputs: dict[str, Any], beta: float) -> Tensor:
        ncp = NoiseConditionedPerceptualLoss(unet, schedule=new_scheduler(), difference=difference)
        leaf = inputs["model_pred"].detach().requires_grad_()
        (slope,) = torch.autograd.grad(ncp_dpo_loss(ncp, **(inputs | {"model_pred": leaf}), beta=beta).loss, leaf)
        gradients = torch.autograd.grad(exact_prediction, parameters, slope.double(), retain_graph=True)
        return torch.cat([g.flatten() for g in gradients])

    wide = converted(inputs, args.device, torch.float64)
    truth_net = copy.deepcopy(base).double()
    ncp = NoiseConditionedPerceptualLoss(truth_net, schedule=new_scheduler(), difference="literal")
    error, ref_error = ncp.errors(**wide)
    chosen, rejected = (ref_error - error).chunk(2)
    beta = 1 / (chosen - rejected).abs().mean().item()  # margins of order one, as in the midst of training
    truth = gradient(truth_net, "literal", wide, beta)
    narrow = copy.deepcopy(base).to(dtype)
    for difference in DIFFERENCES:
        yield difference, cosine_similarity(gradient(narrow, difference, inputs, beta), truth, dim=0).item()


@torch.no_grad()
def _adapt(model: UNet2DConditionModel) -> None:
    """Adapters that changed the model a little, as after some steps of training, in weights that every dtype holds."""
    for parameter in add_lora(model):
        parameter.copy_(rounded(0.05 * torch.randn_like(parameter)))


def _pairs(network: str, unet: UNet2DConditionModel) -> dict[str, Any]:
    """Winners, then losers: the requested digit and another one; for a random network, normal latents."""
    t = torch.randint(1000, (PAIRS,))
    if network == "digits":
        (images, labels), _ = real_digits()
        wanted = torch.randint(CLASSES, (PAIRS,))
        drawn = torch.cat([wanted, (wanted + 1) % CLASSES]).tolist()
        clean = torch.stack([images[labels == digit][int(torch.randint(50, ()))] for digit in drawn])
        noise, t = torch.randn_like(clean[:PAIRS]).repeat(2, 1, 1, 1), t.repeat(2)
        noisy, text = new_scheduler().add_noise(clean, noise, t), condition(wanted.repeat(2))
        return {"noisy_latents": noisy, "timesteps": t, "encoder_hidden_states": text, "target": noise}
    arguments = NETWORKS[network].batch(unet, t.tolist(), [0.0, 0.0], int(torch.randint(1 << 30, ()))).arguments
    for shared in ("target", "encoder_hidden_states", "variance_noise"):
        arguments[shared] = torch.cat([arguments[shared][:PAIRS]] * 2)
    return arguments
