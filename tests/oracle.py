"""Float64 truth for noise-conditioned perceptual losses, written out one sample at a time.

Equation numbers are those of arXiv 2406.17636. `abar` lists the cumulative products of alpha_t = 1 - beta_t;
before the first timestep it is 1, no noise left. Latents and features are float64, scalars Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def scaled_linear_betas(n: int = 1000, start: float = 0.00085, end: float = 0.012) -> list[float]:
    """beta_t of Stable Diffusion's schedule: the square of a straight line from sqrt(start) to sqrt(end)."""
    first, last = math.sqrt(start), math.sqrt(end)
    return [(first + (last - first) * i / max(n - 1, 1)) ** 2 for i in range(n)]


def cumulative_alphas(betas: Sequence[float]) -> list[float]:
    """abar_t of eq. 1: the product of (1 - beta_s) over s <= t."""
    return [math.prod(1.0 - beta for beta in betas[: t + 1]) for t in range(len(betas))]


def estimates(prediction_type: str, output: Tensor, x_t: Tensor, abar_t: float) -> tuple[Tensor, Tensor]:
    """(x_0, eps) solving eq. 1, x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, given the model's output.

    v_prediction is v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0.
    """
    output, x_t = output.double(), x_t.double()
    alpha, sigma = math.sqrt(abar_t), math.sqrt(1.0 - abar_t)
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha, output
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * output, sigma * x_t + alpha * output
    if prediction_type == "sample":
        return output, (x_t - alpha * output) / sigma
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def next_timestep(t: int, step: int = 1) -> int:
    """t' of eq. 13: the timestep at which the features of the less noisy latent are taken, never below 0."""
    return max(int(t) - step, 0)


def reverse_step(prediction_type: str, output: Tensor, x_t: Tensor, t: int, z: Tensor,
                 abar: Sequence[float], step: int = 1) -> Tensor:  # fmt: skip
    """DDPM posterior q(x_{t-step} | x_t, x_0) sampled at z; eq. 2 (12) for epsilon and step 1.

    With p = abar_{t-step}, a = abar_t / p: mean = [sqrt(p) (1 - a) x_0 + sqrt(a) (1 - p) x_t] / (1 - abar_t),
    variance = (1 - a) (1 - p) / (1 - abar_t). Past the first timestep (p = 1) it is x_0.
    """
    t = int(t)
    x_0, _ = estimates(prediction_type, output, x_t, abar[t])
    if t - step < 0:
        return x_0
    abar_t, abar_next = abar[t], abar[t - step]
    a = abar_t / abar_next
    mean_from_x_0 = math.sqrt(abar_next) * (1.0 - a) / (1.0 - abar_t)
    mean_from_x_t = math.sqrt(a) * (1.0 - abar_next) / (1.0 - abar_t)
    variance = (1.0 - a) * (1.0 - abar_next) / (1.0 - abar_t)
    return mean_from_x_0 * x_0 + mean_from_x_t * x_t.double() + math.sqrt(variance) * z.double()


def renoise(prediction_type: str, output: Tensor, x_t: Tensor, t: int, t_next: int,
            abar: Sequence[float]) -> Tensor:  # fmt: skip
    """Eq. 1 at t_next with the estimates of x_0 and eps made at t (deterministic DDIM); x_0 if t_next < 0."""
    x_0, eps = estimates(prediction_type, output, x_t, abar[int(t)])
    abar_next = abar[int(t_next)] if t_next >= 0 else 1.0
    return math.sqrt(abar_next) * x_0 + math.sqrt(1.0 - abar_next) * eps


def clean(prediction_type: str, output: Tensor, x_t: Tensor, t: int, abar: Sequence[float]) -> Tensor:
    """x_0 of eq. 1, as estimated from the model's output."""
    return estimates(prediction_type, output, x_t, abar[int(t)])[0]


