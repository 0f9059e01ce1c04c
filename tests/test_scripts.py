"""The training scripts: each runs to its end on a tiny pipeline and real images, and refuses what it cannot use."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import (
    DiffusionPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from pipelines import digit, save_pairs, save_sd, save_sd3, save_sdxl
from programs import ROOT, called, started
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))  # as when a script in it is run

import training  # noqa: E402
import training_data  # noqa: E402

LORA = "pytorch_lora_weights.safetensors"
TINY = ["--resolution", 64, "--train_batch_size", 2, "--learning_rate", 1e-2, "--max_train_steps", 2]

# Runs a script, and kills it at its second checkpoint, of which it leaves only a part.
KILLED = """
import os, pathlib, runpy, signal, sys
from accelerate import Accelerator

save_state = Accelerator.save_state

def killed(self, folder):
    save_state(self, folder)
    if any(pathlib.Path(folder).parent.glob("checkpoint-*")):
        pathlib.Path(folder, "optimizer.bin").unlink()
        os.kill(os.getpid(), signal.SIGKILL)

Accelerator.save_state = killed
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Where the tiny pipelines and the pairs are."""
    root = tmp_path_factory.mktemp("made")
    return SimpleNamespace(
        sd=save_sd(root / "sd"),
        sd2=save_sd(root / "sd2", prediction_type="v_prediction"),
        sdxl=save_sdxl(root / "sdxl"),
        sd3=save_sd3(root / "sd3"),
        pairs=save_pairs(root / "pairs"),
    )


def command(script: str, model: Path, out: Path, *arguments: object) -> list[object]:
    return [EXAMPLES / f"{script}.py", "--pretrained_model_name_or_path", model, "--output_dir", out, *TINY, *arguments]


def call(script: str, model: Path, out: Path, *arguments: object) -> None:
    """The script in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    path, *rest = map(str, command(script, model, out, *arguments))
    called(partial(runpy.run_path, path, run_name="__main__"), *rest, name=path)


