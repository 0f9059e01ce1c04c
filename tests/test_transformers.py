"""Transformers and flow matching: errors equal the definition, taken by a hook on the whole model and from sigmas."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from families import FAMILIES, Family, family_batch, flow, of_diffusers, transformer
from hypothesis import given
from hypothesis import strategies as st
from models import encoder_of
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ncp_loss import FlowSchedule, NoiseSchedule, frozen_view, ncp_dpo_loss
from ncp_loss import NoiseConditionedPerceptualLoss as NCP

CASES = [(name, layer) for name, family in FAMILIES.items() for layer in family.layers]
CONDITIONING = ("model_pred", "ref_pred", "target", "noisy_latents", "timesteps")


def loss(family: Family, model: nn.Module, layer: str, **options: Any) -> NCP:
    return NCP(model, layer, schedule=family.scheduler, call=family.call, **options)


def module_at(model: nn.Module, layer: str) -> nn.Module:
    parent, _, index = layer.rpartition(".")
    return model.get_submodule(parent)[int(index)]


def image_stream(module: nn.Module, kept: list[Tensor]) -> Any:
    """A hook that keeps the image's features: by what diffusers' code returns, not by what the library thinks of it."""
    text_first = type(module).__name__ in (
        "JointTransformerBlock",
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
        "QwenImageTransformerBlock",
    )

    def keep(module: nn.Module, args: Any, out: Any) -> None:  # before diffusers 0.35 Flux's single blocks have one
        kept.append(out[1] if text_first and isinstance(out, tuple) else out)  # stream, of text and image

    return module.register_forward_hook(keep)


def whole_model_features(family: Family, model: nn.Module, layer: str, x: Tensor, t: Tensor, given: dict) -> Tensor:
    kept: list[Tensor] = []
    conditioning = {k: v for k, v in given.items() if k not in CONDITIONING}
    call = family.call or (lambda m, x, t, **kw: m(x, timestep=t, **kw))
    handle = image_stream(module_at(model, layer), kept)
    call(model, x, t, **conditioning)
    handle.remove()
    return kept[0]


def step_of(scheduler: Any, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and t' of one reverse step with z = 0, from the scheduler's own tables."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        at = torch.stack([(scheduler.timesteps - each).abs().argmin() for each in t])
        u = 1 - at.double() / 1000  # the grid before shifting: 1, 0.999, ...
        sigma, after = (scheduler.config.shift * v / (1 + (scheduler.config.shift - 1) * v) for v in (u, u - 1 / 1000))
        torch.testing.assert_close(sigma, scheduler.sigmas[at].double(), rtol=1e-6, atol=0)
        return torch.ones_like(sigma), after - sigma, after * 1000
    t, abar = t.long(), torch.cumprod(1 - scheduler.betas.double(), 0)
    now, prev = abar[t], abar[t - 1]
    alpha = now / prev
    # The posterior mean, from the estimate of x_0 that the prediction gives.
    of_x0, of_x = prev.sqrt() * (1 - alpha) / (1 - now), alpha.sqrt() * (1 - prev) / (1 - now)
    if scheduler.config.prediction_type == "epsilon":
        return of_x + of_x0 / now.sqrt(), -of_x0 * (1 - now).sqrt() / now.sqrt(), t - 1
    return of_x + of_x0 * now.sqrt(), -of_x0 * (1 - now).sqrt(), t - 1


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_errors_and_gradients_are_the_definitions(name: str, layer: str) -> None:
    family = FAMILIES[name]
    model, given = transformer(family), family_batch(family)
    ncp = loss(family, model, layer, difference="literal")
    error, ref_error = ncp.errors(**given)
    (gradient,) = torch.autograd.grad(error.sum(), given["model_pred"])

    A, B, after = step_of(family.scheduler, given["timesteps"])
    pristine = copy.deepcopy(model)

    def features(prediction: Tensor) -> Tensor:
        x = A.reshape(-1, 1, 1, 1) * given["noisy_latents"] + B.reshape(-1, 1, 1, 1) * prediction
        return whole_model_features(family, pristine, layer, x, after.to(given["timesteps"].dtype), given)

    truth = features(given["target"]).detach()
    wanted = (features(given["model_pred"]) - truth).square().flatten(1).mean(1)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), given["model_pred"])
    wanted_ref = (features(given["ref_pred"]) - truth).square().flatten(1).mean(1)
    # Position tables and norms of some models are float32 whatever the weights are.
    rtol = 1e-7 if name in ("PixArt", "HunyuanDiT") else 1e-3
    torch.testing.assert_close(error, wanted, rtol=rtol, atol=0)
    torch.testing.assert_close(ref_error, wanted_ref.detach(), rtol=rtol, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=rtol, atol=rtol * float(wanted_gradient.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_past_the_layer_runs(name: str) -> None:
    family = FAMILIES[name]
    model, layer = transformer(family), family.layers[-1]
    ncp, ran = loss(family, model, layer), []
    parent = layer.rpartition(".")[0]
    for block_name, block in encoder_of(ncp).view.get_submodule(parent).named_children():
        block.register_forward_pre_hook(lambda *_, n=block_name: ran.append(int(n)))
    ncp.errors(**family_batch(family))
    last = list(model.get_submodule(parent)).index(module_at(model, layer))
    assert max(ran) == last < len(model.get_submodule(parent)) - 1


@pytest.mark.parametrize("name", FAMILIES)
def test_every_estimator_agrees_and_lora_trains_on_a_shared_frozen_base(name: str) -> None:
    family = FAMILIES[name]
    model, given = transformer(family), family_batch(family)
    layer = family.layers[-1]
    literal, _ = loss(family, model, layer, difference="literal").errors(**given)
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith("to_q")]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    assert targets
    shared = {p.data_ptr() for p in adapted.parameters()}
    for difference in ("scaled", "central"):
        ncp = loss(family, adapted, layer, difference=difference)
        assert all(p.data_ptr() in shared for p in encoder_of(ncp).view.parameters())
        torch.testing.assert_close(ncp.errors(**given)[0], literal, rtol=0.05, atol=0)
    reference = frozen_view(adapted)
    conditioning = {k: v for k, v in given.items() if k not in CONDITIONING}
    call = family.call or (lambda m, x, t, **kw: m(x, timestep=t, **kw))
    at = given["noisy_latents"], given["timesteps"].to(torch.float64)
    base = transformer(family)
    for ours, theirs in zip(call(reference, *at, **conditioning)[0], call(base, *at, **conditioning)[0], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_keeps_error_and_gradient(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    half, layer = transformer(family).to(dtype), family.layers[-1]
    given = family_batch(family)

    def error_and_gradient(model: nn.Module, given: dict, **options: Any) -> tuple[Tensor, Tensor]:
        error, _ = loss(family, model, layer, **options).errors(**given)
        return error.detach().double(), torch.autograd.grad(error.sum(), given["model_pred"])[0].double().flatten(1)

    narrow = {k: v.detach().float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
    narrow["model_pred"].requires_grad_()
    wide = {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in narrow.items()}
    wide["model_pred"].requires_grad_()
    error, gradient = error_and_gradient(half, narrow)
    truth, true_gradient = error_and_gradient(copy.deepcopy(half).double(), wide, difference="literal")
    torch.testing.assert_close(error, truth, rtol=0.1, atol=0)
    directions = [g / g.norm(dim=1, keepdim=True) for g in (gradient, true_gradient)]
    assert (directions[0] * directions[1]).sum(1).min() > (0.98 if dtype == torch.bfloat16 else 0.995)


def test_a_layer_that_is_kept_in_float32_in_a_half_precision_model_gets_the_estimator_of_its_products() -> None:
    """Wan's norms stay in float32 where from_pretrained loads it in bf16, and their inputs are products in bf16."""
    heads = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "freq_dim": 32}
    torch.manual_seed(0)
    exact = of_diffusers("WanTransformer3DModel")(
        **heads, in_channels=4, out_channels=4, text_dim=16, rope_max_seq_len=32, cross_attn_norm=True
    )
    exact.double().requires_grad_(False)
    half = copy.deepcopy(exact)
    for name, weight in half.named_parameters():
        weight.data = weight.data.to(torch.float32 if "norm" in name else torch.bfloat16)
    x, target, noise = (torch.randn(2, 4, 2, 8, 8, dtype=torch.float64) for _ in range(3))
    t, text = torch.tensor([300.0, 700.0]), torch.randn(2, 5, 16, dtype=torch.float64)
    schedule = FlowSchedule(3.0)
    truth = NCP(exact, "blocks.1.norm2", schedule=schedule)(target + 0.02 * noise, target, x, t, text)
    found = NCP(half, "blocks.1.norm2", schedule=schedule)(target + 0.02 * noise, target, x, t, text)
    torch.testing.assert_close(found, truth, rtol=0.1, atol=0)


