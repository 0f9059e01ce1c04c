"""Programs of the repository: started as a user starts them, or called in the tests' own process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def started(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Python with these arguments in a process of its own, where kernels are not interpreted."""
    theirs = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    one_thread = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # the other worker has the other core
    command = [sys.executable, *map(str, arguments)]
    env = theirs | one_thread | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def called(main: Callable[[], object], *arguments: object, name: str = "program") -> None:
    """A program's `main` with these arguments, which spares seconds of imports; draws go on as if it had not run."""
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        with torch.random.fork_rng(devices=[]):
            main()
    finally:
        sys.argv = before
