"""What the README shows runs as it stands, in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from models import batch, sd15

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_snippet_of_the_readme_runs_as_it_stands(capsys):
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(snippets) == 4
    unet = sd15(dtype=torch.float32)
    arguments = batch(unet)
    # The one-line change stands in the reader's own loop; the complete loop defines all that it uses.
    loop = {"unet": unet, "noise_scheduler": DDPMScheduler(), **arguments}
    exec("\n".join(snippets[:2]), loop)
    assert loop["loss"].requires_grad
    complete: dict = {}
    exec("\n".join(snippets[2:]), complete)
    assert complete["loss"].requires_grad
    assert capsys.readouterr().out.count("rewards/margins") == 2


def test_the_readmes_commands_are_targets_of_the_makefile():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"make (\w+)", readme)) & {"demo", "test"}
    assert commands == {"demo", "test"}
    assert all(re.search(rf"^{command}:", makefile, re.MULTILINE) for command in commands)


def test_the_readmes_pictures_exist():
    assert all(
        (ROOT / path).is_file() for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    )
