#!/usr/bin/env python
# Copyright 2026 The text-to-image fine-tuning authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune the whole UNet of Stable Diffusion 1.x or 2.x on captioned images with JAX, on TPUs, GPUs or CPUs.

For an image x with caption c, its latents z = scaling_factor * VAE(x), Gaussian noise e and a random timestep t
(Ho et al. 2020, arXiv:2006.11239, eq. 14; Rombach et al. 2022, arXiv:2112.10752, eq. 3):

    z_t  = alpha_t z + sigma_t e,            alpha_t^2 + sigma_t^2 = 1
    loss = mean over samples of  w_t ||UNet(z_t, t, text(c)) - target||^2 / number of latent values
    target = e (epsilon), alpha_t e - sigma_t z (v_prediction) or z (sample);  w_t = 1, or Min-SNR

UNet, VAE and text encoder are written here as functions, with channels-last arrays; torch is not needed. Trainable
weights stay float32; --mixed_precision sets the forward pass and the frozen networks.

    python train_text_to_image_flax.py --pretrained_model_name_or_path MODEL --train_data_dir FOLDER \\
        --mixed_precision bf16 --use_ema --validation_prompts "a red apple" --output_dir out
    python train_text_to_image_flax.py ... --multi_host                        # the same on each of several machines
    python train_text_to_image_flax.py ... --resume_from_checkpoint latest     # after a crash or Ctrl-C

--output_dir then holds:

    model_index.json, unet/, vae/, text_encoder/ ...   for StableDiffusionPipeline.from_pretrained(folder)
    checkpoint-N/            everything needed to resume after update N, written by Orbax
    validation/step-N/       images drawn after update N, and grid.png
    logs/                    TensorBoard;  README.md: the model card

Read these; the rest is plumbing:

    compute_loss             the objective, on one screen: a new noise option goes here
    CaptionedImages          images and captions: replace it to read them from somewhere else
    Samples                  how an image becomes a training sample; random draws depend on seed, epoch and image only
    train                    the loop
    main                     the whole run, in order
"""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import flax
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pyarrow.parquet
from filelock import FileLock
from jax import Array as Tensor
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageDraw, ImageOps, PngImagePlugin
from safetensors import safe_open
from safetensors.numpy import save_file as save_arrays
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import CLIPTokenizer

# ---- Types ----------------------------------------------------------------------------------------------------------

logger = logging.getLogger(__name__)
MODEL_KIND = "Stable Diffusion 1.x or 2.x"


class UserError(ValueError):
    """What the user can put right: shown without a traceback."""


@dataclass
class Progress:
    """Position in training; with the seed it determines the next batch."""

    global_step: int = 0  # optimizer updates so far
    epoch: int = 0  # completed passes over the data
    samples_seen: int = 0  # samples of this epoch used so far, over all processes


class SampleUse(NamedTuple):
    """One use of one sample: the key that a loader passes to `Samples`."""

    epoch: int
    index: int  # position in the data set
    weight: float = 1.0  # 0 = padding, when a batch has fewer samples than processes


class MicroStep(NamedTuple):
    """One forward and backward pass on all processes."""

    epoch: int
    last: int  # samples of the epoch used after it
    window_size: int  # samples in the update that this micro step is part of
    ends_update: bool
    indices: list[int]  # of its samples in the data set


class Data(NamedTuple):
    """Training samples, and those for the held-out loss."""

    train: Samples
    held_out: Samples | None


@dataclass
class Models:
    """The networks of a run, their weights and the compiled programs."""

    tokenizer: CLIPTokenizer
    text_encoder: TextEncoder  # this and the next two are formulas; `with_weights` gives them weights
    vae: VAE
    unet: UNet
    configs: dict[str, dict]  # settings of the parts of the base model
    scheduler_config: dict  # of the noise schedule, with the flags applied
    trained: tuple[str, ...]  # the trainable networks: unet, perhaps text_encoder
    frozen: dict[str, np.ndarray]  # in host memory, in the number format of --mixed_precision
    initial: dict[str, np.ndarray]  # trainable weights as loaded, float32; emptied once they are on the devices
    files: dict[str, Path]  # of the base model to copy or convert, by their place in the output folder
    placed: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # frozen weights on the devices
    state: TrainState | None = None  # this and the next are made by `prepare_training`
    programs: Programs | None = None


class TrainState(NamedTuple):
    """Everything an update changes: arrays on the devices, by names such as unet.conv_in.weight."""

    step: Tensor  # updates so far, without those that fp16 skipped
    weights: dict[str, Tensor]  # float32
    moments: optax.OptState
    ema_updates: Tensor  # that the EMA weights have seen
    averages: dict[str, Tensor] | None
    loss_scale: LossScale | None = None  # of --mixed_precision fp16


class LossScale(NamedTuple):
    """The factor that lifts fp16 gradients out of underflow, as torch's GradScaler adapts it."""

    scale: Tensor
    num_finite: Tensor  # updates since it last changed


class Programs(NamedTuple):
    """The compiled functions."""

    train_step: jax.stages.Wrapped  # (state, frozen, batch) -> (state, metrics)
    compute_losses: jax.stages.Wrapped  # (weights, frozen, batch) -> their sum
    draw: jax.stages.Wrapped  # (weights, frozen, latents, input_ids) -> images


# ---- Objective ------------------------------------------------------------------------------------------------------
# b batch, c latent channels, h and w latent height and width, s caption tokens, d text width, T timesteps

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Objective:
    """The noise schedule, as tables on the device, and the flags of the loss."""

    alpha: Tensor  # [T] float32: factor of the latents at each timestep; alpha^2 + sigma^2 = 1
    sigma: Tensor  # [T] float32: factor of the noise
    prediction_type: str
    args: Namespace


def compute_loss(unet, objective: Objective, latents: Tensor, conditions: dict, draws: dict) -> Tensor:
    """Return the loss of each sample [b], in float32, from latents [b, h, w, c] and the UNet's other inputs.

    Nothing here is random: `draws` holds `timesteps` [b], `noise` [b, h, w, c] and what `list_extra_noises` names.
    """
    args, timesteps, noise = objective.args, draws["timesteps"], draws["noise"]

    # Offset noise shifts the mean of a channel, which plain noise hardly does (Guttenberg 2023, "Diffusion with Offset
    # Noise"). Input perturbation changes the input but not the target (Ning et al. 2023, arXiv:2301.11706).
    if "offset_noise" in draws:
        noise = noise + args.noise_offset * draws["offset_noise"]
    input_noise = noise
    if "perturbation_noise" in draws:
        input_noise = noise + args.input_perturbation * draws["perturbation_noise"]

    # z_t = alpha_t z + sigma_t e, in float32: in bf16 sigma is 0 at the first timesteps
    alpha, sigma = (table[timesteps].reshape(-1, 1, 1, 1) for table in (objective.alpha, objective.sigma))
    noisy_latents = alpha * latents + sigma * input_noise
    target = compute_target(latents, noise, alpha, sigma, objective.prediction_type)

    # DREAM moves input and target by the UNet's own error (Zhou et al. 2023, arXiv:2312.00210, eq. 8):
    # delta = sigma_t^p (e - UNet(z_t)), with the detail preservation p
    if args.dream_training:
        estimate = jax.lax.stop_gradient(unet(noisy_latents, timesteps, **conditions)).astype(jnp.float32)
        delta = sigma**args.dream_detail_preservation * (target - estimate)
        noisy_latents, target = noisy_latents + sigma * delta, target + delta

    # loss = w_t ||UNet(z_t, t, text) - target||^2 / number of latent values
    model_pred = unet(noisy_latents, timesteps, **conditions)
    loss = jnp.square(model_pred.astype(jnp.float32) - target).mean(axis=(1, 2, 3))
    if args.snr_gamma:
        loss = loss * compute_snr_weights(alpha.ravel(), sigma.ravel(), args.snr_gamma, objective.prediction_type)
    return loss


def list_extra_noises(args: Namespace, latent_shape: tuple) -> dict[str, tuple]:
    """Return the shape of each noise that training samples draw besides `noise`, by its name in `draws`.

    A new noise option is a flag, its noise here, and its formula in `compute_loss`. The held-out loss draws none.
    """
    shapes = {}
    if args.noise_offset:
        shapes["offset_noise"] = (latent_shape[0], 1, 1)
    if args.input_perturbation:
        shapes["perturbation_noise"] = latent_shape
    return shapes


def compute_target(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """Return what the UNet should predict [b, h, w, c]; v as in Salimans & Ho 2022, arXiv:2202.00512."""
    if prediction_type == "epsilon":
        return noise
    return alpha * noise - sigma * latents if prediction_type == "v_prediction" else latents


def compute_snr_weights(alpha: Tensor, sigma: Tensor, snr_gamma: float, prediction_type: str) -> Tensor:
    """Return Min-SNR loss weights [b] (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    With snr = alpha^2 / sigma^2: min(snr, gamma) / snr for epsilon, / (snr + 1) for v_prediction, / 1 for sample. Ours
    is 1 where snr is 0, the end of a rescaled schedule: the formula gives 0/0 or never trains the first sampling step.
    """
    snr = (alpha / sigma) ** 2
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": jnp.ones_like(snr)}[prediction_type]
    return jnp.where(snr > 0, jnp.minimum(snr, snr_gamma) / divisor, 1.0)


def compute_timestep_cdf(args: Namespace, num_timesteps: int) -> np.ndarray:
    """Return the cumulative probability of each timestep [num_timesteps], uniform without --timestep_bias_strategy."""
    weights = np.ones(num_timesteps)
    count = max(1, int(args.timestep_bias_portion * num_timesteps))
    biased = {"none": slice(0), "earlier": slice(count), "later": slice(num_timesteps - count, None),
              "range": slice(args.timestep_bias_begin, args.timestep_bias_end)}[args.timestep_bias_strategy]
    weights[biased] *= args.timestep_bias_multiplier
    cumulative = weights.cumsum()
    return cumulative / cumulative[-1]


def make_objective(args: Namespace, scheduler_config: dict) -> Objective:
    alphas_cumprod = jnp.asarray(compute_alphas_cumprod(scheduler_config))
    return Objective(jnp.sqrt(alphas_cumprod), jnp.sqrt(1 - alphas_cumprod), scheduler_config["prediction_type"], args)


def compute_alphas_cumprod(config: dict) -> np.ndarray:
    """Return the share of the signal's variance at each timestep [T] in float32, from a scheduler's settings.

    With rescale_betas_zero_snr its root is shifted and stretched to end in 0 (Lin et al. 2023, arXiv:2305.08891,
    algorithm 1).
    """
    count, schedule = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    first, last, trained = config.get("beta_start", 0.0001), config.get("beta_end", 0.02), config.get("trained_betas")
    cosine = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = {"linear": np.linspace(first, last, count),
             "scaled_linear": np.linspace(first**0.5, last**0.5, count) ** 2,
             "squaredcos_cap_v2": np.minimum(1 - cosine[1:] / cosine[:-1], 0.999)}
    if trained is None and schedule not in betas:
        raise UserError(f"the scheduler's beta_schedule {schedule} is not implemented here: choose from "
                        f"{', '.join(betas)}, or use train_text_to_image.py.")
    alphas_cumprod = np.cumprod(1 - (betas[schedule] if trained is None else np.array(trained)))
    if config.get("rescale_betas_zero_snr"):
        root = np.sqrt(alphas_cumprod)
        alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alphas_cumprod.astype(np.float32)


# ---- Data -----------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items()
                  if name in Image.OPEN and name not in ("HDF5", "MPEG")}  # which Pillow knows and cannot decode
LARGEST_ASPECT = 4  # longer side over shorter, of a bucket: as SDXL's own sizes (Podell et al. 2023, appendix I)
INTERPOLATION_MODES = {name: Image.Resampling[name.removesuffix("_exact").upper()]
                       for name in "nearest nearest_exact bilinear bicubic box hamming lanczos".split()}
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MiB: ComfyUI writes a whole workflow as one chunk


@dataclass(frozen=True)
class CaptionedImages:
    """Images with their captions. For data of your own, return other sequences from `make_captioned_images`.

    Images are read from several threads and from forked loader processes: open files and connections in
    `__getitem__`. Draw nothing at random there: crops, flips and captions are drawn in `Samples`.
    """

    images: Sequence  # each a PIL picture, or a dict of the `bytes` or the `path` of a file
    captions: Sequence[list[str]]  # of each image; each use of the image draws one


def make_captioned_images(args: Namespace, folder: str | None) -> CaptionedImages:
    """Return the data: of `folder` (--train_data_dir or --validation_data_dir), or of --dataset_name if it is None.

    For data of your own: `if folder is None: return CaptionedImages(MyImages(args.dataset_name), captions)`.
    """
    source = folder or args.dataset_name
    rows, captions = load_image_folder(folder, args) if folder else load_rows(args)
    if not captions:
        raise UserError(f"{source} has no images that Pillow reads: unpack archives, or name data that `datasets` "
                        "loads with --dataset_name.")
    images = rows.cast_column(args.image_column, datasets.Image(decode=False))[args.image_column]
    captions = [[texts] if isinstance(texts, str) else texts for texts in captions]
    bad = [row for row, texts in enumerate(captions)
           if not isinstance(texts, list) or {type(text) for text in texts} != {str}]
    if bad:
        raise UserError(f"{len(bad)} of {len(captions)} images in {source} have no caption: row {bad[0]} "
                        f"({get_path(images[bad[0]])}) has {captions[bad[0]]!r} in --caption_column "
                        f"{args.caption_column}. A caption is a string or a list of at least one string: in the "
                        "column, in a metadata.jsonl with file_name, or in a .txt beside the image.")
    captions = datasets.Dataset.from_dict({"captions": captions})["captions"]  # Arrow: loader processes share it
    return CaptionedImages(images, captions)


def load_rows(args: Namespace) -> tuple[datasets.Dataset, list]:
    """Return the rows and captions of --dataset_name: from the hub, a local folder, or what `save_to_disk` wrote."""
    name = args.dataset_name
    saved = [folder for folder in (Path(name), Path(name, "train")) if (folder / "state.json").is_file()]
    try:
        rows = datasets.load_from_disk(saved[0]) if saved else datasets.load_dataset(
            name, args.dataset_config_name, split="train", cache_dir=args.cache_dir, data_dir=args.train_data_dir)
    except Exception as error:  # `datasets` raises many kinds
        raise UserError(f"--dataset_name {name} cannot be loaded: {error} {error.__cause__ or ''}") from error
    check_columns(args, name, rows.column_names)
    return rows, rows[args.caption_column][:]


def check_columns(args: Namespace, source: str | Path, columns: list[str]):
    for flag in ("image_column", "caption_column"):
        if getattr(args, flag) not in columns:
            raise UserError(
                f"--{flag} {getattr(args, flag)} is not in {source}: its columns are {', '.join(columns)}.")


def load_image_folder(folder: str, args: Namespace) -> tuple[datasets.Dataset, list]:
    """Return --image_column and the captions of a folder: of metadata files, or of its images and .txt files."""
    others = args.output_dir, args.train_data_dir, args.validation_data_dir
    seen = {Path(other).resolve() for other in others if other} - {Path(folder).resolve()}
    files = list_files(Path(folder), seen)
    metadata = {path.parent: path for path in files if path.name in METADATA_READERS}.values()  # one of a folder
    if metadata:
        rows = [row for path in metadata for row in read_metadata(path, folder, args)]
    else:
        rows = [(path, read_caption_file(path.with_suffix(".txt"))) for path in files
                if path.suffix.lower() in IMAGE_SUFFIXES]
    images = [path for path, _ in rows]
    refused = [path for path in images if ".." in path.relative_to(folder).parts
               or not (args.skip_broken_images or is_image(path))]
    if refused:
        raise UserError(f"{len(refused)} of {len(images)} images that the metadata in {folder} names are not in it, "
                        f"or of a format that Pillow does not read: the first is {refused[0]}. Fix file_name, unpack "
                        "archives, move or convert the images, or drop these rows.")
    used = {*metadata, *images, *(path.with_suffix(".txt") for path in images if not metadata)}
    unused = [str(path) for path in files if path not in used]
    if unused:
        logger.warning(f"{len(unused)} files in {folder} are not used, being neither images that Pillow can "
                       f"read nor captions, or not listed in the metadata: {', '.join(unused[:5])}")
    return datasets.Dataset.from_dict({args.image_column: list(map(str, images))}), [captions for _, captions in rows]


def is_image(path: Path) -> bool:
    """Return whether Pillow reads a file, judged by its suffix or, if that is an odd one, by its first bytes."""
    with contextlib.suppress(OSError):
        return path.is_file() and (path.suffix.lower() in IMAGE_SUFFIXES or Image.open(path).close() is None)
    return False


def list_files(folder: Path, seen: set[Path]) -> list[Path]:
    """Return the files in a folder and its subfolders, also linked ones, except hidden ones and folders in `seen`."""
    if folder.resolve() in seen:  # links may lead around in a circle
        return []
    seen.add(folder.resolve())
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return [file for path in paths for file in (list_files(path, seen) if path.is_dir() else [path])]


METADATA_READERS = {  # of a file opened as text; each gives dicts
    "metadata.csv": partial(csv.DictReader, strict=True),
    "metadata.jsonl": lambda file: (dict(json.loads(line)) for line in file if line.strip()),
    "metadata.parquet": lambda file: pyarrow.parquet.read_table(file.buffer).to_pylist(),
}


def read_metadata(path: Path, folder: str, args: Namespace) -> list[tuple]:
    """Return the image file, as a path from the data's `folder`, and the captions of each row of a metadata file."""
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows.extend(METADATA_READERS[path.name](file))
    except Exception as error:  # each reader raises its own
        raise UserError(f"{path} cannot be read after row {len(rows)}: {error}. Fix it, in UTF-8.") from error
    names = dict.fromkeys("image" if name == "file_name" else name for row in rows for name in row)  # as `datasets`
    if None in names:
        raise UserError(f"{path} has cells beyond its header, {next(row[None] for row in rows if None in row)}: put "
                        "captions with commas in double quotes.")
    if rows:
        check_columns(args, path, names)
    return [(Path(folder, os.path.relpath(path.parent / f"{row.get('file_name')}", folder)),
             row.get(args.caption_column)) for row in rows]


