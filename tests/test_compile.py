"""The loss under torch's compiler, in fake tensors, without data and exported: one graph, and no value is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from models import batch, small
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from users import AT, Build, add_lora, full

from ncp_loss import NoiseConditionedPerceptualLoss as NCP
from ncp_loss import NoiseSchedule, ncp_dpo_loss

ESTIMATORS = ["literal", "scaled", "central"]
SCHEDULES = {
    "epsilon": None,
    "v": DDPMScheduler(prediction_type="v_prediction"),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.fixture(autouse=True)
def no_compiled_code_is_left() -> Iterator[None]:
    yield
    torch.compiler.reset()


class Backend:
    """Counts the graphs that are compiled, and runs each as it is."""

    compilations = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.compilations += 1
        return graph.forward


def pairs(dtype: torch.dtype = torch.float32, size: int = 1, **options: Any) -> dict[str, Any]:
    return batch(small(dtype), size=size, pairs=True, **options)


def of_the_model(arguments: dict[str, Any]) -> dict[str, Any]:
    """What an NCP's own call takes."""
    return {name: value for name, value in arguments.items() if name != "ref_pred"}


def value_and_gradient(loss: Callable[..., Tensor], arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    value = loss(**arguments)
    return value.detach(), *torch.autograd.grad(value, arguments["model_pred"])


def assert_agree(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-9, atol=1e-12 * float(expected[1].abs().max()))


# Every estimator, and every option once.
CASES: list[dict[str, Any]] = [{"difference": each} for each in ESTIMATORS]
CASES += [{"schedule": "v"}, {"schedule": "flow"}, {"schedule": "flow", "step": "uniform"}, {"step": "uniform"}]
CASES += [
    {"step": "clean"},
    {"checkpoint": True},
    {"chunk_size": 1, "normalize": True},
    {"impl": "triton", "normalize": True},
]


def of_case(case: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in case.items())


LAYER = "down_blocks.0"  # what is compiled in a second or two
INSIDE = "down_blocks.0.resnets.0"  # without attention, whose gradient takes the most to trace


def loss(unet: nn.Module, options: dict[str, Any], **others: Any) -> NCP:
    named = {"schedule": SCHEDULES[options["schedule"]]} if "schedule" in options else {}
    return NCP(add_lora(unet), **{"difference": "scaled"} | options | named | others)


@pytest.mark.slow
@pytest.mark.parametrize("options", [*CASES[:3], *CASES[-2:]], ids=of_case)
def test_the_loss_compiles_into_one_graph_with_the_value_and_gradient_of_eager(options: dict[str, Any]) -> None:
    unet = small()
    arguments = of_the_model(batch(unet))
    ncp = loss(unet, options, layer=INSIDE)
    whole = torch.compile(ncp, fullgraph=True, backend="aot_eager")
    assert_agree(value_and_gradient(whole, arguments), value_and_gradient(ncp, arguments))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_estimator_chosen_for_a_dtype_is_chosen_under_the_compiler_too(dtype: torch.dtype) -> None:
    unet = small(dtype)
    ncp, arguments = NCP(add_lora(unet), LAYER), of_the_model(batch(unet))
    whole = torch.compile(ncp, fullgraph=True, backend=Backend())
    torch.testing.assert_close(value_and_gradient(whole, arguments), value_and_gradient(ncp, arguments))


def times_of(arguments: dict[str, Any], first: float) -> dict[str, Any]:
    """The batch at other timesteps, one of them 0, where t' is the clean end."""
    t = torch.full_like(arguments["timesteps"], first)
    t[::2] = 0
    return arguments | {"timesteps": t}


@pytest.mark.slow
@pytest.mark.parametrize("options", CASES, ids=of_case)
def test_timesteps_compile_nothing_anew_not_even_after_the_first_call(options: dict[str, Any]) -> None:
    unet, backend = small(torch.float32), Backend()
    arguments = of_the_model(batch(unet, size=2))
    whole = torch.compile(loss(unet, options, layer=LAYER), fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for first in (999, 500, 1, 0):
            whole(**times_of(arguments, first)).backward()
    assert backend.compilations == 1


@pytest.mark.slow
def test_each_batch_shape_is_compiled_at_most_once() -> None:
    unet, backend = small(torch.float32), Backend()
    ncp = torch.compile(loss(unet, {}, layer=LAYER), fullgraph=True, dynamic=False, backend=backend)
    shapes = [{"size": 1}, {"size": 2}, {"size": 2, "height": 12}]
    for _ in range(2):
        for shape in shapes:
            for seed in range(2):
                arguments = of_the_model(batch(unet, seed=seed, **shape))
                ncp(**arguments).backward()
    assert backend.compilations == len(shapes)


@pytest.mark.slow
def test_a_batch_size_is_compiled_once_where_shapes_are_dynamic() -> None:
    """``torch.func.vjp`` makes a linear layer's batch a constant of its trace, so each size has a graph."""
    unet, backend = small(), Backend()
    ncp = loss(unet, {}, layer=LAYER)
    whole = torch.compile(ncp, fullgraph=True, dynamic=True, backend=backend)
    for size in (2, 3, 2, 3):
        arguments = of_the_model(batch(unet, size=size))
        assert_agree(value_and_gradient(whole, arguments), value_and_gradient(ncp, arguments))
    assert backend.compilations <= 2


@pytest.mark.slow
def test_losses_of_one_model_compiled_side_by_side_keep_their_own_schedules_and_options() -> None:
    unet = small()
    arguments = of_the_model(batch(unet))
    for options in ({}, {"schedule": DDPMScheduler(beta_end=0.05)}, {"step": 3}):
        ncp = NCP(unet, LAYER, **options)
        whole = torch.compile(ncp, fullgraph=True, backend=Backend())
        assert_agree(value_and_gradient(whole, arguments), value_and_gradient(ncp, arguments))


@pytest.mark.slow
def test_a_compiled_loss_gives_a_preference_loss_the_errors_of_eager() -> None:
    unet = small()
    arguments = batch(unet, pairs=True)
    ncp = loss(unet, {}, layer=LAYER)
    compiled, eager = (ncp_dpo_loss(each, **arguments, beta=1e5).loss for each in (torch.compile(ncp), ncp))
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_a_preference_loss_compiles_whole_with_its_metrics() -> None:
    unet, backend = small(), Backend()
    arguments = batch(unet, pairs=True)
    ncp = loss(unet, {}, layer=LAYER)
    whole = torch.compile(ncp_dpo_loss, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in (900, 3):
            at = arguments | {"timesteps": torch.full_like(arguments["timesteps"], t)}
            got, expected = whole(ncp, **at, beta=1e5), ncp_dpo_loss(ncp, **at, beta=1e5)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    assert backend.compilations == 1


@pytest.mark.slow
def test_a_compiled_preference_loss_takes_kappa_and_beta_in_turn() -> None:
    unet = small()
    ncp, arguments = loss(unet, {}, layer=LAYER), batch(unet, pairs=True)
    whole = torch.compile(ncp_dpo_loss, fullgraph=True, backend=Backend())
    for options in ({"beta": 1e5}, {"beta": 3e5}, {"kappa": 2.0}):
        got, expected = whole(ncp, **arguments, **options), ncp_dpo_loss(ncp, **arguments, **options)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


@pytest.mark.slow
def test_a_layer_that_a_block_calls_twice_compiles_nothing_anew() -> None:
    unet, backend = small(), Backend()
    arguments = of_the_model(batch(unet))
    ncp = NCP(unet, ["down_blocks.0.resnets.0.nonlinearity", LAYER])
    whole = torch.compile(ncp, fullgraph=True, backend=backend)
    for _ in range(3):
        torch.testing.assert_close(whole(**arguments), ncp(**arguments), rtol=1e-9, atol=0)
    assert backend.compilations == 1


@pytest.mark.slow
@pytest.mark.parametrize("trains", [True, False])
def test_a_layer_that_latents_do_not_reach_is_refused_by_a_compiled_loss_too(trains: bool) -> None:
    """Fallbacks to eager code, where a graph breaks at the refusal, end with the same message."""
    unet = small()
    for whole, kind in ((True, torch._dynamo.exc.Unsupported), (False, ValueError)):
        compiled = torch.compile(NCP(unet, "time_embedding"), fullgraph=whole, backend=Backend())
        message = "layer must be a module whose output depends on the latents; it was 'time_embedding'"
        with torch.set_grad_enabled(trains), pytest.raises(kind, match=message):
            compiled(**of_the_model(batch(unet)))


@pytest.mark.slow
def test_a_compiled_loss_without_gradients_gives_the_value_of_eager() -> None:
    unet = small()
    ncp, arguments = loss(unet, {}, layer=LAYER), of_the_model(batch(unet))
    with torch.no_grad():
        value = torch.compile(ncp, fullgraph=True, backend=Backend())(**arguments)
        torch.testing.assert_close(value, ncp(**arguments), rtol=1e-12, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("build", [add_lora, full])
def test_a_compiled_model_and_a_compiled_loss_train_as_eager_ones_do(build: Build) -> None:
    def gradients(compiled: bool) -> list[Tensor]:
        unet = build(small()).train()
        arguments = of_the_model(batch(unet))
        at = [arguments[name] for name in AT]
        options = {"fullgraph": True, "backend": Backend()}
        model = torch.compile(unet, **options) if compiled else unet
        ncp = torch.compile(NCP(model, LAYER), **options) if compiled else NCP(model, LAYER)
        ncp(**arguments | {"model_pred": model(*at).sample}).backward()
        return [p.grad for p in unet.parameters() if p.requires_grad]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("difference", ESTIMATORS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_loss_and_gradient_need_no_value_of_any_tensor(difference: str, schedule: str) -> None:
    arguments = {name: value.detach().to("meta") for name, value in pairs().items()}
    arguments["model_pred"].requires_grad_()
    ncp = NCP(add_lora(small(torch.float32)).to("meta"), difference=difference, schedule=SCHEDULES[schedule])
    out = ncp_dpo_loss(ncp, **arguments)
    out.loss.backward()
    assert {x.device.type for x in (out.loss, arguments["model_pred"].grad, *out.metrics.values())} == {"meta"}


@pytest.mark.parametrize("difference", ESTIMATORS)
@pytest.mark.parametrize("step", [1, "uniform"])
def test_loss_and_gradient_run_on_fake_tensors_and_leave_none_behind(difference: str, step: Any) -> None:
    arguments = {name: value.detach() for name, value in pairs().items()}
    ncp = NCP(add_lora(small(torch.float32)), difference=difference, step=step)
    for _ in range(2):  # on a schedule whose tables are not made yet, and on one whose are
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = {name: mode.from_tensor(value) for name, value in arguments.items()}
            fake["model_pred"].requires_grad_()
            ncp_dpo_loss(ncp, **fake).loss.backward()
        assert ncp_dpo_loss(ncp, **arguments).loss.isfinite()


class Whole(nn.Module):
    def __init__(self, ncp: NCP) -> None:
        super().__init__()
        self.ncp = ncp

    def forward(self, **arguments: Any) -> Any:
        out = ncp_dpo_loss(self.ncp, **arguments, beta=1e5)
        return out.loss, out.metrics


@pytest.mark.slow
@pytest.mark.parametrize("options", [*CASES[:5], CASES[-1]], ids=of_case)
def test_an_exported_loss_gives_the_same_values_at_other_timesteps(options: dict[str, Any]) -> None:
    unet = small()
    arguments = {name: value.detach() for name, value in batch(unet, size=1, pairs=True, timesteps=[700]).items()}
    whole = Whole(loss(unet, options, layer=LAYER))
    for _ in range(1 + ("schedule" in options)):  # at first its tables are not made yet
        program = torch.export.export(whole, (), arguments).module()
        later = arguments | {"timesteps": torch.full_like(arguments["timesteps"], 20)}
        torch.testing.assert_close(program(**later), whole(**later), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scheduler", [None, DDPMScheduler()], ids=["none", "DDPM"])
def test_a_schedule_is_read_by_the_compiler_as_it_is_in_eager_mode(scheduler: Any) -> None:
    schedule = NoiseSchedule.from_scheduler(scheduler)
    t = torch.tensor([0, 3, 999])
    compiled = torch.compile(schedule.reverse_step, fullgraph=True, backend=Backend())
    torch.testing.assert_close(compiled(t), schedule.reverse_step(t), rtol=0, atol=0)
