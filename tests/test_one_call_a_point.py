"""The encoder is called with the trainer's own batch and conditioning, wherever that is kept and however it is shaped.

Truth is a plain hook on a deep copy of the model, called exactly as the trainer calls it, in float64.
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet3DConditionModel
from diffusers.models.attention_processor import AttnProcessor, PAGIdentitySelfAttnProcessor2_0
from families import FAMILIES, ROWS, TEXT, WIDTH, of_diffusers, transformer
from models import batch, encoder_of, sd15, sdxl
from torch import Tensor, nn

from ncp_loss import NoiseConditionedPerceptualLoss as NCP
from ncp_loss import ncp_cpo_loss, ncp_dpo_loss, ncp_sft_loss


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Case(NamedTuple):
    """A model, a trainer's call of it, what is given to that call by name, and the layer whose output counts."""

    model: nn.Module
    call: Callable[..., Any]
    layer: str
    given: dict[str, Any] = {}  # noqa: RUF012
    image: Callable[[Any], Tensor] = lambda output: output[0] if isinstance(output, tuple) else output
    shape: tuple[int, ...] = (ROWS, 4, 8, 8)
    scheduler: Any = None


def pixart_with_its_text_in_a_closure() -> Case:
    text, mask = normal(ROWS, TEXT, WIDTH), torch.ones(ROWS, TEXT, dtype=torch.int64)
    added = {"resolution": None, "aspect_ratio": None}

    def call(model: nn.Module, x: Tensor, t: Tensor) -> Any:
        return model(x, encoder_hidden_states=text, timestep=t, added_cond_kwargs=added, encoder_attention_mask=mask)

    return Case(transformer(FAMILIES["PixArt"]), call, "transformer_blocks.1", scheduler=DDPMScheduler())


def pixart_with_its_text_on_an_object() -> Case:
    case = pixart_with_its_text_in_a_closure()
    held = SimpleNamespace(text=normal(ROWS, TEXT, WIDTH))
    added = {"resolution": None, "aspect_ratio": None}

    def call(model: nn.Module, x: Tensor, t: Tensor, prompts: Any) -> Any:
        return model(x, encoder_hidden_states=prompts.text, timestep=t, added_cond_kwargs=added)

    return case._replace(call=call, given={"prompts": held})


def z_image_with_a_tensor_a_sample_in_a_list() -> Case:
    family = FAMILIES["Z-Image"]
    texts = [normal(TEXT, WIDTH, seed=i) for i in range(ROWS)]

    def call(model: nn.Module, x: Tensor, t: Tensor, texts: list[Tensor]) -> Any:
        return model(list(x.unsqueeze(2)), 1 - t / 1000, texts)

    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return Case(transformer(family), call, "layers.1", {"texts": texts}, scheduler=flow)


def hidream_with_text_stacked_by_layer() -> Case:
    """(layers, B, L, D): the batch is the second dimension."""
    hidream = of_diffusers("HiDreamImageTransformer2DModel")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hidream(
            patch_size=2, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, caption_channels=[WIDTH, WIDTH], text_emb_dim=WIDTH, num_routed_experts=2,
            num_activated_experts=1, axes_dims_rope=(4, 4, 8), max_resolution=(8, 8), llama_layers=[0, 1],
            force_inference_output=True,
        )  # fmt: skip
    model = model.double().eval().requires_grad_(False)
    given = {
        "encoder_hidden_states_t5": normal(ROWS, TEXT, WIDTH),
        "encoder_hidden_states_llama3": normal(2, ROWS, TEXT, WIDTH),
        "pooled_embeds": normal(ROWS, WIDTH),
    }

    def call(model: nn.Module, x: Tensor, t: Tensor, **given: Any) -> Any:
        return model(x, timesteps=t, **given)

    return Case(model, call, "double_stream_blocks.0", given, scheduler=FlowMatchEulerDiscreteScheduler())


