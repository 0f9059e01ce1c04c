"""Half precision: the default difference keeps value and gradient where the published definition is rounding noise.

Truth is the literal definition in float64, on the same network (weights rounded to the half dtype first, so that only
computing differs) and the same predictions.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, encoder_of, sd15, sdxl
from peft import LoraConfig
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ncp_loss import NoiseConditionedPerceptualLoss, NoiseSchedule, ncp_dpo_loss

BF16, FP16 = torch.bfloat16, torch.float16
DTYPES = {"bf16": BF16, "fp16": FP16}
TIMESTEPS = st.sampled_from([1, 5, 20, 100, 500, 900, 999])


def rounded(unet: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The network in ``dtype``, and in float64 with the very same weights."""
    half = copy.deepcopy(unet).to(dtype)
    return half, copy.deepcopy(half).double()


def arguments_for(unet: nn.Module, t: int, error: float, seed: int, rows: int = 4) -> dict:
    """A batch in float32 at one timestep, conditioning included: predictions need not be as coarse as the network."""
    return batch(unet, rows, timesteps=[t] * rows, error=error, seed=seed, dtype=torch.float32)


def in_float64(arguments: dict) -> dict:
    moved = {
        k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()
    }
    if "added_cond_kwargs" in moved:
        moved["added_cond_kwargs"] = {k: v.double() for k, v in moved["added_cond_kwargs"].items()}
    moved["model_pred"].requires_grad_()
    return moved


def error_and_gradient(
    unet: nn.Module, arguments: dict, difference: str, layer: str = "down_blocks"
) -> tuple[Tensor, Tensor]:
    error, _ = NoiseConditionedPerceptualLoss(unet, layer, difference=difference).errors(**arguments)
    return error.detach().double(), torch.autograd.grad(error.sum(), arguments["model_pred"])[0].double()