def read_caption_file(path: Path) -> list[str] | None:
    """Return the lines of a .txt, each of which is a caption, or None if there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        return None
    except Exception as error:  # a folder, a file that may not be read, or another encoding
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}. Save it as UTF-8, or remove it.") from error
    return [line.strip() for line in lines if line.strip()] or [""]


def get_path(image: Image.Image | dict | None) -> str:
    """Return the path of an image, or nothing if it has no file of its own."""
    return isinstance(image, dict) and image.get("path") or ""


def open_image(image: Image.Image | dict) -> Image.Image:
    """Return an image whose pixels may not have been read yet."""
    if isinstance(image, Image.Image):
        return image
    return Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"])


def decode_image(image: Image.Image | dict) -> Image.Image:
    """Return an image as RGB, as viewers show it: upright as its EXIF says, in sRGB, transparency over white."""
    image = open_image(image)
    image.load()
    with contextlib.suppress(Exception):  # a sound picture may have broken EXIF data
        image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile", b"")
    if image.mode.startswith("I"):  # 16 bits per pixel, which PIL would clip to 8 rather than scale
        image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    plain = image.convert("RGB")
    with contextlib.suppress(ImageCms.PyCMSError):  # no profile, or a broken one
        converted = ImageCms.profileToProfile(image if image.mode in ("L", "CMYK") else plain, io.BytesIO(profile),
                                              ImageCms.createProfile("sRGB"), outputMode="RGB")
        if max(most for _, most in ImageChops.difference(converted, plain).getextrema()) > 2:  # else sRGB, rounded
            return converted
    return plain


def parse_size(size: int | str) -> tuple[int, int]:
    """Return height and width in pixels of a size such as 512, or 768x512 (width x height)."""
    width, _, height = str(size).partition("x")
    return int(height or width), int(width)


def list_sizes(args: Namespace) -> list[tuple[int, int]]:
    """Return the sizes of training images, height and width: one or, with buckets, all of about its area."""
    height, width = parse_size(args.resolution)
    if not args.aspect_ratio_buckets:
        return [(height, width)]
    area, step = height * width, args.bucket_step
    sizes = [(side, area // side // step * step) for side in range(step, math.isqrt(LARGEST_ASPECT * area) + 1, step)]
    sizes = sorted({*sizes, *((width, height) for height, width in sizes)})
    return [size for size in sizes if max(size) <= LARGEST_ASPECT * min(size)]


def choose_buckets(images: Sequence, rows: Sequence[int], sizes: list[tuple[int, int]]) -> np.ndarray:
    """Return for each of the `rows` of the images which of the sizes is nearest in aspect ratio."""
    def measure(row):
        size = 1, 1  # of what cannot be opened: decoding it will say why, or skip it
        with contextlib.suppress(Exception):  # broken EXIF data too
            image = open_image(images[row])
            size = image.size[::-1]
            if Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) > 4:  # a PNG's own method would decode it
                size = image.size
        return size

    measured = map_in_threads(measure, rows)
    aspects, choices = (np.log([height / width for height, width in pairs]) for pairs in (measured, sizes))
    buckets = np.abs(aspects[:, None] - choices).argmin(axis=1)
    listed = [f"{count} of {width}x{height}" for (height, width), count in
              zip(sizes, np.bincount(buckets), strict=False) if count]
    logger.info(f"images by width x height: {', '.join(listed)}")
    return buckets


def transform_image(image: Image.Image, args: Namespace, size: tuple[int, int], corner: np.ndarray,
                    flip: bool) -> dict[str, np.ndarray]:
    """Return `images` uint8 [3, *size], resized to cover height and width, mirrored, cropped; and `time_ids`.

    `corner` is the crop's top left, as fractions of the pixels that it can move down and across. SDXL is conditioned
    on `time_ids` [6]: original size, top and left of the crop, its size (Podell et al. 2023, arXiv:2307.01952, 2.2).
    """
    height, width = size
    is_tall = image.height * width > height * image.width
    sides = (width * image.height // image.width, width) if is_tall else (height, height * image.width // image.height)
    resized = image.resize(sides[::-1], INTERPOLATION_MODES[args.image_interpolation_mode])
    resized = ImageOps.mirror(resized) if flip else resized
    room = np.array([resized.height, resized.width]) - size
    top, left = (np.round(room / 2) if args.center_crop else corner * (room + 1)).astype(int).tolist()
    cropped = resized.crop((left, top, left + width, top + height))
    return {"images": np.stack(cropped.split()),
            "time_ids": np.array([image.height, image.width, top, left, height, width], np.float32)}


def make_rng(seed: int, purpose: str, *where: int) -> np.random.Generator:
    """Return the generator of the one draw for `purpose` at `where`, such as (epoch, index).

    Philox is counter-based (Salmon et al. 2011, doi:10.1145/2063384.2063405): keys that differ at all give independent
    streams, so adding, leaving out or reordering draws changes no other.
    """
    digest = hashlib.blake2b(repr((seed, purpose, *where)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


class Samples:
    """What each use of a sample trains on: its image, caption, and every random number that its loss needs."""

    def __init__(self, data: CaptionedImages, args: Namespace, seed: int, configs: dict[str, dict],
                 extra_noises=list_extra_noises):
        self.data, self.args, self.seed = data, args, seed
        self.rows = range(len(data.captions))  # of the data, for each sample
        if args.max_train_samples and args.max_train_samples < len(self.rows):
            self.rows = make_rng(seed, "subset").permutation(len(self.rows))[: args.max_train_samples].tolist()
        self.timestep_cdf = compute_timestep_cdf(args, configs["scheduler"].get("num_train_timesteps", 1000))
        self.sizes = list_sizes(args)
        self.buckets = np.zeros(len(self.rows), int)  # the size of each sample, by its place in `sizes`
        if args.aspect_ratio_buckets:
            self.buckets = choose_buckets(data.images, self.rows, self.sizes)
        channels, factor = configs["vae"].get("latent_channels", 4), compute_vae_factor(configs["vae"])
        self.latent_shapes = [(channels, height // factor, width // factor) for height, width in self.sizes]
        self.noise_shapes = [{"posterior_noise": shape, "noise": shape, **extra_noises(args, shape)}
                             for shape in self.latent_shapes]
        self.num_crops = 1 if args.center_crop else args.cache_crops or 4  # in the cache, for each image
        self.num_flips = 1 + args.random_flip  # of each crop: with --random_flip mirrored as well
        self.latents = None  # EncodedRows with --cache_latents: the variants of each image
        self.text_states = None  # EncodedRows with --cache_text_embeddings
        self.caption_rows = {}  # the row of each caption in them

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, uses: list[SampleUse]) -> list[dict]:
        return map_in_threads(self.__getitem__, uses)

    def __getitem__(self, use: SampleUse) -> dict:
        """Return one sample: image and caption, or what is cached of them, `timesteps` and noises.

        The image is `images` uint8 [3, height, width] or, cached, the `moments` [2c, h, w] of one of its crops; either
        way with `time_ids` [6], and `sources`, the index of the image found in its place.
        """
        def rng(purpose):
            return make_rng(self.seed, purpose, use.epoch, use.index)

        bucket = self.buckets[use.index]
        corner, flip = rng("crop").random(2), self.args.random_flip and rng("flip").random() < 0.5
        if self.latents is None:
            picture, source = self.read(use.index)
            image = transform_image(picture, self.args, self.sizes[bucket], corner, flip)
            image["sources"] = source
        else:
            crop = int(corner[0] * self.num_crops)
            image = self.latents.read((use.index * self.num_crops + crop) * self.num_flips + flip)
            channels, height, width = self.latent_shapes[bucket]
            image["moments"] = image["moments"][: 2 * channels * height * width].reshape(-1, height, width)
        captions = self.data.captions[self.rows[image["sources"]]]
        caption = captions[rng("caption").integers(len(captions))]
        if rng("caption dropout").random() < self.args.proportion_empty_prompts:
            caption = ""
        text = {"caption": caption} if self.text_states is None else self.text_states.read(self.caption_rows[caption])
        noises = {purpose: rng(purpose).standard_normal(shape, np.float32)
                  for purpose, shape in self.noise_shapes[bucket].items()}
        timestep = self.timestep_cdf.searchsorted(rng("timestep").random(), side="right")
        return image | text | noises | {"timesteps": timestep, "weights": np.float32(use.weight)}

    def make_variants(self, index: int) -> list[dict]:
        """Return the crops of an image that are cached, the same for any seed."""
        (image, source), size = self.read(index), self.sizes[self.buckets[index]]
        return [transform_image(image, self.args, size, make_rng(0, "cached crop", index, crop).random(2), flip)
                | {"sources": np.int64(source)} for crop in range(self.num_crops) for flip in range(self.num_flips)]

    def make_order(self, epoch: int, update_size: int) -> np.ndarray:
        """Return the indices of an epoch in random order; with buckets in runs of one size, of an update each."""
        order = make_rng(self.seed, "order", epoch).permutation(len(self))
        if not self.args.aspect_ratio_buckets:
            return order
        in_buckets = [order[self.buckets[order] == bucket] for bucket in range(len(self.sizes))]
        runs = [indices[first : first + update_size] for indices in in_buckets
                for first in range(0, len(indices), update_size)]
        return np.concatenate([runs[place] for place in make_rng(self.seed, "runs", epoch).permutation(len(runs))])

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return an image and its index or, with --skip_broken_images, those of the next one that can be read."""
        for place in itertools.chain(range(index, len(self)), range(index)):
            row, stored = self.rows[place], self.data.images[self.rows[place]]
            try:
                image = decode_image(stored)
                if max(image.size) > 100 * min(image.size):
                    raise ValueError("it is a strip, which would take gigabytes when it is resized")
                return image, place
            except Exception as error:  # PIL raises many kinds for broken files, SyntaxError among them
                message = f"row {row} of the data ({get_path(stored)}) cannot be read as an image: {error}."
                if not self.args.skip_broken_images:
                    raise UserError(f"{message} Fix or remove it, or add --skip_broken_images.") from error
            logging.getLogger(__name__).warning(f"skipped: {message}")
        raise UserError("none of the images can be read: see the warnings above.")


def map_in_threads(function, things) -> list:
    """Return the results of a function for several things at once, in a loader process one after the other."""
    with ThreadPoolExecutor(1 if multiprocessing.parent_process() else 8) as pool:
        return list(pool.map(function, things))


def make_data(args: Namespace, images: CaptionedImages, held_out_images: CaptionedImages | None, seed: int,
              configs: dict[str, dict]) -> Data:
    """Return the samples to train on, and those of --validation_data_dir: with plain draws, the same in every run."""
    plain = Namespace(**vars(args) | {"center_crop": True, "random_flip": False, "proportion_empty_prompts": 0,
                                      "timestep_bias_strategy": "none", "max_train_samples": None})
    return Data(Samples(images, args, seed, configs),
                held_out_images and Samples(held_out_images, plain, 0, configs, extra_noises=lambda *_: {}))


def plan_micro_steps(samples: Samples, progress: Progress, num_updates: int, micro_batch_size: int, accumulation: int):
    """Yield the micro steps of the next `num_updates` updates, from where `progress` stands.

    `micro_batch_size` is that of all processes. An update has images of one size, fewer at the end of an epoch or
    bucket. No sample is repeated or left out; without buckets also where a resumed run has another batch size.
    """
    epoch, first, update_size = progress.epoch, progress.samples_seen, micro_batch_size * accumulation
    order = samples.make_order(epoch, update_size)
    for _ in range(num_updates):
        if first >= len(samples):
            epoch, first = epoch + 1, 0
            order = samples.make_order(epoch, update_size)
        indices = order[first : first + update_size]
        differs = samples.buckets[indices] != samples.buckets[indices[0]]
        end = first + (int(differs.argmax()) or len(indices))  # argmax is 0 if none differs
        for start in range(first, end, micro_batch_size):
            last = min(start + micro_batch_size, end)
            yield MicroStep(epoch, last, end - first, ends_update=last == end, indices=order[start:last].tolist())
        first = end


