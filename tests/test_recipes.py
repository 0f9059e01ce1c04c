"""The edits on the recipe pages: diffs that apply, Python that parses, calls that bind to the public API."""

from __future__ import annotations

import ast
import inspect
import math
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from models import batch, sd15, sdxl
from torch import nn

import ncp_loss
from ncp_loss import NoiseConditionedPerceptualLoss, NoiseSchedule

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "apply_recipe.py"
PAGES = sorted(p for p in (ROOT / "docs" / "recipes").glob("*.md") if "```diff" in p.read_text())
HUNK = re.compile(r"^@@ -(\d+)")
METHODS = {"ncp": "forward", "errors": "errors"}
MODELS = UNet2DConditionModel, SD3Transformer2DModel, FluxTransformer2DModel
INPUTS = ("model_pred", "target", "noisy_latents", "timesteps")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def patch(page: Path) -> list[str]:
    """The lines of a page's diffs, in order."""
    fences = re.findall(r"^```diff[^\n]*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return "".join(fences).splitlines()


def hunks(page: Path) -> list[tuple[str, int, list[str]]]:
    """(file, first line in it, lines of the hunk), in order."""
    file, found = "", []
    for line in patch(page):
        if line.startswith("--- a/"):
            file = line.removeprefix("--- a/")
        elif match := HUNK.match(line):
            found.append((file, int(match[1]), []))
        elif not line.startswith("+++ b/"):
            found[-1][2].append(line)
    return found


def checkout(page: Path, folder: Path) -> dict[Path, str]:
    """The trainer's files as far as the page shows them: old lines at their places, and filler elsewhere."""
    files: dict[str, dict[int, str]] = {}
    for file, start, lines in hunks(page):
        old = [line[1:] for line in lines if not line.startswith("+")]
        places = files.setdefault(file, {})
        assert not places.keys() & set(range(start, start + len(old))), f"{file}: hunks overlap at line {start}"
        places.update(enumerate(old, start))
    for file, places in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(places.get(i, f"filler {i}") + "\n" for i in range(1, max(places) + 4)))
    return {folder / file: (folder / file).read_text() for file in files}


