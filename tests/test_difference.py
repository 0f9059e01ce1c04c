"""The stencil and the error from features, each against its definition in float64, without a model."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from ncp_loss.difference import Estimator, choose, stencil
from ncp_loss.error import _cotangent, attach, check_reverse_mode, feature_errors
from ncp_loss.tensors import per_sample

KINDS = ["literal", "scaled", "central"]
# Lengths of the model's displacement and of the reference's, and whether these point the same way.
MOVES = [(1.0, 1.0, 0.0), (1.0, 1.0, 0.99), (1e-3, 1.0, 0.0), (1.0, 1e-3, 0.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moves(of_model: float, of_reference: float, alike: float) -> tuple[Tensor, Tensor, Tensor]:
    base, one, two = (normal(3, 2, 3, seed=i) for i in range(3))
    two = alike * one + (1 - alike) * two
    return base, of_model * one, of_reference * two


def combined(coefficients: Tensor, features: list[Tensor]) -> Tensor:
    return sum(per_sample(c, f) * f for c, f in zip(coefficients, features, strict=True))


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("reach", [0.0, 0.02, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_of_affine_features_every_stencil_has_the_differences_of_the_definition(kind, reach, move) -> None:
    base, d, r = moves(*move)
    mixing, shift = normal(3, 4, seed=5), normal(4, seed=6)
    for reference in (r, None):
        points = stencil(base, d, reference, None if reference is None else d - r, Estimator(kind, reach, reach))
        features = [x @ mixing + shift for x in points.latents]
        exact = {"rtol": 1e-9, "atol": 1e-12}
        torch.testing.assert_close(combined(points.model, features), d @ mixing, **exact)
        torch.testing.assert_close(combined(points.target, features), base @ mixing + shift, rtol=1e-9, atol=1e-9)
        if points.gap is not None:
            torch.testing.assert_close(combined(points.gap, features), (d - r) @ mixing, **exact)
        assert len(points.latents) == (2 if reference is None else 4 if kind == "central" else 3)


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", KINDS)
def test_where_displacements_are_longer_than_the_reach_a_stencil_is_the_definition_whatever_the_features(
    kind, move
) -> None:
    base, d, r = moves(*move)
    points = stencil(base, d, r, d - r, Estimator(kind, reach=1e-9 * min(filter(None, move[:2]))))
    features = [x.exp() for x in points.latents]
    exact = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(combined(points.model, features), (base + d).exp() - base.exp(), **exact)
    torch.testing.assert_close(combined(points.gap, features), (base + d).exp() - (base + r).exp(), **exact)
    torch.testing.assert_close(combined(points.target, features), base.exp(), **exact)
    torch.testing.assert_close(points.gradient_point, base + d)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_a_reference_on_the_other_side_of_the_target_has_the_error_of_its_own_side(kind, size) -> None:
    """Errors of opposite displacements differ by the encoder's curvature alone."""
    base, d, _ = moves(size, 1.0, 0.0)
    for r in (-d, -d + 1e-17, -1.01 * d):
        points = stencil(base, d, r, d - r, Estimator(kind, {"literal": 0, "scaled": 0.0005, "central": 0.01}[kind]))
        features = [x.exp() for x in points.latents]
        close = {"rtol": 0, "atol": 1e-9 if size == 1 else 0.02 * size}
        torch.testing.assert_close(combined(points.model, features), (base + d).exp() - base.exp(), **close)
        of_reference = combined(points.model - points.gap, features)
        torch.testing.assert_close(of_reference, (base + r).exp() - base.exp(), **close)


@pytest.mark.parametrize("kind", KINDS)
def test_an_arm_is_never_shorter_than_the_definitions_so_that_long_displacements_have_its_points(kind) -> None:
    base, d, _ = moves(1.0, 1.0, 0.0)
    points = stencil(base, d, None, None, Estimator(kind, 0.02, 0.02))
    torch.testing.assert_close(points.latents[0], base + d)
    torch.testing.assert_close(points.latents[1], base)
    near = 0.99 * d + 0.01 * normal(3, 2, 3, seed=7)
    a, b, c, *_ = stencil(base, d, near, d - near, Estimator(kind, 1e-9, 1e-9)).latents
    torch.testing.assert_close(a, base + d)
    torch.testing.assert_close(b, base + near)
    torch.testing.assert_close(c, base)