def features(unet: nn.Module, layer_path: str, x: Tensor, t: int, encoder_hidden_states: Tensor,
             **kw: Any) -> Tensor:  # fmt: skip
    """f(x, c, t) of eq. 13 for a batch of 1: what one submodule returns while the whole frozen model runs."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple, output: Any) -> None:
        caught.append((output[0] if isinstance(output, tuple) else output).clone())

    constants = {name: parameter.detach() for name, parameter in unet.named_parameters()}
    handle = unet.get_submodule(layer_path).register_forward_hook(catch)
    try:
        timestep = torch.tensor([int(t)], device=x.device)
        inputs = {"encoder_hidden_states": encoder_hidden_states, **kw}
        functional_call(unet, constants, (x.double(), timestep), inputs)
    finally:
        handle.remove()
    (output,) = caught
    return output


def perceptual_error(unet: nn.Module, layer_path: str, prediction: Tensor, target: Tensor, x_t: Tensor,
                     t: int, z: Tensor, abar: Sequence[float], prediction_type: str,
                     encoder_hidden_states: Tensor, step: int = 1, normalize: bool = False,
                     **kw: Any) -> Tensor:  # fmt: skip
    """PL of eq. 13 for one sample, the mean over C, H, W in place of the sum, the same z on both sides.

    normalize divides by the mean square of the target's features. Differentiable in prediction.
    """
    x_t, z, t_next = x_t.detach(), z.detach(), next_timestep(t, step)
    x_prediction = reverse_step(prediction_type, prediction, x_t, t, z, abar, step)
    x_target = reverse_step(prediction_type, target.detach(), x_t, t, z, abar, step)
    f_prediction = features(unet, layer_path, x_prediction, t_next, encoder_hidden_states, **kw)
    f_target = features(unet, layer_path, x_target, t_next, encoder_hidden_states, **kw).detach()
    error = (f_prediction - f_target).pow(2).mean()
    return error / f_target.pow(2).mean() if normalize else error


def _sample(value: Any, i: int) -> Any:
    """Sample i, as a batch of 1, of a tensor or of the tensors in a dict; anything else as it is."""
    if isinstance(value, dict):
        return {key: _sample(item, i) for key, item in value.items()}
    return value[i : i + 1] if isinstance(value, Tensor) else value


def batch_errors(unet: nn.Module, layer_path: str, predictions: Tensor, targets: Tensor, x: Tensor,
                 timesteps: Sequence[int] | Tensor, z: Tensor, abar: Sequence[float], prediction_type: str,
                 encoder_hidden_states: Tensor, step: int = 1, normalize: bool = False,
                 **kw: Any) -> Tensor:  # fmt: skip
    """PL of eq. 13 for each sample of a batch, (B,), one sample at a time."""
    errors = []
    for i in range(len(predictions)):
        one, t = slice(i, i + 1), int(timesteps[i])
        errors.append(perceptual_error(unet, layer_path, predictions[one], targets[one], x[one], t, z[one],
                                       abar, prediction_type, encoder_hidden_states[one], step, normalize,
                                       **_sample(kw, i)))  # fmt: skip
    return torch.stack(errors)


def _log_sigmoid(m: float) -> float:
    """log(1 / (1 + exp(-m))), without overflow."""
    return min(m, 0.0) - math.log1p(math.exp(-abs(m)))


def dpo(chosen: Iterable[float], rejected: Iterable[float], ref_chosen: Iterable[float],
        ref_rejected: Iterable[float], beta: Iterable[float] | float, loss_type: str = "sigmoid",
        label_smoothing: float = 0.0, sft_weight: float = 0.0) -> list[float]:  # fmt: skip
    """Eq. 18 per pair, with beta in place of beta T, plus sft_weight times the winner's error.

    label_smoothing is read by "sigmoid" (cDPO) and "robust" (2403.00409, eq. 12: the probability of a flipped label).
    """
    quads = list(zip(chosen, rejected, ref_chosen, ref_rejected, strict=True))
    losses = []
    for (win, lose, ref_win, ref_lose), b in zip(quads, each(beta, len(quads)), strict=True):
        z = -b * ((float(win) - float(ref_win)) - (float(lose) - float(ref_lose)))
        if loss_type == "sigmoid":
            loss = -(1.0 - label_smoothing) * _log_sigmoid(z) - label_smoothing * _log_sigmoid(-z)
        elif loss_type == "hinge":
            loss = max(0.0, 1.0 - z)
        elif loss_type == "ipo":
            gap = z / b - 1.0 / (2.0 * b)
            loss = gap * gap
        elif loss_type == "robust":
            kept, flipped = (1.0 - label_smoothing) * -_log_sigmoid(z), label_smoothing * -_log_sigmoid(-z)
            loss = (kept - flipped) / (1.0 - 2.0 * label_smoothing)
        elif loss_type == "linear":
            loss = b * linear_weight(z) * (float(win) - float(lose))
        elif loss_type == "dmpo":
            log_p, log_not_p = _log_sigmoid(z), _log_sigmoid(-z)
            loss = math.exp(log_p) * (log_p - math.log(0.99)) + math.exp(log_not_p) * (log_not_p - math.log(0.01))
        else:
            raise ValueError(f"unknown loss type {loss_type!r}")
        losses.append(loss + sft_weight * float(win))
    return losses


def linear_weight(z: float) -> float:
    """What stands for sigmoid(-z) in the gradient of Linear-DPO (2605.21123): held constant, never differentiated."""
    return min(max(0.5 - 0.2 * z, 0.001), 0.999)


def each(value: Iterable[float] | float, count: int) -> list[float]:
    """A number for each of ``count``, where one is given for all too."""
    return [float(value)] * count if isinstance(value, int | float) else [float(x) for x in value]


def mapo(chosen: Iterable[float], rejected: Iterable[float], beta: Iterable[float] | float = 0.1, scale: float = 0.5,
         steps: int = 1000) -> list[float]:  # fmt: skip
    """MaPO (2406.06424) per pair: e_w - beta log sigmoid(T [f(e_w) - f(e_l)])."""
    pairs = [(float(win), float(lose)) for win, lose in zip(chosen, rejected, strict=True)]
    return [
        win - b * _log_sigmoid(steps * (mapo_ratio(scale * win) - mapo_ratio(scale * lose)))
        for (win, lose), b in zip(pairs, each(beta, len(pairs)), strict=True)
    ]


def mapo_ratio(y: float) -> float:
    """y / (exp(y) - 1): 1 at 0, and nothing where exp overflows."""
    if y == 0.0:
        return 1.0
    return y / math.expm1(y) if y < 700.0 else 0.0


def mapo_ratio_slope(y: float) -> float:
    """The derivative of ``mapo_ratio``, from its Bernoulli series near 0, where the closed form cancels."""
    if abs(y) < 0.5:
        return -1 / 2 + y / 6 - y**3 / 180 + y**5 / 5040 - y**7 / 151200 + y**9 / 4790016
    if y > 300.0:
        return 0.0
    return 1.0 / math.expm1(y) - y * math.exp(y) / math.expm1(y) ** 2


def kto(error: Iterable[float], ref_error: Iterable[float], desirable: Iterable[bool], beta: Iterable[float] | float,
        kl: float | None = None, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
        ) -> list[float]:  # fmt: skip
    """Diffusion-KTO (2404.04465) per sample: w_y (1 - sigmoid(y beta [(r - e) - z])), z not below 0."""
    gains = [float(ref) - float(e) for e, ref in zip(error, ref_error, strict=True)]
    z = max(math.fsum(gains) / len(gains) if kl is None else kl, 0.0)
    losses = []
    for gain, liked, b in zip(gains, desirable, each(beta, len(gains)), strict=True):
        y, weight = (1.0, desirable_weight) if liked else (-1.0, undesirable_weight)
        losses.append(weight * (1.0 - math.exp(_log_sigmoid(y * b * (gain - z)))))
    return losses


def cpo(chosen: Iterable[float], rejected: Iterable[float], beta: Iterable[float] | float,
        sft_weight: float) -> list[float]:  # fmt: skip
    """Eq. 19 per pair, with beta in place of beta T and sft_weight for lambda."""
    pairs = [(float(win), float(lose)) for win, lose in zip(chosen, rejected, strict=True)]
    betas = each(beta, len(pairs))
    return [-_log_sigmoid(-b * (win - lose)) + sft_weight * win for (win, lose), b in zip(pairs, betas, strict=True)]


def sft(chosen: Iterable[float]) -> list[float]:
    """NCP-SFT per pair: the chosen sample's error."""
    return [float(win) for win in chosen]


def absolute_winners(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Indices of the kept rows, by the definition: for each image of a prompt, all of the prompt's rows are read."""
    kept = set()
    for prompt in {row["caption"] for row in rows}:
        mine = [(i, row) for i, row in enumerate(rows) if row["caption"] == prompt]
        for image in {row[f"image_{side}_uid"] for _, row in mine for side in (0, 1)}:
            labels = [
                (i, row[f"label_{side}"]) for i, row in mine for side in (0, 1) if row[f"image_{side}_uid"] == image
            ]
            if labels and all(label == 1 for _, label in labels):
                kept.add(max(i for i, _ in labels))
    return sorted(kept)
