"""Train the digits base model from scratch: `python -m examples.train_digits` (about ten minutes on a CPU).

A model trained on web images learns from captions that are often wrong. So does this one: a share of the captions
(`--wrong`) is replaced by a digit drawn at random. Its samples look like digits, but not always like the digit that was
asked for, which leaves preference alignment something real to repair.
"""

import argparse

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import trange

from examples.digits import (
    CLASSES,
    WEIGHTS,
    Judge,
    condition,
    new_scheduler,
    new_unet,
    real_digits,
    sample,
    seeded_noise,
)


def main() -> None:
    """Train, save the averaged weights in half precision, and report how the judge reads the samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--wrong", type=float, default=0.35, help="share of captions replaced by a random digit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judged", type=int, default=500, help="samples drawn for the judge at the end")
    parser.add_argument("--out", default=str(WEIGHTS))
    args = parser.parse_args()

    torch.set_num_threads(1)  # so small a network gains little from more, and the weights then depend on them
    torch.manual_seed(args.seed)
    (images, labels), _ = real_digits()
    # Wrong once and for all, as in a scraped data set: redrawing them every epoch would be another problem.
    captions = torch.where(torch.rand(len(labels)) < args.wrong, torch.randint(CLASSES, labels.shape), labels)

    unet, scheduler = new_unet(), new_scheduler()
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    progress = trange(args.steps, desc="training")
    for _ in progress:
        rows = torch.randint(len(images), (args.batch,))
        noise = torch.randn(args.batch, *images.shape[1:])
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (args.batch,))
        prediction = unet(
            scheduler.add_noise(images[rows], noise, timesteps), timesteps, condition(captions[rows])
        ).sample
        loss = F.mse_loss(prediction, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(unet)
        progress.set_postfix(loss=f"{loss.item():.4f}")

    unet = average.module.eval()
    save_file({name: weight.half().contiguous() for name, weight in unet.state_dict().items()}, args.out)

    asked = torch.arange(args.judged) % CLASSES
    _, right = Judge()(sample(unet, asked, seeded_noise(range(len(asked)))), asked)
    print(
        f"saved {args.out}; the judge reads the requested digit in {right.float().mean():.1%} of {len(asked)} samples"
    )


if __name__ == "__main__":
    main()
