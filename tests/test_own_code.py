"""Models whose code is not diffusers': nothing is guessed of it. A hook on the model itself tells what is right."""

from __future__ import annotations

import collections
import collections.abc
import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers.utils import BaseOutput
from families import of_diffusers
from models import batch, encoder_of, sd15, small
from peft import LoraConfig, get_peft_model
from test_conditioning import Sharpened, load_ip_adapters, t2i
from test_own_models import assert_is_the_definition, inputs
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from users import AT, block_output

import ncp_loss
from ncp_loss import NoiseConditionedPerceptualLoss as NCP
from ncp_loss import frozen_view

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
SCHEDULE = ncp_loss.NoiseSchedule(BETAS)


def conv(a: int, b: int) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, padding=1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(4, 8), conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).sin()).sin())


def made(kind: type[nn.Module], *args: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(*args).double().requires_grad_(False)


def assert_right(model: nn.Module, layer: str = "c", **options: Any) -> None:
    """Value and gradient of ``layer`` are those of a hook on the user's own model."""
    pristine, ncp = copy.deepcopy(model), NCP(model, layer, schedule=SCHEDULE, **options)
    call = options.get("call", lambda m, x, t: m(x, t))
    predict = lambda x, t: call(pristine, x, t)  # noqa: E731
    assert_is_the_definition(ncp, pristine.get_submodule(layer), predict, "epsilon", BETAS, inputs(4, 8))


# Layers that get samples by pieces, and models that are no obstacle.


class Tiled(Net):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.b(torch.cat([self.c(tile) for tile in self.a(x).chunk(2, -1)], -1))


class Looped(Net):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = self.a(x)
        for _ in range(3):
            x = self.c(x.sin())
        return self.b(x)


@pytest.mark.parametrize("layer", ["c", ["c", "b"], {"a": 1.0, "c": 2.0}])
@pytest.mark.parametrize("kind", [Tiled, Looped])
def test_a_layer_that_the_model_calls_by_pieces_or_in_a_loop_is_refused(kind: type[nn.Module], layer: Any) -> None:
    ncp = NCP(made(kind), layer)
    target, _, x = inputs(4, 8)[:3]
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^layer must be a module that the model calls once in a pass; it was 'c'"
        ):
            ncp(target.requires_grad_(), target.detach(), x, torch.tensor([300, 400, 500, 600]))


class TiledIfLarge(Net):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(self.c(h) if h.shape[-1] <= 8 else torch.cat([self.c(tile) for tile in h.chunk(2, -1)], -1))


def test_a_layer_that_gets_pieces_of_larger_latents_alone_is_refused_at_the_first_of_them() -> None:
    ncp, at = NCP(made(TiledIfLarge), "c"), torch.tensor([300, 400, 500, 600])
    small, large = (torch.randn(4, 4, 8, width, dtype=torch.float64) for width in (8, 16))
    for x, pieces in ((small, False), (large, True), (small, False), (large, True)):
        expected = pytest.raises(ValueError, match="calls once in a pass; it was 'c'") if pieces else nullcontext()
        with expected:
            ncp.errors(torch.randn_like(x).requires_grad_(), torch.randn_like(x), x, at)


def test_a_processor_that_calls_a_layer_by_pieces_is_refused_when_it_comes() -> None:
    class InHalves(InDtype):
        def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
            text = x if encoder_hidden_states is None else encoder_hidden_states
            q = torch.cat([attn.to_q(part) for part in x.chunk(2, 1)], 1)
            q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (q, attn.to_k(text), attn.to_v(text)))
            return attn.to_out[0](nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    unet = small()
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    ncp, arguments = NCP(unet, layer), batch(unet)
    ncp.errors(**arguments)
    unet.set_attn_processor(InHalves(torch.float64))
    with pytest.raises(ValueError, match="calls once in a pass"):
        ncp.errors(**arguments)


def test_hooks_that_torch_calls_always_are_called_for_each_module_that_the_loss_enters() -> None:
    depth: list[nn.Module] = []
    register = torch.nn.modules.module
    into = register.register_module_forward_pre_hook(lambda module, args: depth.append(module))
    out_of = register.register_module_forward_hook(lambda module, args, out: depth.remove(module), always_call=True)
    try:
        NCP(small(), "down_blocks.0").features(
            torch.randn(2, 4, 8, 8).double(), torch.tensor([3, 4]), torch.randn(2, 5, 12).double()
        )
    finally:
        into.remove()
        out_of.remove()
    assert depth == []


class Long(Net):
    """Past layer c it fails, and hides its own errors' types."""

    def __init__(self) -> None:
        super().__init__()
        self.past = list[int]()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        try:
            h = self.c(self.b(self.a(x).sin()).sin())
        except Exception as error:
            raise RuntimeError("a block failed") from error
        self.past.append(1)
        return h @ h.new_ones(3, 3)


def test_a_model_that_catches_exceptions_or_fails_past_the_layer_is_right_and_runs_past_it_once() -> None:
    model = made(Long)
    ncp, kept = NCP(model, "c", schedule=SCHEDULE), list[Tensor]()
    _, _, x = inputs(4, 8)[:3]
    at = torch.tensor([300, 400, 500, 600])
    found = [ncp.features(x, at)["c"] for _ in range(3)]
    model.c.register_forward_hook(lambda module, args, out: kept.append(out))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x, at)
    for features in found:
        torch.testing.assert_close(features, kept[0], rtol=1e-12, atol=1e-12)
    assert len(encoder_of(ncp).view.past) == 1 + 1  # the list is the model's too


# Rows that are not samples.