def run(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, page, folder, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def added(page: Path, file: str = "") -> list[str]:
    """Each run of added lines, which stands for itself: of a page, or of one file of it."""
    found = []
    for _, _, lines in [hunk for hunk in hunks(page) if Path(hunk[0]).name == file or not file]:
        marked = "\n".join(line if line.startswith("+") else "" for line in lines)
        found += re.findall(r"^\+[^\n]*(?:\n\+[^\n]*)*", marked, re.MULTILINE)
    return [textwrap.dedent(re.sub(r"^\+", "", block, flags=re.MULTILINE)) for block in found]


def signature_of(called: ast.expr) -> inspect.Signature | None:
    """Of a public name, or of the loss, which the pages keep as ``ncp`` or ``self.ncp``."""
    name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
    if name in METHODS:
        method = inspect.signature(getattr(NoiseConditionedPerceptualLoss, METHODS[name]))
        return method.replace(parameters=list(method.parameters.values())[1:])
    return inspect.signature(getattr(ncp_loss, name)) if name in ncp_loss.__all__ else None


def test_some_pages_hold_diffs():
    assert {"diffusers", "kohya"} <= {page.stem for page in PAGES}


@each_page
def test_the_edits_apply_to_the_lines_that_they_name_and_reverse(page, tmp_path):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    before = checkout(page, tmp_path)
    done = run(page, tmp_path)
    assert done.returncode == 0, done.stderr
    after = {path: path.read_text() for path in before}
    old, new = (Counter("".join(texts.values()).splitlines()) for texts in (before, after))
    gone, come = (
        Counter(line[1:] for *_, lines in hunks(page) for line in lines if line.startswith(mark)) for mark in "-+"
    )
    assert new - old == come - gone
    assert old - new == gone - come
    assert run(page, tmp_path, "--reverse").returncode == 0
    assert {path: path.read_text() for path in before} == before


@each_page
def test_a_checkout_that_has_changed_there_is_left_alone(page, tmp_path):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    before = checkout(page, tmp_path)
    last = list(before)[-1]
    last.write_text(re.sub(r"(?m)^(?!filler)(.*)$", r"\1 # moved", last.read_text()))
    before[last] = last.read_text()
    assert run(page, tmp_path).returncode != 0
    assert {path: path.read_text() for path in before} == before


@each_page
def test_every_diff_names_repository_and_commit(page):
    fences = re.findall(r"^```diff([^\n]*)$", page.read_text(), re.MULTILINE)
    titles = [re.fullmatch(r' title="([\w.-]+/[\w.-]+) at ([0-9a-f]{7,40})"', fence) for fence in fences]
    assert all(titles), fences
    assert len({title.groups() for title in titles}) == 1, "one repository, one commit"
    assert titles[0][2] in re.sub(r"```diff.*?```", "", page.read_text(), flags=re.DOTALL), "said in the text too"


@each_page
def test_little_of_the_trainer_is_shown(page):
    for file, start, lines in hunks(page):
        context = [line for line in lines if not line.startswith("+")]
        assert 1 <= len(context) <= 8, (file, start)
        assert not lines[-1].startswith("+"), f"{file}, line {start}: git takes this hunk for the end of the file"


@each_page
def test_added_lines_are_whole_statements_that_call_the_public_api_as_it_is(page):
    trees = [ast.parse(block) for block in added(page)]
    assert not [line for block in added(page) for line in block.splitlines() if len(line) > 92]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    ours = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "ncp_loss"]
    imported = [alias.name for node in ours for alias in node.names]
    assert imported
    assert set(imported) <= set(ncp_loss.__all__)
    conditioning = {node.arg for node in nodes if isinstance(node, ast.arg)}  # of the page's own ``call=``
    conditioning |= {name for model in MODELS for name in inspect.signature(model.forward).parameters}
    calls = [(node, s) for node in nodes if isinstance(node, ast.Call) and (s := signature_of(node.func))]
    assert len(calls) > 1
    for call, signature in calls:
        # What a ``*`` or ``**`` stands for cannot be counted.
        plain = [a for a in call.args if not isinstance(a, ast.Starred)], [k for k in call.keywords if k.arg]
        is_whole = len(plain[0]) == len(call.args) and len(plain[1]) == len(call.keywords)
        bind = signature.bind if is_whole else signature.bind_partial
        bound = bind(*plain[0], **{str(keyword.arg): keyword for keyword in plain[1]})
        assert set(bound.arguments.get("model_kwargs", ())) <= conditioning, ast.unparse(call)


# What follows runs a page's added lines, in their order, among the names that the trainer has there.


def lines_of(page: str, file: str) -> list[str]:
    return added(ROOT / "docs" / "recipes" / f"{page}.md", file)


def execute(blocks: list[str], scope: dict[str, Any]) -> dict[str, Any]:
    for block in blocks:
        exec(compile(block, "page", "exec"), scope)
    return scope