def logged(out: Path) -> dict[str, list[float]]:
    """What the event files say: {metric: values by step}."""
    events = EventAccumulator(str(out / "logs" / "ncp")).Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def sample(pipeline: DiffusionPipeline, **options: object) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    options |= {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    return pipeline("the digit 3", generator=torch.Generator().manual_seed(0), **options).images


def check_lora(kind: type, model: Path, out: Path, load: dict | None = None, **options: object) -> None:
    """The saved adapters load into a pipeline, change what it draws, and leave it as it was when unloaded."""
    pipeline = kind.from_pretrained(model, **(load or {}))
    before = sample(pipeline, **options)
    pipeline.load_lora_weights(out)
    after = sample(pipeline, **options)
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() > 1e-6
    pipeline.unload_lora_weights()
    np.testing.assert_array_equal(sample(pipeline, **options), before)


@pytest.fixture(scope="session")
def whole_run(made, tmp_path_factory):
    """Six steps with checkpoints, not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    steps = ["--train_data_dir", made.pairs, "--max_train_steps", 6, "--checkpointing_steps", 2]
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        call("train_dpo_lora_sd", made.sd, out, *steps)
    return out, shown.getvalue(), steps


def test_the_sd_script_saves_adapters_that_load_into_the_pipeline_and_change_what_it_draws(made, whole_run):
    out, _, _ = whole_run
    check_lora(StableDiffusionPipeline, made.sd, out)


def test_a_run_shows_a_progress_bar_and_logs_loss_and_rewards_at_every_step(whole_run):
    out, shown, _ = whole_run
    assert "training: 100%" in shown
    metrics = logged(out)
    for name in ("loss", "raw_model_loss", "ref_loss", "rewards/margins", "rewards/accuracies", "lr"):
        assert len(metrics[name]) == 6, name
        assert np.isfinite(metrics[name]).all(), name


def test_the_margin_is_logged_by_timestep_and_the_logs_hold_no_nan(whole_run):
    metrics = logged(whole_run[0])
    ranges = [f"rewards/margins/t{r}" for r in ("0-250", "250-500", "500-750", "750-1000")]
    assert {name for name in metrics if "/t" in name} <= set(ranges)
    # Two pairs a step are in one range or in two.
    assert 6 <= sum(len(metrics.get(name, [])) for name in ranges) <= 12
    assert all(np.isfinite(values).all() for values in metrics.values())


def test_a_part_that_no_pair_was_in_is_left_out_of_a_mean_and_what_is_not_a_number_is_not_hidden():
    nan = float("nan")
    names = ["loss", "raw_model_loss", "rewards/margins/t0-250", "rewards/margins/t250-500"]
    seen = torch.tensor([[1.0, nan, 4.0, nan], [3.0, 1.0, nan, nan]])
    means = training.means_of(names, seen)
    assert means.keys() == set(names[:3])
    assert (means["loss"], means["rewards/margins/t0-250"]) == (2.0, 4.0)
    assert np.isnan(means["raw_model_loss"])


def test_a_run_killed_while_it_saves_and_then_resumed_reaches_the_same_bits(made, whole_run, capsys, tmp_path):
    out, _, steps = whole_run
    killed = started("-c", KILLED, *command("train_dpo_lora_sd", made.sd, tmp_path, *steps))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / LORA).exists()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]  # none that is incomplete

    limit = ["--checkpoints_total_limit", 2]
    call("train_dpo_lora_sd", made.sd, tmp_path, *steps, "--resume_from_checkpoint", "latest", *limit)
    assert "resuming from" in capsys.readouterr().out
    assert (tmp_path / LORA).read_bytes() == (out / LORA).read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-6"]


def test_the_sdxl_script_saves_adapters_that_load_into_the_pipeline_and_change_what_it_draws(made, tmp_path):
    call("train_dpo_lora_sdxl", made.sdxl, tmp_path, "--train_data_dir", made.pairs, "--random_crop")
    assert logged(tmp_path)["rewards/margins"][0] == 0.0  # adapters start as nothing: the model is the reference
    check_lora(StableDiffusionXLPipeline, made.sdxl, tmp_path, {"add_watermarker": False})


def test_the_sd3_script_saves_adapters_that_load_into_the_pipeline_and_change_what_it_draws(made, tmp_path):
    call("train_dpo_lora_sd3", made.sd3, tmp_path, "--train_data_dir", made.pairs, "--max_sequence_length", 16)
    assert logged(tmp_path)["rewards/margins"][0] == 0.0
    check_lora(StableDiffusion3Pipeline, made.sd3, tmp_path, max_sequence_length=16)


def test_the_sd3_script_trains_without_the_third_text_encoder_on_a_reference_asked_before(made, tmp_path):
    pairs = save_pairs(tmp_path / "pairs", 2)
    less = ["--no_text_encoder_3", "--precompute_reference", "--gradient_checkpointing", "--loss_space", "both"]
    call("train_dpo_lora_sd3", made.sd3, tmp_path / "out", "--train_data_dir", pairs, *less)
    assert logged(tmp_path / "out")["rewards/margins"][0] == pytest.approx(0.0, abs=0.01)


def test_the_full_script_saves_a_pipeline_with_the_averaged_weights(made, tmp_path):
    data = ["--train_data_dir", made.pairs, "--learning_rate", 1e-3, "--checkpointing_steps", 1]
    call("train_dpo_full_sd", made.sd, tmp_path, *data, "--use_ema")
    assert np.isfinite(sample(StableDiffusionPipeline.from_pretrained(tmp_path))).all()
    first, last = (load_file(tmp_path / f"checkpoint-{i}" / "model.safetensors") for i in (1, 2))
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    name = "conv_in.weight"
    # EMAModel's warm-up: it starts as the first step's weights, and the second's decay is 2/11.
    torch.testing.assert_close(saved[name], 2 / 11 * first[name] + 9 / 11 * last[name])


def test_a_full_run_resumes_with_its_average_and_its_reference_and_reaches_the_same_bits(made, tmp_path):
    weights = "unet/diffusion_pytorch_model.safetensors"
    options = ["--train_data_dir", made.pairs, "--use_ema", "--learning_rate", 1e-3, "--checkpointing_steps", 2]
    call("train_dpo_full_sd", made.sd, tmp_path / "whole", *options, "--max_train_steps", 3)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    call(
        "train_dpo_full_sd", made.sd, tmp_path / "resumed", *options, "--max_train_steps", 3,
        "--resume_from_checkpoint", checkpoint,
    )  # fmt: skip
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "resumed" / weights).read_bytes()
    # The reference's loss at the last step is that of the base model, before and after.
    assert logged(tmp_path / "whole")["ref_loss"][-1] == logged(tmp_path / "resumed")["ref_loss"][-1]


def test_the_sft_script_learns_from_winners_alone(made, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(made.pairs / "chosen", images)
    shutil.copy(made.pairs / "metadata.jsonl", images)
    call("train_sft_lora", made.sd, tmp_path / "out", "--train_data_dir", images)
    plain = {name for name in logged(tmp_path / "out") if "/t" not in name}
    assert plain == {"loss", "raw_model_loss", "lr"}
    check_lora(StableDiffusionPipeline, made.sd, tmp_path / "out")


def test_the_sft_script_takes_the_winners_of_a_table_of_pairs(made, tmp_path):
    table([1.0, 0.5, 0.0]).save_to_disk(tmp_path / "table")
    call("train_sft_lora", made.sd, tmp_path / "out", "--dataset_name", tmp_path / "table")
    assert (tmp_path / "out" / LORA).exists()
    for row, winner in enumerate((0, 7)):
        (image,), _ = load_data("--dataset_name", tmp_path / "table", pairs=False).row(row)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(digit(winner, (64, 64))))


def test_the_sft_script_takes_the_winners_of_a_folder_of_pairs(made, tmp_path):
    call("train_sft_lora", made.sd, tmp_path, "--train_data_dir", made.pairs, "--loss_space", "latent")
    assert (tmp_path / LORA).exists()


@pytest.mark.parametrize("space", ["latent", "perceptual", "both"])
def test_precomputed_reference_predictions_give_the_loss_of_those_computed_in_training(made, tmp_path, space):
    pairs = save_pairs(tmp_path / "pairs")
    options = ["--train_data_dir", pairs, "--loss_space", space, "--max_train_steps", 3]
    call("train_dpo_lora_sdxl", made.sdxl, tmp_path / "fly", *options)
    call("train_dpo_lora_sdxl", made.sdxl, tmp_path / "kept", *options, "--precompute_reference")
    (kept,) = pairs.glob("reference-*.safetensors")
    assert load_file(kept)["ref_preds"].shape[:2] == (6, 2)
    fly, again = logged(tmp_path / "fly"), logged(tmp_path / "kept")
    for name in ("loss", "ref_loss"):
        np.testing.assert_allclose(again[name], fly[name], rtol=1e-5)


def test_precomputed_reference_predictions_are_used_again_for_the_same_settings_and_no_others(made, tmp_path):
    pairs = save_pairs(tmp_path / "pairs", 2)
    options = ["--train_data_dir", pairs, "--max_train_steps", 1, "--precompute_reference"]
    call("train_dpo_lora_sd", made.sd, tmp_path, *options)
    (kept,) = pairs.glob("reference-*.safetensors")
    made_at = kept.stat().st_mtime_ns
    call("train_dpo_lora_sd", made.sd, tmp_path, *options)
    assert [path.stat().st_mtime_ns for path in pairs.glob("reference-*")] == [made_at]
    call("train_dpo_lora_sd", made.sd, tmp_path, *options, "--seed", 1)
    assert len(list(pairs.glob("reference-*"))) == 2
    table([1.0, 0.0], long=["an eight", "a nine"]).save_to_disk(tmp_path / "table")
    for column in ("caption", "long"):
        of_table = ["--dataset_name", tmp_path / "table", *options[2:], "--caption_column", column]
        call("train_dpo_lora_sd", made.sd, tmp_path, *of_table)
    assert len(list((tmp_path / "table").glob("reference-*"))) == 2


@pytest.mark.parametrize("beta", [["--beta_dpo", 2500], ["--kappa", 2500]])
def test_accumulated_gradients_are_those_of_the_whole_batch(made, tmp_path, beta):
    # With so large an epsilon AdamW's step is proportional to the gradient, so that its scale shows too.
    gradient = ["--adam_epsilon", 1, "--learning_rate", 1, "--max_grad_norm", 1e9, "--loss_space", "latent"]
    options = ["--train_data_dir", made.pairs, *gradient, *beta, "--max_train_steps", 1]
    call("train_dpo_lora_sdxl", made.sdxl, tmp_path / "whole", *options, "--train_batch_size", 4)
    call("train_dpo_lora_sdxl", made.sdxl, tmp_path / "parts", *options, "--gradient_accumulation_steps", 2)
    whole, parts = (load_file(tmp_path / name / LORA) for name in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert max(weight.abs().max() for name, weight in whole.items() if ".up." in name) > 1e-4
    one, two = (logged(tmp_path / name) for name in ("whole", "parts"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_a_model_that_predicts_velocity_trains_from_the_base_models_loss(made, tmp_path):
    call("train_dpo_lora_sd", made.sd2, tmp_path, "--train_data_dir", made.pairs, "--weighting", "noise")
    assert np.isfinite(logged(tmp_path)["loss"]).all()


@pytest.mark.parametrize("step", [1, 10, "clean"])
def test_the_loss_takes_the_step_that_is_asked_for(made, step):
    parser = training.new_parser("", pairs=True, learning_rate=1.0, layer="down_blocks")
    options = [] if step == 1 else ["--step", str(step)]
    args = parser.parse_args(["--pretrained_model_name_or_path", "none", *options])
    ncp = training.new_ncp(UNet2DConditionModel.from_pretrained(made.sd, subfolder="unet"), args, None)
    assert ncp.step == step


def test_half_precision_and_checkpointing_start_from_the_reference_too(made, tmp_path):
    half = ["--mixed_precision", "bf16", "--gradient_checkpointing", "--max_train_steps", 1]
    call("train_dpo_lora_sdxl", made.sdxl, tmp_path, "--train_data_dir", made.pairs, *half)
    assert logged(tmp_path)["rewards/margins"] == [0.0]
    assert {weight.dtype for weight in load_file(tmp_path / LORA).values()} == {torch.float32}


def load_data(*arguments: object, pairs: bool = True) -> training_data.Data:
    """As the scripts load it."""
    parser = training.new_parser("", pairs=pairs, learning_rate=1.0)
    args = parser.parse_args(["--pretrained_model_name_or_path", "none", *map(str, arguments)])
    return training_data.load_data(parser, args, pairs)


def encoded(index: int) -> bytes:
    buffer = io.BytesIO()
    digit(index, (64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


def table(labels: list[float], **columns: list) -> datasets.Dataset:
    """Like Pick-a-Pic: two encoded images, the first one's label and a caption."""
    first, second = ([encoded(i + k) for i in range(len(labels))] for k in (0, 5))
    rows = {"jpg_0": first, "jpg_1": second, "label_0": labels, "caption": ["a digit"] * len(labels)}
    return datasets.Dataset.from_dict(rows | columns)


def test_a_table_trains_with_its_winners_first_and_its_ties_left_out(made, tmp_path):
    table([1.0, 0.5, 0.0]).save_to_disk(tmp_path / "table")
    call("train_dpo_lora_sd", made.sd, tmp_path / "out", "--dataset_name", tmp_path / "table", "--loss_space", "latent")
    assert (tmp_path / "out" / LORA).exists()

    data = load_data("--dataset_name", tmp_path / "table")
    assert len(data) == 2
    for row, (winner, loser) in enumerate([(0, 5), (7, 2)]):
        images, caption = data.row(row)
        for image, index in zip(images, (winner, loser), strict=True):
            np.testing.assert_array_equal(np.asarray(image), np.asarray(digit(index, (64, 64))))
        assert caption == "a digit"


def test_absolute_winners_are_kept_with_the_one_they_beat_last_whatever_captions_are_called(tmp_path):
    uids = {"image_0_uid": list("abcef"), "image_1_uid": list("bcafd"), "label_1": [0.0, 0.0, 0.5, 0.0, 0.0]}
    # a and c draw, b and f lose: e alone stays.
    table([1, 1, 0.5, 1, 1], **uids).rename_column("caption", "text").save_to_disk(tmp_path / "table")
    options = ["--dataset_name", tmp_path / "table", "--caption_column", "text"]
    assert len(load_data(*options)) == 4
    for pairs in (True, False):
        data = load_data(*options, "--absolute_winners", pairs=pairs)
        assert len(data) == 1
        images, _ = data.row(0)
        np.testing.assert_array_equal(np.asarray(images[0]), np.asarray(digit(3, (64, 64))))


def test_absolute_winners_of_a_table_without_the_columns_or_of_a_folder_are_refused(made, refused, tmp_path):
    table([1.0]).save_to_disk(tmp_path / "table")
    error = refused("--dataset_name", tmp_path / "table", "--absolute_winners")
    assert "columns must be caption, image_0_uid, image_1_uid, label_0, label_1 and others" in error
    assert "for --absolute_winners" in refused("--train_data_dir", made.pairs, "--absolute_winners")
    uids = {"image_0_uid": ["a"], "image_1_uid": ["b"], "label_1": [1.0]}
    table([1.0], **uids).save_to_disk(tmp_path / "labels")
    assert "rows[0]'s label_0, label_1 must be" in refused("--dataset_name", tmp_path / "labels", "--absolute_winners")


def test_a_table_of_decoded_images_gives_winners_first(made, tmp_path):
    images = {"chosen": [digit(0, (64, 64))], "rejected": [digit(5, (64, 64))], "caption": ["a digit"]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(images)}).save_to_disk(tmp_path / "table")
    found, _ = load_data("--dataset_name", tmp_path / "table").row(0)
    for image, index in zip(found, (0, 5), strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(digit(index, (64, 64))))