class Views(Net):
    """Neighbouring rows are two views of a scene, and attend to each other."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.a(x).sin().reshape(-1, 2, 8, *x.shape[2:])
        return self.c((h + 2 * h.flip(1)).flatten(0, 1).sin())


class FramesFirst(Net):
    """Clips (B, C, F, H, W), whose frames are taken together before the next frame of all clips."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.c(self.a(x.permute(2, 0, 1, 3, 4).flatten(0, 1)).sin())


class TokensFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.c(self.a(x.flatten(2).permute(2, 0, 1)).sin())


def doubled(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(torch.cat([x, x]), torch.cat([t, t]))


def in_halves(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([model(half, t) for half in x.chunk(2)])


class OnTheLast(Net):
    """Every sample depends on the last one, which depends on none."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.a(x)
        return self.c((h + h[-1:]).sin())


MIXED = {
    "all on the last": (OnTheLast, (4, 4, 8, 8), None),
    "views of a scene": (Views, (4, 4, 8, 8), None),
    "frames first": (FramesFirst, (4, 4, 3, 8, 8), None),
    "as many tokens as samples, tokens first": (TokensFirst, (4, 4, 2, 2), None),
    "the batch twice, by call": (Net, (4, 4, 8, 8), doubled),
    "one half of the clips after the other, by call": (FramesFirst, (4, 4, 2, 8, 8), in_halves),
}


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(("kind", "shape", "call"), MIXED.values(), ids=MIXED)
def test_features_of_a_sample_that_depend_on_other_samples_are_refused(
    kind: type[nn.Module], shape: tuple[int, ...], call: Any, chunk_size: int | None
) -> None:
    if chunk_size and kind is TokensFirst:
        shape = 4, 4, 1, 2  # as many as samples in a chunk
    ncp = NCP(made(kind), "c", call=call, chunk_size=chunk_size)
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    apart = "whose output for each sample depends on this sample"
    must_be = "that the model calls once in a pass" if call is in_halves else apart
    with pytest.raises(ValueError, match=f"^layer must be a module {must_be}"):
        ncp.errors(x[0].requires_grad_(), x[1], x[2], torch.tensor([300, 400, 500, 600]))


def test_processors_of_ones_own_that_mix_the_rows_of_a_diffusers_model_are_refused_too() -> None:
    class CrossFrame(Sharpened):
        def __call__(self, attn: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().__call__(attn, hidden + hidden.mean(0, keepdim=True), *args, **kwargs)

    unet = sd15()
    given = batch(unet, 2)
    NCP(unet).errors(**given).error.sum().backward()
    unet.set_attn_processor(Sharpened(5.0))
    NCP(unet).errors(**given).error.sum().backward()
    ncp = NCP(unet)
    ncp.errors(**given)
    mixing = CrossFrame(5.0)
    for processor in (mixing, lambda *args, **kwargs: mixing(*args, **kwargs)):  # a function is one too
        unet.set_attn_processor(processor)
        for of in (NCP(unet), ncp):
            with pytest.raises(ValueError, match=r"^layer must be a module whose output for each sample depends on"):
                of.errors(**given)


def test_images_before_videos_do_not_hide_that_frames_are_taken_before_samples() -> None:
    """With one frame rows are samples. Another number of rows a sample is looked at anew."""
    ncp = NCP(made(FramesFirst), "c", schedule=SCHEDULE, call=lambda model, x, t: model(x, t))
    x, t = torch.randn(2, 4, 1, 6, 6, dtype=torch.float64), torch.tensor([300, 700])
    ncp(x.clone().requires_grad_(), x + 1, x, t)
    clip = x.expand(-1, -1, 3, -1, -1)
    with pytest.raises(ValueError, match="output for each sample depends on this sample alone"):
        ncp(clip.clone().requires_grad_(), clip + 1, clip, t)


class SamplesFirst(Net):
    """Clips (B, C, F, H, W), of which each one's frames follow one another."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.c(self.a(x.transpose(1, 2).flatten(0, 1)).sin())


def test_only_the_first_training_step_with_a_number_of_rows_a_sample_runs_more_backward_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes: list[int] = []

    grad = torch.autograd.grad

    def counted(*args: Any, **options: Any) -> Any:
        passes.append(1)
        return grad(*args, **options)

    def passes_of(ncp: NCP, batch: int, *frames: int, channels: int = 4) -> int:
        passes.clear()
        x = torch.randn(batch, channels, *frames, 8, 8, dtype=torch.float64)
        ncp(x.clone().requires_grad_(), x + 1, x, torch.tensor([300] * batch))
        return len(passes)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    clips = NCP(made(SamplesFirst), "c", schedule=SCHEDULE, call=lambda model, x, t: model(x, t))
    assert [passes_of(clips, *size) for size in ((2, 3), (2, 3), (4, 3), (2, 5), (3, 5), (5, 3))] == [3, 1, 1, 3, 1, 1]
    options = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = diffusers.UNet2DModel(**options, norm_num_groups=8).double().requires_grad_(False)
    assert passes_of(NCP(unet), 2, channels=3) == 1


class Pooled(Net):
    """Two numbers for each sample, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.head = nn.Flatten(0), nn.Identity()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.head(self.flat(self.a(x).sin().mean((2, 3))[:, :2]))


@pytest.mark.parametrize("layer", ["flat", "head"])
def test_features_of_one_dimension_are_grouped_by_sample(layer: str) -> None:
    model = made(Pooled)
    x, t = inputs(4, 8)[2], torch.tensor([300] * 4)
    assert torch.equal(NCP(model, layer).features(x, t)[layer], model(x, t).unflatten(0, (4, 2)))


def test_the_features_of_the_last_layer_are_the_models_own_tensor_and_no_copy() -> None:
    class Shown(nn.Conv2d):
        shown: list[Tensor] = []  # noqa: RUF012

        def forward(self, x: Tensor) -> Tensor:
            self.shown.append(super().forward(x))
            return self.shown[-1]

    model = made(Net)
    model.b = Shown(8, 8, 1).double().requires_grad_(False)
    ncp = NCP(model, ["a", "b"])
    for _ in range(2):  # the first pass runs on, and may change its tensors
        features = ncp.features(inputs(4, 8)[2], torch.tensor([300] * 4))
    assert features["b"] is Shown.shown[1]


def test_a_diffusers_model_with_as_many_tokens_as_samples_is_looked_at_too() -> None:
    """ErnieImage has its tokens first, so (tokens, samples, width) then looks like (samples, tokens, width)."""
    kind = of_diffusers("ErnieImageTransformer2DModel")
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 32, "text_in_dim": 8}
    torch.manual_seed(0)
    model = kind(**sizes, in_channels=4, out_channels=4, rope_axes_dim=(4, 4, 4)).double().requires_grad_(False)
    ncp = NCP(model, "layers.0", schedule=ncp_loss.FlowSchedule())
    x, t = torch.randn(6, 4, 2, 2, dtype=torch.float64), torch.linspace(200, 800, 6)
    text = {"text_bth": torch.randn(6, 2, 8, dtype=torch.float64), "text_lens": torch.full((6,), 2)}
    with pytest.raises(ValueError, match="output for each sample depends on this sample alone"):
        ncp(x.clone().requires_grad_(), x + 1, x, t, **text)


def test_a_sample_alone_is_not_looked_at_and_the_next_batch_is() -> None:
    ncp = NCP(made(Net), "c", call=doubled)
    x, noise, pred = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ncp.errors(pred[:1].requires_grad_(), noise[:1], x[:1], torch.tensor([300]))
    with pytest.raises(ValueError, match=r"^layer must be"):
        ncp.errors(pred.requires_grad_(), noise, x, torch.tensor([300, 300]))


def test_an_invalid_number_in_one_sample_is_no_dependence_on_it() -> None:
    ncp = NCP(made(Net), "c")
    pred, noise, x = torch.randn(3, 3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pred[1] = torch.nan
    error = ncp.errors(pred.clone().requires_grad_(), noise, x, torch.tensor([300, 300, 300])).error
    assert error.isfinite().tolist() == [True, False, True]
    pred[1], pred[2] = 0, torch.nan
    mixed, t = NCP(made(OnTheLast), "c"), torch.tensor([300] * 3)
    mixed.errors(pred.clone().requires_grad_(), noise, x, t)
    with pytest.raises(ValueError, match=r"^layer must be"):  # that batch showed nothing
        mixed.errors(noise.clone().requires_grad_(), x, x, t)


# Conditioning that a model uses up.


@pytest.mark.parametrize("layer", ["down_blocks.3", "mid_block"])
@pytest.mark.parametrize("where", ["closure", "object"])
def test_a_list_that_the_model_empties_is_there_again_at_the_next_point(layer: str, where: str) -> None:
    case = t2i(sd15, channels=[16, 16, 32, 32])
    residuals = [r.detach() for r in case.kwargs["down_intrablock_additional_residuals"]]
    given = batch(case.unet, 2)
    text = given.pop("encoder_hidden_states")
    wanted = NCP(case.unet, layer).errors(
        **given, encoder_hidden_states=text, down_intrablock_additional_residuals=residuals
    )
    mine = list(residuals)
    holder = SimpleNamespace(residuals=mine)

    def call(model: nn.Module, x: Tensor, t: Tensor) -> Any:
        at = mine if where == "closure" else holder.residuals
        return model(x, t, text, down_intrablock_additional_residuals=at)

    ncp = NCP(case.unet, layer, call=call)
    for _ in range(2):
        torch.testing.assert_close(ncp.errors(**given).error, wanted.error, rtol=1e-9, atol=0)
    assert len(mine) == len(residuals)


class Pair(NamedTuple):
    scale: Tensor
    shift: Tensor


class Attributes(dict):
    __getattr__ = dict.__getitem__


@dataclasses.dataclass
class Shifted(BaseOutput):
    """Refuses `update`, as all outputs of diffusers' and transformers' models do."""

    scale: Tensor | None = None
    shift: Tensor | None = None


class Film(Net):
    def forward(self, x: Tensor, timestep: Tensor, cond: Any = None) -> Tensor:
        scale, shift = cond if isinstance(cond, Pair) else (cond["scale"], cond["shift"])
        if isinstance(cond, Attributes):
            scale = cond.scale
        return self.c((self.a(x) * scale[..., None, None] + shift[..., None, None]).sin())


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "named tuple": Pair,
    "dict with attributes": lambda scale, shift: Attributes(scale=scale, shift=shift),
    "UserDict": lambda scale, shift: collections.UserDict(scale=scale, shift=shift),
    "defaultdict": lambda scale, shift: collections.defaultdict(Tensor, scale=scale, shift=shift),
    "diffusers' output": lambda scale, shift: Shifted(scale=scale, shift=shift),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_containers_of_conditioning_keep_their_class_and_the_users_are_not_written_to(container: Any) -> None:
    model = made(Film)
    scale, shift = torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    cond = container(scale.requires_grad_(), shift)
    x = inputs(4, 8)[2]
    t = torch.tensor([300] * 4)
    found = NCP(model, "c").features(x, t, cond=cond)["c"]
    assert torch.equal(found, model(x, t, cond))
    assert (cond[0] if isinstance(cond, Pair) else cond["scale"]) is scale


class Stored(collections.abc.MutableMapping):
    """Keeps its values where a copy of it would share them."""

    def __init__(self, **values: Any) -> None:
        self.values_ = values

    __getitem__ = lambda self, key: self.values_[key]  # noqa: E731
    __setitem__ = lambda self, key, value: self.values_.__setitem__(key, value)  # noqa: E731
    __delitem__ = lambda self, key: self.values_.__delitem__(key)  # noqa: E731
    __iter__ = lambda self: iter(self.values_)  # noqa: E731
    __len__ = lambda self: len(self.values_)  # noqa: E731


def test_a_mapping_of_ones_own_is_not_written_to() -> None:
    scale = torch.ones(4, 8, requires_grad=True)
    cond = Stored(scale=scale, shift=scale, none=torch.empty(0, 5))
    NCP(made(Film).bfloat16(), "c").features(inputs(4, 8)[2].float(), torch.tensor([300] * 4), cond=cond)
    assert cond["scale"] is scale
    assert cond["shift"] is scale


class Textual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor, text: Any = None) -> Tensor:
        return self.c((self.a(x) + self.text(text)[..., None, None]).sin())


@pytest.mark.parametrize("trains", [False, True], ids=["", "trains"])
@pytest.mark.parametrize("layer", ["text", ["c", "text"]], ids=str)
@pytest.mark.parametrize("text_trains", [False, True], ids=["", "text trains"])
def test_a_layer_that_latents_never_reach_is_refused_though_something_else_in_it_trains(
    layer: Any, trains: bool, text_trains: bool
) -> None:
    model, text = made(Textual), torch.ones(2, 8, dtype=torch.float64, requires_grad=text_trains)
    ncp = NCP(model, layer, call=lambda model, x, t: model(x, t, text))
    prediction, target, x = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^layer must be a module whose output depends on the latents; .*'text'"):
            ncp.errors(prediction.requires_grad_(trains), target, x, torch.tensor([300, 300]))
    assert (
        NCP(model, "c", call=lambda model, x, t: model(x, t, text))(prediction, target, x, torch.tensor([300, 300])) > 0
    )


class SecondTime(Net):
    def forward(self, x: Tensor, timestep: Tensor, r: Any = None) -> Tensor:
        wave = (r.float() / 10).sin().to(x.dtype)
        return self.c((self.a(x) + wave.reshape(-1, 1, 1, 1)).sin())


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1, 1), ()], ids=str)
def test_a_number_for_each_sample_or_for_all_is_not_rounded(shape: tuple[int, ...]) -> None:
    model = made(SecondTime).bfloat16()
    x, t = inputs(4, 8)[2].float(), torch.tensor([300] * 4)
    r = torch.tensor([1021.0, 733.0, 1021.0, 733.0][: math.prod(shape)]).view(shape)
    found = NCP(model, "c").features(x, t, r=r)["c"]
    assert torch.equal(found, model(x.bfloat16(), t, r))
    assert not torch.equal(found, model(x.bfloat16(), t, r.bfloat16()))


class Camera(Net):
    def __init__(self) -> None:
        super().__init__()
        self.camera = nn.Linear(3, 8)

    def forward(self, x: Tensor, timestep: Tensor, camera: Any = None, mean: Any = None) -> Tensor:
        return self.c((self.a(x - mean[:, None, None]) + self.camera(camera)[..., None, None]).sin())


@pytest.mark.parametrize(("of_model", "of_trainer"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_short_vectors_follow_the_models_dtype_as_long_ones_do(of_model: str, of_trainer: str) -> None:
    model, dtype = made(Camera).to(getattr(torch, of_model)), getattr(torch, of_trainer)
    x, t = inputs(3, 8)[2][:3].to(dtype), torch.tensor([300] * 3)
    x = torch.cat([x, x[:, :1]], 1)
    camera, mean = torch.ones(3, 3, dtype=dtype), torch.zeros(4, dtype=dtype)
    cast = (value.to(getattr(torch, of_model)) for value in (camera, mean))
    wanted = model(x.to(getattr(torch, of_model)), t, *cast)
    assert torch.equal(NCP(model, "c").features(x, t, camera=camera, mean=mean)["c"], wanted)


class Sized(Net):
    def forward(self, x: Tensor, timestep: Tensor, r: Any = None, **sizes: Tensor) -> Tensor:
        more = (sum(size.sum(1) for size in sizes.values()) + r).float().sin().to(x.dtype)
        return self.c(self.a(x) * more[:, None, None, None])


@pytest.mark.parametrize(
    "name", ["original_size", "sizes", "crop_coords", "resolutions", "positions", "indices", "ids"]
)
def test_sizes_and_times_reach_a_bfloat16_model_as_the_trainer_gives_them(name: str) -> None:
    model = made(Sized).bfloat16()
    x, t = inputs(4, 8)[2].float(), torch.tensor([300] * 4)
    sizes, r = torch.tensor([[1365.0, 765.0]] * 4), torch.tensor([999.25, 3.5, 2.0, 1.0])
    found = NCP(model, "c").features(x, t, r=r, **{name: sizes})["c"]
    assert torch.equal(found, model(x.bfloat16(), t, r=r, **{name: sizes}))


# The dtype in which a model computes.


class Amp(nn.Module):
    """In float32 from outside, and in bf16 inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(4, 8), conv(8, 8), nn.Identity()
        self.dtype = torch.bfloat16

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.a(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.out(h + self.b(h.sin()))


class Flash(nn.Module):
    """In float32, but for its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.qkv, self.out = nn.Linear(4, 16), nn.Linear(16, 48), nn.Identity()
        self.dtype = torch.bfloat16

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.a(x.flatten(2).mT)
        q, k, v = (part.to(self.dtype) for part in self.qkv(h).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4))
        return self.out(h + nn.functional.scaled_dot_product_attention(q, k, v).to(h.dtype).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", [Amp, Flash])
def test_a_float32_model_that_computes_in_bfloat16_inside_gets_the_estimator_of_bfloat16(kind: type) -> None:
    model = made(kind).float()
    exact = copy.deepcopy(model).double()
    exact.dtype = torch.float64
    pred, target, x, t = (value.float() if value.is_floating_point() else value for value in inputs(4, 16))
    pred = (target + 0.03 * (pred - target)).detach().requires_grad_()
    error = NCP(model, "out", schedule=SCHEDULE).errors(pred, target, x, t).error
    (slope,) = torch.autograd.grad(error.sum(), pred)
    truth = NCP(exact, "out", schedule=SCHEDULE).errors(pred, target.double(), x.double(), t).error
    (wanted,) = torch.autograd.grad(truth.sum(), pred)
    torch.testing.assert_close(error.double(), truth, rtol=0.02, atol=0)
    assert torch.cosine_similarity(slope.flatten(), wanted.flatten(), dim=0) > 0.999
    literal = NCP(model, "out", schedule=SCHEDULE, difference="literal").errors(pred, target, x, t).error
    assert (literal.double() / truth - 1).abs().max() > 0.5  # what rounding makes of the definition


def test_autocast_around_the_loss_is_no_dtype_of_the_model_itself() -> None:
    model = made(Net).float()
    pred, target, x, t = (value.float() if value.is_floating_point() else value for value in inputs(4, 8))
    ncp = NCP(model, "c")
    with torch.autocast("cpu", torch.bfloat16):
        ncp.errors(pred, target, x, t)
    ncp.errors(pred, target, x, t)
    assert encoder_of(ncp).compute_dtype(x.device) == torch.float32


class InDtype:
    """An attention processor that computes in a dtype of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        text = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            layer(y).unflatten(-1, (attn.heads, -1)).transpose(1, 2).to(self.dtype)
            for layer, y in ((attn.to_q, x), (attn.to_k, text), (attn.to_v, text))
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(2).to(x.dtype))


def test_the_dtype_of_a_processor_that_the_model_gets_later_is_seen() -> None:
    def with_processor(dtype: torch.dtype, processor: Any) -> nn.Module:
        unet = small(dtype)
        unet.set_attn_processor(processor)
        return unet

    layer = "down_blocks.0.attentions.0.transformer_blocks.0"
    exact = with_processor(torch.float64, InDtype(torch.float64))
    arguments = batch(exact, error=0.02)
    truth = NCP(exact, layer).errors(**arguments).error
    unet = with_processor(torch.float32, InDtype(torch.float32))
    ncp = NCP(unet, layer)
    narrow = {key: value.float() if value.is_floating_point() else value for key, value in arguments.items()}
    ncp.errors(**narrow)
    unet.set_attn_processor(InDtype(torch.bfloat16))
    torch.testing.assert_close(ncp.errors(**narrow).error.double(), truth, rtol=0.05, atol=0)


def test_a_model_that_is_converted_later_is_looked_at_again() -> None:
    model = made(Net).bfloat16()
    ncp = NCP(model, "c")
    x, t = inputs(4, 8)[2].float(), torch.tensor([300] * 4)
    ncp.features(x, t)
    assert encoder_of(ncp).compute_dtype(x.device) == torch.bfloat16
    model.float()
    ncp.features(x, t)
    assert encoder_of(ncp).compute_dtype(x.device) == torch.float32


def test_a_call_under_autocast_leaves_no_dtype_to_a_loss_that_is_compiled_later() -> None:
    unet = small(torch.float32)
    ncp, x, t = NCP(unet), torch.randn(2, 4, 8, 8), torch.tensor([300, 400])
    text = torch.randn(2, 5, 12)
    assert encoder_of(ncp).compute_dtype(x.device) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        ncp.features(x, t, text)
        assert encoder_of(ncp).compute_dtype(x.device) == torch.bfloat16
    assert encoder_of(ncp).compute_dtype(x.device) == torch.float32
    ncp.features(x, t, text)
    unet.bfloat16()
    assert encoder_of(ncp).compute_dtype(x.device) == torch.bfloat16


def test_attention_in_a_kernel_of_ones_own_shows_its_dtype_too() -> None:
    @torch.library.custom_op("ncp_loss_tests::_flash_attn_forward", mutates_args=())
    def attention(x: Tensor) -> Tensor:
        return x.softmax(-1)

    attention.register_autograd(lambda ctx, grad: grad)

    class Kernel(Net):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.c(attention(self.a(x).bfloat16()).float())

    ncp = NCP(made(Kernel).float(), "c")
    x, t = inputs(4, 8)[2].float(), torch.tensor([300] * 4)
    ncp.features(x, t)
    assert encoder_of(ncp).compute_dtype(x.device) == torch.bfloat16


class TimeInFloat32(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.a, self.c = nn.Linear(1, 8), conv(4, 8), conv(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = self.time(timestep[:, None].float() / 1000).to(x.dtype)
        return self.c(self.a(x) + time[..., None, None])


def test_latents_stay_in_a_dtype_that_the_model_takes_whatever_its_first_weight_has() -> None:
    model = made(TimeInFloat32).bfloat16()
    model.time.float()
    x, t = inputs(4, 8)[2].bfloat16(), torch.tensor([300] * 4)
    assert torch.equal(NCP(model, "c").features(x, t)["c"], model(x, t))


def test_a_model_without_parameters_is_evaluated() -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.randn(8, 4, 3, 3))
            self.c = nn.Identity()

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.c(nn.functional.conv2d(x, self.w).sin())

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = made(Buffers).to(dtype)
        x, t = inputs(4, 8)[2].to(dtype), torch.tensor([300] * 4)
        assert torch.equal(NCP(model, "c").features(x, t)["c"], model(x, t))


# What leads back to the user's own modules.


class Stages(Net):
    """Its layers stand in a list, in a method that is kept, in a partial of one, or in a dict, too."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.stages, self.named = [self.a, self.b], {"a": (self.a.forward,), "b": (self.b.forward,)}
        self.body, self.scaled = self._body, functools.partial(self._body, scale=1.0)

    def _body(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.b(self.a(x).sin())

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        if self.way == "list":
            h = self.stages[1](self.stages[0](x).sin())
        elif self.way == "dict of methods":
            h = self.named["b"][0](self.named["a"][0](x).sin())
        else:
            h = (self.body if self.way == "method" else self.scaled)(x)
        return self.c(h.sin())


@pytest.mark.parametrize("way", ["list", "dict of methods", "method", "partial"])
def test_what_leads_to_a_layer_from_outside_the_tree_of_modules_leads_to_the_views(way: str) -> None:
    model = made(Stages, way)
    kept = {name: vars(model)[name] for name in ("stages", "named", "body", "scaled")}
    x, t = inputs(4, 8)[2], torch.tensor([300] * 4)
    wanted = model(x, t)
    model.requires_grad_(True)
    views = NCP(model, "c"), frozen_view(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    assert torch.equal(views[0].features(x, t)["c"], wanted)
    assert torch.equal(views[1](x, t), wanted)
    assert all(vars(model)[name] is value for name, value in kept.items())
    adapted = get_peft_model(made(Stages, way), LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights=False))
    assert torch.equal(NCP(adapted, "c").features(x, t)["c"], wanted)


def test_a_list_of_a_layer_and_its_weight_leads_to_the_views_layer_and_the_shared_weight() -> None:
    model = made(Net)
    model.both = [model.a, model.a.weight, model.b.bias]
    view = frozen_view(model)
    assert view.both[0] is view.a is not model.a
    assert view.both[1] is model.a.weight
    assert view.both[2] is model.b.bias


def test_a_buffer_of_a_class_with_any_name_is_shared() -> None:
    class table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("values", torch.ones(3))

    model = made(Net)
    model.d = table()
    assert frozen_view(model).d.values is model.d.values


class Gains(Net):
    """A list of parameters, beside the place where torch knows them."""

    def __init__(self) -> None:
        super().__init__()
        self.known = nn.ParameterList([nn.Parameter(torch.ones(8, 1, 1))])
        self.gains = [self.known[0]]

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.c((self.a(x) * self.gains[0]).sin())


def test_a_list_of_parameters_leads_to_the_views_copies_while_the_model_trains() -> None:
    model = made(Gains).requires_grad_()
    pristine, view = copy.deepcopy(model), frozen_view(model)
    ncp = NCP(model, "c", call=lambda m, x, t: m(x, t))
    x, t = torch.randn(2, 4, 6, 6, dtype=torch.float64), torch.tensor([300, 700])
    with torch.no_grad():
        model.known[0].add_(1)
    assert torch.equal(view(x, t), pristine(x, t))
    assert torch.equal(ncp.features(x, t)["c"], pristine(x, t))
    assert view.gains[0] is view.known[0] is not model.known[0]


def test_an_attribute_may_contain_itself_and_one_of_wrapped_layers_leads_to_the_layers_inside() -> None:
    model = made(Stages, "list")
    x, t = inputs(4, 8)[2], torch.tensor([300] * 4)
    wanted = model(x, t)
    root: dict[str, Any] = {"layer": model.a, "numbers": list(range(10_000))}
    root["child"] = {"parent": root, "list": []}
    root["child"]["list"].append(root["child"]["list"])
    model.tree = root
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights=False))
    model.stages = [model.a, model.b]  # with their adapters
    assert not torch.equal(model(x, t), wanted)
    view = frozen_view(adapted)
    assert torch.equal(view(x, t), wanted)
    assert view.tree["layer"] is view.a
    assert view.tree["child"]["parent"] is view.tree
    assert model.tree is root
    assert root["layer"] is not view.a


# Names of others' wrappers.


class Block(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, conv(4, 8))
        self.level0 = conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.level0(self.get_submodule(self.name)(x).sin())


class WithBlock(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.block, self.c = Block(name), conv(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.c(self.block(x))


class Preconditioned(nn.Module):
    def __init__(self, name: str, *rest: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, Net())
        for more in rest:
            self.add_module(more, conv(4, 4))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x / 3, timestep / 1000)


@pytest.mark.parametrize("name", ["base_layer", "original_module"])
def test_a_child_of_a_module_of_ones_own_is_no_wrapped_layer_whatever_its_name(name: str) -> None:
    assert_right(made(WithBlock, name))


@pytest.mark.parametrize("names", [("module",), ("base_model",), ("base_model", "head")])
def test_a_module_of_ones_own_is_no_wrapper_whatever_its_children_are_called(names: tuple[str, ...]) -> None:
    assert_right(made(Preconditioned, *names), f"{names[0]}.c")


@pytest.mark.parametrize("package", ["timm.models.unet", "megatron.core.unet", "torch_xla.models"])
def test_a_model_of_a_package_that_has_wrappers_is_none_if_it_has_other_children(package: str) -> None:
    kind = type("Model", (Net,), {"__module__": package})
    assert_right(made(kind))


@pytest.mark.parametrize("merged", [["a layer"], 2, "yes", lambda: True])
def test_an_attribute_called_merged_that_is_no_flag_is_no_merged_adapter(merged: Any) -> None:
    model = made(Net)
    model.b.merged = merged
    assert_right(model)


def test_a_tensor_whose_name_begins_a_parameters_is_no_weight_made_by_a_hook() -> None:
    class Table(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.scale_shift_table = torch.tensor(0.5), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return super().forward(self.scale * x * self.scale_shift_table, timestep)

    assert_right(made(Table))


def test_layers_that_make_their_weights_at_the_first_call_are_refused() -> None:
    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.LazyConv2d(8, 3)

    model = Lazy()
    with pytest.raises(ValueError, match=r"'a' has weights that its first call will make \(a lazy layer\)"):
        NCP(model, "c")


# What the model gets later.


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("called", [False, True])
def test_an_ip_adapter_and_a_layer_put_in_anothers_place_are_told(called: bool, view: bool) -> None:
    def use(made: Any) -> Any:
        return made(*args).sample if view else made.features(*args)["down_blocks"]

    changes: dict[str, Callable[[nn.Module], Any]] = {
        r"got new layers, \[": load_ip_adapters,
        "conv_in was replaced by another layer": lambda unet: setattr(unet, "conv_in", sd15(seed=1).conv_in),
        r"the model got new layers, \['more'\]": lambda unet: setattr(unet, "more", nn.Linear(12, 12)),
    }
    for message, change in changes.items():
        unet = sd15()
        args = [batch(unet)[name] for name in AT]
        made = frozen_view(unet) if view else NCP(unet)
        if called:
            use(made)
        change(unet)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                use(made)


def test_layers_that_are_gone_are_told() -> None:
    unet = small()
    args = [batch(unet)[name] for name in AT]
    ncp = NCP(unet)
    ncp.features(*args)
    unet.down_blocks[0].resnets[0].nonlinearity = None
    with pytest.raises(RuntimeError, match=r"down_blocks\.0\.resnets\.0\.nonlinearity was removed"):
        ncp.features(*args)


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8))


HARMLESS: dict[str, Callable[[nn.Module], Any]] = {
    "a loss on the model itself": lambda model: setattr(model, "criterion", NCP(model, "c")),
    "a reference on the model itself": lambda model: setattr(model, "reference", frozen_view(model)),
    "recomputed blocks": lambda model: apply_activation_checkpointing(
        model, check_fn=lambda module: isinstance(module, nn.Sequential)
    ),
    "synchronised norms": nn.SyncBatchNorm.convert_sync_batchnorm,
    "a compiled layer": lambda model: setattr(model, "b", torch.compile(model.b)),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_wraps_a_layer_or_only_stands_on_the_model_is_no_alarm(change: Callable[[nn.Module], Any]) -> None:
    model = made(Normed).eval()
    x, t = inputs(4, 8)[2], torch.tensor([300] * 4)
    wanted = model(x, t)
    ncp, view = NCP(model, "c"), frozen_view(model)
    for changes in (True, False, False):
        assert torch.equal(ncp.features(x, t)["c"], wanted)
        assert torch.equal(view(x, t), wanted)
        if changes:
            change(model)


def test_a_layer_whose_weights_were_copied_may_be_replaced() -> None:
    model = made(Net).requires_grad_(True)
    x, t = inputs(4, 8)[2], torch.tensor([300] * 4)
    ncp, wanted = NCP(model, "c"), model(x, t)
    ncp.features(x, t)
    model.a = conv(4, 8).double()
    assert torch.equal(ncp.features(x, t)["c"], wanted)


@pytest.mark.slow
def test_an_eager_call_compiles_nothing_anew_of_a_model_of_ones_own() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    ncp = NCP(made(Net).float(), "c")
    compiled = torch.compile(ncp, backend=counter)
    pred, target, x, t = (value.float() if value.is_floating_point() else value for value in inputs(4, 8))
    for eager in (False, False, True, False):
        (ncp if eager else compiled)(pred, target, x, t)
    assert counter.frame_count == 1


@pytest.mark.parametrize("called", [False, True])
def test_a_processor_that_the_model_gets_later_is_the_views_too_and_ones_own_on_the_view_stays(called: bool) -> None:
    unet = sd15()
    given = batch(unet)
    args = [given[name] for name in AT]
    ncp, view, other = NCP(unet), frozen_view(unet), frozen_view(unet)
    other.set_attn_processor(Sharpened(2.0))
    wanted_of_other = other(*args).sample
    if called:
        ncp.features(*args), view(*args)
    unet.set_attn_processor(Sharpened(5.0))
    assert torch.equal(ncp.features(*args)["down_blocks"], block_output(unet, "down_blocks.3", given))
    assert torch.equal(view(*args).sample, unet(*args).sample)
    other.set_attn_processor(Sharpened(2.0))
    assert torch.equal(other(*args).sample, wanted_of_other)


# Which output is the image's.


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return 3 * encoder_hidden_states, self.inner(hidden_states.sin())


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 8), TwoStreams()

    def forward(self, x: Tensor, timestep: Tensor, text: Any = None) -> Tensor:
        return self.c(hidden_states=self.a(x.flatten(2).mT), encoder_hidden_states=text)[1]


def test_a_stream_that_was_clear_once_is_known_where_text_and_image_are_of_one_length() -> None:
    model = made(Text)
    ncp, t = NCP(model, "c"), torch.tensor([300])
    hooks = [len(module._forward_hooks) for module in encoder_of(ncp).view.modules()]
    x, text = torch.randn(1, 4, 2, 2).double(), torch.randn(1, 9, 8).double()
    with pytest.raises(ValueError, match=r"^layer must be a module that returns one tensor, or one shaped"):
        ncp.features(x, t, text=text[:, :4])
    assert [len(module._forward_hooks) for module in encoder_of(ncp).view.modules()] == hooks
    ncp.features(x, t, text=text)
    assert torch.equal(ncp.features(x, t, text=text[:, :4])["c"], model(x, t, text[:, :4]))


class Unclear(nn.Module):
    """Two streams, given without a name that tells which is the image's, and modules that return 1 to 3 dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.rows, self.image = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.flat(x.mean((1, 2))) + self.rows(x.mean(2)).mean(1)
        return text, self.image(scale[:, None, None] * x)


def test_of_the_modules_inside_one_with_unclear_streams_those_that_return_tokens_or_images_are_named() -> None:
    class Blocks(Text):
        def __init__(self) -> None:
            super().__init__()
            self.c = Unclear()

        def forward(self, x: Tensor, timestep: Tensor, text: Any = None) -> Tensor:
            return self.c(self.a(x.flatten(2).mT), text)[1]

    x, t = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.tensor([300, 700])
    with pytest.raises(ValueError, match=r"^layer must be .*, as inside it 'c\.image'; it was 'c'"):
        NCP(made(Blocks), "c").features(x, t, text=torch.randn(2, 9, 8, dtype=torch.float64))


class Beside(nn.Module):
    """Returns what its second argument says; its only input of three dimensions or more is x."""

    def forward(self, x: Tensor, time: Tensor, kind: str) -> Any:
        vector = x.mean((2, 3)) + time[:, None]
        return {"nested": ((x, 2 * x), vector), "vector": (vector, x.sin())}[kind]


class HasBeside(Net):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.l = kind, Beside()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        out = self.l(self.a(x), timestep, self.kind)
        return self.c(out[0][0] if self.kind == "nested" else out[1])


def test_the_one_input_of_three_dimensions_is_the_image_and_a_tensor_behind_a_tuple_is_not() -> None:
    x, t = inputs(4, 8)[2], torch.tensor([300] * 4)
    model = made(HasBeside, "vector")
    assert torch.equal(NCP(model, "l").features(x, t)["l"], model.a(x).sin())
    with pytest.raises(ValueError, match=r"^layer must be a module that returns one tensor"):
        NCP(made(HasBeside, "nested"), "l").features(x, t)


class Nothing(Net):
    def __init__(self) -> None:
        super().__init__()
        self.d = _Empty()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.d(x)
        return x


class _Empty(nn.Module):
    def forward(self, x: Tensor) -> tuple[()]:
        return ()


def test_a_module_that_returns_nothing_is_refused_by_the_layers_name() -> None:
    with pytest.raises(ValueError, match=r"^layer must be a module that returns one tensor.*it was 'd', which"):
        NCP(made(Nothing), "d").features(inputs(4, 8)[2], torch.tensor([300] * 4))


def test_hidden_states_before_the_skip_connections_are_the_features_whatever_stands_behind() -> None:
    """NCSN++'s down blocks return hidden states, skip connections and one tensor more."""
    blocks = {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, **blocks)
    unet.double().requires_grad_(False)
    found: list[Tensor] = []
    x, t = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 500])
    features = NCP(unet).features(x, t)["down_blocks"]
    unet.down_blocks[-1].register_forward_hook(lambda module, args, output: found.append(output[0]))
    unet(x, t)
    assert torch.equal(features, found[0])


def test_features_are_kept_as_they_were_where_the_model_writes_to_them_on_its_way() -> None:
    class InPlace(Net):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            h = self.a(x)
            h += 1
            h = self.b(h)
            h += 1
            return self.c(h)

    model = made(InPlace)
    x, t = inputs(4, 8)[2], torch.tensor([300] * 4)
    found = NCP(model, ["a", "b", "c"]).features(x, t)
    assert torch.equal(found["a"], model.a(x))
    assert torch.equal(found["b"], model.b(model.a(x) + 1))


def test_complex_features_are_refused_and_a_call_that_runs_another_model_is_told_what_to_run() -> None:
    class Fourier(Net):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Identity()

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.c(torch.fft.ifft2(self.f(torch.fft.fft2(self.a(x)))).real)

    x, t = inputs(4, 8)[2], torch.tensor([300] * 4)
    with pytest.raises(TypeError, match=r"^layer must be a module whose output is floating-point; it was 'f'"):
        NCP(made(Fourier), "f").features(x, t)
    model = made(Net)
    with pytest.raises(RuntimeError, match="let `call` run the model that it is given"):
        NCP(model, "c", call=lambda _, x, t: model(x, t)).features(x, t)


def test_arguments_of_a_model_may_be_called_like_the_losss_own() -> None:
    class Named(Net):
        def forward(self, x: Tensor, timestep: Tensor, latents: Any = None, model: Any = None) -> Tensor:
            return super().forward(x + latents + model, timestep)

    model = made(Named)
    x, t = inputs(4, 8)[2], torch.tensor([300] * 4)
    pred, target, *_ = inputs(4, 8)
    one = NCP(model, "c").errors(pred, target, x, t, latents=0 * x, model=x).error
    other = NCP(model, "c").errors(pred, target, x, t, latents=x, model=0 * x).error
    assert torch.equal(one, other)
    assert not torch.equal(one, NCP(model, "c").errors(pred, target, x, t, latents=x, model=x).error)


def test_noise_of_the_step_in_another_dtype_works_under_autocast() -> None:
    unet = small(torch.float32)
    given = batch(unet, dtype=torch.float32) | {"variance_noise": torch.randn(2, 4, 8, 8, dtype=torch.float64)}
    with torch.autocast("cpu", torch.bfloat16):
        found = NCP(unet).errors(**given).error
    assert found.isfinite().all()