def ratio_and_cosine(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Medians over the batch."""
    a, b = (g.flatten(1) / g.flatten(1).norm(dim=1, keepdim=True) for g in (found[1], truth[1]))
    return (found[0] / truth[0]).median().item(), (a * b).sum(1).median().item()


def measured(unet, dtype, difference, t, error, seed, layer="down_blocks") -> tuple[float, float]:
    half, exact = rounded(unet, dtype)
    arguments = arguments_for(unet, t, error, seed)
    truth = error_and_gradient(exact, in_float64(arguments), "literal", layer)
    return ratio_and_cosine(error_and_gradient(half, arguments, difference, layer), truth)


@pytest.mark.slow
@settings(max_examples=16)
@given(
    make=st.sampled_from([sd15, sdxl]),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([BF16, FP16]),
    t=TIMESTEPS,
    error=st.sampled_from([0.3, 0.05, 0.01]),
)
def test_auto_is_right_in_half_precision(make, seed, dtype, t, error):
    """A median of four samples: the bounds allow for its scatter; benchmarks/precision.py has the narrow ones."""
    ratio, cosine = measured(make(seed), dtype, "auto", t, error, seed)
    assert cosine >= (0.985 if dtype == BF16 else 0.995)
    assert abs(ratio - 1) <= (0.06 if dtype == BF16 else 0.03)


@pytest.mark.parametrize("error", [0.3, 0.05, 0.01])
@pytest.mark.parametrize("t", [1, 500, 999])
def test_auto_is_right_in_float32(t, error):
    unet = sd15(dtype=torch.float32)
    arguments = arguments_for(unet, t, error, 0)
    truth = error_and_gradient(copy.deepcopy(unet).double(), in_float64(arguments), "literal")
    ratio, cosine = ratio_and_cosine(error_and_gradient(unet, arguments, "auto"), truth)
    assert cosine >= 0.9999
    assert abs(ratio - 1) <= 0.001


def test_the_published_definition_is_rounding_noise_in_bf16_where_auto_is_not():
    """What all this is for: without it these tests would measure nothing."""
    unet = sd15()
    literal, auto = (measured(unet, BF16, difference, 900, 0.05, 0) for difference in ("literal", "auto"))
    assert literal[0] > 100
    assert literal[1] < 0.5
    assert abs(auto[0] - 1) < 0.05
    assert auto[1] > 0.985


@pytest.mark.slow
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("difference", ["scaled", "central", "auto"])
def test_value_and_gradient_are_continuous_through_zero_error(difference, name):
    """Along a line through the target the error is a parabola and its gradient a straight line, however near to it."""
    half, _ = rounded(sd15(), DTYPES[name])
    arguments = arguments_for(half, 500, 1.0, 3)
    target, direction = arguments["target"], (arguments["model_pred"] - arguments["target"]).detach()
    found = {}
    for length in (-1e-1, -1e-3, -1e-6, 0.0, 1e-6, 1e-3, 1e-1):
        arguments["model_pred"] = (target + length * direction).requires_grad_()
        exact = (arguments["model_pred"].detach() - target).flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1)
        error, slope = error_and_gradient(half, arguments, difference)
        found[length] = (error, slope, exact.double())
    assert torch.equal(found[0.0][0], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(found[0.0][1], torch.zeros_like(found[0.0][1]))
    scatter = 0.4 if difference == "scaled" else 0.15  # rounding falls differently at every length
    error, slope, exact = found[1e-1]
    unit, size = (error / exact.square()).median(), (slope.flatten(1).norm(dim=1) / exact).median()
    for length in (-1e-1, -1e-3, -1e-6, 1e-6, 1e-3):
        error, slope, exact = found[length]
        torch.testing.assert_close((error / exact.square()).median(), unit, rtol=scatter, atol=0)
        torch.testing.assert_close((slope.flatten(1).norm(dim=1) / exact).median(), size, rtol=scatter, atol=0)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 65536.0, 1e12])
def test_gradients_neither_underflow_nor_overflow_whatever_the_loss_is_scaled_by(name, scale):
    """As a GradScaler does, or a small learning signal: the encoder's backward pass sees cotangents of order one."""
    half, _ = rounded(sd15(), DTYPES[name])
    arguments = arguments_for(half, 900, 0.01, 0)
    seen = []
    ncp = NoiseConditionedPerceptualLoss(half)
    encoder_of(ncp).view.down_blocks[-1].register_full_backward_hook(lambda m, gi, go: seen.append(go[0].float()))
    error, _ = ncp.errors(**arguments)
    (one,) = torch.autograd.grad(error.sum(), arguments["model_pred"], retain_graph=True)
    (scaled,) = torch.autograd.grad(scale * error.double().sum(), arguments["model_pred"], retain_graph=True)
    torch.testing.assert_close(scaled.double() / scale, one.double(), rtol=1e-5, atol=0)
    assert (one != 0).float().mean() > 0.99
    sizes = [g.flatten(1).square().mean(1).sqrt() for g in seen]
    assert all(((size > 0.9) & (size < 1.1)).all() for size in sizes)


@pytest.mark.parametrize("name", DTYPES)
def test_the_lora_gradient_of_ncp_dpo_agrees_with_float64s(name):
    """The same residuals fed to both; one float64 graph from predictions to adapters, so that only the loss differs."""
    half, exact = rounded(sd15(), DTYPES[name])
    arguments = batch(half, 4, pairs=True, dtype=torch.float32, error=0.0, timesteps=[20, 300, 700, 900])
    model = copy.deepcopy(exact)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    adapters = [p for p in model.parameters() if p.requires_grad]
    wide = in_float64(arguments)
    prediction = model(wide["noisy_latents"], wide["timesteps"], wide["encoder_hidden_states"]).sample

    def adapter_gradient(unet: nn.Module, inputs: dict, difference: str) -> Tensor:
        reference = {"ref_pred": (0.9 * prediction.detach()).to(inputs["target"].dtype)}
        leaf = {"model_pred": prediction.detach().to(inputs["target"].dtype).requires_grad_()}
        ncp = NoiseConditionedPerceptualLoss(unet, difference=difference)
        loss = ncp_dpo_loss(ncp, **(inputs | reference | leaf), beta=2500.0).loss
        (slope,) = torch.autograd.grad(loss, leaf["model_pred"])
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(prediction, adapters, slope.double(), retain_graph=True)]
        )

    truth = adapter_gradient(exact, wide, "literal")
    cosines = {
        d: torch.cosine_similarity(adapter_gradient(half, arguments, d), truth, dim=0, eps=0)
        for d in ("auto", "literal")
    }
    assert cosines["auto"] >= 0.98
    assert cosines["literal"] < cosines["auto"]


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float64, 4), (torch.float32, 4), (FP16, 5), (BF16, 6)])
def test_auto_costs_at_most_half_more_encoder_work_in_bf16_and_a_quarter_more_in_fp16(dtype, expected):
    """One call a point and one backward pass; target, reference, model and backward are the definition's four."""
    unet = sd15(dtype=dtype)
    ncp, calls = NoiseConditionedPerceptualLoss(unet), []
    encoder_of(ncp).view.register_forward_pre_hook(lambda m, a: calls.append((len(a[0]), torch.is_grad_enabled())))
    ncp.errors(**batch(unet, 3))
    assert calls == [(3, False)] * (expected - 2) + [(3, True)]