def test_every_image_has_its_own_size_and_crop_and_pairs_share_their_draws(made):
    data = load_data("--train_data_dir", made.pairs)
    args = SimpleNamespace(resolution=32, random_crop=True, no_hflip=False, seed=0)
    stream = training_data.Stream(data, args, 0, 12)
    batch = training_data.collate([stream[i] for i in range(3)])
    assert batch["images"].shape == (6, 3, 32, 32)
    assert batch["time_ids"].shape == (6, 6)
    # Winners are 72 wide and 64 high, losers 64 wide and 80 high; scaled, there are 4 and 8 pixels of room.
    assert batch["time_ids"][:3, :2].tolist() == [[64, 72]] * 3
    assert batch["time_ids"][3:, :2].tolist() == [[80, 64]] * 3
    assert batch["time_ids"][:, 4:].tolist() == [[32, 32]] * 6
    winners, losers = batch["time_ids"][:3, 2:4], batch["time_ids"][3:, 2:4]
    assert (winners[:, 0] == 0).all()
    assert (losers[:, 1] == 0).all()
    assert len(set(losers[:, 0].tolist())) > 1

    # A sample is a function of seed, epoch and row: the same from any start, in any batch; the next epoch's is another.
    again = training_data.Stream(data, args, 2, 12)[0]
    assert again.keys() == stream[2].keys()
    assert all(np.array_equal(again[name], stream[2][name]) for name in again)
    epochs = [sorted(stream[i]["rows"] for i in range(first, first + 6)) for first in (0, 6)]
    assert epochs == [list(range(6))] * 2
    assert len({stream[i]["seeds"] for i in range(12)}) == 12