def test_a_flow_step_is_the_schedulers_own_euler_step() -> None:
    scheduler = flow(3.0)
    scheduler.set_timesteps(1000)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    generator = torch.Generator().manual_seed(0)
    x, o = (torch.randn(1, 4, 4, 4, generator=generator) for _ in range(2))
    for i in (0, 10, 500, 990):
        t = FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps[i : i + 1]
        step = schedule.reverse_step(t)
        torch.testing.assert_close(step.latents(x, o, None), x + step.B * o, rtol=1e-6, atol=1e-6)
        after = FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps[i + 1]
        torch.testing.assert_close(step.timesteps, after[None], rtol=1e-5, atol=1e-4)


@given(st.floats(0.5, 8.0), st.floats(1.0, 1000.0), st.integers(2, 1500))
def test_flow_steps_compose_and_end_at_the_clean_end(shift: float, t: float, step: int) -> None:
    schedule = NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift))
    at = torch.tensor([t], dtype=torch.float64)

    def after(t: torch.Tensor, step: int) -> torch.Tensor:
        return schedule.reverse_step(t, step).timesteps

    after(torch.tensor([1000.0]), 1)  # shows the schedule that timesteps are no sigmas
    once, rest = after(at, step), after(after(at, 1), step - 1)
    torch.testing.assert_close(once, rest, rtol=1e-9, atol=1e-9)
    assert 0 <= once < at
    assert after(at, 1000) == 0
    back = schedule.reverse_step(at, "clean", dtype=torch.float64)
    torch.testing.assert_close(back.B, -at / 1000)
    assert back.timesteps == 0