def a_table_as_long_as_the_batch() -> Case:
    """Positions that are not samples, as many of them as there are rows."""
    unet, table = sd15(), normal(ROWS, 12)

    def call(model: nn.Module, x: Tensor, t: Tensor, text: Tensor, table: Tensor) -> Any:
        return model(x, t, text + (table.T @ table)[:5])

    given = {"text": normal(ROWS, 5, 12), "table": table}
    return Case(unet, call, "down_blocks.3", given, shape=(ROWS, 4, 16, 16))


def processors_that_pair_rows() -> Case:
    """Perturbed-attention guidance: the second half of the rows is perturbed, by its place in the batch."""
    unet = sdxl()
    names = unet.attn_processors
    unet.set_attn_processor({n: PAGIdentitySelfAttnProcessor2_0() if "attn1" in n else AttnProcessor() for n in names})
    arguments = batch(unet, ROWS)
    given = {"text": arguments["encoder_hidden_states"], "added": arguments["added_cond_kwargs"]}

    def call(model: nn.Module, x: Tensor, t: Tensor, text: Tensor, added: dict[str, Tensor]) -> Any:
        return model(x, t, text, added_cond_kwargs=added)

    return Case(unet, call, "down_blocks.2", given, shape=(ROWS, 4, 16, 16))


