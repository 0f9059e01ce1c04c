"""Align all weights of Stable Diffusion 1.5 or 2 with preferences: NCP-DPO, full fine-tuning.

    accelerate launch train_dpo_full_sd.py --pretrained_model_name_or_path MODEL --dataset_name TABLE --use_ema

Writes a whole pipeline, which `StableDiffusionPipeline.from_pretrained(output_dir)` loads. The weights that train are
kept in float32, and so is the one copy of them that stays behind: it is the reference, and part of it the encoder. The
loss is that of LoRA's script.
"""

from diffusers import StableDiffusionPipeline
from train_dpo_lora_sd import loss_step, question
from training import main

if __name__ == "__main__":
    defaults = {"resolution": 512, "learning_rate": 1e-6, "layer": "down_blocks", "output_dir": "ncp-dpo-full-sd"}
    main(__doc__, StableDiffusionPipeline, loss_step, question, lora=False, **defaults)
