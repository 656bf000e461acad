"""Train the tiny VAE of quickstart/base on small pictures: 64 px, 4 latent channels of 16 x 16.

    python quickstart/train_vae.py --images FOLDER [FOLDER ...] --output_dir VAE --minutes 25

The loss is L1, plus the L1 of horizontal and vertical differences, which keeps edges sharp without a second network,
plus the L1 of color (without brightness) in 4 x 4 averages, since hues come last otherwise, plus a small KL term. It
sees crops of half the width and height: the network is convolutional throughout, and a crop costs a quarter. The
scaling factor is set so that latents have unit variance, as Rombach et al. 2022 (arXiv:2112.10752).
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusers import AutoencoderKL

SIZE = 64  # pixels
CROP = 32  # pixels of a picture that an update sees
KL_WEIGHT = 1e-6  # of the KL divergence summed over a picture's latents, against mean losses per pixel
COLOR_WEIGHT = 2.0


def load_images(folders: list[str]) -> Tensor:
    """Return all pictures in the folders, over white, as uint8 [n, 3, 64, 64]."""
    pictures = []
    paths = [path for folder in folders for path in sorted(Path(folder).glob("*.*")) if path.suffix != ".jsonl"]
    for path in paths:
        picture = Image.open(path).convert("RGBA").resize((SIZE, SIZE), Image.LANCZOS)
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return torch.stack(pictures)


def make_vae() -> AutoencoderKL:
    """Return the network with random weights."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64), norm_num_groups=8, layers_per_block=1, latent_channels=4, sample_size=SIZE,
        mid_block_add_attention=False, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3)


def compute_loss(vae: AutoencoderKL, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the mean absolute error of reconstructing pixel_values [b, 3, 64, 64] in [-1, 1]."""
    posterior = vae.encode(pixel_values).latent_dist
    error = vae.decode(posterior.sample()).sample - pixel_values
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    blurred = F.avg_pool2d(error, 4)
    colors = (blurred - blurred.mean(1, keepdim=True)).abs().mean()
    return error.abs().mean() + edges + COLOR_WEIGHT * colors + KL_WEIGHT * posterior.kl().mean(), error.abs().mean()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random crop of each picture, which may reach 4 pixels beyond it, as [-1, 1]; half are mirrored."""
    images = F.pad(images.float() / 127.5 - 1, (4, 4, 4, 4), value=1.0)
    corners = torch.randint(0, SIZE + 9 - CROP, (len(images), 2), generator=generator).tolist()
    crops = [image[:, y : y + CROP, x : x + CROP] for image, (y, x) in zip(images, corners, strict=True)]
    images, mirrored = torch.stack(crops), torch.rand(len(crops), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images).to(memory_format=torch.channels_last)


@torch.no_grad()
def set_scaling_factor(vae: AutoencoderKL, images: Tensor) -> None:
    """Set the factor that gives latents a standard deviation of 1."""
    means = torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in images.split(64)])
    vae.register_to_config(scaling_factor=round(1 / means.std().item(), 5))


def main() -> None:
    """Train for a given time and save."""
    parser = argparse.ArgumentParser(description="Train the tiny VAE of the quickstart.")
    parser.add_argument("--images", nargs="+", required=True, help="Folders of pictures.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--start_from", help="A VAE to train further, in place of random weights.")
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vae = AutoencoderKL.from_pretrained(args.start_from).float() if args.start_from else make_vae()
    images, vae = load_images(args.images), vae.to(memory_format=torch.channels_last).train()
    print(f"{len(images)} pictures, {sum(p.numel() for p in vae.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    started, step, share, errors = time.monotonic(), 0, 0.0, []
    while share < 1:
        share = min(1.0, (time.monotonic() - started) / (60 * args.minutes))
        warmup, decay = min(1.0, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * share))
        optimizer.param_groups[0]["lr"] = args.learning_rate * warmup * max(decay, 0.01)
        batch = images[torch.randint(0, len(images), (args.batch_size,), generator=generator)]
        loss, error = compute_loss(vae, augment(batch, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        errors.append(error.item())
        step += 1
        if step % 100 == 0:
            passed = time.monotonic() - started
            print(f"step {step}: {passed:.0f} s, mean error {np.mean(errors[-100:]):.4f}", flush=True)
    set_scaling_factor(vae, images)
    vae.to(memory_format=torch.contiguous_format).half().save_pretrained(args.output_dir)
    print(f"{step} updates, mean error {np.mean(errors[-200:]):.4f}, scaling factor {vae.config.scaling_factor}")


if __name__ == "__main__":
    main()
