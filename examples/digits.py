"""What the digits studies share: real handwriting, a small text-to-image U-Net's shape, a sampler and a judge.

The images are scikit-learn's `load_digits` (1,797 handwritten digits of 8x8 pixels), smoothly upscaled to 16x16. One
half teaches the generator, the other half the judge, so the judge never saw what the generator learned from.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from torch import Tensor
from tqdm import tqdm

WEIGHTS = Path(__file__).with_name("digits_unet.safetensors")
SIZE, CLASSES = 16, 10


def real_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The generator's half of the real digits and the judge's: images (N, 1, 16, 16) in [-1, 1], labels (N,)."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=SIZE, mode="bicubic", align_corners=False).clamp(-1, 1)
    halves = train_test_split(range(len(images)), test_size=0.5, random_state=0, stratify=data.target)
    labels = torch.from_numpy(data.target).long()
    first, second = ((images[half], labels[half]) for half in halves)
    return first, second


def condition(labels: Tensor) -> Tensor:
    """The "text embedding" of a digit, (N, 2, 11): a start token and the digit's own, one-hot in place of learned."""
    start = torch.full_like(labels, CLASSES)
    return F.one_hot(torch.stack([start, labels], dim=1), CLASSES + 1).float()


def new_unet() -> UNet2DConditionModel:
    """An untrained U-Net with Stable Diffusion's block types: three levels, cross-attention at 8x8."""
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=CLASSES + 1,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def load_unet() -> UNet2DConditionModel:
    """The committed base model: stored in half precision to be small, run in single."""
    unet = new_unet()
    unet.load_state_dict({name: weight.float() for name, weight in load_file(WEIGHTS).items()})
    unet = unet.to(memory_format=torch.channels_last)  # samples a fifth faster on a CPU
    return unet.eval().requires_grad_(False)


def add_lora(unet: UNet2DConditionModel, rank: int = 8) -> list[torch.nn.Parameter]:
    """Add LoRA adapters to the attention layers and residual convolutions; returns what trains: their parameters."""
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, epsilon prediction."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )


def seeded_noise(seeds: range, shape: tuple[int, ...] = (1, SIZE, SIZE)) -> Tensor:
    """(N, *shape) standard normal noise; each sample's depends on its own seed alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(unet: UNet2DConditionModel, labels: Tensor, noise: Tensor, steps: int = 20, progress: str = "") -> Tensor:
    """Deterministic DDIM from `noise`, no guidance, to images (N, 1, 16, 16) in [-1, 1]; `progress` titles a bar."""
    scheduler = new_scheduler()
    scheduler.set_timesteps(steps)
    images = []
    chunks = list(zip(noise.split(100), condition(labels).split(100), strict=True))
    for chunk, states in tqdm(chunks, desc=progress, disable=not progress):
        for t in scheduler.timesteps:
            chunk = scheduler.step(unet(chunk, t, states).sample, t, chunk).prev_sample
        images.append(chunk.clamp(-1, 1))
    return torch.cat(images)


class Judge:
    """A classifier fitted on real digits; its belief that an image shows the requested digit is the reward."""

    def __init__(self) -> None:
        _, (images, labels) = real_digits()
        # A Gaussian kernel machine with probabilities: its fit is convex, so it hardly depends on the machine.
        kernel = Nystroem(gamma=0.01, n_components=400, random_state=0)
        self.classifier = make_pipeline(kernel, LogisticRegression(C=30, max_iter=1000))
        self.classifier.fit(images.flatten(1).numpy(), labels.numpy())

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The probability of the requested digit, (N,), and whether the judge reads that digit, (N,) bool."""
        probabilities = torch.from_numpy(self.classifier.predict_proba(images.flatten(1).numpy()))
        return probabilities.gather(1, labels[:, None]).squeeze(1), probabilities.argmax(1) == labels
