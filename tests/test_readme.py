"""What the README shows runs as it stands, in order, and its figures are those of committed results."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from models import batch, sd15
from peft import LoraConfig
from test_docs import result, share

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_every_snippet_of_the_readme_runs_as_it_stands_in_a_loop_that_has_its_names():
    snippets = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(snippets) == 3
    unet = sd15(dtype=torch.float32).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    pair = {name: torch.cat([value, value]) for name, value in batch(unet).items() if torch.is_tensor(value)}
    loop = {"torch": torch, "unet": unet, "noise_scheduler": DDPMScheduler(), **pair}
    for number, snippet in enumerate(snippets):
        exec(snippet, loop)
        assert loop["loss"].requires_grad, number
        if number == 0:  # the model is the reference
            assert loop["loss"].item() == pytest.approx(math.log(2))
            assert loop["metrics"]["rewards/margins"] == 0
            loop["loss"].backward()
            assert any(p.grad is not None and p.grad.abs().max() > 0 for p in unet.parameters())


def test_code_on_the_first_page_fits_a_phone():
    assert (
        max(len(line) for block in re.findall(r"^```\w+\n(.*?)^```", README, re.M | re.S) for line in block.split("\n"))
        <= 48
    )


def test_the_readmes_table_shows_the_committed_figures():
    kinds = ("literal", "auto")
    found = {
        (name, r["network"], r["estimator"]): r
        for name in ("lora", "margins")
        for r in result("precision")[name]
        if r["compute"] == "bfloat16"
    }
    cosines = {n: [f"{found['lora', n, kind]['cosine']:.3f}" for kind in kinds] for n in ("sd15", "digits")}
    margins = {n: [share(found["margins", n, kind]["0.01"]) for kind in kinds] for n in ("sd15", "digits")}
    memory = {r["step"]: r for r in result("memory")["steps"]}
    steps = [memory[step] for step in ("NCP as published", "ncp_loss")]
    times = {r["step"]: r["over latent DPO"] for r in result("throughput-sd15")["steps"]}
    rows = {
        "cosine with float64's: random network": cosines["sd15"],
        "margin in bf16, its relative error: random network": margins["sd15"],
        "peak memory": [f"{row['peak, MB'] / memory['latent DPO']['peak, MB']:.2f}" for row in steps],
        "checkpoint=True": [
            f"{memory['ncp_loss, checkpoint=True']['peak, MB'] / memory['latent DPO']['peak, MB']:.2f}"
        ],
        "weights added": [
            f"{r['weights beyond the model, MB']:.{digits}f} MB" for r, digits in zip(steps, (1, 0), strict=True)
        ],
        "time of a float32 step": [f"{times[step]:.2f}" for step in ("NCP as published", "ncp_loss")],
    }
    lines = README.splitlines()
    for name, figures in rows.items():
        assert any(name in line and line.endswith(f"| {' | '.join(figures)} |") for line in lines), name
    for figures in (cosines["digits"], margins["digits"]):
        assert f"| the same: trained network | {' | '.join(figures)} |" in lines


def test_the_readmes_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"make (\w+)", README)) & {"demo", "test"}
    assert commands == {"demo", "test"}
    assert all(re.search(rf"^{command}:", makefile, re.MULTILINE) for command in commands)


def test_the_readmes_pictures_exist():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README) + re.findall(r'<img src="([^"]+)"', README)
    assert len(pictures) == 2
    assert all((ROOT / path).is_file() for path in pictures)


def test_a_package_index_shows_the_readme_without_pictures_and_links_that_lead_nowhere_there():
    command = [sys.executable, "-m", "hatch_fancy_pypi_readme"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert re.findall(r"\]\((?!https://)[^)]*\)|<img|<!--|!\[|^\*.*\*$", shown, re.MULTILINE) == []
    assert set(re.findall(r"\(`(docs/[^`]+)`\)", shown)) == set(re.findall(r"\((docs/[^)#]+\.md)", README))
    assert shown.count("```python") == README.count("```python")
    assert re.findall(r"^## .*", shown, re.MULTILINE) == re.findall(r"^## .*", README, re.MULTILINE)
