"""What the documentation shows runs as it stands, page by page; its links lead somewhere, and no page is left out."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import DDPMScheduler
from models import batch, sd15

import ncp_loss
from ncp_loss import NoiseConditionedPerceptualLoss

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# A block with title="..." is a fragment of another program, which the title names: it is parsed, not run.
FENCE = re.compile(r"^( *)(`{3,})(\w*)([^\n]*)\n(.*?)^\1\2$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)[^)]*\)")


class Block(NamedTuple):
    code: str
    is_fragment: bool


def name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def python_blocks(page: Path) -> list[Block]:
    found = [m for m in FENCE.finditer(page.read_text()) if m[3] in ("python", "py")]
    return [Block(textwrap.dedent(m[5]), "title=" in m[4]) for m in found]


def included(source: str) -> str:
    """A file, or its section between two markers."""
    file, _, section = source.partition(":")
    text = (ROOT / file).read_text()
    if not section:
        return text
    (found,) = re.findall(rf"\[start:{section}\] -->(.*?)<!-- --8<-- \[end:{section}\]", text, re.DOTALL)
    return found


def prose(page: Path) -> str:
    """The page without its code, the text that it includes in place."""
    text = re.sub(r'^--8<-- "(.+)"$', lambda m: included(m[1]), page.read_text(), flags=re.MULTILINE)
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", text))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def navigation() -> list[str]:
    return re.findall(r"^ +- (?:.+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)


def readers_loop() -> dict[str, object]:
    """What a block may take for granted: the names of the loop that a reader has."""
    unet, scheduler = sd15(dtype=torch.float32), DDPMScheduler()
    ncp = NoiseConditionedPerceptualLoss(unet, schedule=scheduler)
    return {"torch": torch, "unet": unet, "noise_scheduler": scheduler, "ncp": ncp, **batch(unet)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=name)
def test_every_python_block_of_a_page_runs_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = python_blocks(page)
    scope = {} if all(block.is_fragment for block in blocks) else readers_loop()
    for number, block in enumerate(blocks, 1):
        where = f"{name(page)}, block {number}"
        if block.is_fragment:
            ast.parse(block.code, where)
        else:
            exec(compile(block.code, where, "exec"), scope)


def test_only_recipes_hold_fragments():
    """Everywhere else a reader may paste what is shown."""
    assert {p.parent.name for p in PAGES if any(block.is_fragment for block in python_blocks(p))} == {"recipes"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_fits_the_column_that_the_site_gives_it(page):
    lines = [line for block in python_blocks(page) for line in block.code.splitlines()]
    assert not [line for line in lines if len(line) > 92 and not line.lstrip().startswith("# was: ")]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_and_picture_exists(page):
    for target in LINK.findall(prose(page)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            other = page if not path else page.parent / path
            assert other.exists(), target
            assert not anchor or anchor in anchors(other), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_test_that_a_page_names_exists(page):
    for file, test in re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", page.read_text()):
        source = (ROOT / "tests" / file).read_text()
        assert f"def {test}(" in source if test else source, (file, test)


def test_every_page_is_in_the_navigation_and_every_entry_a_page():
    assert sorted(navigation()) == [name(page) for page in PAGES]


def test_every_public_name_is_on_the_api_page():
    shown = re.findall(r"^::: ncp_loss\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(ncp_loss.__all__)


def test_home_shows_the_committed_figures_of_the_demo():
    result = json.loads((DOCS / "images" / "demo.json").read_text())
    home = (DOCS / "index.md").read_text()
    drawn, win = result["requested digit drawn"], result["win rate"]
    for value in (drawn["base"], drawn["aligned"], win["share"], win["low"], win["high"]):
        assert f"{value:.1%}" in home, value
    means = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())["means"]
    assert f"wins {means['win rate']:.1%} ± {means['win rate ±']:.1%}" in home
    readme = (ROOT / "README.md").read_text()
    assert f"aligned sample in {means['win rate']:.1%} of the pairs" in readme
    for text in (home, readme):
        spread = f"from {means['base diversity']:.0%} to {means['diversity']:.0%} of that between two real ones"
        assert spread in text.replace("\n", " ")
