"""The main job runs from one command, ends in a result, and says the same twice."""

from __future__ import annotations

import json

import pytest
import torch
from programs import ROOT, called, started
from safetensors.torch import load_file

from benchmarks import demo as demo_of_five_seeds
from examples import demo, quickstart, train_digits

slow = pytest.mark.slow
TINY = [*demo_of_five_seeds.TINY, "--out"]


@pytest.fixture(scope="module")
def of_a_process(tmp_path_factory):
    """The demo as a user starts it: what it printed, and the folder that it wrote to."""
    out = tmp_path_factory.mktemp("demo")
    return started("-m", "examples.demo", *TINY, out), out


@slow
def test_the_demo_prints_a_result_a_progress_bar_and_writes_pictures(of_a_process):
    done, out = of_a_process
    assert done.returncode == 0, done.stderr
    assert "win rate over the base" in done.stdout
    assert "95% interval" in done.stdout
    assert "diversity, of real digits" in done.stdout
    assert "aligning" in done.stderr  # tqdm's bar
    for name in ("samples.png", "reward.png", "margins.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


@slow
def test_the_demo_gives_the_same_numbers_twice(of_a_process, tmp_path):
    # Again as a user starts it: the judge's last digits depend on the threads that a process gives its linear algebra.
    assert started("-m", "examples.demo", *TINY, tmp_path).returncode == 0
    results = [json.loads((out / "result.json").read_text()) for out in (of_a_process[1], tmp_path)]
    for result in results:
        del result["seconds"], result["settings"]["out"], result["command"]
    assert results[0] == results[1]


def test_diversity_is_the_mean_distance_of_two_samples_of_one_digit():
    labels = torch.arange(30) % 10
    alike = labels.float()[:, None, None, None].expand(30, 1, 4, 4)  # digits differ, samples of one digit do not
    assert demo.diversity(alike, labels) == 0
    spread = alike + (torch.arange(30) // 10).float()[:, None, None, None]  # each digit's three samples: 0, 1, 2 apart
    assert demo.diversity(spread, labels) == pytest.approx((4 + 4 + 8) / 3)


@slow
def test_a_latent_baseline_is_one_option_away(tmp_path):
    called(demo.main, *TINY, tmp_path, "--space", "latent", "--steps", 1)
    assert json.loads((tmp_path / "result.json").read_text())["settings"]["space"] == "latent"


@slow
def test_the_quick_start_aligns_in_eighty_lines_and_prints_what_changed(capsys):
    called(quickstart.main, "--pairs", 10, "--steps", 1, "--held-out", 10)
    assert "of 10 held-out samples" in capsys.readouterr().out
    assert len((ROOT / "examples" / "quickstart.py").read_text().splitlines()) <= 80


@slow
def test_the_training_script_trains_and_saves_what_the_demo_loads(tmp_path):
    called(train_digits.main, "--steps", 1, "--judged", 10, "--out", tmp_path / "unet.safetensors")
    committed = load_file(ROOT / "examples" / "digits_unet.safetensors")
    assert {k: v.shape for k, v in load_file(tmp_path / "unet.safetensors").items()} == {
        k: v.shape for k, v in committed.items()
    }


def test_too_few_held_out_samples_are_refused_by_name(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        called(demo.main, "--held-out", 10, "--out", tmp_path)
    assert "--held-out must be at least 20, two samples a digit; it was 10" in capsys.readouterr().err


def test_the_committed_weights_are_small():
    assert (ROOT / "examples" / "digits_unet.safetensors").stat().st_size <= 2_000_000


def test_the_committed_demo_result_shows_a_win_over_the_base_with_its_interval_above_one_half():
    result = json.loads((ROOT / "docs" / "images" / "demo.json").read_text())
    assert result["win rate"]["low"] > 0.5
    assert result["reward"]["aligned"] > result["reward"]["base"]