def share_samples(steps, rank: int, num_processes: int):
    """Yield this process's part of each micro step: a contiguous one, so that processes make one large batch."""
    for step in steps:
        uses = [SampleUse(step.epoch, index) for index in step.indices]
        begin, end = (len(uses) * part // num_processes for part in (rank, rank + 1))
        yield uses[begin:end] or [uses[0]._replace(weight=0.0)]


def collate(samples: list[dict], tokenizers: list[CLIPTokenizer]) -> dict[str, np.ndarray]:
    """Return samples as one batch, channels last; for captions that are not cached `input_ids` [b, s]."""
    captions = [sample.pop("caption") for sample in samples if "caption" in sample]
    batch = {name: np.stack([sample[name] for sample in samples]) for name in samples[0] if name != "time_ids"}
    batch = {name: np.moveaxis(array, 1, -1) if array.ndim == 4 else array for name, array in batch.items()}
    batch = {name: array.astype(np.int32) if array.dtype == np.int64 else array for name, array in batch.items()}
    if captions:
        input_ids = tokenizers[0](captions, padding="max_length", truncation=True, return_tensors="np").input_ids
        batch["input_ids"] = input_ids.astype(np.int32)
        batch["num_long"] = input_ids[:, -2] != tokenizers[0].pad_token_id  # full: perhaps truncated
    return batch


def make_dataloader(samples: Samples, steps, models: Models, num_workers: int, accelerator: Accelerator, size: int):
    """Yield each micro step with this process's batch of it, always of `size` samples for each of its devices."""
    steps, planned = itertools.tee(steps)
    shares = share_samples(planned, accelerator.process_index, accelerator.num_processes)
    tokenizers = copy.deepcopy(list_tokenizers(models))  # one must not serve two threads, and validation uses these
    with ThreadPoolExecutor(num_workers or 8) as pool:
        for step, uses in zip(steps, shares, strict=True):
            batch = collate(list(pool.map(samples.__getitem__, uses)), tokenizers)
            yield step, pad_batch(batch, size * jax.local_device_count())


def pad_batch(batch: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Return a batch of `size` samples, filled up with its first one, without weight, where it is short."""
    missing = size - len(batch["weights"])
    if missing == 0:
        return batch
    filled = {name: np.concatenate([array, np.repeat(array[:1], missing, axis=0)]) for name, array in batch.items()}
    filled["weights"][size - missing :] = 0
    return filled


def make_updates(args: Namespace, accelerator: Accelerator, batches, stop_request: StopRequest):
    """Yield each update's last micro step and, on the devices, its batch of all micro steps [a, b, ...].

    Shapes never change, so that nothing is compiled again.
    """
    micro_batches = []
    for step, micro_batch in batches:
        micro_batches.append(micro_batch)
        if not step.ends_update:
            continue
        first = micro_batches[0]  # an update that is short of micro steps is filled up with samples of no weight
        micro_batches += [jax.tree.map(np.zeros_like, first)] * (args.gradient_accumulation_steps - len(micro_batches))
        batch = {name: np.stack([micro[name] for micro in micro_batches]) for name in first}
        batch["signal"] = np.full(batch["weights"].shape, stop_request.signal_number, np.int32)
        yield step, accelerator.place_batch({**batch, "window_size": np.float32(step.window_size)}, axis=1)
        micro_batches = []


def iterate_ahead(batches):
    """Yield what the generator `batches` yields, with the next one being made in a thread while this one is used.

    The first is made in this thread, where loaders can start. Close it when leaving early, or they outlive an error.
    """
    with contextlib.closing(batches), ThreadPoolExecutor(1) as reader:
        batch = next(batches, None)
        while batch is not None:
            pending = reader.submit(next, batches, None)
            yield batch
            batch = pending.result()


def preview_data(args: Namespace, accelerator: Accelerator, samples: Samples):
    """With --preview_data, write a sheet of training samples as preview.png, and stop."""
    if not args.preview_data:
        return
    if accelerator.is_main_process:
        rows = []
        for index in samples.make_order(0, args.train_batch_size)[: args.preview_data].tolist():
            sample, row = samples[SampleUse(0, index)], Image.new("RGB", (800, 256), "white")
            row.paste(ImageOps.contain(Image.fromarray(np.moveaxis(sample["images"], 0, -1)), (250, 250)))
            ImageDraw.Draw(row).multiline_text((260, 4), textwrap.fill(sample["caption"], 80), "black")
            rows.append(row)
        Image.fromarray(np.vstack(rows)).save(f"{args.output_dir}/preview.png")
        logger.info(f"wrote {args.output_dir}/preview.png, for --preview_data, and stopped")
    sys.exit(0)


# ---- Training -------------------------------------------------------------------------------------------------------


FIRST_LOSS_SCALE, LOSS_SCALE_INTERVAL = 2.0**16, 2000  # doubled after so many updates without overflow


def train_step(accelerator: Accelerator, models: Models, objective: Objective, recipe: Recipe, state: TrainState,
               frozen: dict[str, Tensor], batch: dict[str, Tensor]) -> tuple[TrainState, dict[str, Tensor]]:
    """Return the state after one update, and its metrics. Every sample of an update counts the same.

    `batch` holds a whole update [a, b, ...]: a micro steps of b samples over all devices. In fp16 an update whose
    gradients overflow changes only the loss scale. It still counts as an update of the run; the learning-rate
    schedule does not advance, as under accelerate in the torch scripts.
    """
    losses, gradients = compute_gradients(accelerator, models, objective, state, frozen, batch)
    norm = optax.tree.norm(gradients)
    if objective.args.max_grad_norm:
        clip = jnp.minimum(1.0, objective.args.max_grad_norm / (norm + 1e-6))  # as torch clips
        gradients = jax.tree.map(lambda gradient: gradient * clip, gradients)

    factor = recipe.lr_factor(state.step)
    rates = {part: rate * factor for part, rate in recipe.rates.items()}
    changes, moments = recipe.optimizer.update(gradients, state.moments, state.weights)
    weights = {name: weight - rates[name.split(".")[0]] * changes[name] for name, weight in state.weights.items()}

    metrics = {"train_loss": (losses * batch["weights"]).sum() / batch["window_size"], "grad_norm": norm,
               "lr": rates["unet"], "signal": batch["signal"].max(),
               "long_captions": (batch["num_long"] * (batch["weights"] > 0)).sum()}
    averages, ema_updates = state.averages, state.ema_updates
    if averages is not None:
        ema_updates = ema_updates + 1
        decay = metrics["ema_decay"] = compute_ema_decay(ema_updates, objective.args.ema_decay)
        averages = {name: average + (1 - decay) * (weights[name] - average) for name, average in averages.items()}
    updated = TrainState(state.step + 1, weights, moments, ema_updates, averages, state.loss_scale)
    if state.loss_scale is not None:
        is_finite, metrics["loss_scale"] = jnp.isfinite(norm), state.loss_scale.scale
        updated = jax.tree.map(partial(jnp.where, is_finite), updated, state)
        updated = updated._replace(loss_scale=adapt_loss_scale(state.loss_scale, is_finite))
    return updated, metrics


def adapt_loss_scale(loss_scale: LossScale, is_finite: Tensor) -> LossScale:
    """Return the loss scale for the next update: half after an overflow, doubled after LOSS_SCALE_INTERVAL without."""
    num_finite = jnp.where(is_finite, loss_scale.num_finite + 1, 0)
    grows = num_finite == LOSS_SCALE_INTERVAL
    factor = jnp.where(grows, 2.0, jnp.where(is_finite, 1.0, 0.5))
    return LossScale(loss_scale.scale * factor, jnp.where(grows, 0, num_finite))


def compute_gradients(accelerator: Accelerator, models: Models, objective: Objective, state: TrainState,
                      frozen: dict[str, Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the losses [a, b] of an update's samples and the gradients of their mean."""
    micro_batches = {name: array for name, array in batch.items() if array.ndim > 1 and name != "signal"}
    scale = 1.0 if state.loss_scale is None else state.loss_scale.scale

    def compute_mean(weights: dict[str, Tensor], micro_batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        gathered = accelerator.gather_weights(weights)
        networks = with_weights(models, {**frozen, **gathered})
        losses = compute_loss(networks.unet, objective, *encode_batch(networks, micro_batch), micro_batch)
        return (losses * micro_batch["weights"]).sum() / batch["window_size"] * scale, losses

    def add_part(total: dict[str, Tensor] | None, micro_batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        gradients, losses = jax.grad(compute_mean, has_aux=True)(state.weights, micro_batch)
        gradients = accelerator.divide_gradients(jax.tree.map(lambda gradient: gradient / scale, gradients))
        return gradients if total is None else jax.tree.map(jnp.add, total, gradients), losses

    if len(batch["weights"]) == 1:  # without accumulation, no second set of gradients in memory
        gradients, losses = add_part(None, {name: array[0] for name, array in micro_batches.items()})
        return losses[None], gradients
    gradients, losses = jax.lax.scan(add_part, jax.tree.map(jnp.zeros_like, state.weights), micro_batches)
    return losses, gradients


def compile_train_step(models: Models, batch: dict[str, Tensor]) -> jax.stages.Compiled:
    """Return `train_step` compiled for batches of this shape, which it must be for each size of images."""
    began = time.perf_counter()
    compiled = models.programs.train_step.lower(models.state, models.placed, batch).compile()
    logger.info(f"compiled the update for {batch['noise'].shape} in {time.perf_counter() - began:.1f} s")
    return compiled


def train(args: Namespace, accelerator: Accelerator, models: Models, data: Data, progress: Progress,
          record: dict) -> int:
    """Train until the last update, advancing `progress`; return the signal that stopped it early, or 0."""
    last_step = compute_last_step(args, data.train, accelerator.num_devices)
    if progress.global_step > last_step:
        logger.warning(f"update {progress.global_step} is beyond --max_train_steps {last_step}: taking one more")
        last_step = progress.global_step + 1
    steps = plan_micro_steps(data.train, progress, last_step - progress.global_step,
                             args.train_batch_size * accelerator.num_devices, args.gradient_accumulation_steps)
    loader = make_dataloader(data.train, steps, models, args.dataloader_num_workers, accelerator,
                             args.train_batch_size)
    meter = Meter(args, accelerator, progress.global_step, last_step)
    stop_request = StopRequest(accelerator)
    ahead = contextlib.closing(iterate_ahead(make_updates(args, accelerator, loader, stop_request)))
    compiled, signal_number = {}, 0

    with stop_request, logging_redirect_tqdm(), ahead as updates:
        for step, batch in meter.time_waits(updates):
            shape = batch["noise"].shape
            if shape not in compiled:
                began = time.perf_counter()
                compiled[shape] = compile_train_step(models, batch)
                meter.started += time.perf_counter() - began  # which is not training
            models.state, metrics = compiled[shape](models.state, models.placed, batch)
            progress.global_step += 1
            progress.epoch, progress.samples_seen = step.epoch, step.last
            meter.end_update(progress.global_step, step, metrics)

            signal_number = stop_request.agreed(metrics)
            ends_run = progress.global_step == last_step or signal_number
            if ends_run or progress.global_step % args.checkpointing_steps == 0:
                meter.flush()
                save_checkpoint(args, accelerator, models, progress, record)
            if ends_run:
                break
            ends_nth_epoch = step.last == len(data.train) and (step.epoch + 1) % args.validation_epochs == 0
            is_due = progress.global_step % args.validation_steps == 0 if args.validation_steps else ends_nth_epoch
            if is_due and (args.validation_prompts or data.held_out):
                meter.flush()
                validate(args, accelerator, models, data, progress)
    Path(args.output_dir, PROBE).unlink(missing_ok=True)
    return signal_number


def encode_batch(models: Models, batch: dict) -> tuple[Tensor, dict]:
    """Return latents [b, h, w, c] in float32, drawn anew at each use, and the UNet's other inputs.

    Both come from the caches where the batch brings them: as `moments` and `encoder_hidden_states` [b, s, d].
    """
    moments = batch["moments"] if "moments" in batch else encode_images(models.vae, batch["images"])
    mean, std = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    latents = (mean + std * batch["posterior_noise"]) * models.vae.config["scaling_factor"]
    if "encoder_hidden_states" in batch:
        return latents, {"encoder_hidden_states": batch["encoder_hidden_states"].astype(jnp.float32)}
    return latents, encode_captions(models, batch)


def encode_images(vae: VAE, images: Tensor) -> Tensor:
    """Return the moments [b, h, w, 2c] of uint8 images [b, H, W, 3]: mean and standard deviation of their latents."""
    return jnp.concatenate(vae.encode(images.astype(jnp.float32) / 127.5 - 1), axis=-1)  # [-1, 1]


def encode_captions(models: Models, batch: dict) -> dict[str, Tensor]:
    """Return the text encoder's last states [b, s, d]."""
    return {"encoder_hidden_states": models.text_encoder(batch["input_ids"])}


# ---- Networks -------------------------------------------------------------------------------------------------------
# Functions of weights, which have the names of torch's files: a layer is called where it is used, by its name.

ATTENTIONS = ("plain", "cudnn")
CUDNN_WIDTH = 128  # of an attention head, the most on all GPUs: SD 1.x has up to 160, SD 2.x 64
QUERIES_AT_ONCE = 1024  # of plain attention: its table of all pairs is made in parts of this many rows


@dataclass(frozen=True)
class Layers:
    """The weights of a network and how its layers compute, with torch's defaults; `at` steps into a part of it.

    Layers compute in `dtype`, norms in float32 within. A weight that is not there is made, as zeros of the shape that
    the layer needs: so `list_shapes` learns what a network consists of.
    """

    weights: dict[str, Tensor]
    dtype: type = jnp.float32
    attention: str = "plain"  # among the UNet's pixels: plain or cudnn
    remat: bool = False  # compute activations again in the backward pass
    prefix: str = ""

    def at(self, name: str) -> Layers:
        """Return the layers of a part."""
        return dataclasses.replace(self, prefix=f"{self.prefix}{name}.")

    def get(self, name: str, *shape: int) -> Tensor:
        """Return a weight in the format of the computation."""
        name = self.prefix + name
        if name not in self.weights:
            self.weights[name] = jnp.zeros(shape)
        return self.weights[name].astype(self.dtype)

    def linear(self, name: str, x: Tensor, width: int, *, bias: bool = True) -> Tensor:
        """[..., d] -> [..., width]."""
        x = jnp.dot(x.astype(self.dtype), self.get(f"{name}.weight", x.shape[-1], width))
        return x + self.get(f"{name}.bias", width) if bias else x

    def conv(self, name: str, x: Tensor, width: int, size: int = 3, *, stride: int = 1, padding=None) -> Tensor:
        """[b, h, w, c] -> [b, h / stride, w / stride, width]."""
        kernel, around = self.get(f"{name}.weight", size, size, x.shape[-1], width), ((size // 2, size // 2),) * 2
        x = jax.lax.conv_general_dilated(x.astype(self.dtype), kernel, (stride, stride), padding or around,
                                         dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x + self.get(f"{name}.bias", width)

    def norm(self, name: str, x: Tensor, epsilon: float, groups: int | None = None) -> Tensor:
        """Normalize the last axis of [..., d], or each group of channels of [b, h, w, c]."""
        x, width, axes = x.astype(self.dtype), x.shape[-1], -1 if groups is None else (1, 2, 4)
        wide = (x if groups is None else x.reshape(*x.shape[:-1], groups, -1)).astype(jnp.float32)
        mean = wide.mean(axes, keepdims=True)
        variance = jnp.square(wide - mean).mean(axes, keepdims=True)
        if groups is not None:
            mean, variance = (values.repeat(width // groups, axis=-1).reshape(len(x), 1, 1, width)
                              for values in (mean, variance))
        scale, shift = (self.get(f"{name}.{leaf}", width) for leaf in ("weight", "bias"))
        return ((x - mean) * (jax.lax.rsqrt(variance + epsilon) * scale) + shift).astype(self.dtype)


def remat(function, layers: Layers, **settings):
    """Return a part of a network; with `layers.remat` its activations are not kept for the backward pass."""
    function = partial(function, layers, **settings)
    return jax.checkpoint(function) if layers.remat else function


def compute_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, *, method: str = "plain",
                      is_causal: bool = False) -> Tensor:
    """Return what queries [b, q, d] find in keys and values [b, k, d], as [b, q, d].

    Plain attention keeps nothing but its inputs for the backward pass, and has a part of the table of all pairs at a
    time. The few pixels of the lowest levels, whose heads are too wide for cuDNN on older GPUs, take it anyway.
    """
    query, key, value = (x.reshape(*x.shape[:2], num_heads, -1) for x in (query, key, value))
    if method != "plain" and query.shape[-1] <= CUDNN_WIDTH:
        found = jax.nn.dot_product_attention(query, key, value, is_causal=is_causal, implementation=method)
        return found.reshape(*found.shape[:2], -1)

    @jax.checkpoint
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        logits = logits / math.sqrt(query.shape[-1])
        if is_causal:
            logits = jnp.where(jnp.tri(*logits.shape[-2:], dtype=bool), logits, -jnp.inf)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits).astype(value.dtype), value)

    batch, length = query.shape[:2]
    if length <= QUERIES_AT_ONCE:
        return attend(query, key, value).reshape(batch, length, -1)
    size = next(size for size in range(QUERIES_AT_ONCE, 0, -1) if length % size == 0)
    parts = jnp.moveaxis(query.reshape(batch, -1, size, *query.shape[2:]), 1, 0)
    found = jax.lax.map(lambda part: attend(part, key, value), parts)  # of so many pixels none is causal
    return jnp.moveaxis(found, 0, 1).reshape(batch, length, -1)


def run_attention(layers: Layers, x: Tensor, num_heads: int, context: Tensor | None = None, *, bias: bool = False,
                  method: str = "plain") -> Tensor:
    """[b, q, d], [b, k, e] -> [b, q, d]: attention to the context, or without one to x itself."""
    width, context = x.shape[-1], x if context is None else context
    query = layers.linear("to_q", x, width, bias=bias)
    key, value = (layers.linear(name, context, width, bias=bias) for name in ("to_k", "to_v"))
    return layers.linear("to_out.0", compute_attention(query, key, value, num_heads, method=method), width)


def run_resnet(layers: Layers, x: Tensor, embedding: Tensor | None = None, *, width: int, groups: int,
               epsilon: float = 1e-6) -> Tensor:
    """[b, h, w, c], [b, e] -> [b, h, w, width]: two convolutions beside a shortcut, the timestep added in between."""
    hidden = layers.conv("conv1", jax.nn.silu(layers.norm("norm1", x, epsilon, groups)), width)
    if embedding is not None:
        hidden = hidden + layers.linear("time_emb_proj", jax.nn.silu(embedding), width)[:, None, None]
    hidden = layers.conv("conv2", jax.nn.silu(layers.norm("norm2", hidden, epsilon, groups)), width)
    return (x if x.shape[-1] == width else layers.conv("conv_shortcut", x, width, 1)) + hidden


def run_transformer(layers: Layers, x: Tensor, context: Tensor, *, num_heads: int, config: dict) -> Tensor:
    """[b, h, w, c], [b, s, d] -> [b, h, w, c]: attention among pixels, attention to the caption, GEGLU feed-forward.

    SD 1.x projects with 1 x 1 convolutions, 2.x with matrices; GEGLU is from Shazeer 2020, arXiv:2002.05202.
    """
    project = layers.linear if config["use_linear_projection"] else partial(layers.conv, size=1)
    width, block = x.shape[-1], layers.at("transformer_blocks.0")
    tokens = project("proj_in", layers.norm("norm", x, 1e-6, config["norm_num_groups"]), width)
    tokens = tokens.reshape(len(x), -1, width)
    tokens = tokens + run_attention(block.at("attn1"), block.norm("norm1", tokens, 1e-5), num_heads,
                                    method=layers.attention)
    tokens = tokens + run_attention(block.at("attn2"), block.norm("norm2", tokens, 1e-5), num_heads, context)
    hidden, gate = jnp.split(block.linear("ff.net.0.proj", block.norm("norm3", tokens, 1e-5), 8 * width), 2, axis=-1)
    tokens = tokens + block.linear("ff.net.2", hidden * jax.nn.gelu(gate, approximate=False), width)
    return x + project("proj_out", tokens.reshape(x.shape), width)


def upsample(layers: Layers, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """[b, h, w, c] -> [b, 2 h, 2 w, c], or as high and wide as `size`, which is odd where the skips are."""
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    return layers.conv("upsamplers.0.conv", x if size is None else x[:, : size[0], : size[1]], x.shape[-1])


@dataclass(frozen=True)
class Network:
    """The settings of a network and its layers, which `with_weights` gives weights."""

    config: dict
    layers: Layers


class UNet(Network):
    """The denoising network of Stable Diffusion 1.x and 2.x: a way down, across and up."""

    def __call__(self, noisy_latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """[b, h, w, c], [b], [b, s, d] -> [b, h, w, c]."""
        config, layers = self.config, self.layers
        channels, count = config["block_out_channels"], config["layers_per_block"]
        last = len(channels) - 1
        heads = config["attention_head_dim"]  # which is their number, misnamed
        heads = [heads] * len(channels) if isinstance(heads, int) else heads
        conditions = self.embed_timesteps(timesteps), encoder_hidden_states
        x = layers.conv("conv_in", noisy_latents, channels[0])
        skips = [x]
        for level, (kind, width) in enumerate(zip(config["down_block_types"], channels, strict=True)):
            block, num_heads = layers.at(f"down_blocks.{level}"), heads[level] if "CrossAttn" in kind else None
            for index in range(count):
                x = self.run_layer(block, index, x, conditions, width, num_heads)
                skips.append(x)
            if level < last:
                x = block.conv("downsamplers.0.conv", x, width, stride=2)
                skips.append(x)

        x = self.run_layer(layers.at("mid_block"), 0, x, conditions, channels[-1], heads[-1])
        x = self.run_layer(layers.at("mid_block"), 1, x, conditions, channels[-1], None)

        for level, (kind, width) in enumerate(zip(config["up_block_types"], channels[::-1], strict=True)):
            block, num_heads = layers.at(f"up_blocks.{level}"), heads[last - level] if "CrossAttn" in kind else None
            for index in range(count + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = self.run_layer(block, index, x, conditions, width, num_heads)
            if level < last:
                x = upsample(block, x, skips[-1].shape[1:3])
        x = layers.norm("conv_norm_out", x, config["norm_eps"], config["norm_num_groups"])
        return layers.conv("conv_out", jax.nn.silu(x), config["out_channels"])

    def embed_timesteps(self, timesteps: Tensor) -> Tensor:
        """[b] -> [b, e]."""
        layers, width = self.layers.at("time_embedding"), self.config["block_out_channels"][0]
        half = width // 2
        angles = timesteps[:, None] * jnp.exp(-math.log(10000) * jnp.arange(half) / half)
        waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return layers.linear("linear_2", jax.nn.silu(layers.linear("linear_1", waves, 4 * width)), 4 * width)

    def run_layer(self, block: Layers, index: int, x: Tensor, conditions: tuple[Tensor, Tensor], width: int,
                  num_heads: int | None) -> Tensor:
        """Return [b, h, w, width] after a resnet and, where there are heads, a transformer."""
        embedding, context = conditions
        x = remat(run_resnet, block.at(f"resnets.{index}"), width=width, groups=self.config["norm_num_groups"],
                  epsilon=self.config["norm_eps"])(x, embedding)
        if num_heads is None:
            return x
        attention = block.at(f"attentions.{index}")
        return remat(run_transformer, attention, num_heads=num_heads, config=self.config)(x, context)


class VAE(Network):
    """The autoencoder between pixels and latents."""

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[b, H, W, 3] in [-1, 1] -> mean and standard deviation [b, h, w, c] in float32."""
        config, layers, channels = self.config, self.layers.at("encoder"), self.config["block_out_channels"]
        x, width = layers.conv("conv_in", pixel_values, channels[0]), 2 * config["latent_channels"]
        for level, channel in enumerate(channels):
            block = layers.at(f"down_blocks.{level}")
            x = self.run_resnets(block, x, config["layers_per_block"], channel)
            if level < len(channels) - 1:
                x = block.conv("downsamplers.0.conv", x, channel, stride=2, padding=((0, 1), (0, 1)))
        moments = self.layers.conv("quant_conv", self.run_end(layers, self.run_middle(layers, x), width), width, 1)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(log_variance, -30, 20))

    def decode(self, latents: Tensor) -> Tensor:
        """[b, h, w, c] as the UNet knows them -> [b, H, W, 3] in [-1, 1], float32."""
        config, layers, channels = self.config, self.layers.at("decoder"), self.config["block_out_channels"][::-1]
        x = self.layers.conv("post_quant_conv", latents / config["scaling_factor"], config["latent_channels"], 1)
        x = self.run_middle(layers, layers.conv("conv_in", x, channels[0]))
        for level, channel in enumerate(channels):
            block = layers.at(f"up_blocks.{level}")
            x = self.run_resnets(block, x, config["layers_per_block"] + 1, channel)
            x = upsample(block, x) if level < len(channels) - 1 else x
        return self.run_end(layers, x, config["out_channels"]).astype(jnp.float32)

    def run_resnets(self, block: Layers, x: Tensor, count: int, width: int) -> Tensor:
        """[b, h, w, c] -> [b, h, w, width]."""
        for index in range(count):
            x = run_resnet(block.at(f"resnets.{index}"), x, width=width, groups=self.config["norm_num_groups"])
        return x

    def run_middle(self, layers: Layers, x: Tensor) -> Tensor:
        """[b, h, w, c] -> [b, h, w, c]: resnet, attention among all pixels in one head, resnet."""
        middle, width, groups = layers.at("mid_block"), x.shape[-1], self.config["norm_num_groups"]
        x = run_resnet(middle.at("resnets.0"), x, width=width, groups=groups)
        if self.config["mid_block_add_attention"]:
            attention = middle.at("attentions.0")
            tokens = attention.norm("group_norm", x, 1e-6, groups).reshape(len(x), -1, width)
            x = x + run_attention(attention, tokens, 1, bias=True).reshape(x.shape)
        return run_resnet(middle.at("resnets.1"), x, width=width, groups=groups)

    def run_end(self, layers: Layers, x: Tensor, width: int) -> Tensor:
        """[b, h, w, c] -> [b, h, w, width]."""
        x = layers.norm("conv_norm_out", x, 1e-6, self.config["norm_num_groups"])
        return layers.conv("conv_out", jax.nn.silu(x), width)


class TextEncoder(Network):
    """CLIP's text transformer, up to its last states."""

    def __call__(self, input_ids: Tensor) -> Tensor:
        """[b, s] -> [b, s, d]."""
        config, layers, embeddings = self.config, self.layers, self.layers.at("embeddings")
        tokens = embeddings.get("token_embedding.weight", config["vocab_size"], config["hidden_size"])
        places = embeddings.get("position_embedding.weight", config["max_position_embeddings"], config["hidden_size"])
        x = jnp.take(tokens, input_ids, axis=0) + places[: input_ids.shape[1]]
        for index in range(config["num_hidden_layers"]):
            x = remat(run_clip_layer, layers.at(f"encoder.layers.{index}"), config=config)(x)
        return layers.norm("final_layer_norm", x, config["layer_norm_eps"])


def run_clip_layer(layers: Layers, x: Tensor, *, config: dict) -> Tensor:
    """[b, s, d] -> [b, s, d]: attention of each token to itself and those before it, and two linear layers."""
    width, epsilon, own = config["hidden_size"], config["layer_norm_eps"], layers.at("self_attn")
    hidden = layers.norm("layer_norm1", x, epsilon)
    query, key, value = (own.linear(f"{name}_proj", hidden, width) for name in "qkv")
    found = compute_attention(query, key, value, config["num_attention_heads"], is_causal=True)
    x = x + own.linear("out_proj", found, width)
    hidden = layers.linear("mlp.fc1", layers.norm("layer_norm2", x, epsilon), config["intermediate_size"])
    return x + layers.linear("mlp.fc2", ACTIVATIONS[config["hidden_act"]](hidden), width)


ACTIVATIONS = {"gelu": partial(jax.nn.gelu, approximate=False), "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x)}
NETWORKS = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}
EXAMPLES = {  # calls that touch every layer
    "unet": lambda unet: unet(jnp.zeros((1, 16, 16, unet.config["in_channels"])), jnp.zeros(1),
                              jnp.zeros((1, 1, unet.config["cross_attention_dim"]))),
    "vae": lambda vae: vae.decode(vae.encode(jnp.zeros((1, 16, 16, vae.config["in_channels"])))[0]),
    "text_encoder": lambda text_encoder: text_encoder(jnp.zeros((1, 1), int)),
}


def list_shapes(part: str, config: dict) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the weights that a network needs, by their torch names and in JAX's layout."""
    def call() -> dict[str, Tensor]:
        weights = {}
        EXAMPLES[part](NETWORKS[part](config, Layers(weights)))
        return weights

    return jax.eval_shape(call)


# ---- Arguments ------------------------------------------------------------------------------------------------------

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
TRACKERS = ("tensorboard", "wandb")
OPTIONAL_PACKAGES = {"use_8bit_adam": "bitsandbytes", "enable_xformers_memory_efficient_attention": "xformers",
                     "enable_npu_flash_attention": "torch_npu"}


def in_range(kind: type, low: float, high: float = 1e15):
    def read(text):
        value = kind(text)
        if not low <= value <= high:
            raise ArgumentTypeError(f"must be from {low:g} to {high:g}, got {text!r}")
        return value

    read.__name__ = kind.__name__  # argparse then says "invalid int value" of what is no number
    return read


positive_int = in_range(int, 1)
nonnegative_int = in_range(int, 0)
positive_float = in_range(float, 1e-30)
nonnegative_float = in_range(float, 0)
fraction = in_range(float, 0, 1)


def image_size(text: str) -> int | str:
    """An argparse type: 512 as a number, 768x512 (width x height) as it is."""
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})?", text):
        raise ArgumentTypeError(f"must be from 1 to 99999, such as 512 or 768x512 (width x height), got {text!r}")
    return text if "x" in text else int(text)


image_size.__name__ = "int"  # to who lists the flags, what it is in the reference


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Return the flags of the command line (or of `argv`), refusing impossible ones with exit status 2."""
    parser = ArgumentParser(
        description="Fine-tune the whole UNet of Stable Diffusion 1.x or 2.x on captioned images with JAX.",
        usage="python %(prog)s --pretrained_model_name_or_path MODEL --train_data_dir FOLDER [flags]",
        formatter_class=ArgumentDefaultsHelpFormatter)
    add_flags(parser)
    parser.set_defaults(output_dir="sd-model-finetuned", resolution=512, validation_epochs=5, seed=0,
                        image_interpolation_mode="bilinear")
    args = read_args(parser, argv)
    check_args(
        parser, args,
        (args.attention == "cudnn" and args.mixed_precision == "no",
         "--attention cudnn needs --mixed_precision bf16 or fp16: cuDNN's kernel takes no float32."),
    )
    return args


def add_flags(parser: ArgumentParser):  # noqa: PLR0915 - one statement per flag
    def add(flag, text, **settings):
        group.add_argument(flag, help=text, **settings)
    switch = partial(add, action="store_true")
    group = parser.add_argument_group("model")
    add("--pretrained_model_name_or_path", "Base model: a folder, .safetensors file or hub name.", required=True)
    add("--pretrained_vae_model_name_or_path", "VAE to use: a folder or hub name, without revision and variant.")
    add("--revision", "Branch, tag or commit of the model on the hub.")
    add("--variant", "Weight files to load: fp16 loads *.fp16.safetensors.")
    add("--cache_dir", "Folder for downloaded models and data sets.")
    switch("--train_text_encoder", "Train the text encoder (SDXL: both) with the UNet.")
    add("--clip_skip", "Use the text states of this many layers earlier, as diffusers' clip_skip.", type=positive_int)

    group = parser.add_argument_group("data")
    add("--dataset_name", "Data set: a name on the hub, or a local folder that `datasets` loads or has saved.")
    add("--dataset_config_name", "Configuration of --dataset_name.")
    add("--train_data_dir", "Folder of images. Captions: metadata.jsonl, .csv or .parquet with the columns file_name "
        "and --caption_column, or a .txt file beside each image. With --dataset_name: its data_dir.")
    add("--image_column", "Column of the images.", default="image")
    add("--caption_column", "Column of the captions: a string, or a list of which one is drawn.", default="text")
    add("--max_train_samples", "Train on at most this many samples, drawn by --seed.", type=positive_int)
    add("--resolution", "512 or 768x512 (width x height): images are scaled to cover it and cropped.", type=image_size)
    switch("--aspect_ratio_buckets",
        "Train each image near its own shape, at the size nearest in aspect ratio of about --resolution's area.")
    add("--bucket_step", "With --aspect_ratio_buckets, sides are multiples of this.", type=positive_int, default=64)
    add("--preview_data", "Write preview.png of this many cropped, captioned samples, then stop.", type=positive_int)
    add("--image_interpolation_mode", "Resizing filter.", default="lanczos", choices=tuple(INTERPOLATION_MODES))
    switch("--center_crop", "Crop at the center, not at random.")
    switch("--random_flip", "Flip half of the images left to right, at random.")
    add("--proportion_empty_prompts", "Probability of dropping the caption; "
        "0.1 keeps classifier-free guidance working (arXiv:2207.12598).", type=fraction, default=0)
    switch("--skip_broken_images", "Replace images that cannot be read; the log names them.")
    add("--dataloader_num_workers", "Threads that load data; 0: 8. "
        "Raise it if `data_wait` in the logs exceeds a few percent.", type=nonnegative_int, default=0)

    group = parser.add_argument_group("cache")
    switch("--cache_latents", "Encode all images once and keep them on disk.")
    add("--no_cache_latents", "Turn off --cache_latents (its default: %(default)s).", default=False,
        dest="cache_latents", action="store_false")
    switch("--cache_text_embeddings", "Encode all captions once and keep them on disk.")
    add("--no_cache_text_embeddings", "Turn off --cache_text_embeddings (its default: %(default)s).", default=False,
        dest="cache_text_embeddings", action="store_false")
    add("--cache_crops", "Random crops to cache per image; with --center_crop 1. If not given: 4.", type=positive_int)
    add("--cache_dtype", "Format on disk: fp32 if fp16 overflows.", default="fp16", choices=("fp16", "fp32"))
    add("--encoded_dir", "Folder of the cache, shared between runs. If not given: in --cache_dir or the hub's.")

    group = parser.add_argument_group("objective")
    add("--prediction_type", f"What the UNet predicts: {', '.join(PREDICTION_TYPES)}. If not given: the model's.")
    add("--snr_gamma", "Min-SNR weights with this gamma; 5.0 is common (arXiv:2303.09556).", type=positive_float)
    add("--noise_offset", "Strength of noise constant over a latent channel; "
        "0.1 helps with very dark and bright images.", type=nonnegative_float, default=0)
    add("--input_perturbation", "Strength of extra noise in the UNet's input but not its target; "
        "0.1 in arXiv:2301.11706.", type=nonnegative_float, default=0)
    switch("--dream_training", "Use DREAM (arXiv:2312.00210): fewer updates, each with one more forward pass.")
    add("--dream_detail_preservation", "Larger keeps more detail (DREAM).", type=nonnegative_float, default=1.0)
    add("--timestep_bias_strategy", "Draw some timesteps more often: earlier (less noisy) ones, later ones, "
        "or a range.", default="none", choices=("earlier", "later", "range", "none"))
    add("--timestep_bias_multiplier", "How many times as often they are drawn.", type=positive_float, default=1.0)
    add("--timestep_bias_portion", "Fraction that `earlier` and `later` choose.", type=fraction, default=0.25)
    add("--timestep_bias_begin", "First timestep of `range`.", type=nonnegative_int, default=0)
    add("--timestep_bias_end", "End of `range`, not included.", type=int, default=1000)
    switch("--rescale_betas_zero_snr",
        "Rescale the noise schedule to end in pure noise (arXiv:2305.08891); needs v_prediction or sample.")

    group = parser.add_argument_group("length and batch")
    add("--train_batch_size", "Images per device and forward pass.", type=positive_int, default=16)
    add("--gradient_accumulation_steps", "Forward and backward passes per update, "
        "for batches that do not fit into memory.", type=positive_int, default=1)
    add("--num_train_epochs", "Passes over the data if there is no --max_train_steps.", type=positive_int, default=100)
    add("--max_train_steps", "Optimizer updates in total, in place of --num_train_epochs.", type=positive_int)
    add("--seed", "Seed of all random draws. If not given, one is drawn and logged.", type=nonnegative_int)

    group = parser.add_argument_group("optimizer")
    add("--learning_rate", "Peak learning rate.", type=nonnegative_float, default=1e-4)
    add("--text_encoder_lr", "Peak learning rate of the text encoder, if not the UNet's.", type=nonnegative_float)
    switch("--scale_lr", "Multiply learning rates by the total batch size.")
    add("--lr_scheduler", f"One of {', '.join(LR_SCHEDULERS)}.", default="constant")
    add("--lr_warmup_steps", "Updates of rising learning rate, not of `constant`.", type=nonnegative_int, default=500)
    add("--lr_num_cycles", "Cycles of cosine_with_restarts.", type=positive_int, default=1)
    add("--lr_power", "Exponent of polynomial.", type=positive_float, default=1.0)
    add("--adam_beta1", "Decay of Adam's first moment.", type=fraction, default=0.9)
    add("--adam_beta2", "Decay of Adam's second moment.", type=fraction, default=0.999)
    add("--adam_weight_decay", "Decoupled weight decay.", type=nonnegative_float, default=1e-2)
    add("--adam_epsilon", "Added to the denominator of Adam's update.", type=positive_float, default=1e-08)
    add("--max_grad_norm", "Clip gradients to this norm; 0 turns it off.", type=nonnegative_float, default=1.0)

    group = parser.add_argument_group("EMA")
    switch("--use_ema", "Average the weights exponentially, for validation and export.")
    add("--ema_decay", "Decay of the average; at update n at most n / (9 + n).", type=fraction, default=0.9999)

    group = parser.add_argument_group("precision, memory and devices")
    add("--mixed_precision", "Number format of the forward and backward pass and of the frozen networks. bf16 and "
        "fp16 save memory; fp16, for GPUs without bf16, scales the loss and skips an update whose gradients "
        "overflow.", default="no", choices=("no", "fp16", "bf16"))
    switch("--allow_tf32", "Multiply float32 matrices as fast as the device can: in TF32 on GPUs, in bf16 on TPUs.")
    switch("--gradient_checkpointing", "Recompute activations to save memory, slower.")
    switch("--fsdp", "Shard weights, EMA weights and Adam's moments over the devices: less memory on each.")
    add("--attention", "`plain`: two matrix products and a softmax. `cudnn`: one fused kernel with far less memory, "
        "on NVIDIA GPUs with bf16 or fp16.", default="plain", choices=ATTENTIONS)
    switch("--multi_host", "Train together with the other machines of a TPU slice or a Slurm, MPI or Kubernetes job.")
    switch("--from_pt", "Accepted for old commands: PyTorch weights are read without it.")
    add("--local_rank", "Accepted for old launchers; not needed.", type=int, default=-1)

    group = parser.add_argument_group("validation")
    add("--validation_prompts", "Prompts to draw, one image each.", nargs="+")
    add("--validation_prompt", "Prompt to draw --num_validation_images images of.")
    add("--validation_size", "Size to draw, or one for each. Else --resolution.", type=image_size, nargs="+")
    add("--num_validation_images", "Images to draw of --validation_prompt.", type=nonnegative_int, default=4)
    add("--validation_epochs", "Validate every this many epochs.", type=positive_int)
    add("--validation_steps", "Validate every this many updates, in place of --validation_epochs.", type=positive_int)
    add("--validation_data_dir", "Folder of held-out images, laid out as --train_data_dir. Their unweighted loss at "
        "fixed noise and timesteps is logged as validation_loss, which is comparable between runs.")
    add("--validation_inference_steps", "Denoising steps per validation image.", type=positive_int, default=20)
    add("--validation_guidance_scale", "Scale of classifier-free guidance.", type=nonnegative_float, default=7.5)

    group = parser.add_argument_group("checkpoints and output")
    add("--output_dir", "Folder for everything that is saved.")
    add("--checkpointing_steps", "Save every this many updates, and at the end.", type=positive_int, default=500)
    add("--checkpoints_total_limit", "Checkpoints to keep, the newest ones. If not given: all.", type=positive_int)
    add("--resume_from_checkpoint", "Checkpoint to resume: `latest`, a name in --output_dir, or a path.")

    group = parser.add_argument_group("tracking and hub")
    add("--report_to", f"Where to log: {', '.join(TRACKERS)} (comma-separated), or none.", default="tensorboard")
    add("--logging_dir", "Folder for logs, inside --output_dir.", default="logs")
    add("--logging_steps", "Updates whose numbers are read at once; each is logged.", type=positive_int, default=10)
    add("--tracker_project_name", "Name of the project in trackers.", default="text2image-fine-tune")
    switch("--push_to_hub", "Upload the result and its model card at the end.")
    add("--hub_model_id", "Repository to upload to. If not given: --output_dir's name.")
    switch("--hub_private_repo", "Create that repository as a private one.")
    add("--hub_token", "Token for the upload; `hf auth login` or HF_TOKEN keeps it out of the shell's history.")


def read_args(parser: ArgumentParser, argv: list[str] | None) -> Namespace:
    """Return the flags, with the ~ of --output_dir=~/out expanded and all prompts to draw in --validation_prompts."""
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, str):
            setattr(args, name, os.path.expanduser(value))
    args.validation_prompts = args.validation_prompts or []
    if args.validation_prompt:
        args.validation_prompts += [args.validation_prompt] * args.num_validation_images
    args.validation_size = args.validation_size or [args.resolution]
    if args.preview_data:
        args.report_to, args.push_to_hub = "none", False
    return args


def check_args(parser: ArgumentParser, args: Namespace, *own_cases: tuple[bool, str]):
    """Refuse flags that contradict each other, the files or the machine: the first case that is true."""
    out = Path(args.output_dir).resolve()
    results = map(out.joinpath, (RESULT, "README.md", "unet", "vae", "text_encoder", "tokenizer", "scheduler"))
    earlier = [path.name for path in (*list_checkpoints(args.output_dir), *results) if path.exists()]
    cases = [
        *own_cases,
        (not args.dataset_name and not os.path.isdir(args.train_data_dir or ""),
         f"no training data: --train_data_dir {args.train_data_dir} is no folder. Give one, or --dataset_name NAME."),
        (args.validation_data_dir and not os.path.isdir(args.validation_data_dir),
         f"--validation_data_dir {args.validation_data_dir} is not a folder."),
        (earlier and not (args.resume_from_checkpoint and earlier[0].startswith("checkpoint-")),
         f"--output_dir {args.output_dir} holds {', '.join(earlier)}, which this run would overwrite: name another "
         "folder or, to go on from a checkpoint in it, add --resume_from_checkpoint latest."),
        *((getattr(args, flag) and Path(getattr(args, flag)).resolve() == out,
           f"--output_dir {args.output_dir} is also --{flag}, whose files would mix with this run's: name another.")
          for flag in ("pretrained_model_name_or_path", "dataset_name", "train_data_dir", "validation_data_dir")),
        (args.prediction_type not in (None, *PREDICTION_TYPES),
         f"--prediction_type {args.prediction_type}: choose from {', '.join(PREDICTION_TYPES)}."),
        (args.lr_scheduler not in LR_SCHEDULERS,
         f"--lr_scheduler {args.lr_scheduler}: choose from {', '.join(LR_SCHEDULERS)}."),
        (not list_sizes(args),
         f"--bucket_step {args.bucket_step} leaves no size of about --resolution {args.resolution}: lower it."),
        (args.dream_training and args.input_perturbation,
         "--dream_training and --input_perturbation exclude each other: both change the noise in the UNet's input."),
        (args.text_encoder_lr is not None and not args.train_text_encoder,
         "--text_encoder_lr needs --train_text_encoder."),
        (args.cache_text_embeddings and args.train_text_encoder,
         "--train_text_encoder changes the text embeddings, so do not cache them: add --no_cache_text_embeddings."),
        (args.hub_token and args.report_to not in ("tensorboard", "none"),
         f"--hub_token with --report_to {args.report_to}: such trackers publish the command line, and the token with "
         "it. Run `hf auth login`, or set HF_TOKEN, and drop --hub_token."),
        *((getattr(args, flag, False) and not importlib.util.find_spec(package),
           f"--{flag} needs {package}, which is not installed: pip install {package}, or drop the flag.")
          for flag, package in OPTIONAL_PACKAGES.items()),
        *((tracker not in TRACKERS or tracker != "all" and not importlib.util.find_spec(tracker),
           f"--report_to {tracker} is unknown or not installed: choose from {', '.join(TRACKERS)}, several with "
           "commas, or none alone.")
          for tracker in args.report_to.split(",") if args.report_to != "none")]
    for is_wrong, message in cases:
        if is_wrong:
            parser.error(message)


# ---- Setup ----------------------------------------------------------------------------------------------------------


def make_accelerator(args: Namespace) -> Accelerator:
    """Set up processes, devices and logging: libraries log warnings only."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING,
                        force=True)  # replaces the handler of Orbax's logging library
    if args.multi_host:
        jax.distributed.initialize(shutdown_timeout_seconds=30)  # after another process failed
    if args.mixed_precision == "no" and not args.allow_tf32:  # JAX's default is a shorter format
        jax.config.update("jax_default_matmul_precision", "highest")
    accelerator = Accelerator(args.mixed_precision, fsdp=args.fsdp)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    return accelerator


class Accelerator:
    """The processes, devices and trackers of a run, with accelerate's names, which shared helpers use."""

    def __init__(self, mixed_precision: str, *, fsdp: bool):
        self.process_index, self.num_processes = jax.process_index(), jax.process_count()
        self.is_main_process = self.process_index == 0
        self.num_devices, self.mixed_precision, self.fsdp = jax.device_count(), mixed_precision, fsdp
        self.mesh = Mesh(np.array(jax.devices()), ("devices",))
        self.whole = NamedSharding(self.mesh, PartitionSpec())  # a copy on every device
        self.split = NamedSharding(self.mesh, PartitionSpec("devices"))
        self.trackers = []

    def wait_for_everyone(self):
        """Wait until all processes are here."""
        if self.num_processes > 1:
            multihost_utils.sync_global_devices("wait_for_everyone")

    @contextlib.contextmanager
    def main_process_first(self):
        """Run the body on the main process first, then on the others, which find its caches."""
        if not self.is_main_process:
            self.wait_for_everyone()
        yield
        if self.is_main_process:
            self.wait_for_everyone()

    def log(self, numbers: dict[str, float], step: int):
        """Send numbers of an update to the trackers."""
        for tracker in self.trackers:
            tracker.log(numbers, step=step)

    def end_training(self):
        """Close the trackers."""
        for tracker in self.trackers:
            tracker.finish()

    def place(self, array: np.ndarray, sharding: NamedSharding) -> Tensor:
        """Put a host array, which every process has, on the devices."""
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    def choose_sharding(self, array) -> NamedSharding:
        """Return the sharding of an array of the state: a copy on each device, or with --fsdp cut along one axis.

        That is the longest axis that the number of devices divides. Biases and norms are too small to be cut.
        """
        sizes = [size if size % self.num_devices == 0 else 0 for size in array.shape]
        if not self.fsdp or array.ndim < 2 or not any(sizes):
            return self.whole
        axis = sizes.index(max(sizes))
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, "devices"))

    def gather_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights in full on each device, for one pass inside a compiled function; see --fsdp.

        Kernels are gathered in the number format of the forward pass.
        """
        if not self.fsdp:
            return weights
        dtype = get_dtype(self.mixed_precision)
        return {name: jax.lax.with_sharding_constraint(array.astype(dtype) if array.ndim > 1 else array, self.whole)
                for name, array in weights.items()}

    def divide_gradients(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Shard gradients as their weights are, inside a compiled function."""
        return {name: jax.lax.with_sharding_constraint(array, self.choose_sharding(array))
                for name, array in gradients.items()}

    def place_batch(self, batch: dict[str, np.ndarray], axis: int) -> dict[str, Tensor]:
        """Put a batch, of which each process has a part, on the devices, cut along an axis; scalars go to each."""
        split = NamedSharding(self.mesh, PartitionSpec(*[None] * axis, "devices"))
        return {name: jax.make_array_from_process_local_data(
            split if np.ndim(array) > axis else self.whole, np.asarray(array)) for name, array in batch.items()}


def gather_object(things: list) -> list:
    """Return the lists of all processes as one; of JSON types, and short."""
    if jax.process_count() == 1:
        return things
    packed = np.frombuffer(json.dumps(things).encode().ljust(1000), np.uint8)
    return [thing for row in multihost_utils.process_allgather(packed) for thing in json.loads(row.tobytes())]


def open_output_dir(args: Namespace, accelerator: Accelerator) -> FileLock:
    """Create the output folder, clear what a crash has left, and return the lock that keeps other runs out."""
    folder = Path(args.output_dir).resolve()
    lock = FileLock(Path(tempfile.gettempdir(), f"text-to-image-{make_key(str(folder))}.lock"), thread_local=False,
                    mode=0o666, is_singleton=True)  # a notebook may start again after an error, which keeps the lock
    try:
        folder.mkdir(parents=True, exist_ok=True)  # on all, as NFS remembers for a while what a machine did not find
        if accelerator.is_main_process:
            lock.acquire(timeout=10)  # loader processes of a killed run may hold it for 5 seconds
            for leftover in folder.glob(".partial-*"):  # of a crash
                remove(leftover)
            if not args.preview_data:
                (folder / PROBE).touch()
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir} cannot be written, or is in use by another run that may "
                        f"still be saving: {error}. Wait for its end, or name another folder.") from error
    accelerator.wait_for_everyone()
    if not args.preview_data and not all(gather_object([(folder / PROBE).exists()])):
        raise UserError(f"--output_dir {folder} is not the same folder on all machines: name one that they share.")
    return lock


def start_run(args: Namespace, accelerator: Accelerator, images: CaptionedImages, checkpoint: Path | None) -> dict:
    """Create the repository on the hub, seed and start the trackers; return what checkpoints record about the run."""
    if accelerator.is_main_process and args.push_to_hub:
        args.hub_model_id = huggingface_hub.create_repo(
            args.hub_model_id or Path(args.output_dir).resolve().name, private=args.hub_private_repo or None,
            exist_ok=True, token=args.hub_token).repo_id
    seed = load_run_record(checkpoint).get("seed", secrets.randbits(32)) if args.seed is None else args.seed
    seed = gather_object([seed])[0]  # the main process's, for all
    if accelerator.is_main_process:
        accelerator.trackers = [start_tracker(name, args) for name in args.report_to.split(",") if name != "none"]
    return {"seed": seed, "num_processes": accelerator.num_devices, "precision": accelerator.mixed_precision,
            "captions_digest": make_key(images.captions[:]),
            "flags": {key: value for key, value in vars(args).items() if key != "hub_token"}}


def log_run_header(args: Namespace, accelerator: Accelerator, models: Models, samples: Samples, seed: int,
                   checkpoint: Path | None):
    trained = sum(array.size for array in models.state.weights.values())
    last_step = compute_last_step(args, samples, accelerator.num_devices)
    logger.info(f"training {trained:,} parameters of {' and '.join(models.trained)} on {len(samples):,} samples at "
                f"{args.resolution} px, seed {seed}")
    logger.info(f"{last_step:,} updates of {compute_total_batch_size(args, accelerator.num_devices)} samples: "
                f"{args.train_batch_size} per device x {args.gradient_accumulation_steps} accumulation steps x "
                f"{accelerator.num_devices} devices ({jax.devices()[0].device_kind}) of "
                f"{accelerator.num_processes} processes")
    logger.info(f"precision {accelerator.mixed_precision}, {models.scheduler_config['prediction_type']} prediction, "
                f"output in {args.output_dir}, starting from {checkpoint or 'the base model'}")


# SLURM sends SIGUSR1 if told so by --signal=USR1@SECONDS; Windows has none
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)}