@pytest.mark.parametrize("difference", ["literal", "scaled", "central"])
def test_the_memory_format_changes_no_value(difference):
    unet = sd15()
    arguments = batch(unet, 2, height=8, width=8)
    contiguous = error_and_gradient(unet, arguments, difference)
    channels_last = error_and_gradient(unet.to(memory_format=torch.channels_last), arguments, difference)
    torch.testing.assert_close(channels_last, contiguous, rtol=1e-8, atol=1e-15)


def test_without_a_gradient_to_take_nothing_is_evaluated_for_one():
    unet = sd15(dtype=BF16)
    ncp, calls = NoiseConditionedPerceptualLoss(unet), []
    arguments = batch(unet, 3)
    with_gradient, with_ref = ncp.errors(**arguments)
    encoder_of(ncp).view.register_forward_pre_hook(lambda m, a: calls.append(len(a[0])))
    with torch.no_grad():
        error, ref_error = ncp.errors(**arguments)
    assert calls == [3] * 4
    assert torch.equal(error, with_gradient)
    assert torch.equal(ref_error, with_ref)
    assert not error.requires_grad


class TF32(TorchFunctionMode):
    """Rounds the inputs of matrix products and convolutions to TF32's ten mantissa bits, as a GPU does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in {"linear", "conv2d", "matmul", "bmm", "scaled_dot_product_attention"}:
            args = tuple(self.round(a) if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def round(x: Tensor) -> Tensor:
        bits = x.detach().view(torch.int32)
        nearest = ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
        return x + (nearest - x).detach()  # the derivative of the identity


def test_auto_is_right_where_matrix_products_round_like_tf32_and_the_definition_is_not(monkeypatch):
    unet = sd15(dtype=torch.float32)
    arguments = arguments_for(unet, 500, 0.05, 0)
    truth = error_and_gradient(copy.deepcopy(unet).double(), in_float64(arguments), "literal")
    monkeypatch.setattr("ncp_loss.difference._uses_tf32", lambda device: True)
    with TF32():
        found = {d: ratio_and_cosine(error_and_gradient(unet, arguments, d), truth) for d in ("auto", "literal")}
    assert abs(found["auto"][0] - 1) < 0.02
    assert found["auto"][1] > 0.995
    assert found["literal"][0] > 1.1
    assert found["literal"][1] < 0.97


# The fourth, fp16 over bf16 weights, is CUDA's alone: on the CPU autocast leaves group norm's weights as they are.
@pytest.mark.parametrize(("weights", "compute"), [(torch.float32, "bf16"), (torch.float32, "fp16"), (BF16, "bf16")])
def test_autocast_is_right_over_single_and_half_weights(weights, compute):
    half, exact = rounded(sd15(), weights)
    arguments = arguments_for(half, 500, 0.05, 0)
    truth = error_and_gradient(exact, in_float64(arguments), "literal")
    with torch.autocast("cpu", DTYPES[compute]):
        found = error_and_gradient(half, arguments, "auto")
    ratio, cosine = ratio_and_cosine(found, truth)
    assert abs(ratio - 1) < 0.06
    assert cosine > (0.985 if compute == "bf16" else 0.995)


def test_latents_and_coefficients_stay_in_float32_up_to_the_encoders_door():
    """Two predictions that a bf16 reverse step would not tell apart have different errors, in the right proportion."""
    half, _ = rounded(sd15(), BF16)
    arguments = arguments_for(half, 900, 1e-4, 0)
    one = error_and_gradient(half, arguments, "auto")[0]
    arguments["model_pred"] = (
        (arguments["target"] + 2 * (arguments["model_pred"] - arguments["target"])).detach().requires_grad_()
    )
    two = error_and_gradient(half, arguments, "auto")[0]
    torch.testing.assert_close((two / one).median(), torch.tensor(4.0, dtype=torch.float64), rtol=0.02, atol=0)
    assert NoiseSchedule.from_scheduler(None).reverse_step(torch.tensor([5])).B.dtype == torch.float32


class Mixed(nn.Module):
    """A half-precision trunk whose first weights are float32, as where an embedding is kept so."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1), requires_grad=False)
        self.trunk = trunk

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        dtype = self.trunk.dtype
        return self.trunk((x * self.gain).to(dtype), timestep, encoder_hidden_states.to(dtype)).sample


@pytest.mark.parametrize("name", DTYPES)
def test_auto_goes_by_what_features_are_computed_in_where_the_first_weight_would_mislead(name):
    half, exact = rounded(sd15(), DTYPES[name])
    arguments = arguments_for(half, 500, 0.05, 0)
    truth = error_and_gradient(exact, in_float64(arguments), "literal")
    ratio, cosine = ratio_and_cosine(error_and_gradient(Mixed(half), arguments, "auto", "trunk.down_blocks.3"), truth)
    assert abs(ratio - 1) < 0.06
    assert cosine > (0.985 if name == "bf16" else 0.995)
