"""The package as installed: what importing it costs and brings, and how large it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ncp_loss

PACKAGE = Path(ncp_loss.__file__).parent
IMPORT = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import ncp_loss
print(json.dumps([time.process_time() - start, sorted(set(sys.modules) - before)]))
"""


def test_importing_adds_little_to_importing_torch_and_brings_no_heavy_module():
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True, text=True).stdout)
        for _ in range(3)
    ]
    heavy = (
        "triton",
        "peft",
        "transformers",
        "accelerate",
        "diffusers",
        "numpy.testing",
        "torch._dynamo",
        "torch._inductor",
    )
    assert [name for name in runs[0][1] if name.startswith(heavy)] == []
    assert min(seconds for seconds, _ in runs) < 0.05


def test_the_package_is_small_and_every_file_opens_with_its_purpose():
    files = sorted(PACKAGE.glob("*.py"))
    for file in files:
        first = file.read_text().splitlines()[0]
        assert first.startswith('"""')
        assert first.endswith('."""') or file.name == "__init__.py"
        if file.name != "__init__.py":
            assert first[3:].startswith(f"{file.stem}: ")
    lines = [line for file in files for line in file.read_text().splitlines() if line.strip()]
    assert len(lines) <= 2000


def test_public_names_are_those_of_the_contract_and_documented():
    assert ncp_loss.__all__ == sorted(ncp_loss.__all__)
    assert set(ncp_loss.__all__) == {
        *("FlowSchedule", "NoiseConditionedPerceptualLoss", "NoiseSchedule", "PreferenceOutput", "frozen_view"),
        *("cpo_loss", "dpo_loss", "sft_loss", "ncp_cpo_loss", "ncp_dpo_loss", "ncp_sft_loss"),
    }
    for name in ncp_loss.__all__:
        assert len(getattr(ncp_loss, name).__doc__.splitlines()) > 0
    assert (PACKAGE / "py.typed").exists()