def video(clips: int) -> Case:
    """Features of B clips of F frames have B x F rows."""
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12, attention_head_dim=4,
        layers_per_block=1, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    unet = unet.double().eval().requires_grad_(False)

    def call(model: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Any:
        return model(x, t, text)

    return Case(unet, call, "down_blocks.1", {"text": normal(clips, 5, 12)}, shape=(clips, 4, 3, 8, 8))


CASES: dict[str, Callable[[], Case]] = {
    "text in a closure, PixArt": pixart_with_its_text_in_a_closure,
    "text on an object, PixArt": pixart_with_its_text_on_an_object,
    "a tensor a sample in a list, Z-Image": z_image_with_a_tensor_a_sample_in_a_list,
    "text stacked by layer, HiDream": hidream_with_text_stacked_by_layer,
    "a table as long as the batch": a_table_as_long_as_the_batch,
    "processors that pair rows, PAG": processors_that_pair_rows,
    "a clip's frames in rows, UNet3D": lambda: video(1),
    "clips' frames in rows, UNet3D": lambda: video(3),
}


def test_a_u_net_of_videos_needs_no_function_that_calls_it() -> None:
    model, call, layer, given, _, shape, _ = video(2)
    x, target, at = normal(*shape, seed=2), normal(*shape, seed=1), torch.tensor([300, 700])
    arguments = target + 1, target, x, at
    with_call = NCP(model, layer, call=call).errors(*arguments, **given).error
    own = copy.deepcopy(model)
    own.__class__ = type("Own", (UNet3DConditionModel,), {"__module__": "my_project"})
    for each in (model, own):
        assert torch.equal(NCP(each, layer).errors(*arguments, given["text"]).error, with_call)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_errors_and_gradients_are_those_of_a_hook_on_the_users_own_call(make: Callable[[], Case]) -> None:
    model, call, layer, given, image, shape, scheduler = make()
    pristine, kept = copy.deepcopy(model), list[Tensor]()
    pristine.get_submodule(layer).register_forward_hook(lambda m, a, out: kept.append(image(out).clone()))
    ncp = NCP(model, layer, schedule=scheduler, call=call)

    at = torch.linspace(300, 700, shape[0]).double().round()
    target, x = normal(*shape, seed=1), normal(*shape, seed=2)
    prediction = (target + 0.3 * normal(*shape, seed=3)).requires_grad_()
    reference = target + 0.3 * normal(*shape, seed=4)
    error, ref_error = ncp.errors(prediction, target, x, at, ref_pred=reference, **given)

    back = ncp.schedule.reverse_step(at, dtype=torch.float64)

    def features(output: Tensor) -> Tensor:
        kept.clear()
        call(pristine, back.latents(x, output, None), back.timesteps, **given)
        return kept[0].reshape(shape[0], -1)  # a sample's rows follow one another

    truth = features(target)
    wanted, wanted_ref = ((features(o) - truth).square().mean(1) for o in (prediction, reference))
    single = {"HiDreamImageTransformer2DModel", "ZImageTransformer2DModel"}
    rtol = 1e-3 if type(model).__name__ in single else 1e-7  # their position tables are float32
    torch.testing.assert_close(error, wanted, rtol=rtol, atol=0)
    torch.testing.assert_close(ref_error, wanted_ref.detach(), rtol=rtol, atol=0)
    got, gradient = (torch.autograd.grad(e.sum(), prediction)[0] for e in (error, wanted))
    torch.testing.assert_close(got, gradient, rtol=rtol, atol=rtol * float(gradient.abs().max()))


class Sequence(nn.Module):
    """Tokens first, (L, B, D), as torch's own transformers have them by default."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(x.flatten(2).permute(2, 0, 1))


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_features_with_tokens_first_are_refused_by_the_layers_name(rows: int) -> None:
    model = Sequence().double().eval().requires_grad_(False)
    x = normal(rows, 4, 4, 4)
    with pytest.raises(
        ValueError, match=rf"layer must be a module whose output has the batch first.*'layer'.*\(16, {rows}, 4\)"
    ):
        NCP(model, "layer").errors(x, x, x, torch.arange(rows))


@pytest.mark.parametrize("name", ["ref_pred", "pairs"])
def test_what_only_errors_takes_is_refused_by_the_call(name: str) -> None:
    unet = sd15()
    arguments = batch(unet)
    value = {"ref_pred": arguments.pop("ref_pred"), "pairs": True}[name]
    with pytest.raises(TypeError, match=rf"{name} must be given to ncp.errors\(...\)"):
        NCP(unet)(**arguments, **{name: value})


NO_USE = [(use, name) for use in (ncp_cpo_loss, ncp_sft_loss) for name in ("ref_pred", "ref_error", "pairs")]


@pytest.mark.parametrize(("objective", "name"), [*NO_USE, (ncp_dpo_loss, "pairs")])
def test_what_an_objective_does_not_use_is_refused(objective: Any, name: str) -> None:
    unet = sd15()
    arguments = batch(unet, pairs=True)
    value = {"ref_pred": arguments["ref_pred"], "ref_error": torch.ones(4), "pairs": True}[name]
    if objective is not ncp_dpo_loss:
        del arguments["ref_pred"]
    with pytest.raises(TypeError, match=rf"^{name} must be given to ncp.errors\(...\)"):
        objective(NCP(unet), **arguments, **{name: value})


WRONG_OPTIONS = {"weighting": "min_snr", "difference": "best", "chunk_size": -2, "reduction": "max", "impl": "cuda"}
WRONG_OPTIONS |= {"step": 0, "normalize": 2, "schedule": DDPMScheduler()}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_an_option_that_is_set_later_is_checked_at_the_next_call(name: str) -> None:
    unet = sd15()
    ncp = NCP(unet)
    setattr(ncp, name, WRONG_OPTIONS[name])
    with pytest.raises((ValueError, TypeError), match=rf"^{name} must be"):
        ncp.errors(**batch(unet))


def test_functional_transforms_of_torch_are_refused_by_name() -> None:
    unet = sd15()
    arguments = batch(unet)
    prediction = arguments.pop("model_pred").detach()
    with pytest.raises(RuntimeError, match="ncp errors must be computed outside"):
        torch.func.grad(lambda x: NCP(unet).errors(x, **arguments).error.sum())(prediction)


def test_a_keyword_that_the_model_does_not_know_is_not_swallowed() -> None:
    unet = sd15()
    arguments = batch(unet)
    del arguments["ref_pred"]
    with pytest.raises(TypeError, match="target_features"):
        NCP(unet)(**arguments, target_features={})


def test_a_second_use_of_a_loss_while_a_pass_runs_is_refused() -> None:
    unet = sd15()
    ncp, arguments = NCP(unet), batch(unet)
    encoder_of(ncp).view.down_blocks[0].register_forward_hook(lambda *_: ncp.errors(**arguments))
    with pytest.raises(RuntimeError, match="ncp must be used once at a time"):
        ncp.errors(**arguments)


def test_threads_get_the_right_value_or_are_told() -> None:
    unet = sd15()
    ncp = NCP(unet)
    batches = [batch(unet, seed=seed) for seed in range(2)]
    wanted = [ncp.errors(**arguments).error for arguments in batches]
    told, wrong, start = [], [], threading.Barrier(2)

    def use(arguments: dict[str, Any], expected: Tensor) -> None:
        start.wait()
        for _ in range(10):
            try:
                wrong.append(not torch.equal(ncp.errors(**arguments).error, expected))
            except RuntimeError as error:
                told.append(str(error))

    threads = [threading.Thread(target=use, args=pair) for pair in zip(batches, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) + len(wrong) == 20
    assert not any(wrong)
    assert all("ncp must be used once at a time" in message for message in told)
    assert all(torch.equal(ncp.errors(**a).error, e) for a, e in zip(batches, wanted, strict=True))


def test_two_losses_of_one_model_may_run_in_two_threads() -> None:
    unet = sd15()
    arguments = batch(unet)
    losses = [NCP(unet) for _ in range(2)]
    expected = losses[0].errors(**arguments).error
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: losses[i % 2].errors(**arguments).error, [0, 1]))
    assert all(torch.equal(error, expected) for error in found)


@pytest.mark.parametrize("options", [{}, {"step": 20}, {"step": "clean"}, {"checkpoint": True}])
@pytest.mark.parametrize("trains", [True, False])
def test_no_random_number_is_drawn_that_was_not_asked_for(trains: bool, options: dict[str, Any]) -> None:
    unet = sd15(dropout=0.5).train()
    arguments = batch(unet)
    ncp, before = NCP(unet, **options), torch.get_rng_state()
    with torch.set_grad_enabled(trains):
        error = ncp.errors(**arguments).error.sum()
    if trains:
        error.backward()
    assert torch.equal(torch.get_rng_state(), before)


def errors_elsewhere(ncp: NCP, arguments: dict[str, Any], answer: Any) -> None:
    torch.set_num_threads(1)
    error = ncp.errors(**arguments, model_pred=arguments["target"] + 0.1).error
    answer.put(error.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_loss_gives_the_same_errors_in_another_process(method: str, called: bool) -> None:
    unet = sd15()
    arguments = {key: value for key, value in batch(unet).items() if key != "model_pred"}
    ncp = NCP(unet)
    if called:
        ncp.features(*(arguments[k] for k in ("noisy_latents", "timesteps", "encoder_hidden_states")))
    context = multiprocessing.get_context(method)
    answer = context.Queue()
    process = context.Process(target=errors_elsewhere, args=(ncp, arguments, answer))
    process.start()
    found = answer.get(timeout=120)
    process.join()
    expected = ncp.errors(**arguments, model_pred=arguments["target"] + 0.1).error
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-12, atol=0)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.second(self.first(x).sin())


@pytest.mark.slow
def test_three_thousand_steps_change_no_result_and_hold_no_memory() -> None:
    model = Tiny().requires_grad_(False)
    ncp = NCP(model, ["first", "second"])
    target, x, noise = torch.randn(3, 2, 4, 8, 8)
    prediction = (target + 0.1 * noise).requires_grad_()
    t = torch.tensor([100, 700])

    def step() -> Tensor:
        error, _ = ncp.errors(prediction, target, x, t, ref_pred=target - 0.1 * noise)
        return torch.cat([error.detach(), torch.autograd.grad(error.sum(), prediction)[0].flatten()])

    def held() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    expected = step()
    for _ in range(100):
        step()
    tensors, objects = held(), len(gc.get_objects())
    for _ in range(3000):
        assert torch.equal(step(), expected)
    assert held() <= tensors
    assert len(gc.get_objects()) < objects + 1000