class StopRequest:
    """On SIGTERM, SLURM's SIGUSR1 or the first Ctrl-C, all processes save and stop.

    Of several processes, each sends the signal it received along with its batches, and reads the highest of all with
    the numbers of the update before, so that nobody waits for it.
    """

    def __init__(self, accelerator: Accelerator):
        self.signal_number, self.previous = 0, {}
        self.is_shared, self.previous_metrics = accelerator.num_processes > 1, {"signal": 0}

    def __enter__(self) -> StopRequest:
        try:
            self.previous = {number: signal.signal(number, self.receive) for number in STOP_SIGNALS}
        except ValueError:  # Python allows no handlers outside the main thread
            logger.warning("not in the main thread: signals do not save and stop this run")
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame):
        """Note the signal; a second one of the same kind ends the process at once, even while it waits for another."""
        self.signal_number = number
        signal.signal(number, signal.SIG_DFL)
        logger.warning("stop requested: finishing this update and saving a checkpoint; ask again to stop at once")

    def agreed(self, metrics: dict[str, Tensor]) -> int:
        """Return the signal that some process received, or 0; the same on every process. Call once per update."""
        if not self.is_shared:
            return self.signal_number
        before, self.previous_metrics = self.previous_metrics, metrics
        return int(before["signal"])


