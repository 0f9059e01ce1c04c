"""The public surface: names and signatures as pinned in public_api.txt, and documentation that holds what it must.

A change to the surface shows in review, as a change to that file: `python tests/test_api.py > tests/public_api.txt`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ncp_loss

PINNED = Path(__file__).with_name("public_api.txt")
FUNCTIONS = [name for name in ncp_loss.__all__ if inspect.isfunction(getattr(ncp_loss, name))]
CLASSES = [name for name in ncp_loss.__all__ if inspect.isclass(getattr(ncp_loss, name))]


def surface() -> Iterator[str]:
    """A line for each public name and each public method of this library, with arguments' names, kinds and defaults."""
    for name in ncp_loss.__all__:
        thing = getattr(ncp_loss, name)
        yield f"{name}{arguments(thing)}"
        if inspect.isclass(thing):
            own = [vars(base) for base in reversed(thing.__mro__) if base.__module__.startswith("ncp_loss.")]
            for method, value in sorted({name: value for members in own for name, value in members.items()}.items()):
                value = getattr(value, "__func__", value)
                if not method.startswith("_") and inspect.isfunction(value):
                    yield f"    {name}.{method}{arguments(value)}"


def arguments(thing: Any) -> str:
    signature = inspect.signature(thing)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_the_public_surface_is_the_pinned_one() -> None:
    assert "\n".join(surface()) + "\n" == PINNED.read_text()


@pytest.mark.parametrize("name", [*FUNCTIONS, "FlowSchedule", "NoiseConditionedPerceptualLoss", "NoiseSchedule"])
def test_a_public_name_documents_what_it_computes_what_it_raises_and_an_example_that_runs(name: str) -> None:
    text = inspect.getdoc(getattr(ncp_loss, name))
    assert "Raises:" in text
    assert ">>> " in text
    for argument in inspect.signature(getattr(ncp_loss, name)).parameters:
        assert argument in text, argument


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n.endswith("_loss")])
def test_a_loss_documents_its_formula_its_shapes_and_what_it_returns(name: str) -> None:
    text = inspect.getdoc(getattr(ncp_loss, name))
    assert "Returns:" in text
    assert any(formula in text for formula in ("sigmoid(", "the error itself", "PLw"))
    assert "(B,)" in text or "as in" in text


if __name__ == "__main__":
    print("\n".join(surface()))