def diffusers_scope(unet: nn.Module, **args: Any) -> dict[str, Any]:
    """The names of diffusers' loops; ``args`` are the script's options."""
    arguments = batch(unet, pairs=True, timesteps=[250, 999 if args.get("is_turbo") else 700])
    prediction, added_cond = arguments["model_pred"], arguments.get("added_cond_kwargs", {})
    options = {"beta_dpo": 5000, "loss_type": "sigmoid", "is_turbo": False, "snr_gamma": None} | args
    return arguments | {
        "unet": unet,
        "noise_scheduler": DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        "args": SimpleNamespace(**options),
        "ref_preds": prediction.detach().clone(),
        "noisy_model_input": arguments["noisy_latents"],
        "prompt_embeds": arguments["encoder_hidden_states"],
        "add_time_ids": added_cond.get("time_ids"),
        "pooled_prompt_embeds": added_cond.get("text_embeds"),
        "unet_added_conditions": added_cond,
        "mse_loss_weights": torch.arange(1.0, 5.0),
        "logs": {},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("file", "unet", "args"),
    [
        ("train_diffusion_dpo.py", sd15, {}),
        ("train_diffusion_dpo_sdxl.py", sdxl, {}),
        ("train_diffusion_dpo_sdxl.py", sdxl, {"is_turbo": True}),
    ],
)
def test_diffusers_pairs_start_at_log_two_and_train_the_prediction(file, unet, args, dtype):
    scope = diffusers_scope(unet(dtype=dtype), **args)
    if args.get("is_turbo"):  # as the script does: its product changes, its betas do not
        signal = scope["noise_scheduler"].alphas_cumprod.sqrt()
        scope["noise_scheduler"].alphas_cumprod = (
            (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        ).square()
    execute(lines_of("diffusers", file), scope)
    assert scope["logs"]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert scope["logs"]["rewards/margins"] == 0
    scope["loss"].backward()
    assert scope["model_pred"].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("file", "unet"),
    [
        ("train_text_to_image.py", lambda: sd15(dtype=torch.float32).requires_grad_(True)),
        ("train_text_to_image_lora.py", lambda: sd15(dtype=torch.float32)),
        ("train_text_to_image_lora_sdxl.py", lambda: sdxl(dtype=torch.float32)),
    ],
)
def test_diffusers_single_images_follow_a_prediction_type_set_in_the_loop(file, unet):
    imports, build, error, mean, weighted = lines_of("diffusers", file)
    scope = execute([imports, build], diffusers_scope(unet()))
    scope["noise_scheduler"].register_to_config(prediction_type="v_prediction")
    execute([error, mean], scope)
    expected = NoiseConditionedPerceptualLoss(
        scope["unet"], schedule=NoiseSchedule(scope["noise_scheduler"].betas, "v_prediction"), weighting="noise"
    )
    arguments = [
        scope[name] for name in ("model_pred", "target", "noisy_latents", "timesteps", "encoder_hidden_states")
    ]
    conditions = {"added_cond_kwargs": scope["unet_added_conditions"]} if scope["unet_added_conditions"] else {}
    assert scope["loss"].item() == expected(*arguments, **conditions).item()
    unweighted = scope["error"]
    execute([weighted], scope)
    assert torch.equal(scope["loss"], unweighted * torch.arange(1.0, 5.0))


class Trainer:
    """kohya's, as far as the page's lines reach: ``call_unet`` casts latents, and text comes as a list."""

    is_sdxl = False
    ncp = ncp_error = None

    def call_unet(self, args, accelerator, unet, latents, timesteps, text_conds, batch, weight_dtype):
        return unet(latents.to(weight_dtype), timesteps, text_conds[0].to(weight_dtype)).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kohyas_lines_give_the_librarys_error_with_float32_latents(dtype):
    _, _, take, replace = lines_of("kohya", "train_network.py")
    unet, schedule = sd15(dtype=dtype), DDPMScheduler()
    given = batch(unet, dtype=torch.float32)
    on = {"enabled": dtype != torch.float32, "dtype": torch.bfloat16}
    accelerator = SimpleNamespace(autocast=lambda: torch.autocast("cpu", **on))
    args = SimpleNamespace(v_parameterization=False)
    scope = given | {
        "NoiseConditionedPerceptualLoss": NoiseConditionedPerceptualLoss,
        "NoiseSchedule": NoiseSchedule,
        "self": Trainer(),
        "args": args,
        "accelerator": accelerator,
        "unet": unet,
        "noise_scheduler": schedule,
        "noise_pred": given["model_pred"],
        "weight_dtype": dtype,
        "batch": {"captions": ["one", "two"]},
        "text_encoder_conds": [given["encoder_hidden_states"]],
        "loss": "the trainer's",
    }
    execute([take, replace], scope)
    ncp = NoiseConditionedPerceptualLoss(unet, schedule=schedule, weighting="noise", reduction="none")
    with accelerator.autocast():
        expected = ncp(*(given[name] for name in INPUTS), given["encoder_hidden_states"])
    assert torch.equal(scope["loss"], expected[:, None, None, None])
    scope["loss"].mean().backward()
    assert given["model_pred"].grad.abs().sum() > 0


def test_kohyas_trainers_for_other_models_keep_their_own_loss():
    _, attributes, _, replace = lines_of("kohya", "train_network.py")
    inheriting = type("FluxTrainer", (type("NetworkTrainer", (), execute([attributes], {})),), {})
    assert execute([replace], {"self": inheriting(), "loss": "the trainer's"})["loss"] == "the trainer's"