# ---- Models ---------------------------------------------------------------------------------------------------------

ADDITION_EMBED_TYPE = None  # of the UNet: what tells this kind of model from the other
VAE_SCALE = 0.18215  # the scaling_factor that the UNets of this kind were trained with
TOKENIZERS = ("tokenizer",)
WEIGHT_FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
                "safety_checker": "model"}
OLD_NAMES = {"query": ".to_q.", "key": ".to_k.", "value": ".to_v.", "proj_attn": ".to_out.0."}  # in the VAE
FLAX_FILES = {"unet": "diffusion_flax_model.msgpack", "vae": "diffusion_flax_model.msgpack",
              "text_encoder": "flax_model.msgpack"}
# Settings that must be unset: they ask for inputs or noise that training lacks, or scale latents as it does not.
UNSUPPORTED_SETTINGS = {
    "unet": ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim"),
    "vae": ("shift_factor", "latents_mean", "latents_std"), "scheduler": ("use_flow_sigmas",)}
# Settings of networks: those that may differ, with what holds where an old file leaves them out, ...
SETTINGS = {
    "unet": {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_eps": 1e-5, "norm_num_groups": 32,
             "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 1280, "attention_head_dim": 8,
             "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "use_linear_projection": False,
             "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3},
    "vae": {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 32,
            "block_out_channels": (64,), "scaling_factor": 0.18215, "mid_block_add_attention": True},
    "text_encoder": {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
                     "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
                     "layer_norm_eps": 1e-5},
}
# ... those that must be as here if they are there at all; others must be unset, False or 0, ...
FIXED_SETTINGS = {
    "act_fn": "silu", "attention_type": "default", "addition_embed_type_num_heads": 64, "conv_in_kernel": 3,
    "conv_out_kernel": 3, "downsample_padding": 1, "flip_sin_to_cos": True, "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "resnet_out_scale_factor": 1, "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional", "transformer_layers_per_block": 1,
    "use_quant_conv": True, "use_post_quant_conv": True, "model_type": "clip_text_model"}
BLOCK_TYPES = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "DownEncoderBlock2D",
               "UpDecoderBlock2D"}
# ... and those that change no number here.
IDLE_SETTINGS = frozenset(
    "architectures bos_token_id eos_token_id pad_token_id dtype torch_dtype initializer_factor initializer_range "
    "projection_dim transformers_version split_head_dim use_memory_efficient_attention sample_size upcast_attention "
    "force_upcast down_block_types up_block_types".split())


def load_model_configs(args: Namespace) -> dict[str, dict]:
    """Return the settings of each network and of the noise schedule, and the tokenizer.

    A model that cannot be trained is refused here, before its weights are read.
    """
    configs = {}
    for part, name in {**dict.fromkeys(SETTINGS, "config.json"), "scheduler": "scheduler_config.json"}.items():
        with explained_load(args, part):
            file = find_file(args, part, name)
            if file is None:
                raise OSError(f"{name} is missing.")
            configs[part] = json.loads(file.read_text())
            addition = configs["unet"].get("addition_embed_type")
            if addition != ADDITION_EMBED_TYPE:
                raise UserError(f"it has addition_embed_type {addition}: this script trains {MODEL_KIND} models. "
                                "Scripts for SDXL have sdxl in their names.")
    with explained_load(args, "tokenizer"):
        configs["tokenizer"] = load_tokenizer(args, "tokenizer", configs["text_encoder"])
    check_model_configs(args, configs)
    configs |= {part: check_settings(part, configs[part]) for part in SETTINGS}
    configs["text_encoder"]["num_hidden_layers"] -= args.clip_skip or 0  # later layers are not loaded
    scheduler = configs["scheduler"]
    compute_alphas_cumprod(scheduler)  # refuses an unknown noise schedule
    scheduler["_class_name"] = scheduler.get("_class_name", "PNDMScheduler").removeprefix("Flax")
    return configs


def load_tokenizer(args: Namespace, part: str, text_config: dict) -> CLIPTokenizer:
    """Return a tokenizer with the text encoder's longest text as its own, which not every tool saves."""
    where, files = locate_part(args, part)
    tokenizer = CLIPTokenizer.from_pretrained(where, **files)
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_config.get("max_position_embeddings", 77))
    if not 512 < len(tokenizer) <= text_config["vocab_size"]:  # 256 bytes, each also at the end of a word
        raise OSError(f"it has a vocabulary of {len(tokenizer)}, its text encoder one of {text_config['vocab_size']}: "
                      "tokenizer.json, or vocab.json and merges.txt, are missing or of another model.")
    return tokenizer


def locate_model(args: Namespace) -> str:
    """Return the folder, or name on the hub, of the base model; UserError for a model in one file."""
    where = args.pretrained_model_name_or_path
    if Path(where).is_file():
        raise UserError("it is one file, and this script reads folders in diffusers format. Convert it, where torch "
                        "is installed: python -c \"from diffusers import StableDiffusionPipeline as P; "
                        f"P.from_single_file('{where}').save_pretrained('FOLDER')\"")
    return where


def locate_part(args: Namespace, part: str) -> tuple[str, dict]:
    """Return the folder, or name on the hub, that a part of the model is loaded from, and where in it."""
    if part == "vae" and args.pretrained_vae_model_name_or_path:
        return args.pretrained_vae_model_name_or_path, {"cache_dir": args.cache_dir}
    revision = getattr(args, "non_ema_revision", args.revision) if part == "unet" else args.revision
    return locate_model(args), {"subfolder": part, "revision": revision, "cache_dir": args.cache_dir}


def check_model_configs(args: Namespace, configs: dict[str, dict]):
    where, vae, scheduler = args.pretrained_model_name_or_path, configs["vae"], configs["scheduler"]
    factor, latent_channels = compute_vae_factor(vae), vae.get("latent_channels", 4)
    in_channels = configs["unet"].get("in_channels", 4)
    sampler, num_timesteps = scheduler.get("_class_name", ""), scheduler.get("num_train_timesteps", 1000)
    prediction_type = args.prediction_type or scheduler.get("prediction_type", "epsilon")
    refusals = (
        *((configs[part].get(name), f"the {part} has {name} = {configs[part].get(name)!r}, which this script cannot "
           "train with: name another model.") for part, names in UNSUPPORTED_SETTINGS.items() for name in names),
        (in_channels != latent_channels,
         f"the UNet of {where} takes {in_channels} channels and the VAE makes {latent_channels}: inpainting models "
         "cannot be trained, and a VAE must be made for this kind of model."),
        (any(side % factor for size in (*list_sizes(args), *map(parse_size, args.validation_size)) for side in size),
         f"--resolution {args.resolution}, --validation_size, and --bucket_step {args.bucket_step} with "
         f"--aspect_ratio_buckets must be multiples of {factor}, for the VAE."),
        (prediction_type not in PREDICTION_TYPES or sampler.startswith(("FlowMatch", "EDM")),
         f"{where} is for {sampler} with prediction type {prediction_type}; this script trains models for noise as "
         f"DDPM adds it, with prediction type {', '.join(PREDICTION_TYPES)}."),
        (args.dream_training and prediction_type != "epsilon",
         f"--dream_training needs prediction type epsilon; this run has {prediction_type}."),
        (args.rescale_betas_zero_snr and prediction_type == "epsilon",
         "--rescale_betas_zero_snr needs --prediction_type v_prediction or sample; this run has epsilon."),
        (args.timestep_bias_strategy == "range"
         and not args.timestep_bias_begin < args.timestep_bias_end <= num_timesteps,
         f"--timestep_bias_begin {args.timestep_bias_begin} must be below --timestep_bias_end "
         f"{args.timestep_bias_end}, and both within the {num_timesteps} timesteps of {where}."),
        (args.clip_skip and args.clip_skip + len(TOKENIZERS) > configs["text_encoder"].get("num_hidden_layers", 12),
         f"--clip_skip {args.clip_skip} skips all layers of the text encoder: take a smaller number."),
    )
    for is_wrong, message in refusals:
        if is_wrong:
            raise UserError(message)
    scale = vae.get("scaling_factor", 0.18215)
    if scale != VAE_SCALE and scale in (0.18215, 0.13025):  # that of the other kind of model
        logger.warning(f"the VAE has scaling_factor {scale}, not that of {MODEL_KIND}: if it is made for such models, "
                       f"set it to {VAE_SCALE} in its config.json, else take another.")