@pytest.mark.parametrize("kind", ["scaled", "central"])
@pytest.mark.parametrize(("of_model", "of_reference"), [(1.0, 1.0001), (1e-4, 1.0), (1.0, 1e-4)])
def test_a_short_displacement_beside_a_long_one_is_looked_at_where_the_definition_has_it(
    kind, of_model, of_reference
) -> None:
    """The response to a short displacement is another one at the far end of a long one."""
    base, one, _ = moves(1.0, 1.0, 0.0)
    d, r = of_model * one, of_reference * one
    points = stencil(base, d, r, d - r, Estimator(kind, 0.01))
    features = [x.exp() for x in points.latents]
    close = {"rtol": 2e-3, "atol": 1e-9}
    torch.testing.assert_close(combined(points.model, features), (base + d).exp() - base.exp(), **close)
    torch.testing.assert_close(combined(points.gap, features), (base + d).exp() - (base + r).exp(), **close)
    of_reference_alone = combined(points.model - points.gap, features)
    torch.testing.assert_close(of_reference_alone, (base + r).exp() - base.exp(), **close)
    torch.testing.assert_close(points.gradient_point, base + d, rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", ["scaled", "central"])
@pytest.mark.parametrize("reach", [0.02, 0.06])
def test_a_short_displacement_is_looked_at_over_the_estimators_reach(kind, reach) -> None:
    base, d, r = moves(1e-6, 1e-6, 0.0)

    def rms(x: Tensor) -> Tensor:
        return x.square().mean((1, 2)).sqrt()

    apart = stencil(base, d, None, None, Estimator(kind, 1.0, reach)).latents
    torch.testing.assert_close(rms(apart[0] - apart[1]), 2 * reach * rms(base))
    four = stencil(base, d, r, d - r, Estimator(kind, reach, 1.0)).latents
    torch.testing.assert_close(rms(four[0] - four[1]), 2 * reach * rms(base))
    torch.testing.assert_close(
        rms((four[0] + four[1]) / 2 - four[2]) / rms(base), torch.full((3,), 2 * reach).double(), rtol=0.5, atol=0
    )
    middle = (apart[0] + apart[1]) / 2
    torch.testing.assert_close(middle, base + d / 2 if kind == "central" else base + (apart[0] - apart[1]) / 2)


@pytest.mark.parametrize(("move", "of_model", "of_reference"), [(MOVES[0], 1, 1), (MOVES[2], 1, 2), (MOVES[3], 2, 1)])
def test_the_four_points_stand_about_the_middle_that_the_shortest_of_three_displacements_asks_for(
    move, of_model, of_reference
) -> None:
    """Of two as long as their gap, and of one that is a thousandth of the other, all shorter than the reach."""
    base, d, r = moves(*move)
    d, r = d / 1000, r / 1000
    points = stencil(base, d, r, d - r, Estimator("central", 0.02, 0.02))
    middle = torch.stack(points.latents).mean(0)
    torch.testing.assert_close(middle, base + of_model * d / 4 + of_reference * r / 4)


@pytest.mark.parametrize("kind", ["scaled", "central"])
def test_a_model_that_is_all_but_right_keeps_the_digits_of_its_difference(kind) -> None:
    base, d, r = moves(1e-17, 1.0, 0.0)
    mixing = normal(3, 4, seed=5)
    points = stencil(base, d, r, d - r, Estimator(kind, 0.02, 0.02))
    torch.testing.assert_close(
        combined(points.model, [x @ mixing for x in points.latents]), d @ mixing, rtol=1e-9, atol=1e-30
    )


@pytest.mark.parametrize("kind", ["scaled", "central"])
@pytest.mark.parametrize("of_model", [1e-12, 1e-20, 1e-25, 1e-40])
def test_points_and_coefficients_are_finite_however_short_a_displacement_is(kind, of_model) -> None:
    base, d, r = (x.float() for x in moves(of_model, 1.0, 0.0))
    for pair in ((d, r), (r, d), (d, d + 0.1 * d), (d, -d)):
        points = stencil(base, *pair, pair[0] - pair[1], Estimator(kind, 0.045))
        found = (*points.latents, points.model, points.gap, points.target, points.gradient_point)
        assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_displacement_that_is_nowhere_positive_is_one_too(kind) -> None:
    base, d, r = moves(1.0, 1.0, 0.0)
    d, r = -d.abs() - 3 * r.abs(), -r.abs()
    points = stencil(base, d, r, d - r, Estimator(kind, 0.02, 0.02))
    torch.testing.assert_close(combined(points.model, points.latents), d, rtol=1e-9, atol=0)
    torch.testing.assert_close(combined(points.gap, points.latents), d - r, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_taken_at_the_first_point_or_at_the_definitions(kind) -> None:
    base, d, _ = moves(1e-3, 1.0, 0.0)
    for at_point in (True, False):
        points = stencil(base, d, None, None, Estimator(kind, 0.02, 0.02, at_point))
        assert torch.equal(points.gradient_point, points.latents[0] if at_point else base + d)


@given(length=st.floats(1e-6, 10), reach=st.sampled_from([0.0005, 0.02, 0.06]))
def test_the_central_stencil_has_no_error_of_second_order(length, reach) -> None:
    """About their middle the definition's own differences of squares are matched as the arms grow."""
    base, one = (normal(2, 5, seed=i) for i in range(2))
    d = length * one
    points = stencil(base, d, None, None, Estimator("central", reach, reach))
    features = [x.square() for x in points.latents]
    torch.testing.assert_close(
        combined(points.model, features), (base + d).square() - base.square(), rtol=1e-6, atol=1e-9
    )


def test_differences_are_taken_by_the_dtype_that_is_computed_in() -> None:
    cpu = torch.device("cpu")
    assert choose("auto", torch.float64, cpu) == Estimator("literal")
    assert choose("auto", torch.float32, cpu) == Estimator("scaled", 0.0005, 0.0005)
    assert choose("auto", torch.float16, cpu) == Estimator("central", 0.02, 0.02)
    assert choose("auto", torch.bfloat16, cpu) == Estimator("central", 0.045, 0.06, gradient_at_first=False)
    assert choose("scaled", torch.bfloat16, cpu) == Estimator("scaled", 0.045, 0.06)
    assert choose("central", torch.float64, cpu) == Estimator("central", 0.0005, 0.0005)
    assert all(choose("literal", dtype, cpu).kind == "literal" for dtype in (torch.bfloat16, torch.float32))
    assert choose("auto", torch.float64, torch.device("cuda")).kind == "literal"


@pytest.mark.parametrize("everywhere", ["none", "ieee"])
def test_differences_are_central_where_a_gpu_rounds_matrix_products_to_tf32(everywhere: str) -> None:
    convolution, product = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = convolution.fp32_precision, product.fp32_precision, torch.backends.fp32_precision
    try:
        for precision, kind in (
            (("tf32", "ieee"), "central"),
            (("ieee", "ieee"), "scaled"),
            (("ieee", "tf32"), "central"),
        ):
            torch.backends.fp32_precision = everywhere
            convolution.fp32_precision, product.fp32_precision = precision
            assert choose("auto", torch.float32, torch.device("cuda")).kind == kind
            assert choose("auto", torch.float32, torch.device("cpu")).kind == "scaled"
    finally:
        torch.backends.fp32_precision = before[2]
        convolution.fp32_precision, product.fp32_precision = before[:2]


# The error.

WEIGHTS = {"one": 1.0, "two": 0.25}


def moved(x: Tensor) -> Tensor:
    """1 for each sample that is anywhere not 0."""
    return x.detach().flatten(1).any(1).to(x.dtype)


def features_of(x: Tensor) -> dict[str, Tensor]:
    return {"one": x.tanh().sum(-1), "two": (x * x.roll(1, -1)).flatten(1)}


def definition(at: Callable[[Tensor], dict[str, Tensor]], base: Tensor, d: Tensor, normalize: bool) -> Tensor:
    total = torch.zeros(len(base), dtype=base.dtype)
    for name, weight in WEIGHTS.items():
        target, moved = at(base)[name].flatten(1), at(base + d)[name].flatten(1)
        scale = target.square().mean(1) if normalize else 1.0
        total = total + weight * (moved - target).square().mean(1) / scale
    return total


@pytest.mark.parametrize("unit", [None, 0.1])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("move", MOVES)
def test_errors_margin_and_gradient_are_those_of_the_definition(move, normalize, unit) -> None:
    base, d, r = moves(*move)
    d.requires_grad_()
    truth = definition(features_of, base, d, normalize) / (unit**2 if unit else 1)
    of_reference = definition(features_of, base, r, normalize) / (unit**2 if unit else 1)
    B = None if unit is None else torch.full((3,), unit, dtype=torch.float64)
    (slope,) = torch.autograd.grad(truth.sum(), d)
    with torch.no_grad():
        points = stencil(base, d, r, d - r, Estimator("literal"))
        seen = [features_of(x) for x in points.latents]
        errors, cotangents, size = feature_errors(seen, points, WEIGHTS, normalize, B)
    exact = {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(errors.error, truth.detach(), **exact)
    torch.testing.assert_close(errors.ref_error, of_reference, **exact)
    torch.testing.assert_close(errors.error - errors.ref_error, (truth - of_reference).detach(), **exact)
    at = points.gradient_point.clone().requires_grad_()
    cotangent = cotangents()
    largest = torch.stack([c.flatten(1).square().mean(1).sqrt() for c in cotangent.values()]).amax(0)
    torch.testing.assert_close(largest, moved(d), **exact)  # of order one
    (pulled,) = torch.autograd.grad([features_of(at)[k] for k in WEIGHTS], at, [cotangent[k] for k in WEIGHTS])
    torch.testing.assert_close(per_sample(size, pulled) * pulled, slope, **exact)
    alone = stencil(base, d.detach(), None, None, Estimator("literal"))
    only, *_ = feature_errors([features_of(x) for x in alone.latents], alone, WEIGHTS, normalize, B)
    assert only.ref_error is None
    torch.testing.assert_close(only.error, truth.detach(), **exact)


def test_an_error_hands_its_slope_times_the_gradient_to_the_prediction_in_its_dtype() -> None:
    prediction = torch.ones(2, 3).half().requires_grad_()
    slope, error = torch.arange(6.0).reshape(2, 3), torch.tensor([2.0, 3.0])
    attached = attach(error, prediction, slope)
    assert torch.equal(attached, error)
    (gradient,) = torch.autograd.grad((attached * torch.tensor([1.0, 10.0])).sum(), prediction)
    assert gradient.dtype == torch.float16
    assert torch.equal(gradient.float(), slope * torch.tensor([[1.0], [10.0]]))


def test_kernels_are_loaded_where_they_are_asked_for_and_not_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ncp_loss.fused", None)  # as where triton is not installed
    base, d, _ = moves(1.0, 1.0, 0.0)
    points = stencil(base, d, None, None, Estimator("literal"))
    seen = [features_of(x) for x in points.latents]
    errors, cotangents, _ = feature_errors(seen, points, WEIGHTS)
    torch.testing.assert_close(errors.error, definition(features_of, base, d, False))
    cotangents()
    with pytest.raises(ImportError):
        feature_errors(seen, points, WEIGHTS, impl="triton")
    with pytest.raises(ImportError):
        _cotangent([x["one"] for x in seen], points.model, "triton")


def test_only_a_prediction_with_a_tangent_is_refused_for_it() -> None:
    x = torch.ones(2)
    for prediction in (x, x.clone().requires_grad_(), None, "x"):
        check_reverse_mode(prediction)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="model_pred must carry no tangent"):
        check_reverse_mode(forward_ad.make_dual(x, x))
