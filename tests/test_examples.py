"""The main job runs from one command, ends in a result, and says the same twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples.demo import diversity

ROOT = Path(__file__).parents[1]
slow = pytest.mark.slow
DEMO = ["examples.demo", "--steps", "2", "--pairs", "10", "--batch", "2", "--held-out", "20", "--out"]


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *map(str, arguments)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # the other worker has the other core
    return subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    outs = [tmp_path_factory.mktemp("demo") for _ in range(2)]
    return outs, [run(*DEMO, out) for out in outs]


@slow
def test_the_demo_prints_a_result_a_progress_bar_and_writes_pictures(demo):
    outs, runs = demo
    assert runs[0].returncode == 0, runs[0].stderr
    assert "win rate over the base" in runs[0].stdout
    assert "95% interval" in runs[0].stdout
    assert "diversity, of real digits" in runs[0].stdout
    assert "aligning" in runs[0].stderr  # tqdm's bar
    for name in ("samples.png", "reward.png", "margins.png"):
        assert (outs[0] / name).read_bytes().startswith(b"\x89PNG")


@slow
def test_the_demo_gives_the_same_numbers_twice(demo):
    results = [json.loads((out / "result.json").read_text()) for out in demo[0]]
    for result in results:
        del result["seconds"], result["settings"]["out"], result["command"]
    assert results[0] == results[1]


def test_diversity_is_the_mean_distance_of_two_samples_of_one_digit():
    labels = torch.arange(30) % 10
    alike = labels.float()[:, None, None, None].expand(30, 1, 4, 4)  # digits differ, samples of one digit do not
    assert diversity(alike, labels) == 0
    spread = alike + (torch.arange(30) // 10).float()[:, None, None, None]  # each digit's three samples: 0, 1, 2 apart
    assert diversity(spread, labels) == pytest.approx((4 + 4 + 8) / 3)


@slow
def test_a_latent_baseline_is_one_option_away(tmp_path):
    done = run(*DEMO, tmp_path, "--space", "latent", "--steps", 1)
    assert done.returncode == 0, done.stderr


@slow
def test_the_quick_start_aligns_in_eighty_lines_and_prints_what_changed():
    done = run("examples.quickstart", "--pairs", 10, "--steps", 1, "--held-out", 10)
    assert done.returncode == 0, done.stderr
    assert "of 10 held-out samples" in done.stdout
    assert len((ROOT / "examples" / "quickstart.py").read_text().splitlines()) <= 80


@slow
def test_the_training_script_trains_and_saves_what_the_demo_loads(tmp_path):
    done = run("examples.train_digits", "--steps", 1, "--judged", 10, "--out", tmp_path / "unet.safetensors")
    assert done.returncode == 0, done.stderr
    committed = load_file(ROOT / "examples" / "digits_unet.safetensors")
    assert {k: v.shape for k, v in load_file(tmp_path / "unet.safetensors").items()} == {
        k: v.shape for k, v in committed.items()
    }


def test_too_few_held_out_samples_are_refused_by_name(tmp_path):
    done = run("examples.demo", "--held-out", 10, "--out", tmp_path)
    assert done.returncode == 2
    assert "--held-out must be at least 20, two samples a digit; it was 10" in done.stderr


def test_the_committed_weights_are_small():
    assert (ROOT / "examples" / "digits_unet.safetensors").stat().st_size <= 2_000_000


def test_the_committed_demo_result_shows_a_win_over_the_base_with_its_interval_above_one_half():
    result = json.loads((ROOT / "docs" / "images" / "demo.json").read_text())
    assert result["win rate"]["low"] > 0.5
    assert result["reward"]["aligned"] > result["reward"]["base"]