def compute_vae_factor(vae_config: dict) -> int:
    """Return how many pixels one latent value spans in each direction."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def make_scheduler_config(args: Namespace, config: dict) -> dict:
    config = config | {"prediction_type": args.prediction_type or config.get("prediction_type", "epsilon")}
    if args.rescale_betas_zero_snr:  # sampling must then begin at the last timestep
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if args.rescale_betas_zero_snr or config["prediction_type"] == "sample":  # PNDM, the usual one, can do neither
        config |= {"_class_name": "DDIMScheduler", "clip_sample": False}
    return config


@contextlib.contextmanager
def explained_load(args: Namespace, part: str):
    """Say which flag has named files that cannot be loaded, or that the installed packages are at fault."""
    try:
        yield
    except Exception as error:  # of several libraries
        if isinstance(error, ImportError) or re.search("version of|pip install|unexpected keyword", str(error)):
            raise ImportError(f"packages are missing or do not fit together: {error} Install those that were tested: "
                              "pip install -r requirements.txt (JAX: requirements_flax.txt) -c constraints.txt"
                              ) from error
        vae = args.pretrained_vae_model_name_or_path
        raise UserError(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path} "
                        f"{f'or --pretrained_vae_model_name_or_path {vae} ' if vae else ''}cannot be loaded: "
                        f"{part and f'its {part}: '}{str(error) or repr(error)} Give a folder in diffusers format "
                        "(unet/, vae/ ...) or a name on the hub (`hf auth login` for a gated one).") from error


def load_models(args: Namespace, accelerator: Accelerator, configs: dict[str, dict]) -> Models:
    """Load the networks: trainable ones in float32, frozen ones in the number format of --mixed_precision."""
    dtype = get_dtype(accelerator.mixed_precision)
    trained = ("unet", "text_encoder") if args.train_text_encoder else ("unet",)
    networks, frozen, initial, files = {}, {}, {}, find_copied_files(args)
    for part, kind in NETWORKS.items():
        layers = Layers({}, dtype, args.attention, args.gradient_checkpointing and part in trained)
        networks[part], found = kind(configs[part], layers), find_weights(args, part)
        arrays = read_arrays(found)
        skipped = take_skipped_layers(args, configs["text_encoder"], arrays)
        weights = load_weights(part, configs[part], arrays, jnp.float32 if part in trained else dtype)
        (initial if part in trained else frozen).update(weights)
        if part in trained:
            frozen |= skipped  # for the export
        else:
            files |= {f"{part}/{name}": file for name, file in found.items()}
    return Models(configs["tokenizer"], **networks, configs=configs, trained=trained, frozen=frozen, initial=initial,
                  files=files, scheduler_config=make_scheduler_config(args, configs["scheduler"]))


def take_skipped_layers(args: Namespace, config: dict, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Remove from the text encoder's arrays those of the layers that --clip_skip leaves out, and return them."""
    numbers = range(config["num_hidden_layers"], config["num_hidden_layers"] + (args.clip_skip or 0))
    prefixes = tuple(f"encoder.layers.{number}." for number in numbers)
    names = [name for name in arrays if name.startswith(prefixes)]
    return {f"text_encoder.{name}": arrays.pop(name) for name in names}


def list_tokenizers(models: Models) -> list[CLIPTokenizer]:
    return [getattr(models, name) for name in TOKENIZERS]


def find_file(args: Namespace, part: str, name: str) -> Path | None:
    """Return a file of the base model, downloaded if it is on the hub, or None where there is no such file."""
    where, files = locate_part(args, part)
    if Path(where).is_dir():
        path = Path(where, files.get("subfolder", ""), name)
        return path if path.is_file() else None
    try:
        return Path(huggingface_hub.hf_hub_download(where, name, **files))
    except huggingface_hub.errors.EntryNotFoundError:  # also offline, of what has not been downloaded
        return None


def check_settings(part: str, config: dict) -> dict:
    """Return a network's settings with defaults filled in; refuse, by name, those that are not implemented."""
    odd = [f"{name} {value!r}" for name, value in config.items()
           if not (name in SETTINGS[part] or name in IDLE_SETTINGS or name[0] == "_")
           and value not in (FIXED_SETTINGS.get(name, False), None)]
    odd += sorted({*config.get("down_block_types", ()), *config.get("up_block_types", ())} - BLOCK_TYPES)
    if config.get("hidden_act", "gelu") not in ACTIVATIONS:
        odd.append(f"hidden_act {config['hidden_act']}")
    if odd:
        raise UserError(f"the {part} has {', '.join(odd)}, which this script does not support: use "
                        "train_text_to_image.py.")
    return {**SETTINGS[part], **config}


def get_dtype(mixed_precision: str) -> type:
    """Return the number format of the forward pass and of frozen networks."""
    return {"no": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}[mixed_precision]


