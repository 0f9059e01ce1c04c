"""Settings for all tests: one thread each, since the models are small and the workers many."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():  # Triton then runs kernels on CPU tensors; it looks when kernels are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")
from hypothesis import settings

torch.set_num_threads(1)
logging.getLogger("diffusers").setLevel(logging.ERROR)
settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("default")
