"""Which of the error's two forms a loss takes on a CPU, where no kernel is interpreted, as it is in the other tests."""

from __future__ import annotations

import json
import os

import pytest
from programs import ROOT, started

# The test's own process is told to interpret kernels, and the kernels then take a CPU's tensors too.
PROGRAM = """
import json, os
import torch
from models import batch, sd15
from ncp_loss import NoiseConditionedPerceptualLoss as NCP

assert "TRITON_INTERPRET" not in os.environ
unet = sd15()
arguments = batch(unet)

def found(**options):
    try:
        loss = NCP(unet, **options)(**{name: x for name, x in arguments.items() if name != "ref_pred"})
        (gradient,) = torch.autograd.grad(loss, arguments["model_pred"])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return [loss.item(), gradient.flatten().tolist()]

print(json.dumps([found(), found(impl="eager"), found(impl="triton")]))
"""


@pytest.fixture(scope="module")
def found() -> list:
    """What a loss gives by default, and with each form asked for by name: value and gradient, or an error."""
    done = started("-c", PROGRAM, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_loss_on_a_cpu_is_the_eager_one_by_default(found):
    by_default, eager, _ = found
    assert by_default == eager
    value, gradient = eager
    assert value > 0
    assert max(gradient) > 0


def test_kernels_asked_for_by_name_are_refused_on_a_cpu(found):
    assert found[2].startswith("ValueError: impl must be ")
    assert found[2].endswith("; it was 'triton'")