def find_weights(args: Namespace, part: str) -> dict[str, Path]:
    """Return the files with the weights of a part, by the names that they have without --variant.

    A part that has none of that variant is read without, as by StableDiffusionPipeline.from_pretrained.
    """
    stem, is_own = WEIGHT_FILES[part], "subfolder" in locate_part(args, part)[1]
    for variant in ([f".{args.variant}"] if args.variant and is_own else []) + [""]:
        for name in (f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"):
            file = find_file(args, part, name)
            if file is None:
                continue
            shards = set(json.loads(file.read_text())["weight_map"].values()) if name.endswith(".json") else ()
            files = {name.replace(variant, ""): file, **{shard: find_file(args, part, shard) for shard in shards}}
            if None in files.values():
                raise OSError(f"{name} lists files that are not there.")
            return files
    flax_file = find_file(args, part, FLAX_FILES[part]) if part in FLAX_FILES else None
    if flax_file is None:
        raise OSError(f"{part}/ has no {stem}.safetensors, whole or in shards, and no Flax weights; where it has .bin "
                      "files, load and save it with diffusers once.")
    return {FLAX_FILES[part]: flax_file}


def read_arrays(files: dict[str, Path]) -> dict[str, np.ndarray]:
    """Return the arrays of weight files by today's torch names and in torch's layout."""
    arrays = {}
    for name, path in files.items():
        if name.endswith(".msgpack"):
            arrays |= read_flax_arrays(path)
        elif name.endswith(".safetensors"):
            with safe_open(path, framework="numpy") as file:
                arrays |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    renamed = {re.sub(r"\.(query|key|value|proj_attn)\.", lambda match: OLD_NAMES[match[1]],
                      name.removeprefix("text_model.")): array for name, array in arrays.items()}
    return {name: array for name, array in renamed.items() if not name.endswith("position_ids")}


def read_flax_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays that diffusers and transformers saved from Flax models, by torch's names and in its layout."""
    arrays = {}
    tree = flax.serialization.msgpack_restore(path.read_bytes())
    for name, array in flax.traverse_util.flatten_dict(tree, sep=".").items():
        name = re.sub(r"(blocks|attentions|resnets|samplers|net|to_out)_(\d+)\.", r"\1.\2.", name)
        name = re.sub(r"\.(kernel|scale|embedding)$", ".weight", name)
        arrays[name] = change_layout(name, np.asarray(array), to_torch=True)
    return arrays


def change_layout(name: str, array: np.ndarray, *, to_torch: bool = False) -> np.ndarray:
    """Return weights in JAX's layout, or in torch's: kernels [h, w, i, o] and [i, o], or [o, i, h, w] and [o, i]."""
    if array.ndim == 4:
        return array.transpose((3, 2, 0, 1) if to_torch else (2, 3, 1, 0))
    return array.T if array.ndim == 2 and not name.endswith("embedding.weight") else array


def with_weights(models: Models, weights: dict[str, Tensor]) -> Models:
    """Return the models with the networks that `weights` are of, ready to be called."""
    networks = {}
    for part in {name.split(".")[0] for name in weights}:
        network = getattr(models, part)
        layers = dataclasses.replace(network.layers, weights=select_part(weights, part))
        networks[part] = dataclasses.replace(network, layers=layers)
    return dataclasses.replace(models, **networks)


def select_part(weights: dict, part: str) -> dict:
    """Return the weights of one part by their names in it."""
    return {name.removeprefix(f"{part}."): array for name, array in weights.items() if name.startswith(f"{part}.")}


def find_copied_files(args: Namespace) -> dict[str, Path]:
    """Return the base model's files that the export copies: settings, safety checker and feature extractor.

    They are fetched now, so that the end of the run needs no network.
    """
    files = {f"{part}/config.json": find_file(args, part, "config.json") for part in SETTINGS}
    extra = {f"{part}/{name}": find_file(args, part, name) for part, name in (
        ("safety_checker", "config.json"), ("feature_extractor", "preprocessor_config.json"))}
    if None not in extra.values():  # one needs the other
        weights = find_weights(args, "safety_checker")
        files |= {**extra, **{f"safety_checker/{name}": file for name, file in weights.items()}}
    return files


def compute_ema_decay(num_updates: Tensor, decay: float) -> Tensor:
    """Return the EMA decay at update n, as diffusers' EMAModel: 0 for n = 1, then n / (9 + n) up to `decay`."""
    return jnp.minimum(decay, jnp.where(num_updates <= 1, 0.0, num_updates / (9.0 + num_updates)))


class LocalEncoder:
    """Encodes with a frozen network on this process's own devices, in batches of one size, so that it compiles once.

    `encode` takes the models and a batch; `batch_size` is per device.
    """

    def __init__(self, models: Models, part: str, encode, batch_size: int):
        self.mesh = Mesh(np.array(jax.local_devices()), ("devices",))
        self.batch_size = batch_size * self.mesh.size
        self.weights = {name: array for name, array in models.frozen.items() if name.startswith(f"{part}.")}
        self.encode = jax.jit(lambda weights, inputs: encode(with_weights(models, weights), inputs))

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Return the encodings of [n, ...], for any n."""
        self.weights = jax.device_put(self.weights, NamedSharding(self.mesh, PartitionSpec()))  # at the first batch
        results, split = [], NamedSharding(self.mesh, PartitionSpec("devices"))
        for start in range(0, len(inputs), self.batch_size):
            part = inputs[start : start + self.batch_size]
            padded = np.concatenate([part, np.repeat(part[:1], self.batch_size - len(part), axis=0)])
            results.append(np.asarray(self.encode(self.weights, jax.device_put(padded, split)))[: len(part)])
        return np.concatenate(results)


# ---- Cache ----------------------------------------------------------------------------------------------------------

FILE_SIZE, LEAST_FILES = 16 * 2**20, 16  # of a cache: bytes in a file, whose images are in memory at once
ENCODED_PIXELS = 2**20  # in a batch of the VAE: one image of 1024 px, four of 512
CACHE_DTYPES = {"fp16": "f2", "fp32": "f4"}  # for numpy
OPENING = threading.Lock()  # numpy reads headers by `ast`, which threads may not share before Python 3.11.8 and 3.12.2


def cache_encodings(args: Namespace, accelerator: Accelerator, models: Models, samples: Samples):
    """Encode images and captions once, as the flags say."""
    if args.cache_latents:
        samples.latents = cache_latents(args, accelerator, models, samples)
    if args.cache_text_embeddings:
        samples.text_states = cache_text_states(args, accelerator, models, samples)


def cache_latents(args: Namespace, accelerator: Accelerator, models: Models, samples: Samples) -> EncodedRows:
    """Return a row per variant of each image: the VAE's moments, flat, time_ids, and the image it is of."""
    size = 2 * max(math.prod(shape) for shape in samples.latent_shapes)  # of moments; smaller ones are padded
    row = np.dtype([("moments", CACHE_DTYPES[args.cache_dtype], (size,)), ("time_ids", "f4", (6,)), ("sources", "i8")])
    key = make_key(digest_images(accelerator, samples), args.image_interpolation_mode, args.center_crop,
                   digest_network(models, "vae"), row, samples.sizes, samples.num_flips)
    rows = EncodedRows(args, f"images-{key}", row, len(samples), samples.num_crops * samples.num_flips)
    batch_size = min(max(1, ENCODED_PIXELS // math.prod(parse_size(args.resolution))),
                     math.ceil(rows.rows_per_file / jax.local_device_count()))
    encoder = LocalEncoder(models, "vae", lambda models, images: encode_images(models.vae, images), batch_size)

    def encode(items):
        variants = list(itertools.chain(*items))
        crops = [variant.pop("images") for variant in variants]
        encoded = {}
        for shape in {crop.shape for crop in crops}:
            places = [place for place, crop in enumerate(crops) if crop.shape == shape]
            moments = encoder(np.moveaxis(np.stack([crops[place] for place in places]), 1, -1))
            moments = np.moveaxis(moments, -1, 1).reshape(len(places), -1)
            encoded |= zip(places, np.pad(moments, ((0, 0), (0, size - moments.shape[1]))), strict=True)
        return {"moments": [encoded[place] for place in range(len(crops))],
                **{name: [variant[name] for variant in variants] for name in variants[0]}}

    rows.fill(accelerator, partial(map_in_threads, samples.make_variants), encode)
    return rows


def cache_text_states(args: Namespace, accelerator: Accelerator, models: Models, samples: Samples) -> EncodedRows:
    """Return the text states of the empty caption and every distinct one, whose rows are `samples.caption_rows`."""
    captions = sorted({"", *(caption for row in samples.rows for caption in samples.data.captions[row])})
    samples.caption_rows = {caption: row for row, caption in enumerate(captions)}
    tokenizer, width = models.tokenizer, models.configs["text_encoder"]["hidden_size"]
    row = np.dtype([("encoder_hidden_states", CACHE_DTYPES[args.cache_dtype], (tokenizer.model_max_length, width)),
                    ("num_long", np.bool_)])
    key = make_key(captions, row, tokenizer.pad_token_id, digest_network(models, "text_encoder"))
    encoder = LocalEncoder(models, "text_encoder", lambda models, input_ids: encode_captions(
        models, {"input_ids": input_ids})["encoder_hidden_states"].astype(jnp.float32), 16)

    def encode(items):
        batch = collate([{"caption": caption} for caption in items], list_tokenizers(models))
        return {"encoder_hidden_states": encoder(batch["input_ids"]), "num_long": batch["num_long"]}

    rows = EncodedRows(args, f"captions-{key}", row, len(captions))
    rows.fill(accelerator, lambda items: [captions[item] for item in items], encode)
    return rows


class EncodedRows:
    """Encoded captions, or variants of images, as rows of .npy files that processes and runs share."""

    def __init__(self, args: Namespace, name: str, dtype: np.dtype, num_items: int, rows_per_item: int = 1):
        size = min(FILE_SIZE // (rows_per_item * dtype[0].itemsize), math.ceil(num_items / LEAST_FILES)) or 1
        caches = args.encoded_dir or Path(args.cache_dir or huggingface_hub.constants.HF_HOME, "encoded")
        self.folder, self.dtype, self.rows_per_file = Path(caches, name), dtype, size * rows_per_item
        self.files = [(self.folder / f"{number:06d}.npy", range(num_items)[first : first + size])
                      for number, first in enumerate(range(0, num_items, size))]  # with the items in each

    def read(self, row: int) -> dict[str, np.ndarray]:
        file, place = divmod(row, self.rows_per_file)
        values = open_rows(self.files[file][0])[place]
        return {name: values[name].copy() for name in self.dtype.names}

    def fill(self, accelerator: Accelerator, read, encode):
        """Write this process's share of the missing files: the values by name that `encode(read(items))` returns.

        What is read next is read while this is encoded. A file is written aside, then renamed: a killed run goes on
        with the next file, and two runs do no harm.
        """
        first = self.dtype.names[0]
        missing = [(path, items) for path, items in self.files[accelerator.process_index :: accelerator.num_processes]
                   if not path.exists()]
        inputs = iterate_ahead(read(items) for _, items in missing)
        bar = tqdm(missing, f"encoding {self.folder.name}", disable=not accelerator.is_main_process)
        for (path, items), encoded in zip(bar, map(encode, inputs), strict=True):
            rows = np.empty(len(encoded[first]), self.dtype)
            for name, values in encoded.items():
                rows[name] = values
            if not np.isfinite(rows[first]).all():
                raise UserError(f"the {first} of items {items.start} to {items.stop - 1} of the samples are not "
                                f"finite as {rows[first].dtype}: try --mixed_precision no, --cache_dtype fp32.")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                aside = path.with_name(f".partial-{os.urandom(8).hex()}.npy")
                np.save(aside, rows)
                finish_files(aside)
                aside.replace(path)
            except OSError as error:
                raise UserError(f"{self.folder} cannot be written: {error}. Free some space, name another "
                                "--encoded_dir, or use fewer --cache_crops; files so far are kept.") from error
        accelerator.wait_for_everyone()
        if not all(path.exists() for path, _ in self.files):
            raise UserError(f"{self.folder} lacks files that other machines wrote: name an --encoded_dir all see.")
        logger.info(f"cache {self.folder} has its {len(self.files)} files")


@functools.lru_cache(maxsize=256)  # each open file takes one of the process's descriptors
def open_rows(path: Path) -> np.ndarray:
    with OPENING:
        return np.load(path, mmap_mode="r")


def make_key(*facts) -> str:
    """Return a short name for facts, the same for equal ones only."""
    return hashlib.blake2b(repr(facts).encode(), digest_size=12).hexdigest()


def digest_images(accelerator: Accelerator, samples: Samples) -> str:
    """Hash all image files, and three preprocessed images, so that editing the transform rebuilds the cache."""
    def digest(index):
        image = samples.data.images[samples.rows[index]]
        try:
            return hashlib.blake2b(image.tobytes() if isinstance(image, Image.Image)
                                   else image.get("bytes") or Path(image["path"]).read_bytes()).digest()
        except Exception:  # decoding it will say why, or skip it
            return b""

    key, count = None, len(samples)
    if accelerator.is_main_process:
        logger.info("reading all images, to find their cache")
        pieces = [array.tobytes() for index in (0, count // 2, count - 1)
                  for variant in samples.make_variants(index) for array in variant.values()]
        key = hashlib.blake2b(b"".join(pieces + map_in_threads(digest, range(count))), digest_size=12).hexdigest()
    return gather_object([key])[0]


def digest_network(models: Models, part: str) -> str:
    """Hash a network's settings and weights, wherever they were loaded from."""
    digest = hashlib.blake2b(repr(models.configs[part]).encode(), digest_size=12)
    for _, array in sorted(select_part(models.frozen, part).items()):
        digest.update(array.tobytes())
    return digest.hexdigest()


# ---- Optimization ---------------------------------------------------------------------------------------------------


def prepare_training(args: Namespace, accelerator: Accelerator, models: Models, objective: Objective,
                     samples: Samples):
    """Put all weights on the devices, the trainable ones with their training state, and prepare the programs."""
    last_step = compute_last_step(args, samples, accelerator.num_devices)
    recipe = make_recipe(args, models.trained, last_step, accelerator.num_devices)
    make = partial(make_state, args, recipe)
    places = jax.tree.map(accelerator.choose_sharding, jax.eval_shape(make, models.initial))
    weights = jax.tree.map(accelerator.place, models.initial, places.weights)
    models.state = jax.jit(make, out_shardings=places, donate_argnums=0)(weights)
    models.initial = {}
    models.placed = {name: accelerator.place(array, accelerator.whole) for name, array in models.frozen.items()}
    models.programs = make_programs(args, accelerator, models, objective, recipe, places)


def compute_total_batch_size(args: Namespace, num_processes: int) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * num_processes


def compute_learning_rate(args: Namespace, part: str, num_processes: int) -> float:
    """Return the peak learning rate of a network, with --scale_lr times the samples in an update."""
    rate = args.learning_rate
    if part != "unet" and args.text_encoder_lr is not None:
        rate = args.text_encoder_lr
    return rate * (compute_total_batch_size(args, num_processes) if args.scale_lr else 1)


def compute_last_step(args: Namespace, samples: Samples, num_processes: int) -> int:
    """Return the number of updates in the whole run: --max_train_steps, else --num_train_epochs of them."""
    updates_per_epoch = sum(math.ceil(count / compute_total_batch_size(args, num_processes))
                            for count in np.bincount(samples.buckets))
    return args.max_train_steps or args.num_train_epochs * updates_per_epoch


def load_weights(part: str, config: dict, arrays: dict[str, np.ndarray], dtype: type) -> dict[str, np.ndarray]:
    """Return the arrays as weights of a network by names with its part in front; UserError where they do not fit."""
    needed, laid_out = list_shapes(part, config), {name: change_layout(name, array) for name, array in arrays.items()}
    odd = [name for name in sorted(needed.keys() | laid_out.keys()) if name not in needed or name not in laid_out
           or needed[name].shape != laid_out[name].shape]
    if odd:
        found = {name: arrays[name].shape if name in arrays else "missing" for name in odd[:3]}
        raise UserError(f"the weights do not fit {part}/config.json: {len(odd)} tensors are missing, too many or of "
                        f"another shape, among them {found}.")
    return {f"{part}.{name}": np.asarray(array, dtype) for name, array in laid_out.items()}


@dataclass(frozen=True)
class Recipe:
    """Optimizer and learning rates."""

    optimizer: optax.GradientTransformation  # AdamW without the learning rate
    lr_factor: optax.Schedule  # of the updates so far
    rates: dict[str, float]  # peak learning rate of each network


def make_state(args: Namespace, recipe: Recipe, weights: dict[str, Tensor]) -> TrainState:
    """Return the state before the first update; the EMA weights, if any, are copies of the weights."""
    zero = jnp.zeros((), jnp.int32)
    averages = jax.tree.map(jnp.copy, weights) if args.use_ema else None
    loss_scale = LossScale(jnp.float32(FIRST_LOSS_SCALE), zero) if args.mixed_precision == "fp16" else None
    return TrainState(zero, weights, recipe.optimizer.init(weights), zero, averages, loss_scale)


def make_programs(args: Namespace, accelerator: Accelerator, models: Models, objective: Objective, recipe: Recipe,
                  places: TrainState) -> Programs:
    """Return the functions, each compiled at its first call; shapes never change."""
    plain = dataclasses.replace(objective, args=Namespace(dream_training=False, snr_gamma=None))
    steps = make_ddim_steps(models.scheduler_config, args.validation_inference_steps)

    def join(weights: dict, frozen: dict) -> Models:
        return with_weights(models, {**accelerator.gather_weights(weights), **frozen})

    def compute_losses(weights: dict, frozen: dict, batch: dict) -> Tensor:
        networks = join(weights, frozen)
        losses = compute_loss(networks.unet, plain, *encode_batch(networks, batch), batch)
        return (losses * batch["weights"]).sum()

    def draw(weights: dict, frozen: dict, latents: Tensor, input_ids: Tensor) -> Tensor:
        return draw_latents(join(weights, frozen), steps, max(1.0, args.validation_guidance_scale), latents, input_ids)

    return Programs(
        jax.jit(partial(train_step, accelerator, models, objective, recipe), donate_argnums=0,
                out_shardings=(places, accelerator.whole)),
        jax.jit(compute_losses, out_shardings=accelerator.whole), jax.jit(draw, out_shardings=accelerator.whole))


def make_recipe(args: Namespace, trained: tuple[str, ...], last_step: int, num_devices: int) -> Recipe:
    """Return AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) and its learning rates from the flags."""
    optimizer = optax.chain(optax.scale_by_adam(args.adam_beta1, args.adam_beta2, args.adam_epsilon),
                            optax.add_decayed_weights(args.adam_weight_decay))
    rates = {part: compute_learning_rate(args, part, num_devices) for part in trained}
    return Recipe(optimizer, make_lr_factor(args, rates["unet"], last_step), rates)


def make_lr_factor(args: Namespace, rate: float, last_step: int) -> optax.Schedule:
    """Return the schedule: the factor of the peak learning rate after n updates."""
    warmup = args.lr_warmup_steps
    length = max(last_step, warmup + 1) - warmup  # a decay of length 0 would divide by 0

    def restart(count: Tensor) -> Tensor:
        progress = count / length
        return jnp.where(progress < 1, 0.5 * (1 + jnp.cos(jnp.pi * (args.lr_num_cycles * progress % 1))), 0.0)

    if args.lr_scheduler == "constant":
        return optax.constant_schedule(1.0)
    after_warmup = {
        "constant_with_warmup": optax.constant_schedule(1.0), "linear": optax.linear_schedule(1.0, 0.0, length),
        "cosine": optax.cosine_decay_schedule(1.0, length), "cosine_with_restarts": restart,
        "polynomial": optax.polynomial_schedule(1.0, 1e-7 / max(rate, 1e-7), args.lr_power, length)}
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), after_warmup[args.lr_scheduler]], [warmup])


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

RUN_RECORD = "run_record.json"  # in a checkpoint: progress, seed, flags, and digests of its files
PROBE = ".partial-probe"  # in --output_dir during a run: if it is missing, the disk was unmounted
TRAINED = "state"  # in a checkpoint: weights and moments
EMA_FOLDER = "averages"  # in a checkpoint: the EMA weights
LOSS_SCALE_FOLDER = "loss_scale"
# Flags that must not change on resume: they decide which tensors a checkpoint holds.
FIXED_FLAGS = {"use_ema", "train_text_encoder"}
# Flags that may change on resume without changing the results.
INCONSEQUENTIAL_FLAGS = frozenset(
    "output_dir cache_dir encoded_dir resume_from_checkpoint preview_data checkpointing_steps checkpoints_total_limit "
    "logging_dir logging_steps report_to tracker_project_name push_to_hub hub_model_id hub_private_repo local_rank "
    "debug_loss offload_ema foreach_ema pretrained_lora_model_name_or_path dataloader_num_workers validation_prompts "
    "validation_prompt num_validation_images validation_size validation_steps validation_epochs validation_data_dir "
    "validation_guidance_scale validation_inference_steps save_kohya_format optimizer_in_backward".split())


def list_checkpoints(output_dir: str) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    return sorted(filter(get_checkpoint_step, Path(output_dir).glob("checkpoint-*")), key=get_checkpoint_step)


def get_checkpoint_step(folder: Path) -> int | None:
    """Return N of checkpoint-N; None for other folders, and without the file that we or the reference write last."""
    named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    is_complete = any((folder / name).is_file() for name in (RUN_RECORD, "random_states_0.pkl"))
    return int(named[1]) if named and is_complete else None


def find_checkpoint(name: str | None, output_dir: str) -> Path | None:
    """Return the checkpoint that --resume_from_checkpoint names; None for no name, or if `latest` finds none."""
    complete = list_checkpoints(output_dir)
    if name is None or name == "latest" and not complete:
        return None
    for folder in complete[-1:] if name == "latest" else (Path(output_dir, name), Path(name)):
        if is_whole_checkpoint(folder):
            if any(map(folder.samefile, complete[:-1])):
                logger.warning(f"`latest` would return to {complete[-1].name}, newer than {name}: move it away.")
            return folder
    whole = ", ".join(folder.name for folder in filter(is_whole_checkpoint, complete)) or "no checkpoint"
    raise UserError(f"--resume_from_checkpoint {name} is not a complete checkpoint, or {folder} has files that were "
                    f"cut short, removed or taken from another run. Name a whole one: {output_dir} holds {whole}.")


def is_whole_checkpoint(folder: Path) -> bool:
    """Return whether a checkpoint has all files as they were saved, judged by their ends."""
    try:
        saved = load_run_record(folder).get("files", {})
    except ValueError:  # cut short
        return False
    return get_checkpoint_step(folder) is not None and saved.items() <= digest_files(folder).items()


def digest_files(folder: Path) -> dict[str, str]:
    """Hash the last MiB of each file: enough to notice one that was cut short or is from another run."""
    return {path.relative_to(folder).as_posix(): make_key(
                np.fromfile(path, np.uint8, offset=max(0, path.stat().st_size - 2**20)).tobytes())
            for path in folder.rglob("*") if path.is_file()}


def load_run_record(checkpoint: Path | None) -> dict:
    """Return what a checkpoint recorded about its run; empty for None and for the reference's checkpoints."""
    if not checkpoint or not (checkpoint / RUN_RECORD).is_file():
        return {}
    return json.loads((checkpoint / RUN_RECORD).read_text())


def check_changes(checkpoint: Path | None, record: dict):
    """Warn of what differs from the run that made a checkpoint; UserError for flags that must not."""
    if not checkpoint:
        return
    saved = load_run_record(checkpoint)
    flags = saved.get("flags", {"channels_last": False})  # of the reference, which keeps no record
    before, now = flags | saved | {"use_ema": (checkpoint / EMA_FOLDER).is_dir()}, record["flags"] | record
    changed = {key: f"{key} {before[key]} -> {now[key]}" for key in sorted(
        before.keys() & now.keys() - INCONSEQUENTIAL_FLAGS - {"flags"}) if before[key] != now[key]}
    misfits = [changed[key] for key in changed if key in FIXED_FLAGS]
    if misfits:
        raise UserError(f"{checkpoint} does not fit: {'; '.join(misfits)}. Give the command as it was.")
    if changed:
        logger.warning(
            f"settings differ from {checkpoint}: {'; '.join(changed.values())}. Training goes on with the new values.")
    elif saved:
        logger.info(f"resuming from {checkpoint} with the same captions, noise and settings")
    else:
        logger.warning(f"{checkpoint} has no {RUN_RECORD}: training goes on, with the samples in another order.")


def split_state(state: TrainState) -> dict[str, dict]:
    """Return a state as it lies in a checkpoint, by folder: EMA weights and loss scale, where there are any, apart."""
    parts = {TRAINED: {"step": state.step, "weights": state.weights, "moments": state.moments}}
    if state.averages is not None:
        parts[EMA_FOLDER] = {"updates": state.ema_updates, "weights": state.averages}
    if state.loss_scale is not None:
        parts[LOSS_SCALE_FOLDER] = state.loss_scale._asdict()
    return parts


def save_state(accelerator: Accelerator, models: Models, folder: Path):
    """Write the state with Orbax, each process what its devices hold."""
    accelerator.wait_for_everyone()
    for name, part in split_state(models.state).items():
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.resolve() / name, part)


def load_state(state: TrainState, folder: Path) -> TrainState:
    """Return a saved state, sharded as `state`, whose arrays are freed for it."""
    parts = split_state(state)
    for name, part in parts.items():
        if name != LOSS_SCALE_FOLDER or (folder / name).is_dir():  # not there after a run in another precision
            places = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype,
                                                                     sharding=array.sharding), part)
            jax.tree.map(lambda array: array.delete(), part)  # a device need not hold two states
            with ocp.StandardCheckpointer() as checkpointer:
                parts[name] = checkpointer.restore(folder / name, places)
    averages = parts.get(EMA_FOLDER, {"updates": state.ema_updates, "weights": None})
    loss_scale = LossScale(**parts[LOSS_SCALE_FOLDER]) if LOSS_SCALE_FOLDER in parts else None
    return TrainState(**parts[TRAINED], ema_updates=averages["updates"], averages=averages["weights"],
                      loss_scale=loss_scale)


def save_checkpoint(args: Namespace, accelerator: Accelerator, models: Models, progress: Progress,
                    record: dict):
    """Save what the next update depends on, renamed once it is on disk, so that a crash leaves the others whole."""
    place = Path(args.output_dir, f"checkpoint-{progress.global_step}")
    aside, limit = place.with_name(f".partial-{place.name}"), args.checkpoints_total_limit
    try:
        Path(args.output_dir, PROBE).stat()
        save_state(accelerator, models, aside)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (aside / RUN_RECORD).write_text(json.dumps(
                record | {"progress": vars(progress), "files": digest_files(aside)}, indent=1))
            replace_folder(aside, place)
    except Exception as error:  # of several libraries, which do not all say what is wrong
        raise RuntimeError(f"{place} could not be written: {error}. Is the disk full or gone, or did a process end? "
                           "Others are whole: make room, then add --resume_from_checkpoint latest.") from error
    if accelerator.is_main_process:
        logger.info(f"saved {place}")
        others = [folder for folder in list_checkpoints(args.output_dir) if folder != place]
        while limit and len(others) >= limit:
            remove(others.pop(0))
    accelerator.wait_for_everyone()


def replace_folder(new: Path, place: Path):
    """Move a file or folder to its place, once it is on disk; then remove what was there."""
    finish_files(new)
    old = place.rename(place.with_name(f".partial-old-{place.name}")) if os.path.lexists(place) else None
    new.rename(place)
    if old:
        remove(old)


def finish_files(path: Path):
    """Flush a file, or all in a folder, to disk, with the folder's permissions: safetensors leaves out the group's."""
    for file in filter(Path.is_file, [path, *path.rglob("*")]):
        with open(file, "r+b") as stream:
            os.fsync(stream)
        with contextlib.suppress(OSError):  # on file systems that have no permissions
            file.chmod(file.parent.stat().st_mode & 0o666)


def remove(path: Path):
    """Remove a file, a folder or a link, renamed first: half a checkpoint is none. A later start tries again."""
    path = path.rename(path.with_name(f".partial-removed-{path.name.removeprefix('.partial-removed-')}"))
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()


def resume(models: Models, checkpoint: Path) -> Progress:
    """Load a checkpoint and return its progress."""
    try:
        models.state = load_state(models.state, checkpoint.resolve())
    except Exception as error:  # of several libraries, whose words go on for pages
        raise UserError(f"{checkpoint} cannot be loaded: {error!r}. Name another checkpoint, or give the command as "
                        "it was.") from error
    return Progress(**load_run_record(checkpoint)["progress"])


# ---- Validation and export ------------------------------------------------------------------------------------------

MODEL_LICENSE = "creativeml-openrail-m"  # this and the next two are for the model card
MODEL_TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "diffusers-training",
              "jax"]
CARD_FACTS = ("updates", "seed", "train_text_encoder", "learning_rate", "train_batch_size",
              "gradient_accumulation_steps", "resolution", "mixed_precision", "pretrained_vae_model_name_or_path",
              "use_ema", "clip_skip", "rank", "lora_alpha")
RESULT = "model_index.json"  # in --output_dir: marks a finished run
PIPELINE_CLASSES = {"text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
                    "unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL")}
SAFETY_CLASSES = {"safety_checker": ("stable_diffusion", "StableDiffusionSafetyChecker"),
                  "feature_extractor": ("transformers", "CLIPImageProcessor")}


def validate(args: Namespace, accelerator: Accelerator, models: Models, data: Data, progress: Progress,
             tag: str = "validation"):
    """Draw the prompts and measure the held-out loss, with the EMA weights if there are any.

    `tag` is the name of the pictures in trackers.
    """
    images = draw_images(args, accelerator, models, args.validation_prompts, data.train.seed)
    if data.held_out:
        loss = compute_held_out_loss(args, accelerator, models, data.held_out)
        logger.info(f"validation_loss {loss:.5f} at update {progress.global_step}")
    with log_failure("saving what validation found"):
        if data.held_out:
            accelerator.log({"validation_loss": loss}, step=progress.global_step)
        if images and accelerator.is_main_process:
            save_images(args, accelerator, images, progress.global_step, tag)


