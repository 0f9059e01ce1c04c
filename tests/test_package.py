"""The package as installed: what importing it costs and brings, and how large it is."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import ncp_loss

PACKAGE = Path(ncp_loss.__file__).parent
CODE_LINES = 2175  # a budget; CONTRIBUTING.md says it too
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
IMPORT = """
import json, sys, time
start = time.process_time()
import torch
before, middle = set(sys.modules), time.process_time()
import ncp_loss
print(json.dumps([(time.process_time() - middle) / (middle - start), sorted(set(sys.modules) - before)]))
"""


@pytest.mark.slow
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
    # Processor time, as a share of torch's own in the same process: neither a slow nor a busy machine changes it much.
    assert min(share for share, _ in runs) < 0.06


def lines_of(source: str) -> tuple[int, int]:
    """Lines of code, without blank lines, comments and docstrings; and comments."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if first is not None and ast.get_docstring(node, clean=False) is not None:
                docstrings |= set(range(first.lineno, first.end_lineno + 1))
    code: set[int] = set()
    comments = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments += 1
        elif token.type not in LAYOUT:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings), comments


COUNTED = '''"""Docstring,

of three lines."""

# comment
x = """code,

of three lines"""  # comment


def f():
    """Docstring."""
    return (
        x
    )
'''


def test_lines_of_code_are_counted_without_blank_lines_comments_and_docstrings():
    assert lines_of(COUNTED) == (7, 2)


def test_the_package_stays_within_its_budget_of_code_lines_which_contributing_names():
    code, comments = map(sum, zip(*(lines_of(file.read_text()) for file in PACKAGE.glob("*.py")), strict=True))
    more = f"{code} lines of code: say why in the commit, and raise the budget here and in CONTRIBUTING.md"
    assert code <= CODE_LINES, f"{more} ({comments} comments)"
    assert f"{CODE_LINES:,} lines of code" in (PACKAGE.parent / "CONTRIBUTING.md").read_text()


def imported(file: Path) -> set[str]:
    """The files of the package that one of them imports, wherever in it the import stands."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom) and node.level]
    return {node.module or name.name for node in nodes for name in node.names}


def test_no_room_imports_another_but_error_the_stencil_that_it_combines():
    rooms = {"schedule", "difference", "encoder", "error", "objectives"}
    files = [file for file in PACKAGE.glob("*.py") if file.stem not in ("__init__", "loss", "preference")]
    assert rooms < {file.stem for file in files}
    assert {(file.stem, other) for file in files for other in imported(file) & rooms} == {("error", "difference")}


def test_every_file_opens_with_its_purpose():
    files = sorted(PACKAGE.glob("*.py"))
    for file in files:
        first = file.read_text().splitlines()[0]
        assert first.startswith('"""')
        assert first.endswith('."""') or file.name == "__init__.py"
        if file.name != "__init__.py":
            assert first[3:].startswith(f"{file.stem}: ")


def test_public_names_are_those_of_the_contract_and_documented():
    assert ncp_loss.__all__ == sorted(ncp_loss.__all__)
    assert set(ncp_loss.__all__) == {
        *("FlowSchedule", "NoiseConditionedPerceptualLoss", "NoiseSchedule", "PreferenceOutput", "frozen_view"),
        *("cpo_loss", "dpo_loss", "sft_loss", "ncp_cpo_loss", "ncp_dpo_loss", "ncp_sft_loss"),
        *("mapo_loss", "kto_loss", "preference_metrics", "by_timestep", "relative_beta", "absolute_winners"),
    }
    for name in ncp_loss.__all__:
        assert len(getattr(ncp_loss, name).__doc__.splitlines()) > 0
    assert (PACKAGE / "py.typed").exists()
