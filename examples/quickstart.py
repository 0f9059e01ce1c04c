"""From nothing to an aligned model: `python -m examples.quickstart`. Two to three minutes on a CPU.

A small text-to-image U-Net learned digits from captions that are often wrong. A judge prefers the sample that shows the
requested digit, and NCP-DPO teaches the model to prefer it too.
"""

import argparse

import torch
from tqdm import trange

from examples.digits import CLASSES, Judge, add_lora, condition, load_unet, new_scheduler, sample, seeded_noise
from ncp_loss import NoiseConditionedPerceptualLoss, frozen_view, ncp_dpo_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200, help="pairs sampled")
    parser.add_argument("--steps", type=int, default=80, help="training steps")
    parser.add_argument("--held-out", type=int, default=100, help="samples judged before and after")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet, judge, scheduler = load_unet(), Judge(), new_scheduler()  # the model is frozen; only adapters will train

    # 1. Preferences: two samples for each request, and which of them the judge rewards more.
    requests = torch.arange(args.pairs) % CLASSES
    noise = seeded_noise(range(2 * args.pairs))
    first, second = sample(unet, requests.repeat(2), noise, progress="sampling pairs").chunk(2)
    lead = judge(first, requests)[0] - judge(second, requests)[0]
    decided, better = lead.abs() > 0.1, (lead > 0)[:, None, None, None]
    winners, losers = torch.where(better, first, second)[decided], torch.where(better, second, first)[decided]
    requests = requests[decided]

    # 2. Adapters, a reference and the loss; neither of the last two holds a weight of its own.
    optimizer = torch.optim.AdamW(add_lora(unet), lr=3e-4)
    reference = frozen_view(unet)
    ncp = NoiseConditionedPerceptualLoss(unet, layer="down_blocks", schedule=scheduler, step="clean")

    held_out = torch.arange(args.held_out) % CLASSES
    held_out_noise = seeded_noise(range(1_000_000, 1_000_000 + args.held_out))
    before = judge(sample(unet, held_out, held_out_noise), held_out)[0].mean()

    # 3. The loop. Winners first, then their losers; one noise and one timestep for both members of a pair.
    progress = trange(args.steps, desc="aligning")
    for _ in progress:
        rows = torch.randint(len(requests), (16,))
        latents, text = torch.cat([winners[rows], losers[rows]]), condition(requests[rows].repeat(2))
        noise = torch.randn_like(winners[rows]).repeat(2, 1, 1, 1)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(rows),)).repeat(2)
        noisy = scheduler.add_noise(latents, noise, timesteps)

        prediction = unet(noisy, timesteps, text).sample
        with torch.no_grad():
            ref_prediction = reference(noisy, timesteps, text).sample
        loss, metrics = ncp_dpo_loss(ncp, prediction, noise, noisy, timesteps, text, ref_pred=ref_prediction, kappa=2.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{metrics['rewards/accuracies'].item():.0%}")

    # 4. What changed, on noise that no training sample came from.
    after = judge(sample(unet, held_out, held_out_noise), held_out)[0].mean()
    print(f"mean reward of {len(held_out)} held-out samples: {before:.1%} before, {after:.1%} after")


if __name__ == "__main__":
    main()
