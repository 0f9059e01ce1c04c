"""Settings for all tests: one thread each, since the models are small and the workers many."""

import logging
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():  # Triton then runs kernels on CPU tensors; it looks when kernels are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")
import pytest
from accelerate.state import AcceleratorState, GradientState
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
logging.getLogger("diffusers").setLevel(logging.ERROR)
# Nothing fails for being slow: a busy machine draws examples slowly too.
patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=50, derandomize=True, **patient)
settings.register_profile("few", max_examples=10, derandomize=True, **patient)  # for tests/mutation.py
settings.load_profile("default")


@pytest.fixture(autouse=True)
def no_state_of_accelerate_is_left() -> Iterator[None]:
    """It keeps the settings of a process's first Accelerator for all later ones, whichever test made it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