@pytest.mark.parametrize("step", [1, 50, "uniform", "clean"])
def test_pairs_share_the_step_of_a_flow(step: Any) -> None:
    family = FAMILIES["SD3"]
    given = family_batch(family)
    given["timesteps"] = given["timesteps"][:1].repeat(2)
    ncp = loss(family, transformer(family), family.layers[0], step=step)
    out = ncp_dpo_loss(ncp, **given, generator=torch.Generator().manual_seed(0), beta=10.0)
    assert out.loss.isfinite()
    schedule = ncp.schedule.reverse_step(given["timesteps"], step, pairs=True)
    assert schedule.timesteps[0] == schedule.timesteps[1]


def test_normalize_makes_errors_of_loud_and_quiet_layers_comparable() -> None:
    """Activations of transformers reach thousands: raw squared errors differ by their square."""
    family = FAMILIES["SD3"]
    given = family_batch(family)
    quiet, loud = transformer(family), transformer(family)
    with torch.no_grad():
        for block in loud.transformer_blocks:  # what a block adds to its residual stream, three thousand times over
            block.attn.to_out[0].weight.mul_(3000)
            block.ff.net[2].weight.mul_(3000)
    raw, relative = (
        [loss(family, model, family.layers[-1], normalize=n).errors(**given)[0].mean() for model in (quiet, loud)]
        for n in (False, True)
    )
    assert raw[1] / raw[0] > 50
    assert 0.1 < relative[1] / relative[0] < 10


def test_streams_of_one_shape_are_refused_by_name() -> None:
    family = FAMILIES["SD3"]
    given = family_batch(family)
    given["encoder_hidden_states"] = torch.randn(2, 16, 16, dtype=torch.float64)  # as many words as image tokens
    model, layer = transformer(family), family.layers[0]
    with pytest.raises(ValueError, match=r"^layer must be a module that returns one tensor, .*as inside it") as told:
        loss(family, model, layer).errors(**given)
    assert_the_modules_named_can_be_taken(str(told.value), lambda inner: loss(family, model, inner).errors(**given))


def assert_the_modules_named_can_be_taken(message: str, use: Any) -> None:
    instead = re.findall(r"'([^']+)'", message.split(" inside it ")[1].split("; it was")[0])
    assert 0 < len(instead) <= 8
    taken = 0
    for inner in instead:
        with contextlib.suppress(ValueError):  # the text's of a first block, which latents do not reach
            taken += bool((use(inner).error > 0).all())
    assert taken > 0


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x)) + other.mean(1, keepdim=True)


class Kohya(nn.Module):
    """SD 3.5's block in kohya's layout: the text's stream is the first, in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.context_block, self.x_block = Stream(), Stream()

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.context_block(context, x), self.x_block(x, context) + c[:, None]


class BFL(nn.Module):
    """Flux's block in its makers' layout, called by names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.img, self.txt = Stream(), Stream()

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        return self.img(img, txt) + vec[:, None], self.txt(txt, img)