@pytest.fixture
def refused(made, monkeypatch, capsys, tmp_path):
    """The one line with which the script refuses its arguments, before it loads a model."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    def run(*arguments: object, script: str = "train_dpo_lora_sd", model: object = made.sd) -> str:
        monkeypatch.setattr(DiffusionPipeline, "from_pretrained", load)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            call(script, model, tmp_path / "out", *arguments)
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert error.startswith(f"{script}.py: error: ")
        return error

    return run


def test_a_path_where_there_is_no_pipeline_is_refused(made, refused, tmp_path):
    data = ["--train_data_dir", made.pairs]
    assert "it was /nowhere/model" in refused(*data, model="/nowhere/model")
    assert "--pretrained_model_name_or_path must be" in refused(*data, model=tmp_path)
    assert "--pretrained_model_name_or_path must be" in refused(*data, model="nobody/no-such-model")
    assert "--pretrained_vae_model_name_or_path must be" in refused(
        *data, "--pretrained_vae_model_name_or_path", tmp_path
    )


def test_a_pipeline_of_another_family_is_refused(made, refused):
    data = ["--train_data_dir", made.pairs]
    assert "with unet, text_encoder alone" in refused(*data, model=made.sdxl)
    assert "it was" in refused(*data, model=made.sd, script="train_dpo_lora_sdxl")
    assert "with transformer, text_encoder, text_encoder_2 alone" in refused(
        *data, model=made.sdxl, script="train_dpo_lora_sd3"
    )


def test_data_that_is_not_there_or_given_twice_is_refused(made, refused, tmp_path):
    assert "data must be given by one of" in refused()
    assert "it was both" in refused("--train_data_dir", made.pairs, "--dataset_name", "x")
    assert "--train_data_dir must be a folder with chosen/, rejected/, metadata.jsonl" in refused(
        "--train_data_dir", tmp_path / "none"
    )
    assert "--dataset_name must be a table" in refused("--dataset_name", tmp_path / "none")


def test_a_table_without_the_columns_is_refused_with_those_it_has(refused, tmp_path):
    table([1.0]).remove_columns("label_0").save_to_disk(tmp_path / "table")
    error = refused("--dataset_name", tmp_path / "table")
    assert "columns must be jpg_0 and jpg_1 and label_0 and caption, or chosen and rejected and caption" in error
    assert "it was jpg_0, jpg_1, caption" in error


def test_an_empty_table_or_folder_is_refused(refused, tmp_path):
    table([]).save_to_disk(tmp_path / "table")
    assert "--dataset_name must be a table with rows" in refused("--dataset_name", tmp_path / "table")
    empty = save_pairs(tmp_path / "pairs", 0)
    assert "it was empty" in refused("--train_data_dir", empty)


def test_a_table_of_ties_is_refused(refused, tmp_path):
    table([0.5, 0.5]).save_to_disk(tmp_path / "table")
    assert "label_0 must be 0 or 1 in some row" in refused("--dataset_name", tmp_path / "table")
    table(["left", "right"]).save_to_disk(tmp_path / "words")
    assert "label_0 must be numbers" in refused("--dataset_name", tmp_path / "words")


def test_an_image_without_its_partner_or_caption_is_refused_by_name(refused, tmp_path):
    pairs = save_pairs(tmp_path / "pairs", 3)
    (pairs / "rejected" / "1.png").unlink()
    assert "it was 1.png in metadata.jsonl alone" in refused("--train_data_dir", pairs)
    digit(0, (64, 64)).save(pairs / "rejected" / "1.png")
    digit(0, (64, 64)).save(pairs / "chosen" / "7.png")
    assert "it was 7.png in chosen/ alone" in refused("--train_data_dir", pairs)


def test_a_line_of_metadata_that_says_something_else_is_refused_by_number(refused, tmp_path):
    pairs = save_pairs(tmp_path / "pairs", 2)
    (pairs / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "caption": "a"}) + "\nnot json\n")
    assert "'not json' in line 2" in refused("--train_data_dir", pairs)
    (pairs / "metadata.jsonl").write_text(2 * (json.dumps({"file_name": "0.png", "caption": "a"}) + "\n"))
    assert "each name once; it was" in refused("--train_data_dir", pairs)
    assert "in line 1" in refused("--train_data_dir", pairs, "--caption_column", "text")


def test_what_is_not_an_image_or_a_caption_is_refused(refused, tmp_path):
    table([1.0], jpg_1=[b"not an image"]).save_to_disk(tmp_path / "images")
    assert "must be images, or encoded images" in refused("--dataset_name", tmp_path / "images")
    table([1.0], caption=[7]).save_to_disk(tmp_path / "captions")
    assert "caption must be text; it was 7" in refused("--dataset_name", tmp_path / "captions")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resolution", "60"], "--resolution must be a multiple of 8; it was 60"),
        (["--train_batch_size", "0"], "--train_batch_size must be a positive number; it was 0"),
        (["--beta_dpo", "-1"], "--beta_dpo must be a positive number; it was -1.0"),
        (["--kappa", "2", "--beta_dpo", "500"], "argument --beta_dpo: not allowed with argument --kappa"),
        (["--step", "0"], "--step must be a positive whole number or 'clean'; it was 0"),
        (["--step", "noisy"], "argument --step: invalid length value: 'noisy'"),
        (["--kappa", "0"], "--kappa must be a positive number; it was 0.0"),
        (["--resume_from_checkpoint", "elsewhere"], "--resume_from_checkpoint must be 'latest' or a folder named"),
        (["--loss_space", "pixels"], "invalid choice: 'pixels'"),
        (["--lr_scheduler", "piecewise_constant"], "invalid choice: 'piecewise_constant'"),
        (["--seed", "-1"], "--seed must be a number, not negative; it was -1"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers must be a number, not negative; it was -1"),
        (["--adam_weight_decay", "nan"], "--adam_weight_decay must be a number, not negative; it was nan"),
        (["--adam_beta1", "1.5"], "--adam_beta1 must be in [0, 1); it was 1.5"),
    ],
)
def test_a_bad_option_is_refused(made, refused, arguments, message):
    assert message in refused("--train_data_dir", made.pairs, *arguments)
