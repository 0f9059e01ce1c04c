"""The emoji testbed's networks: an autoencoder, a text-conditioned U-Net on its latents, word embeddings, a sampler."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from examples import digits
from examples.digits import new_scheduler

WEIGHTS = Path(__file__).with_name("weights")
LATENT, SIDE = 4, 8  # channels and side of a latent
TEXT, WORDS = 64, 12  # width of the text states; words of the longest caption
UNKNOWN, NOTHING = 0, 1  # tokens before the vocabulary's: a word never learned, and the place after the last word

seeded_noise = partial(digits.seeded_noise, shape=(LATENT, SIDE, SIDE))


def new_vae() -> AutoencoderKL:
    """32 x 32 RGB, given as 16 x 16 x 12, to 8 x 8 x 4: Stable Diffusion's block types.

    A block of 2 x 2 pixels is one place of 12 channels, so no convolution runs at 32 x 32, where most time would go.
    """
    return AutoencoderKL(
        sample_size=16,
        in_channels=12,
        out_channels=12,
        latent_channels=LATENT,
        block_out_channels=(64, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
    ).to(memory_format=torch.channels_last)


def new_unet() -> UNet2DConditionModel:
    """Two levels, 8 x 8 and 4 x 4, with cross-attention on both, as in Stable Diffusion's upper levels."""
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=LATENT,
        out_channels=LATENT,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=(2, 3),  # heads: each 32 wide
        norm_num_groups=8,
    ).to(memory_format=torch.channels_last)


class Text(nn.Module):
    """Captions to text states (N, 12, 64): a learned vector for each word and each place. No words: unconditional."""

    def __init__(self, vocabulary: list[str]) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.index = {word: index for index, word in enumerate(vocabulary, start=2)}
        self.words = nn.Embedding(len(vocabulary) + 2, TEXT)
        self.places = nn.Parameter(torch.randn(WORDS, TEXT) * 0.1)

    def tokens(self, captions: list[str]) -> Tensor:
        rows = [[self.index.get(word, UNKNOWN) for word in caption.split()[:WORDS]] for caption in captions]
        return torch.tensor([row + [NOTHING] * (WORDS - len(row)) for row in rows])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.words(tokens) + self.places


class Generator(nn.Module):
    """U-Net and text, trained together."""

    def __init__(self, vocabulary: list[str]) -> None:
        super().__init__()
        self.unet, self.text = new_unet(), Text(vocabulary)


class Coder(nn.Module):
    """The autoencoder, and the mean and deviation of each latent channel, by which latents are normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = new_vae()
        self.register_buffer("mean", torch.zeros(LATENT, 1, 1))
        self.register_buffer("deviation", torch.ones(LATENT, 1, 1))

    @torch.no_grad()
    def normalize(self, images: Tensor) -> None:
        """Take the mean and the scale from the latents of these images."""
        found = torch.cat([self.encode(part).mean for part in images.split(64)])
        self.mean, self.deviation = (x.view_as(self.mean) for x in (found.mean((0, 2, 3)), found.std((0, 2, 3))))

    def encode(self, images: Tensor) -> DiagonalGaussianDistribution:
        blocks = F.pixel_unshuffle(images, 2).contiguous(memory_format=torch.channels_last)
        return self.vae.encode(blocks).latent_dist

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(self.vae.decode(latents).sample, 2)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """(N, 4, 8, 8): the posterior's mean, normalized."""
        return torch.cat([(self.encode(part).mean - self.mean) / self.deviation for part in images.split(64)])

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """(N, 3, 32, 32) in [-1, 1]."""
        return torch.cat([self.decode(part * self.deviation + self.mean) for part in latents.split(64)]).clamp(-1, 1)


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel, text: Text, captions: list[str], noise: Tensor, steps: int = 15, guidance: float = 2.0
) -> Tensor:
    """Deterministic DDIM with classifier-free guidance, from `noise` to scaled latents (N, 4, 8, 8)."""
    scheduler: DDIMScheduler = new_scheduler()
    scheduler.set_timesteps(steps)
    found = []
    for part, tokens in zip(noise.split(64), text.tokens(captions).split(64), strict=True):
        states = torch.cat([text(torch.full_like(tokens, NOTHING)), text(tokens)])
        for t in scheduler.timesteps:
            without, given = unet(part.repeat(2, 1, 1, 1), t, states).sample.chunk(2)
            part = scheduler.step(without + guidance * (given - without), t, part).prev_sample
        found.append(part)
    return torch.cat(found)


def save(path: Path, weights: dict[str, Tensor], note: dict[str, str] | None = None) -> None:
    """The weights, matrices and filters in half precision, and a note beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = {name: (value.half() if value.ndim > 1 else value).contiguous() for name, value in weights.items()}
    path.write_bytes(safetensors.torch.save(small, metadata=note))


def note(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def load(path: Path, module: nn.Module, strict: bool = True) -> nn.Module:
    """The module with the file's weights, in single precision, frozen."""
    module.load_state_dict({name: value.float() for name, value in load_file(path).items()}, strict=strict)
    return module.eval().requires_grad_(False)


def load_coder(folder: Path = WEIGHTS) -> Coder:
    coder = Coder()
    load(folder / "emoji_vae.safetensors", coder)
    return coder


def load_generator(folder: Path = WEIGHTS, early: bool = False) -> Generator:
    """U-Net and text; `early`: of a checkpoint, to the end of the down blocks, the rest untrained."""
    path = folder / f"emoji_unet{'_early' if early else ''}.safetensors"
    generator = Generator(note(path)["vocabulary"].split())
    load(path, generator, strict=not early)
    return generator