class WithSkips(nn.Module):
    """One stream in, whose features come out beside what a skip connection takes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Stream()

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, ::2], self.inner(x, x) + emb[:, None]


class ByPosition(nn.Module):
    """diffusers' names, called by position, the image's stream not the first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Kohya()

    def forward(self, encoder_hidden_states: Tensor, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(encoder_hidden_states, hidden_states, temb)


class TwoStreams(nn.Module):
    def __init__(self, block: nn.Module, call: Any) -> None:
        super().__init__()
        self.block, self.call, self.kept = block, call, list[Tensor]()

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        c = timestep.to(x.dtype)[:, None].expand(-1, 4) / 1000
        return self.call(self.block, x.flatten(2).mT, encoder_hidden_states, c)


@pytest.mark.parametrize("words", [5, 16])
@pytest.mark.parametrize(
    ("make", "call", "known"),
    [
        (Kohya, lambda block, x, text, c: block(text, x, c), None),
        (BFL, lambda block, x, text, c: block(img=x, txt=text, vec=c), None),
        (BFL, lambda block, x, text, c: block(x, text, c), None),
        (WithSkips, lambda block, x, text, c: block(x, c), 1),
        (ByPosition, lambda block, x, text, c: block(text, x, c), 1),
    ],
    ids=["kohya", "BFL", "BFL by position", "skips", "diffusers' names by position"],
)
def test_the_stream_of_a_block_is_the_images_or_the_block_is_refused(
    make: Any, call: Any, known: int | None, words: int
) -> None:
    torch.manual_seed(0)
    model = TwoStreams(make(), call).double().requires_grad_(False)
    x, target, noise = torch.randn(3, 2, 4, 4, 4, dtype=torch.float64)
    text, t = torch.randn(2, words, 4, dtype=torch.float64), torch.tensor([300, 800])
    given = {"noisy_latents": x, "target": target, "timesteps": t, "encoder_hidden_states": text}
    given["model_pred"] = target + noise
    if known is None or (make is ByPosition and words == 16):
        with pytest.raises(ValueError, match=r"^layer must be .*'block', which returned a tuple \[") as told:
            NCP(model, "block").errors(**given)
        assert re.search("'block.(x_block|img|inner.x_block)'", str(told.value))
        assert_the_modules_named_can_be_taken(str(told.value), lambda inner: NCP(model, inner).errors(**given))
        assert not any(module._forward_hooks for module in model.modules())
        return
    expected = model(x, t, text)[known]
    assert torch.equal(NCP(model, "block").features(x, t, text)["block"], expected)


@pytest.mark.parametrize("layer", ["transformer_blocks.0", "transformer_blocks.1"])
def test_blocks_called_by_position_for_recomputation_give_the_same_stream(layer: str) -> None:
    family = FAMILIES["SD3"]
    model, given = transformer(family), family_batch(family)
    assert torch.equal(*(loss(family, model, layer, checkpoint=c).errors(**given)[0] for c in (False, True)))


def test_a_model_that_keeps_some_weights_in_float32_computes_in_the_dtype_of_the_others(tmp_path: Path) -> None:
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    torch.manual_seed(0)
    wan = of_diffusers("WanTransformer3DModel")
    wan(**config, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32).save_pretrained(tmp_path)
    model = wan.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).requires_grad_(False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}

    x, target, noise = torch.randn(3, 2, 4, 1, 8, 8)
    text = torch.randn(2, 5, 16)
    given = {"target": target, "noisy_latents": x, "model_pred": target + 0.1 * noise, "encoder_hidden_states": text}
    half = {name: value.bfloat16() for name, value in given.items()}
    error, wanted = (
        NCP(unet, "blocks.0", schedule=flow()).errors(**batch, timesteps=torch.tensor([300.0, 800.0]))[0]
        for unet, batch in ((model, half), (copy.deepcopy(model).double(), {k: v.double() for k, v in half.items()}))
    )
    torch.testing.assert_close(error.double(), wanted, rtol=0.05, atol=0)


def test_flow_schedules_are_read_from_every_kind_of_flow_scheduler() -> None:
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    flows = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    for scheduler in (
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(**flows),
        UniPCMultistepScheduler(**flows),
    ):
        schedule = NoiseSchedule.from_scheduler(scheduler)
        assert (schedule.prediction_type, schedule.shift, len(schedule)) == ("flow", 3.0, 1000)
    dynamic = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    assert NoiseSchedule.from_scheduler(dynamic).shift == 1.0
    assert NoiseSchedule.from_scheduler(DDPMScheduler()).prediction_type == "epsilon"