def get_best_weights(models: Models) -> dict[str, Tensor]:
    """Return the EMA weights if there are any, else the trained ones."""
    return models.state.weights if models.state.averages is None else models.state.averages


def make_ddim_steps(config: dict, num_steps: int) -> tuple[np.ndarray, ...]:
    """Return timesteps [n], and alpha^2 there and after each step [n] of it, as diffusers' DDIMScheduler has them."""
    alphas_cumprod, count = compute_alphas_cumprod(config), config.get("num_train_timesteps", 1000)
    timesteps = {"leading": np.arange(num_steps)[::-1] * (count // num_steps) + config.get("steps_offset", 0),
                 "trailing": np.round(np.arange(count, 0, -count / num_steps))[:num_steps] - 1,
                 "linspace": np.linspace(0, count - 1, num_steps).round()[::-1]}
    timesteps = timesteps[config.get("timestep_spacing", "leading")].astype(np.int32).clip(0, count - 1)
    after = timesteps - count // num_steps
    last = 1.0 if config.get("set_alpha_to_one", True) else alphas_cumprod[0]
    return timesteps, alphas_cumprod[timesteps], np.where(after < 0, last, alphas_cumprod[after]).astype(np.float32)


def draw_latents(models: Models, steps: tuple[np.ndarray, ...], guidance_scale: float, latents: Tensor,
                 input_ids: Tensor) -> Tensor:
    """Return uint8 images [b, H, W, 3] from noise [b, h, w, c] and the tokens [b, 2, s] of no caption and of one.

    By DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 without added noise) and classifier-free guidance (Ho &
    Salimans 2022, arXiv:2207.12598).
    """
    conditions = encode_captions(models, {"input_ids": input_ids.reshape(-1, input_ids.shape[-1])})
    prediction_type = models.scheduler_config["prediction_type"]

    def denoise(latents: Tensor, step: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, None]:
        timestep, variance, next_variance = step
        pairs = jnp.repeat(latents, 2, axis=0)  # side by side, since the devices divide this axis
        model_pred = models.unet(pairs, jnp.full(len(pairs), timestep), **conditions).astype(jnp.float32)
        without, given = model_pred[0::2], model_pred[1::2]
        model_pred = without + guidance_scale * (given - without)
        return take_ddim_step(latents, model_pred, variance, next_variance, prediction_type), None

    latents, _ = jax.lax.scan(denoise, latents, steps)
    return jnp.clip(models.vae.decode(latents) * 127.5 + 127.5, 0, 255).round().astype(jnp.uint8)


def take_ddim_step(latents: Tensor, model_pred: Tensor, variance: Tensor, next_variance: Tensor,
                   prediction_type: str) -> Tensor:
    """Return less noisy latents [b, h, w, c]; the variances are alpha^2 at this timestep and at the next."""
    alpha, sigma = jnp.sqrt(variance), jnp.sqrt(1 - variance)
    if prediction_type == "epsilon":
        clean, noise = (latents - sigma * model_pred) / alpha, model_pred
    elif prediction_type == "v_prediction":
        clean, noise = alpha * latents - sigma * model_pred, alpha * model_pred + sigma * latents
    else:
        clean, noise = model_pred, (latents - alpha * model_pred) / sigma
    return jnp.sqrt(next_variance) * clean + jnp.sqrt(1 - next_variance) * noise


def draw_images(args: Namespace, accelerator: Accelerator, models: Models, prompts: list[str],
                seed: int) -> list[Image.Image]:
    """Return a picture per prompt, from the same noise at every call; none where drawing failed.

    Each device draws one picture at a time. With several processes a failure ends the run, as the others wait.
    """
    sizes = [args.validation_size[index % len(args.validation_size)] for index in range(len(prompts))]
    factor, channels = compute_vae_factor(models.configs["vae"]), models.configs["vae"]["latent_channels"]
    drawn, count = {}, accelerator.num_devices
    with contextlib.nullcontext() if accelerator.num_processes > 1 else log_failure("drawing validation pictures"):
        for size in dict.fromkeys(sizes):
            shape = (channels, *(side // factor for side in parse_size(size)))
            indices = [index for index in range(len(prompts)) if sizes[index] == size]
            for start in range(0, len(indices), count):
                rows = [indices[min(start + device, len(indices) - 1)] for device in range(count)]
                noise = np.stack([make_rng(seed, "validation", row).standard_normal(shape, np.float32)
                                  for row in rows])
                captions = [{"caption": caption} for row in rows for caption in ("", prompts[row])]
                input_ids = collate(captions, list_tokenizers(models))["input_ids"].reshape(count, 2, -1)
                batch = [accelerator.place(each, accelerator.split) for each in (np.moveaxis(noise, 1, -1), input_ids)]
                images = np.asarray(models.programs.draw(get_best_weights(models), models.placed, *batch))
                drawn |= zip(rows, images, strict=True)
        return [Image.fromarray(drawn[index]) for index in range(len(prompts))]
    return []


def compute_held_out_loss(args: Namespace, accelerator: Accelerator, models: Models, held_out: Samples) -> float:
    """Return the mean unweighted loss of the held-out samples, with the same noise and timesteps in every run.

    It is nan if measuring failed.
    """
    count, losses = len(held_out), []
    steps = plan_micro_steps(held_out, Progress(), len(set(held_out.buckets)),
                             args.train_batch_size * accelerator.num_devices, count)
    with contextlib.nullcontext() if accelerator.num_processes > 1 else log_failure("measuring the held-out loss"):
        for _, batch in make_dataloader(held_out, steps, models, 0, accelerator, args.train_batch_size):
            losses.append(models.programs.compute_losses(get_best_weights(models), models.placed,
                                                         accelerator.place_batch(batch, axis=0)))
        return float(sum(jax.device_get(losses))) / count
    return math.nan


def save_images(args: Namespace, accelerator: Accelerator, images: list[Image.Image], step: int,
                tag: str):
    """Save pictures one by one and side by side, and send them to the trackers."""
    folder = Path(args.output_dir, f"validation/step-{step}")
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        image.save(folder / f"{index:02d}.png")
    sides = np.max([image.size for image in images], axis=0)
    images = [image.crop((0, 0, *sides)) for image in images]  # with black beside smaller ones
    Image.fromarray(np.hstack(images)).save(folder / "grid.png")
    logger.info(f"saved {len(images)} pictures and grid.png in {folder}")
    log_images(accelerator, tag, images, args.validation_prompts, step)


def export_model(args: Namespace, accelerator: Accelerator, models: Models):
    """Write the pipeline to --output_dir, aside first, so that a failure leaves what was there before.

    Frozen parts are copies of the base model's files, Flax weights converted.
    """
    weights = multihost_utils.process_allgather(get_best_weights(models), tiled=True)
    if not accelerator.is_main_process:
        return
    aside = Path(args.output_dir, ".partial-export")
    for name, source in models.files.items():
        part, _, file = name.partition("/")
        (aside / part).mkdir(parents=True, exist_ok=True)
        if file == "config.json":
            write_json(aside / name, json.loads(source.read_text()))
        elif name.endswith(".msgpack"):
            save_network(read_arrays({name: source}), part, aside)
        else:
            shutil.copyfile(source, aside / name)
    models.tokenizer.save_pretrained(aside / "tokenizer")
    for part in models.trained:
        own = {name: change_layout(name, array, to_torch=True) for name, array in select_part(weights, part).items()}
        save_network({**select_part(models.frozen, part), **own}, part, aside)
    write_json(aside / "scheduler" / "scheduler_config.json", models.scheduler_config)
    has_checker = (aside / "safety_checker").is_dir()
    write_json(aside / RESULT, {
        "_class_name": "StableDiffusionPipeline", "scheduler": ("diffusers", models.scheduler_config["_class_name"]),
        **PIPELINE_CLASSES, **(SAFETY_CLASSES if has_checker else dict.fromkeys(SAFETY_CLASSES, (None, None))),
        "requires_safety_checker": has_checker})
    for part in sorted(aside.iterdir(), key=Path.is_file):
        replace_folder(part, Path(args.output_dir, part.name))
    aside.rmdir()
    logger.info(f"saved the pipeline: StableDiffusionPipeline.from_pretrained({args.output_dir!r}) loads it")


def save_network(arrays: dict[str, np.ndarray], part: str, folder: Path):
    """Write the weights of a network, given by torch's names and in its layout, as diffusers reads them."""
    prefix = "text_model." if part == "text_encoder" else ""  # which every version of transformers reads
    save_arrays({prefix + name: np.ascontiguousarray(array) for name, array in arrays.items()},
                folder / part / f"{WEIGHT_FILES[part]}.safetensors", metadata={"format": "pt"})


def write_json(path: Path, settings: dict):
    """Write a file of settings, naming torch's classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=2) + "\n"
    path.write_text(text.replace('"_class_name": "Flax', '"_class_name": "'))


def make_example(args: Namespace, prompt: str) -> str:
    clip_skip = f", clip_skip={args.clip_skip}" if args.clip_skip else ""
    return ("from diffusers import StableDiffusionPipeline\n\n"
            f"pipeline = StableDiffusionPipeline.from_pretrained({args.hub_model_id or args.output_dir!r})\n"
            f"image = pipeline({prompt!r}{clip_skip}).images[0]")


def save_model_card(args: Namespace, seed: int, progress: Progress):
    """Write README.md, the model card, with the pictures drawn after the last update."""
    folder, base = Path(args.output_dir), args.pretrained_model_name_or_path
    header = huggingface_hub.ModelCardData(license=MODEL_LICENSE, library_name="diffusers", tags=MODEL_TAGS,
                                           inference=True, base_model=None if Path(base).exists() else base)
    source = args.dataset_name or "images in a local folder"
    text = f"---\n{header.to_yaml()}\n---\n\n# Fine-tuned {base}\n\nTrained on {source}.\n\n"
    grid = folder / f"validation/step-{progress.global_step}/grid.png"
    if grid.is_file():
        shutil.copyfile(grid, folder / "val_imgs_grid.png")
        text += "![Pictures drawn after the last update](./val_imgs_grid.png)\n\n"
    prompt = next(iter(args.validation_prompts), "a prompt like the captions it was trained on")
    text += f"## Use\n\n```python\n{make_example(args, prompt)}\n```\n\n## Training\n\n"
    facts = vars(args) | {"updates": progress.global_step, "seed": seed}
    text += "".join(f"- {name}: {facts[name]}\n" for name in CARD_FACTS if facts.get(name) is not None)
    (folder / "README.md").write_text(text, encoding="utf-8")


def push_to_hub(args: Namespace):
    try:
        huggingface_hub.upload_folder(
            repo_id=args.hub_model_id, folder_path=args.output_dir, token=args.hub_token,
            commit_message="End of training",
            ignore_patterns=["checkpoint-*/**", ".partial-*/**", "wandb/**", f"{Path(args.logging_dir)}/**"])
    except Exception as error:
        raise UserError(f"uploading {args.output_dir} to {args.hub_model_id} failed: {error}. To try again, repeat "
                        "the command with --resume_from_checkpoint latest.") from error


# ---- Logging --------------------------------------------------------------------------------------------------------


class Meter:
    """Keeps metrics on the devices and reads them late, so that the devices never wait.

    Logs the metrics of every update with its own step; with every --logging_steps updates `images_per_second`,
    `data_wait` (share of the time spent waiting for data) and `peak_memory_gib`.
    """

    def __init__(self, args: Namespace, accelerator: Accelerator, first_step: int, last_step: int):
        self.accelerator, self.logging_steps = accelerator, args.logging_steps
        self.bar = tqdm(total=last_step, initial=first_step, desc="updates", disable=not accelerator.is_main_process)
        self.updates = []  # (step, numbers) of those not read yet
        self.started, self.waited = time.perf_counter(), 0.0  # since the last reading
        self.overflows = 0  # updates in a row whose gradient is not finite

    def time_waits(self, updates):
        """Yield each update's last micro step with its batch, and measure how long each was waited for."""
        began = time.perf_counter()
        for update in updates:
            self.waited += time.perf_counter() - began
            yield update
            began = time.perf_counter()
            if not self.updates:  # all read: what was done since, such as saving, is not training
                self.started = began

    def end_update(self, global_step: int, step: MicroStep, metrics: dict[str, Tensor]):
        """Take an update's metrics; wait for the update before it, so that the devices stay busy with this one.

        They are read --logging_steps updates at a time, once one more has begun.
        """
        self.updates.append((global_step, {"epoch": step.epoch, "num_images": step.window_size, **metrics}))
        if len(self.updates) > 1:
            jax.block_until_ready(self.updates[-2])
        if len(self.updates) > self.logging_steps:
            self.flush(self.logging_steps)
        with contextlib.suppress(OSError):  # a closed pipe, such as `| tee` after Ctrl-C, must not end the run
            self.bar.update()

    def flush(self, count: int | None = None):
        """Read the oldest metrics, or all, from the devices and log them; raise UserError if one is not finite."""
        rows = jax.device_get(self.updates[:count])
        del self.updates[:count]
        if not rows:
            return
        seconds, num_images = time.perf_counter() - self.started, 0
        for _, numbers in rows:
            del numbers["signal"]
            num_images += numbers.pop("num_images")
        rows = [(step, {name: float(number) for name, number in numbers.items()}) for step, numbers in rows]
        memory = jax.local_devices()[0].memory_stats() or {}  # none of CPUs
        rows[-1][1].update({"images_per_second": num_images / seconds, "data_wait": self.waited / seconds,
                            "peak_memory_gib": memory.get("peak_bytes_in_use", 0) / 2**30})
        self.started, self.waited = time.perf_counter(), 0.0
        for step, numbers in rows:
            with log_failure("sending numbers to the trackers"):
                self.accelerator.log(numbers, step=step)
            self.overflows = 0 if math.isfinite(numbers["grad_norm"]) else self.overflows + 1
            allowed = 30 if "loss_scale" in numbers else 0  # whose updates are skipped, and the scale of 65,536 halved
            if not math.isfinite(numbers["train_loss"]) or self.overflows > allowed:
                raise UserError(
                    f"the loss is {numbers['train_loss']} at step {step} (gradient norm {numbers['grad_norm']}, lr "
                    f"{numbers['lr']:.0e}, precision {self.accelerator.mixed_precision}): too high a learning rate? "
                    "Try a lower one, and --mixed_precision bf16 in place of fp16. Checkpoints are untouched.")
        self.bar.set_postfix(loss=numbers["train_loss"], lr=numbers["lr"], refresh=False)


@contextlib.contextmanager
def log_failure(what: str):
    """Log an exception: a failing picture or tracker must not end the run."""
    try:
        yield
    except Exception:  # anything from out of memory to a full disk
        logging.getLogger(__name__).exception(f"{what} failed; the run goes on")  # on any process


def log_images(accelerator: Accelerator, tag: str, images: list[Image.Image], prompts: list[str], step: int):
    """Send pictures to every tracker."""
    for tracker in accelerator.trackers:
        if isinstance(tracker, TensorBoardRun):
            tracker.log({f"{tag}/{index}": image for index, image in enumerate(images)}, step=step)
        else:
            import wandb

            captioned = [wandb.Image(image, caption=prompt) for image, prompt in zip(images, prompts, strict=True)]
            tracker.log({tag: captioned}, step=step)


def start_tracker(name: str, args: Namespace):
    """Start a tracker."""
    if name == "tensorboard":
        return TensorBoardRun(Path(args.output_dir, args.logging_dir, args.tracker_project_name))
    import wandb

    return wandb.init(project=args.tracker_project_name, dir=args.output_dir,
                      config={key: value for key, value in vars(args).items() if key != "hub_token"})


class TensorBoardRun:
    """Writes TensorBoard's event files without torch or TensorFlow; has the methods of a run of W&B."""

    def __init__(self, folder: Path):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.file, self.make_event = EventFileWriter(str(folder)), Event

    def log(self, values: dict[str, float | Image.Image], step: int):
        """Write numbers or pictures of an update."""
        summary = []
        for tag, value in values.items():
            if isinstance(value, Image.Image):
                stream = io.BytesIO()
                value.save(stream, format="PNG")
                summary.append({"tag": tag, "image": {"height": value.height, "width": value.width, "colorspace": 3,
                                                      "encoded_image_string": stream.getvalue()}})
            else:
                summary.append({"tag": tag, "simple_value": value})
        self.file.add_event(self.make_event(wall_time=time.time(), step=step, summary={"value": summary}))
        self.file.flush()

    def finish(self):
        """Close the file."""
        self.file.close()


# ---- Main -----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    accelerator = make_accelerator(args)
    configs = load_model_configs(args)
    lock = open_output_dir(args, accelerator)  # noqa: F841 - held until the end
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    with accelerator.main_process_first():
        images = make_captioned_images(args, None if args.dataset_name else args.train_data_dir)
        held_out_images = make_captioned_images(args, args.validation_data_dir) if args.validation_data_dir else None
    record = start_run(args, accelerator, images, checkpoint)
    check_changes(checkpoint, record)
    data = make_data(args, images, held_out_images, record["seed"], configs)
    preview_data(args, accelerator, data.train)

    with explained_load(args, ""):
        models = load_models(args, accelerator, configs)
    cache_encodings(args, accelerator, models, data.train)
    objective = make_objective(args, models.scheduler_config)
    prepare_training(args, accelerator, models, objective, data.train)
    progress = resume(models, checkpoint) if checkpoint else Progress()

    log_run_header(args, accelerator, models, data.train, record["seed"], checkpoint)
    signal_number = train(args, accelerator, models, data, progress, record)
    if not signal_number:
        validate(args, accelerator, models, data, progress, tag="test")
        export_model(args, accelerator, models)
        if accelerator.is_main_process:
            save_model_card(args, record["seed"], progress)
            if args.push_to_hub:
                push_to_hub(args)
        accelerator.wait_for_everyone()
    with log_failure("closing the trackers"):
        accelerator.end_training()
    if signal_number:
        logger.warning(f"stopped by {signal.Signals(signal_number).name} after update {progress.global_step}, which "
                       "is saved: to continue, repeat the command with --resume_from_checkpoint latest")
        sys.exit(128 + signal_number)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {str(error).rpartition('UserError: ')[2]}")  # of a loader process's: its last line
