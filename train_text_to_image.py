#!/usr/bin/env python
# Copyright 2026 The text-to-image fine-tuning authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune the whole UNet of Stable Diffusion 1.x or 2.x on captioned images.

For an image x with caption c, its latents z = scaling_factor * VAE(x), Gaussian noise e and a random timestep t
(Ho et al. 2020, arXiv:2006.11239, eq. 14; Rombach et al. 2022, arXiv:2112.10752, eq. 3):

    z_t  = alpha_t z + sigma_t e,            alpha_t^2 + sigma_t^2 = 1
    loss = mean over samples of  w_t ||UNet(z_t, t, text(c)) - target||^2 / number of latent values
    target = e (epsilon), alpha_t e - sigma_t z (v_prediction) or z (sample);  w_t = 1, or Min-SNR

UNet weights are float32, or --weight_dtype bf16; --mixed_precision sets the forward pass and the frozen networks.

    accelerate launch --mixed_precision bf16 train_text_to_image.py --pretrained_model_name_or_path MODEL \\
        --train_data_dir FOLDER --use_ema --validation_prompts "a red apple" --output_dir out
    accelerate launch --multi_gpu train_text_to_image.py ... --resume_from_checkpoint latest

--output_dir then holds:

    model_index.json, unet/, vae/, text_encoder/ ...   for StableDiffusionPipeline.from_pretrained(folder)
    checkpoint-N/            everything needed to resume after update N; unet/ (and unet_ema/) in it can be loaded
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
import ctypes
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
from collections import ChainMap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import numpy as np
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, AutocastKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.logging import get_logger
from accelerate.utils import gather_object, send_to_device, set_seed
from accelerate.utils.memory import clear_device_cache
from filelock import FileLock
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageDraw, ImageOps, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TVF
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import CLIPTextModel, CLIPTokenizer

import diffusers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler

# ---- Types ----------------------------------------------------------------------------------------------------------

logger = get_logger(__name__)
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
    """The networks of a run, their optimizer and learning-rate schedule."""

    tokenizer: CLIPTokenizer
    text_encoder: nn.Module  # frozen, in the run's precision; or like the UNet with --train_text_encoder
    vae: AutoencoderKL  # frozen, in the run's precision
    unet: nn.Module  # trainable, in --weight_dtype
    scheduler_config: dict  # of the noise schedule, with the flags applied
    trained: tuple[str, ...]  # names of the trainable networks: unet, perhaps text_encoder
    clip_skip: int | None = None  # layers before the last whose text states are used, with --clip_skip
    prompts: list[dict] | None = None  # the states of those to draw, with --cache_text_embeddings
    ema: EmaWeights | None = None
    wrapped: Models | None = None  # as accelerate wraps them for training; it and the next two: of `prepare_training`
    optimizer: torch.optim.Optimizer | None = None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None


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
    """Return the loss of each sample [b], in float32, from latents [b, c, h, w] and the UNet's other inputs.

    Nothing here is random: `draws` holds `timesteps` [b], `noise` [b, c, h, w] and what `list_extra_noises` names.
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
    alpha, sigma = objective.alpha[timesteps].view(-1, 1, 1, 1), objective.sigma[timesteps].view(-1, 1, 1, 1)
    noisy_latents = alpha * latents + sigma * input_noise
    target = compute_target(latents, noise, alpha, sigma, objective.prediction_type)

    # DREAM moves input and target by the UNet's own error (Zhou et al. 2023, arXiv:2312.00210, eq. 8):
    # delta = sigma_t^p (e - UNet(z_t)), with the detail preservation p
    if args.dream_training:
        with torch.no_grad():
            estimate = unet(noisy_latents, timesteps, **conditions, return_dict=False)[0].float()
        delta = sigma**args.dream_detail_preservation * (target - estimate)
        noisy_latents, target = noisy_latents + sigma * delta, target + delta

    # loss = w_t ||UNet(z_t, t, text) - target||^2 / number of latent values
    model_pred = unet(noisy_latents, timesteps, **conditions, return_dict=False)[0]
    loss = F.mse_loss(model_pred.float(), target, reduction="none").mean(dim=(1, 2, 3))
    if args.snr_gamma:
        loss = loss * compute_snr_weights(alpha.flatten(), sigma.flatten(), args.snr_gamma, objective.prediction_type)
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
    """Return what the UNet should predict [b, c, h, w]; v as in Salimans & Ho 2022, arXiv:2202.00512."""
    if prediction_type == "epsilon":
        return noise
    return alpha * noise - sigma * latents if prediction_type == "v_prediction" else latents


def compute_snr_weights(alpha: Tensor, sigma: Tensor, snr_gamma: float, prediction_type: str) -> Tensor:
    """Return Min-SNR loss weights [b] (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    With snr = alpha^2 / sigma^2: min(snr, gamma) / snr for epsilon, / (snr + 1) for v_prediction, / 1 for sample. Ours
    is 1 where snr is 0, the end of a rescaled schedule: the formula gives 0/0 or never trains the first sampling step.
    """
    snr = (alpha / sigma) ** 2
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
    return torch.where(snr > 0, snr.clamp(max=snr_gamma) / divisor, 1.0)


def compute_timestep_cdf(args: Namespace, num_timesteps: int) -> np.ndarray:
    """Return the cumulative probability of each timestep [num_timesteps], uniform without --timestep_bias_strategy."""
    weights = np.ones(num_timesteps)
    count = max(1, int(args.timestep_bias_portion * num_timesteps))
    biased = {"none": slice(0), "earlier": slice(count), "later": slice(num_timesteps - count, None),
              "range": slice(args.timestep_bias_begin, args.timestep_bias_end)}[args.timestep_bias_strategy]
    weights[biased] *= args.timestep_bias_multiplier
    cumulative = weights.cumsum()
    return cumulative / cumulative[-1]


def make_objective(args: Namespace, scheduler_config: dict, device: torch.device) -> Objective:
    alphas_cumprod = DDPMScheduler.from_config(scheduler_config).alphas_cumprod.to(device)
    return Objective(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), scheduler_config["prediction_type"], args)


# ---- Data -----------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items()
                  if name in Image.OPEN and name not in ("HDF5", "MPEG")}  # which Pillow knows and cannot decode
LARGEST_ASPECT = 4  # longer side over shorter, of a bucket: as SDXL's own sizes (Podell et al. 2023, appendix I)
INTERPOLATION_MODES = {mode.name.lower(): mode for mode in TVF.InterpolationMode}
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
    resized = TVF.resize(image, sides, INTERPOLATION_MODES[args.image_interpolation_mode])
    if flip:
        resized = TVF.horizontal_flip(resized)
    room = np.array([resized.height, resized.width]) - size
    top, left = (np.round(room / 2) if args.center_crop else corner * (room + 1)).astype(int).tolist()
    return {"images": np.stack(TVF.crop(resized, top, left, height, width).split()),
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


def collate(samples: list[dict], tokenizers: list[CLIPTokenizer]) -> dict[str, Tensor]:
    """Return samples as one batch; for captions that are not cached `input_ids` [b, s], for a second tokenizer _2."""
    captions = [sample.pop("caption") for sample in samples if "caption" in sample]
    # by numpy: torch would start threads of its own here, which get in the way of those that train
    batch = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
    if captions:
        for name, tokenizer in zip(("input_ids", "input_ids_2"), tokenizers, strict=False):
            batch[name] = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        batch["num_long"] = batch["input_ids"][:, -2] != tokenizers[0].pad_token_id  # perhaps truncated
    return batch


def make_dataloader(samples: Samples, steps, models: Models, num_workers: int, accelerator: Accelerator):
    """Yield each micro step with this process's batch; loader processes start at the first, in the caller's thread."""
    steps, planned = itertools.tee(steps)
    tokenizers = copy.deepcopy(list_tokenizers(models))  # one must not serve two threads, and validation uses these
    loader = iter(DataLoader(
        samples, batch_sampler=share_samples(planned, accelerator.process_index, accelerator.num_processes),
        num_workers=num_workers, collate_fn=partial(collate, tokenizers=tokenizers),
        pin_memory=accelerator.device.type == "cuda", worker_init_fn=ignore_stop_signals,
        generator=torch.Generator()))  # its own, to leave the global one alone
    try:
        yield from zip(steps, loader, strict=True)
    finally:
        if num_workers:
            loader._shutdown_workers()  # which otherwise waits for the last reference to go


def ignore_stop_signals(worker_id: int):
    """Leave the signals that reach a whole process group to the training process, which ends its loaders by itself."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


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


def train_step(accelerator: Accelerator, models: Models, objective: Objective, batch: dict[str, Tensor],
               step: MicroStep) -> dict:
    """Add the gradients of a micro step, each sample of the update counting the same; return its share of numbers."""
    for network in list_trained(models):
        network.require_backward_grad_sync = step.ends_update  # DDP averages once per update; no_sync() does just this
    losses = compute_loss(models.unet, objective, *encode_batch(models, batch), batch)
    loss = (losses * batch["weights"]).sum() / step.window_size  # next: times what DDP and accelerate divide by
    accelerator.backward(loss * accelerator.num_processes * accelerator.gradient_accumulation_steps)
    return {"train_loss": loss.detach()}


def train(args: Namespace, accelerator: Accelerator, models: Models, objective: Objective, data: Data,
          progress: Progress, record: dict) -> int:
    """Train until the last update, advancing `progress`; return the signal that stopped the run early, or 0."""
    last_step = compute_last_step(args, data.train, accelerator.num_processes)
    if progress.global_step > last_step:
        logger.warning(f"update {progress.global_step} is beyond --max_train_steps {last_step}: taking one more")
        last_step = progress.global_step + 1
    steps = plan_micro_steps(data.train, progress, last_step - progress.global_step,
                             args.train_batch_size * accelerator.num_processes, args.gradient_accumulation_steps)
    loader = make_dataloader(data.train, steps, models, args.dataloader_num_workers, accelerator)
    parameters = name_trained_parameters(models).values()
    meter, signal_number = Meter(args, accelerator, progress.global_step, last_step), 0

    ahead = contextlib.closing(iterate_ahead(loader))
    with StopRequest(accelerator) as stop_request, logging_redirect_tqdm(), ahead as batches:
        for step, batch in meter.time_waits(batches):
            # `sources`, the numbers of the images, stay in host memory: reading them would wait for the device
            batch = send_to_device(batch, accelerator.device, non_blocking=True, skip_keys="sources")
            meter.add(step, batch, train_step(accelerator, models.wrapped, objective, batch, step))
            if not step.ends_update:
                continue
            numbers = {"epoch": step.epoch, "lr": models.lr_scheduler.get_last_lr()[0],
                       "grad_norm": accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)}
            models.optimizer.step()
            models.optimizer.zero_grad()
            # in fp16 an update that overflows is skipped, by fused AdamW on the device: only the norm shows it
            is_done = not accelerator.scaler or math.isfinite(numbers["grad_norm"])
            if is_done:
                models.lr_scheduler.step()
            if is_done and models.ema:
                numbers["ema_decay"] = models.ema.step()
            progress.global_step += 1
            progress.epoch, progress.samples_seen = step.epoch, step.last
            meter.end_update(progress.global_step, numbers)

            signal_number = stop_request.agreed()
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
                validate(args, accelerator, models, objective, data, progress)
    Path(args.output_dir, PROBE).unlink(missing_ok=True)
    return signal_number


def encode_batch(models: Models, batch: dict) -> tuple[Tensor, dict]:
    """Return latents [b, c, h, w] in float32, drawn anew at each use, and the UNet's other inputs.

    Both come from the caches where the batch brings them: as `moments` and `encoder_hidden_states` [b, s, d].
    """
    moments = batch["moments"] if "moments" in batch else encode_images(models.vae, batch["images"])
    mean, std = moments.float().chunk(2, dim=1)
    latents = (mean + std * batch["posterior_noise"]) * models.vae.config.scaling_factor
    if "encoder_hidden_states" in batch:
        return latents, {"encoder_hidden_states": batch["encoder_hidden_states"].float()}
    return latents, encode_captions(models, batch)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return the moments [b, 2c, h, w] of uint8 images [b, 3, H, W]: mean and standard deviation of their latents."""
    moments = []
    for part in images.split(max(1, ENCODED_PIXELS // images[0, 0].numel())):
        posterior = vae.encode((part.to(vae.device).float() / 127.5 - 1).to(vae.dtype)).latent_dist  # of [-1, 1]
        moments.append(torch.cat([posterior.mean, posterior.std], dim=1).float())
    return torch.cat(moments)


def encode_captions(models: Models, batch: dict) -> dict[str, Tensor]:
    """Return the text encoder's last states [b, s, d], or with --clip_skip earlier ones after the final norm."""
    output = models.text_encoder(batch["input_ids"], output_hidden_states=True)  # for --clip_skip
    if not models.clip_skip:
        return {"encoder_hidden_states": output.last_hidden_state}
    (norm,) = (module for name, module in models.text_encoder.named_modules() if name.endswith("final_layer_norm"))
    return {"encoder_hidden_states": norm(output.hidden_states[-models.clip_skip - 1])}


# ---- Arguments ------------------------------------------------------------------------------------------------------

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "mlflow", "aim", "clearml", "dvclive", "swanlab", "trackio", "all")
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
        description="Fine-tune the whole UNet of Stable Diffusion 1.x or 2.x on captioned images.",
        usage="accelerate launch %(prog)s --pretrained_model_name_or_path MODEL --train_data_dir FOLDER [flags]",
        formatter_class=ArgumentDefaultsHelpFormatter)
    add_flags(parser)
    parser.set_defaults(output_dir="sd-model-finetuned", resolution=512, validation_epochs=5)
    args = read_args(parser, argv)
    args.non_ema_revision = args.non_ema_revision or args.revision
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    num_processes = int(os.environ.get("WORLD_SIZE", 1))  # which every launcher sets
    check_args(
        parser, args,
        *((args.use_8bit_adam and getattr(args, flag), f"--use_8bit_adam excludes --{flag}: drop one of them.")
          for flag in ("use_adafactor", "channels_last")),  # which it undoes
        (precision == "fp16" and not torch.accelerator.is_available(),
         "--mixed_precision fp16 needs a GPU, and there is none here: use bf16 or no."),
        (args.optimizer_in_backward
         and (args.gradient_accumulation_steps > 1 or args.max_grad_norm or args.torch_compile or precision == "fp16"
              or num_processes > 1 and not args.fsdp),
         "--optimizer_in_backward uses each gradient at once, before it is summed, averaged, unscaled or clipped: it "
         "needs one process or --fsdp, and --mixed_precision bf16 or no, with --gradient_accumulation_steps 1, "
         "--max_grad_norm 0 and no --torch_compile."),
        (args.weight_dtype == "bf16"
         and (not args.optimizer_in_backward or precision != "bf16" or args.use_ema or args.fsdp),
         "--weight_dtype bf16 needs --optimizer_in_backward and --mixed_precision bf16, and no --use_ema or --fsdp."),
        (args.fsdp and (num_processes == 1 or torch.__version__ < (2, 11)),  # older: losses slightly off
         "--fsdp needs torch 2.11 and several processes: add --multi_gpu to `accelerate launch`, or drop --fsdp."),
        *((args.fsdp and getattr(args, flag), f"--fsdp excludes --{flag}: drop one of them.")
          for flag in ("use_8bit_adam", "use_adafactor", "channels_last")),
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
    add("--non_ema_revision", "Revision of the UNet, if not --revision; EMA weights then start from --revision.")
    add("--variant", "Weight files to load: fp16 loads *.fp16.safetensors.")
    add("--cache_dir", "Folder for downloaded models and data sets.")
    add("--single_file_config", "Folder or hub name of a model whose configurations and tokenizers go with a model in "
        "one .safetensors file. If not given: diffusers' own choice.")
    add("--clip_skip", "Use the text states of this many layers earlier, as diffusers' clip_skip.", type=positive_int)
    switch("--train_text_encoder", "Train the text encoder (SDXL: both) with the UNet.")

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
    add("--dataloader_num_workers", "Processes that load data; 0: threads. "
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

    group = parser.add_argument_group("precision and memory")
    add("--mixed_precision", "Number format of the forward pass and the frozen networks. If not given: "
        "accelerate's setting.", choices=("no", "fp16", "bf16"))
    switch("--allow_tf32", "Multiply float32 matrices in TF32: faster, slightly less exact.")
    switch("--gradient_checkpointing", "Recompute activations to save memory, slower.")
    switch("--use_8bit_adam", "Use AdamW with 8-bit moments (bitsandbytes).")
    switch("--use_adafactor", "Use Adafactor (arXiv:1804.04235): less memory than AdamW.")
    switch("--optimizer_in_backward", "Update in the backward pass, without keeping gradients.")
    add("--weight_dtype", "Format of the trained weights; bf16, with updates rounded up or down at random, "
        "halves their memory.", default="fp32", choices=("fp32", "bf16"))
    switch("--fsdp", "Shard weights, EMA weights and Adam's moments over the devices: less memory on each.")
    switch("--offload_ema", "Keep the EMA weights in host memory.")
    switch("--foreach_ema", "For old commands: EMA weights are always updated in one call.")
    switch("--enable_xformers_memory_efficient_attention", "Use xformers' attention.")
    switch("--enable_npu_flash_attention", "Use flash attention of Ascend NPUs (torch_npu).")
    switch("--vae_tiling", f"VAE in tiles above {VAE_TILE} pixels: less memory, faint seams.")
    switch("--torch_compile", "Compile the UNet: minutes at the start, faster steps after.")
    switch("--channels_last", "Channels-last UNet weights: faster in half precision.")
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

LONGEST_WAIT = timedelta(hours=2)  # of one process for another, for example while it downloads the data
LONGEST_PAUSE = timedelta(minutes=30)  # the same while training, for example while it writes a checkpoint
set_timeout = getattr(dist, "set_timeout", lambda timeout: None)  # which older releases of torch lack
# SLURM sends SIGUSR1 if told so by --signal=USR1@SECONDS; Windows has none
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)}


def make_accelerator(args: Namespace) -> Accelerator:
    """Return the accelerator; libraries log warnings only."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, project_dir=os.path.join(args.output_dir, args.logging_dir),
        log_with=None if args.report_to == "none" else args.report_to.split(","),
        step_scheduler_with_optimizer=False,  # the schedule counts updates, not updates times processes
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT),
                         DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of gradients
                         AutocastKwargs(cache_enabled=False)],  # nor of weights: a pass uses each only once
    )
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
        raise UserError(f"accelerate's settings for {accelerator.distributed_type.value} are not supported: use "
                        "--multi_gpu and, to divide a model that is trained whole, the script's own --fsdp.")
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


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
    set_seed(seed % 2**31, device_specific=True)  # adapters start from the global generators, and dropout uses them
    flags = dict(vars(args))
    del flags["hub_token"]
    accelerator.init_trackers(args.tracker_project_name, {
        key: str(value) if isinstance(value, list) else value for key, value in flags.items()})
    return {"seed": seed, "num_processes": accelerator.num_processes, "precision": accelerator.mixed_precision,
            "captions_digest": make_key(images.captions[:]), "flags": flags}


def log_run_header(args: Namespace, accelerator: Accelerator, models: Models, samples: Samples, seed: int,
                   checkpoint: Path | None):
    logger.info(f"training {' and '.join(models.trained)} on {len(samples):,} samples at {args.resolution} px for "
                f"{compute_last_step(args, samples, accelerator.num_processes):,} updates of "
                f"{compute_total_batch_size(args, accelerator.num_processes)}: "
                f"{args.train_batch_size} per device x {args.gradient_accumulation_steps} accumulation steps x "
                f"{accelerator.num_processes} processes on {accelerator.device}")
    logger.info(f"seed {seed}, precision {accelerator.mixed_precision}, {models.scheduler_config['prediction_type']} "
                f"prediction, output in {args.output_dir}, starting from {checkpoint or 'the base model'}")


class StopRequest:
    """On SIGTERM, SIGUSR1 (SLURM, before the time limit) or the first Ctrl-C, all processes save and stop."""

    def __init__(self, accelerator: Accelerator):
        self.signal_number, self.previous, self.group = 0, {}, None
        if accelerator.num_processes > 1:  # not NCCL, which would wait for the GPU
            self.group = dist.new_group(timeout=LONGEST_PAUSE, backend="gloo")
            set_timeout(LONGEST_PAUSE)  # of the default group

    def __enter__(self):
        try:
            self.previous = {number: signal.signal(number, self.receive) for number in STOP_SIGNALS}
        except ValueError:  # Python allows no handlers outside the main thread
            logger.warning("not in the main thread: signals do not save and stop this run")
        return self

    def __exit__(self, kind, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.group:
            set_timeout(LONGEST_WAIT)
            if kind:
                logger.error("training failed. If the error below is about a connection or a timeout, another process "
                             "has ended, or hangs: see its log. End it, and start all again with "
                             "--resume_from_checkpoint latest.", main_process_only=False)

    def receive(self, number: int, frame):
        """Note the signal; a second one of the same kind ends the process at once, even while it waits for another."""
        self.signal_number = number
        signal.signal(number, signal.SIG_DFL)
        logger.warning("stop requested: finishing this update and saving a checkpoint; ask again to stop at once")

    def agreed(self) -> int:
        """Return the signal that some process has received, or 0; the same on every process. Call once per update."""
        number = torch.tensor(self.signal_number)
        if self.group:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        return int(number)


# ---- Models ---------------------------------------------------------------------------------------------------------

PIPELINE = StableDiffusionPipeline
TOKENIZERS = ("tokenizer",)
TEXT_ENCODERS = {"text_encoder": CLIPTextModel}
NETWORK_CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, **TEXT_ENCODERS}
HALF_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # by --mixed_precision
VAE_SCALE = 0.18215  # the scaling_factor that the UNets of this kind were trained with
SHARDED_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")  # with --fsdp gathered one by one
VAE_TILE = 512  # pixels on a side, with --vae_tiling
ADDITION_EMBED_TYPE = None  # of the UNet: tells this kind of model from the other
# Settings that must be unset: they ask for inputs or noise that training lacks, or scale latents as it does not.
UNSUPPORTED_SETTINGS = {
    "unet": ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim"),
    "vae": ("shift_factor", "latents_mean", "latents_std"), "scheduler": ("use_flow_sigmas",)}


def load_model_configs(args: Namespace) -> dict[str, dict]:
    """Return tokenizers and configurations; refuse a model that cannot be trained, before any weights are read."""
    configs = {}
    for part in ("unet", "vae", "scheduler", *TEXT_ENCODERS):
        with explained_load(args, part):
            where, files = locate_part(args, part)
            kind = DDPMScheduler if part == "scheduler" else UNet2DConditionModel  # which reads any config.json
            configs[part] = kind.load_config(where, **files)
            addition = configs["unet"].get("addition_embed_type")
            if addition != ADDITION_EMBED_TYPE:
                raise UserError(f"it has addition_embed_type {addition}: this script trains {MODEL_KIND} models. "
                                "Scripts for SDXL have sdxl in their names.")
            if part == "scheduler":  # what diffusers lacks would only fail at the export
                getattr(diffusers, configs[part].get("_class_name", "DDPMScheduler")).from_config(configs[part])
    for part, tokenizer in zip(TEXT_ENCODERS, TOKENIZERS, strict=True):
        with explained_load(args, tokenizer):
            configs[tokenizer] = load_tokenizer(args, tokenizer, configs[part])
    check_model_configs(args, configs)
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
    """Return the folder, or name on the hub, of the base model; one in a single file is converted once, and cached."""
    file = Path(args.pretrained_model_name_or_path)
    if not file.is_file():
        return args.pretrained_model_name_or_path
    key = make_key(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns, args.single_file_config)
    folder = Path(args.cache_dir or huggingface_hub.constants.HF_HOME, "converted", f"{file.stem}-{key}")
    if folder.is_dir():
        return str(folder)
    logger.info(f"converting {file} to {folder}, once")
    try:
        with safe_open(file, framework="pt") as weights:
            names = weights.keys()
        pipeline = PIPELINE.from_single_file(str(file), config=args.single_file_config, cache_dir=args.cache_dir)
        if "v_pred" in names:  # a file says it so, as it has no configuration
            pipeline.scheduler.register_to_config(prediction_type="v_prediction",
                                                  rescale_betas_zero_snr="ztsnr" in names)
        aside = folder.with_name(f".partial-{os.getpid()}-{folder.name}")
        pipeline.save_pretrained(aside)
        remove(aside) if folder.is_dir() else replace_folder(aside, folder)  # another run may be reading it
    except Exception as error:  # of several libraries
        raise UserError(f"{error} Is it a {MODEL_KIND} model? Only .safetensors are read. What else it needs "
                        "comes from the hub, or from the model folder that --single_file_config names.") from error
    return str(folder)


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


def load_network(args: Namespace, part: str, dtype: torch.dtype) -> nn.Module:
    """Load a network, frozen; refuse files that lack weights, in whose place libraries put random values."""
    (where, files), failures = locate_part(args, part), []
    own = args.variant if "subfolder" in files else None  # --variant is not for a VAE named separately
    with explained_load(args, part):
        for variant in (own, None, "fp16"):  # not every part has files of --variant
            try:
                network, report = NETWORK_CLASSES[part].from_pretrained(
                    where, **files, variant=variant, dtype=dtype, output_loading_info=True)
            except OSError as error:
                failures.append(error)
                continue
            missing = report["missing_keys"]
            if missing:
                raise OSError(f"the weights lack {min(missing)} ({len(missing)} tensors in all).")
            return network.requires_grad_(False)
        raise failures[0]


def load_parts(args: Namespace, accelerator: Accelerator, configs: dict[str, dict], in_float32: tuple = ()) -> dict:
    """Return tokenizers and frozen networks, these in the run's precision or, if named, in float32."""
    parts = {part: configs[part] for part in TOKENIZERS}
    for part in NETWORK_CLASSES:
        precision = "no" if part in in_float32 else accelerator.mixed_precision
        parts[part] = load_network(args, part, HALF_DTYPES.get(precision, torch.float32))
    vae = parts["vae"]
    if accelerator.device.type == "cpu":
        vae.to(memory_format=torch.channels_last)  # encodes 10% faster; GPUs would only take more memory
    if args.vae_tiling:
        vae.enable_tiling()
        vae.tile_sample_min_size = min(VAE_TILE, vae.tile_sample_min_size)
        vae.tile_latent_min_size = vae.tile_sample_min_size // compute_vae_factor(vae.config)
    return parts


def load_models(args: Namespace, accelerator: Accelerator, configs: dict[str, dict]) -> Models:
    """Load the networks: trainable ones in --weight_dtype, frozen ones in the run's precision."""
    trained = ("unet", "text_encoder") if args.train_text_encoder else ("unet",)
    parts = load_parts(args, accelerator, configs, trained * (args.weight_dtype == "fp32"))
    models = Models(**parts, trained=trained, clip_skip=args.clip_skip,
                    scheduler_config=make_scheduler_config(args, configs["scheduler"]))
    for network in list_trained(models):
        network.requires_grad_(True)
    freeze_unused_layers(models.text_encoder, args.clip_skip or 0)
    return models


def set_up_networks(args: Namespace, models: Models):
    for network in list_trained(models):
        network.train()
        for module in network.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.forward = partial(normalize, module)
        if args.gradient_checkpointing:
            if isinstance(network, UNet2DConditionModel):
                network.enable_gradient_checkpointing()
            else:
                network.gradient_checkpointing_enable({"use_reentrant": False})
    if args.enable_xformers_memory_efficient_attention:
        models.unet.enable_xformers_memory_efficient_attention()
    if args.enable_npu_flash_attention:
        models.unet.enable_npu_flash_attention()
    if args.channels_last:
        models.unet.to(memory_format=torch.channels_last)
    if args.torch_compile and not getattr(args, "fsdp", False):  # which compiles block by block
        models.unet.compile()  # in place, so that names and files stay those of the plain network


def normalize(norm, values):
    """Return a group or layer norm in its input's format, where CUDA's autocast would go to float32 and stay there."""
    weights = norm.weight.to(values), norm.bias.to(values)
    with torch.autocast(values.device.type, enabled=False):  # its kernels take the statistics in float32 anyway
        if isinstance(norm, nn.GroupNorm):
            return F.group_norm(values, norm.num_groups, *weights, norm.eps)
        return F.layer_norm(values, norm.normalized_shape, *weights, norm.eps)


def shard_networks(args: Namespace, accelerator: Accelerator, models: Models):
    """With --fsdp, divide the trainable networks among the processes, by torch's FSDP2, in place.

    Blocks are gathered one at a time, in the precision of the forward pass; gradients are summed in float32. Nothing
    stays gathered after a pass, or `EmaWeights.swap` would leave the next pass with the weights from before.
    """
    if not args.fsdp:
        return
    mesh = dist.DeviceMesh.from_group(dist.group.WORLD, accelerator.device.type)  # a new group waits for all
    policy = MixedPrecisionPolicy(param_dtype=HALF_DTYPES.get(accelerator.mixed_precision), cast_forward_inputs=False,
                                  reduce_dtype=torch.float32)
    if args.torch_compile:
        models.unet.compile_repeated_blocks()  # found by their classes' names, which sharding changes
    for network in list_trained(models):
        kind = type(network)
        for module in [part for name, part in network.named_modules() if type(part).__name__ in SHARDED_BLOCKS
                       or name.endswith("final_layer_norm")] + [network]:  # which --clip_skip calls by itself
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        functools.update_wrapper(type(network), kind, updated=())  # FSDP2's new class: files and transformers name it
        accelerator.prepare_model(network, device_placement=False, evaluation_mode=True)  # adds autocast only
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # gives back the memory of whole weights, which glibc would keep


def shard_optimizer(args: Namespace, models: Models):
    """With --fsdp, have checkpoints hold whole moments, so that they resume on any number of processes."""
    optimizer = models.optimizer.optimizer
    parameters = list(name_trained_parameters(models).values())

    def state_dict():
        state = optimizer.state_dict()
        return state | {"state": {key: gather(moments) for key, moments in state["state"].items()}}

    def load_state_dict(state):
        for key, moments in state["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = shard_like(parameters[key], moments[name])
        optimizer.load_state_dict(state)

    if args.fsdp:  # accelerate saves and loads through its wrapper
        models.optimizer.state_dict, models.optimizer.load_state_dict = state_dict, load_state_dict


def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors, in host memory of the main process, elsewhere empty; all processes have to call this."""
    place = "meta" if dist.get_rank() else "cpu"
    return {name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to(place)
            for name, tensor in tensors.items()}


@contextlib.contextmanager
def whole_weights(models: Models):
    """Let the main process save sharded networks whole; all processes have to call this."""
    sharded = [network for network in list_trained(models) if isinstance(network, FSDPModule)]
    for network in sharded:
        network.state_dict = partial(dict, gather(network.state_dict()))
    yield
    for network in sharded:
        del network.state_dict


def shard_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """Return `whole` divided among the processes as `parameter` is, if it is."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)  # without sending


def freeze_unused_layers(text_encoder: nn.Module, num_unused: int, *others: str):
    """Freeze the last layers and `others`, whose output is not used and which get no gradient."""
    num_layers = text_encoder.config.num_hidden_layers
    unused = [f".layers.{number}" for number in range(num_layers - num_unused, num_layers)]
    for name, module in text_encoder.named_modules():
        if name.endswith((*unused, *others)):
            module.requires_grad_(False)


def list_tokenizers(models: Models) -> list[CLIPTokenizer]:
    return [getattr(models, name) for name in TOKENIZERS]


def list_trained(models: Models) -> list[nn.Module]:
    return [getattr(models, part) for part in models.trained]


def name_trained_parameters(models: Models) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by names such as unet.conv_in.weight, `text_model.` left out in any version."""
    return {f"{part}.{name.removeprefix('text_model.')}": parameter for part in models.trained
            for name, parameter in getattr(models, part).named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def encoders_on_device(args: Namespace, accelerator: Accelerator, models: Models):
    """Move the frozen encoders that are needed to the device, and back if their outputs are cached."""
    needs_texts = models.prompts is None or args.validation_data_dir  # else the prompts are encoded already
    text_encoders = [getattr(models, part) for part in TEXT_ENCODERS if needs_texts and part not in models.trained]
    try:
        for network in (models.vae, *text_encoders):
            network.to(accelerator.device)
        yield
    finally:
        for network in [models.vae] * args.cache_latents + text_encoders * args.cache_text_embeddings:
            network.to("cpu")
        clear_device_cache()


# ---- Cache ----------------------------------------------------------------------------------------------------------

FILE_SIZE, LEAST_FILES = 16 * 2**20, 16  # of a cache: bytes in a file, whose images are in memory at once
ENCODED_PIXELS = 2**20  # in a batch of the VAE: one image of 1024 px, four of 512
CACHE_DTYPES = {"fp16": "f2", "fp32": "f4"}  # for numpy
OPENING = threading.Lock()  # numpy reads headers by `ast`, which threads may not share before Python 3.11.8 and 3.12.2


@torch.no_grad()
def cache_encodings(args: Namespace, accelerator: Accelerator, models: Models, samples: Samples):
    """Encode images and captions once, as the flags say, and put the networks where training needs them."""
    with encoders_on_device(args, accelerator, models):
        if args.cache_latents:
            samples.latents = cache_latents(args, accelerator, models.vae, samples)
        if args.cache_text_embeddings:
            samples.text_states = cache_text_states(args, accelerator, models, samples)
            models.prompts = encode_prompts(args, accelerator, make_pipeline(models))


def cache_latents(args: Namespace, accelerator: Accelerator, vae: AutoencoderKL, samples: Samples) -> EncodedRows:
    """Return a row per variant of each image: the VAE's moments, flat, time_ids, and the image it is of."""
    size = 2 * max(math.prod(shape) for shape in samples.latent_shapes)  # of moments; smaller ones are padded
    row = np.dtype([("moments", CACHE_DTYPES[args.cache_dtype], (size,)), ("time_ids", "f4", (6,)), ("sources", "i8")])
    key = make_key(digest_images(accelerator, samples), args.image_interpolation_mode, args.center_crop,
                   digest_network(vae), args.vae_tiling, row, samples.sizes, samples.num_flips)

    def encode(items):
        variants = list(itertools.chain(*items))
        crops = [(variant["images"].shape, variant["images"].tobytes()) for variant in variants]
        encoded = {}  # by crop: square images have one, many times
        for shape in {shape for shape, _ in crops}:
            distinct = {crop: variant["images"] for crop, variant in zip(crops, variants, strict=True)
                        if crop[0] == shape}
            moments = encode_images(vae, torch.from_numpy(np.stack(list(distinct.values())))).flatten(1).cpu()
            encoded |= zip(distinct, F.pad(moments, (0, size - moments.shape[1])).numpy(), strict=True)
        return {"moments": [encoded[crop] for crop in crops]} | {
            name: [variant[name] for variant in variants] for name in ("time_ids", "sources")}

    rows = EncodedRows(args, f"images-{key}", row, len(samples), samples.num_crops * samples.num_flips)
    rows.fill(accelerator, partial(map_in_threads, samples.make_variants), encode)
    return rows


def cache_text_states(args: Namespace, accelerator: Accelerator, models: Models, samples: Samples) -> EncodedRows:
    """Return the text states of the empty caption and every distinct one, whose rows are `samples.caption_rows`."""
    captions = sorted({"", *(caption for row in samples.rows for caption in samples.data.captions[row])})
    samples.caption_rows = {caption: row for row, caption in enumerate(captions)}
    empty = encode_texts(models, [""])  # which SDXL may want to be zeros
    row = np.dtype([(name, CACHE_DTYPES[args.cache_dtype] if values.dtype == np.float32 else values.dtype,
                     values.shape[1:]) for name, values in empty.items()])
    key = make_key(captions, bool(empty["encoder_hidden_states"].any()), row, models.clip_skip,
                   [tokenizer.pad_token_id for tokenizer in list_tokenizers(models)],
                   [digest_network(getattr(models, part)) for part in TEXT_ENCODERS])
    rows = EncodedRows(args, f"captions-{key}", row, len(captions))
    rows.fill(accelerator, lambda items: [captions[item] for item in items], partial(encode_texts, models))
    return rows


def encode_texts(models: Models, captions: list[str]) -> dict[str, np.ndarray]:
    """Return what `encode_captions` returns, in float32, and `num_long`: whether each caption fills all tokens."""
    batch = collate([{"caption": caption} for caption in captions], list_tokenizers(models))
    states = encode_captions(models, send_to_device(batch, models.text_encoder.device))
    return {name: states[name].float().cpu().numpy() for name in states} | {"num_long": batch["num_long"].numpy()}


def encode_prompts(args: Namespace, accelerator: Accelerator, pipeline) -> list[dict[str, Tensor]]:
    """Return for each prompt to draw what a call of the pipeline takes in its place."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return [dict(zip(names, pipeline.encode_prompt(
        prompt, device=accelerator.device, num_images_per_prompt=1, do_classifier_free_guidance=True,
        clip_skip=args.clip_skip), strict=False)) for prompt in args.validation_prompts]


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


def digest_network(network: nn.Module) -> str:
    """Hash a network's layers and weights, wherever they were loaded from."""
    digest = hashlib.blake2b(repr(network).encode(), digest_size=12)
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- Optimization ---------------------------------------------------------------------------------------------------


def prepare_training(args: Namespace, accelerator: Accelerator, models: Models, samples: Samples):
    """Make optimizer, learning-rate schedule and EMA weights, and wrap the trainable networks for the devices."""
    set_up_networks(args, models)
    models.wrapped = dataclasses.replace(models, **{
        part: accelerator.prepare(getattr(models, part)) for part in models.trained})
    accelerator.free_memory()  # forgets the networks, whose files `save_state` and `resume` take care of
    optimizer = make_optimizer(args, make_parameter_groups(args, accelerator, models))
    lr_scheduler = make_lr_scheduler(args, optimizer, compute_last_step(args, samples, accelerator.num_processes))
    models.optimizer, models.lr_scheduler = accelerator.prepare(optimizer, lr_scheduler)
    if args.use_ema:  # only now: wrapping has made the weights the same on all processes
        models.ema = make_ema(args, models)


def make_parameter_groups(args: Namespace, accelerator: Accelerator, models: Models) -> list[dict]:
    return [{"params": [parameter for parameter in getattr(models, part).parameters() if parameter.requires_grad],
             "weight_decay": args.adam_weight_decay,
             "lr": compute_learning_rate(args, part, accelerator.num_processes)} for part in models.trained]


class Adafactor(transformers.optimization.Adafactor):
    """Adafactor that factors a convolution as a matrix [out, in x 3 x 3]; on its own it factors each 3 x 3."""

    def step(self, closure=None):
        kernels = [(parameter, parameter.data) for group in self.param_groups for parameter in group["params"]
                   if parameter.ndim == 4 and parameter.grad is not None]
        for kernel, whole in kernels:
            size = whole[0].numel()  # of a row, as it lies in memory: any order of columns will do
            kernel.data, kernel.grad = (data.as_strided((len(data), size), (size, 1)) for data in (whole, kernel.grad))
        super().step(closure)
        for kernel, whole in kernels:
            kernel.data = whole


def make_optimizer(args: Namespace, groups: list[dict]):
    lr = groups[0]["lr"]  # of the UNet: polynomial schedules read it
    if args.use_adafactor:  # with plain learning rates: scaled by the size of the weights, adapters would stay at 0
        return Adafactor(groups, lr, scale_parameter=False, relative_step=False)
    settings = groups, lr, (args.adam_beta1, args.adam_beta2), args.adam_epsilon
    if args.use_8bit_adam:
        import bitsandbytes

        # it would wait for the device after each tensor, which only moments in paged memory (not ours) need
        bitsandbytes.optim.optimizer.sync_gpu = lambda tensor: None
        return bitsandbytes.optim.AdamW8bit(*settings)
    return torch.optim.AdamW(*settings, fused=not hasattr(torch, "npu"))  # where older releases lack it


def update_in_backward(args: Namespace, models: Models):
    """With --optimizer_in_backward, update each parameter when its gradient is complete, then free the gradient."""
    if not args.optimizer_in_backward:
        return
    optimizer = models.optimizer.optimizer

    def update(number, master, parameter):
        groups = optimizer.param_groups
        optimizer.param_groups = [groups[number] | {"params": [master]}]
        if master is not parameter:
            master.data, master.grad = parameter.float(), parameter.grad.float()
        optimizer.step()
        optimizer.param_groups = groups
        if master is not parameter:
            parameter.copy_(round_to_bf16(master))
            master.data, master.grad = master.new_empty(0), None
        parameter.grad = None

    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if parameter.dtype == torch.bfloat16:  # the optimizer sees another: float32 in its update, else empty
                group["params"][place] = nn.Parameter(parameter.new_empty(0, dtype=torch.float32))
            parameter.register_post_accumulate_grad_hook(partial(update, number, group["params"][place]))


def round_to_bf16(values: Tensor) -> Tensor:
    """Round float32 up or down at random, right on average: to nearest, small updates are lost (arXiv:2010.06192)."""
    noise = torch.randint_like(values, 2**16, dtype=torch.int32) * values.isfinite()  # in the bits that bf16 lacks
    return (values.view(torch.int32) + noise).bitwise_and(-(2**16)).view(torch.float32).bfloat16()


def compute_total_batch_size(args: Namespace, num_processes: int) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * num_processes


def compute_learning_rate(args: Namespace, part: str, num_processes: int) -> float:
    """Return the peak learning rate of a network, with --scale_lr times the samples in an update."""
    rate = args.learning_rate
    if part != "unet" and args.text_encoder_lr is not None:
        rate = args.text_encoder_lr
    return rate * (compute_total_batch_size(args, num_processes) if args.scale_lr else 1)


def make_lr_scheduler(args: Namespace, optimizer, last_step: int):
    return get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_cycles=args.lr_num_cycles,
        num_training_steps=max(last_step, args.lr_warmup_steps + 1), power=args.lr_power)  # a decay needs a length


def compute_last_step(args: Namespace, samples: Samples, num_processes: int) -> int:
    """Return the number of updates in the whole run: --max_train_steps, else --num_train_epochs of them."""
    updates_per_epoch = sum(math.ceil(count / compute_total_batch_size(args, num_processes))
                            for count in np.bincount(samples.buckets))
    return args.max_train_steps or args.num_train_epochs * updates_per_epoch


class EmaWeights:
    """Exponential moving average of the trainable weights, in float32: ema += (1 - decay_n) (weights - ema).

    decay_n is 0 at the first update, then n / (9 + n), at most `decay`: the ramp of diffusers' EMAModel, which reads
    these files. `min_decay` is a floor, for EMA weights that come with a model. `offload` keeps them in host memory;
    on a GPU, its copies run beside the next update's passes.
    """

    def __init__(self, parameters: list[Tensor], decay: float, offload: bool = False):
        self.parameters, self.decay, self.offload = parameters, decay, offload
        self.min_decay, self.num_updates = 0.0, 0
        self.stream = torch.cuda.Stream() if offload and torch.cuda.is_available() else None
        options = {"device": "cpu", "pin_memory": self.stream is not None} if offload else {}
        self.averages = [torch.empty_like(parameter, **options).copy_(parameter.detach()) for parameter in parameters]

    @torch.no_grad()
    def step(self) -> float:
        """Average in the weights of this update and return its decay."""
        self.num_updates += 1
        ramp = 0.0 if self.num_updates == 1 else self.num_updates / (9 + self.num_updates)
        decay = max(self.min_decay, min(self.decay, ramp))
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            if self.offload:
                for parameter, average in zip(self.parameters, self.averages, strict=True):
                    average.copy_(average.to(parameter.device, non_blocking=True).lerp_(parameter, 1 - decay),
                                  non_blocking=bool(self.stream))  # to pinned memory only
            else:
                torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
        return decay

    def join(self, *_):
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)

    @torch.no_grad()
    def swap(self):
        self.join()
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)

    def save_state(self, config: Path):
        """Add the number of updates and the settings to a config.json, as diffusers' EMAModel does."""
        state = {"decay": self.decay, "min_decay": self.min_decay, "optimization_step": self.num_updates,
                 "update_after_step": 0, "use_ema_warmup": False, "inv_gamma": 1.0, "power": 2 / 3}
        before = json.loads(config.read_text()) if config.is_file() else {}
        config.write_text(json.dumps(before | state, indent=2))


@contextlib.contextmanager
def averaged_weights(models: Models):
    """Put the EMA weights, if there are any, into the networks for a while."""
    swap = models.ema.swap if models.ema else lambda: None
    swap()
    try:
        yield
    finally:
        swap()


@torch.no_grad()
def make_ema(args: Namespace, models: Models) -> EmaWeights:
    """Return EMA weights: the trainable weights or, with --non_ema_revision, those at --revision."""
    parameters = name_trained_parameters(models)
    shards = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in parameters.values()]
    ema = EmaWeights(shards, args.ema_decay, args.offload_ema)
    models.optimizer.optimizer.register_step_pre_hook(ema.join)
    if args.non_ema_revision != args.revision:
        source_args = Namespace(**vars(args) | {"non_ema_revision": args.revision})
        ema.swap()
        for name, tensor in load_network(source_args, "unet", torch.float32).state_dict().items():
            parameters[f"unet.{name}"].copy_(shard_like(parameters[f"unet.{name}"], tensor))
        ema.swap()
        ema.min_decay = ema.decay  # the ramp would forget them
    return ema


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

RUN_RECORD = "run_record.json"  # in a checkpoint: progress, seed, flags, and digests of its files
PROBE = ".partial-probe"  # in --output_dir during a run: if it is missing, the disk was unmounted
EMA_FOLDER = "unet_ema"  # in a checkpoint: the EMA weights and, in config.json, the state of the average
# Flags that must not change on resume: they decide which tensors a checkpoint holds, and how they lie in memory.
FIXED_FLAGS = {"use_ema", "use_8bit_adam", "use_adafactor", "train_text_encoder", "channels_last", "weight_dtype"}
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


def save_trained(accelerator: Accelerator, models: Models, folder: Path, *, averaged: bool = False):
    """Write the trainable networks as model folders that diffusers loads: unet/, or unet_ema/ with EMA weights."""
    with whole_weights(models):
        if accelerator.is_main_process:
            for part in models.trained:
                getattr(models, part).save_pretrained(folder / f"{part}{'_ema' * averaged}")


@torch.no_grad()
def load_trained(models: Models, folder: Path, *, averaged: bool = False):
    weights = {f"{part}.{name.removeprefix('text_model.')}": tensor for part in models.trained
               for file in (folder / f"{part}{'_ema' * averaged}").glob("*.safetensors")
               for name, tensor in load_file(file).items()}
    for name, parameter in name_trained_parameters(models).items():
        parameter.copy_(shard_like(parameter, weights[name]))


def save_state(accelerator: Accelerator, models: Models, folder: Path):
    """Write networks and EMA weights as files that diffusers loads, and the rest of the state by accelerate."""
    accelerator.save_state(folder)
    save_trained(accelerator, models, folder)
    if models.ema:
        with averaged_weights(models):
            save_trained(accelerator, models, folder, averaged=True)
        if accelerator.is_main_process:
            models.ema.save_state(folder / EMA_FOLDER / "config.json")


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


def resume(accelerator: Accelerator, models: Models, checkpoint: Path) -> Progress:
    """Load a checkpoint and return its progress; learning rate and AdamW's settings are the command line's."""
    optimizer, schedule = models.optimizer.optimizer, models.lr_scheduler.scheduler
    settings, base_lrs, scaler = optimizer.state_dict()["param_groups"], schedule.base_lrs, accelerator.scaler
    record = load_run_record(checkpoint)
    try:
        if not (checkpoint / "scaler.pt").is_file():  # not of a run in fp16: the loss scale begins anew
            accelerator.scaler = None
        accelerator.load_state(checkpoint, map_location="cpu", load_kwargs={"mmap": True})
        accelerator.scaler = scaler
        # without those that fp16 skipped; the reference's schedules count otherwise
        num_updates = schedule.last_epoch if record else get_checkpoint_step(checkpoint)
        load_trained(models, checkpoint)
        if models.ema:
            models.ema.num_updates = num_updates
            with averaged_weights(models):
                load_trained(models, checkpoint, averaged=True)
    except Exception as error:  # of several libraries, about files that are cut short
        raise UserError(f"{checkpoint} cannot be loaded: {error!r}. Name another checkpoint, or give the command as "
                        "it was.") from error
    # also moves the step counts to the device, which the reference leaves on the CPU
    optimizer.load_state_dict(optimizer.state_dict() | {"param_groups": settings})
    schedule.base_lrs, schedule.last_epoch = base_lrs, num_updates - 1
    schedule.step()
    schedule._step_count = num_updates + 1  # as in an uninterrupted run
    return Progress(**record.get("progress", {"global_step": num_updates}))


# ---- Validation and export ------------------------------------------------------------------------------------------

MODEL_LICENSE = "creativeml-openrail-m"  # this and the next two are for the model card
MODEL_TAGS = ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "diffusers-training"]
CARD_FACTS = ("updates", "seed", "train_text_encoder", "learning_rate", "train_batch_size",
              "gradient_accumulation_steps", "resolution", "mixed_precision", "pretrained_vae_model_name_or_path",
              "use_ema", "clip_skip", "rank", "lora_alpha")
RESULT = "model_index.json"  # in --output_dir: marks a finished run


def make_pipeline(models: Models, safety_checker=None, feature_extractor=None) -> StableDiffusionPipeline:
    config = models.scheduler_config
    if models.clip_skip and not hasattr(models.text_encoder, "text_model"):
        # where the pipeline looks for the final norm, which transformers 5.6 has moved; vars(), as it is no submodule
        vars(models.text_encoder)["text_model"] = models.text_encoder
    parts = {part: getattr(models, part) for part in ("vae", "unet", *TEXT_ENCODERS, *TOKENIZERS)}
    return StableDiffusionPipeline(
        **parts, scheduler=getattr(diffusers, config.get("_class_name", "PNDMScheduler")).from_config(config),
        safety_checker=safety_checker, feature_extractor=feature_extractor,
        requires_safety_checker=safety_checker is not None)


@torch.no_grad()
def validate(args: Namespace, accelerator: Accelerator, models: Models, objective: Objective, data: Data,
             progress: Progress, tag: str = "validation"):
    """Draw the prompts and measure the held-out loss, with the EMA weights if any; the processes share both."""
    drawn, loss = [], math.nan
    if not args.validation_prompts and not data.held_out:
        return
    for network in list_trained(models):
        network.eval()
    with (averaged_weights(models),
          contextlib.nullcontext() if getattr(args, "fsdp", False) else log_failure("validation"),  # others wait
          encoders_on_device(args, accelerator, models)):
        loss = compute_held_out_loss(args, accelerator, models, objective, data.held_out)
        drawn = draw_images(args, accelerator, models, data.train.seed)
    for network in list_trained(models):
        network.train()
    images, loss = dict(sorted(dict(gather_object(drawn)).items())), sum(gather_object([loss]))
    with log_failure("saving what validation found"):
        if data.held_out:
            logger.info(f"validation_loss {loss:.5f} at update {progress.global_step}")
            accelerator.log({"validation_loss": loss}, step=progress.global_step)
        if images and accelerator.is_main_process:
            save_images(args, accelerator, images, progress.global_step, tag)


def draw_images(args: Namespace, accelerator: Accelerator, models: Models, seed: int) -> list[tuple[int, Image.Image]]:
    """Return this process's share of the pictures, each with its index, from the same noise at every call."""
    prompts, pipeline, drawn = args.validation_prompts, make_pipeline(models), []
    pipeline.set_progress_bar_config(disable=True)
    states = models.prompts or encode_prompts(args, accelerator, pipeline)
    pipeline.register_modules(**dict.fromkeys(TEXT_ENCODERS))  # which may be in host memory
    for first in range(0, len(prompts), accelerator.num_processes):  # idle processes draw one more, unused
        index = (first + accelerator.process_index) % len(prompts)
        height, width = parse_size(args.validation_size[index % len(args.validation_size)])
        generator = torch.Generator().manual_seed(int(make_rng(seed, "validation", index).integers(2**31)))
        with accelerator.autocast():
            latents = pipeline(**states[index], height=height, width=width, generator=generator,
                               num_inference_steps=args.validation_inference_steps, output_type="latent",
                               guidance_scale=args.validation_guidance_scale).images
        latents = latents.float() / models.vae.config.scaling_factor
        pixel_values = models.vae.decode(latents.to(models.vae.dtype)).sample  # in its own dtype: fp16 may overflow
        drawn.append((index, pipeline.image_processor.postprocess(pixel_values.float())[0]))
    return drawn


def compute_held_out_loss(args: Namespace, accelerator: Accelerator, models: Models, objective: Objective,
                          held_out: Samples | None) -> float:
    """Return this process's share of the mean unweighted loss of held-out samples, at the same noise in every run."""
    if not held_out:
        return 0.0
    plain = dataclasses.replace(objective, args=Namespace(dream_training=False, snr_gamma=None))
    count, losses = len(held_out), []
    steps = plan_micro_steps(held_out, Progress(), len(set(held_out.buckets)),
                             args.train_batch_size * accelerator.num_processes, count)
    for _, batch in make_dataloader(held_out, steps, models, 0, accelerator):
        batch = send_to_device(batch, accelerator.device)
        losses.append(compute_loss(models.unet, plain, *encode_batch(models, batch), batch) * batch["weights"])
    return torch.cat(losses).sum().item() / count


def save_images(args: Namespace, accelerator: Accelerator, images: dict[int, Image.Image], step: int,
                tag: str):
    """Save pictures one by one, by the index of their prompt, and side by side, and send them to the trackers."""
    folder = Path(args.output_dir, f"validation/step-{step}")
    sides = np.max([image.size for image in images.values()], axis=0)
    pixels = [image.crop((0, 0, *sides)) for image in images.values()]  # with black beside smaller ones
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in images.items():
        image.save(folder / f"{index:02d}.png")
    Image.fromarray(np.hstack(pixels)).save(folder / "grid.png")
    logger.info(f"saved {len(images)} pictures and grid.png in {folder}")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({tag: np.stack(pixels)}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({tag: [wandb.Image(image, caption=f"{index}: {args.validation_prompts[index]}")
                               for index, image in images.items()]}, step=step)
        else:
            logger.warning(f"pictures are not sent to {tracker.name}: see {folder}")


def load_safety_checker(args: Namespace) -> tuple:
    """Return the safety checker of the base model and its feature extractor; None if there is none, or none loads."""
    with log_failure("loading the safety checker of the base model"):  # offline, or a partial download
        base = PIPELINE.from_pretrained(
            locate_model(args), revision=args.revision, variant=args.variant, cache_dir=args.cache_dir,
            **dict.fromkeys(("unet", "vae", "scheduler", *TEXT_ENCODERS, *TOKENIZERS)))  # nothing else of it
        return base.safety_checker, base.feature_extractor
    return None, None


def export_model(args: Namespace, accelerator: Accelerator, models: Models):
    """Write the pipeline to --output_dir, to a temporary folder first, so that a failure keeps the previous export."""
    aside = Path(args.output_dir, ".partial-export")
    with averaged_weights(models), whole_weights(models):
        if not accelerator.is_main_process:
            return
        make_pipeline(models, *load_safety_checker(args)).save_pretrained(aside)
    for part in sorted(aside.iterdir(), key=Path.is_file):
        replace_folder(part, Path(args.output_dir, part.name))
    aside.rmdir()
    logger.info(f"saved the pipeline: StableDiffusionPipeline.from_pretrained({args.output_dir!r}) loads it")


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
    """Measures a run and logs it; losses and gradient norms are read from the device every --logging_steps updates.

    SUMMED numbers are added up over the micro steps and processes of an update. Each reading also has
    `images_per_second`, `data_wait` (share of the time spent waiting for data) and the GPU's `peak_memory_gib`.
    """

    SUMMED = ("train_loss", "long_captions")

    def __init__(self, args: Namespace, accelerator: Accelerator, first_step: int, last_step: int):
        self.accelerator, self.logging_steps = accelerator, args.logging_steps
        self.bar = tqdm(total=last_step, initial=first_step, desc="updates", disable=not accelerator.is_main_process)
        self.numbers, self.updates = {}, {}  # of the current update, and by step of those not read yet
        self.started, self.waited, self.num_images = time.perf_counter(), 0.0, 0  # since the last reading
        self.overflows = 0  # updates in a row whose gradient is not finite

    def time_waits(self, batches):
        """Yield what `batches` yields, and measure how long each was waited for."""
        began = time.perf_counter()
        for step_and_batch in batches:
            if not self.num_images:  # just read: what was done since, such as saving, is not training
                self.started = began
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
            self.waited += time.perf_counter() - began
            yield step_and_batch
            began = time.perf_counter()

    def add(self, step: MicroStep, batch: dict[str, Tensor], numbers: dict):
        self.num_images += len(step.indices)
        numbers["long_captions"] = (batch["num_long"] * batch["weights"]).sum()
        for name in self.SUMMED:
            numbers[name] += self.numbers.get(name, 0)
        self.numbers |= numbers

    def end_update(self, global_step: int, numbers: dict):
        """Finish an update; every --logging_steps of them, read and log the numbers."""
        self.updates[global_step] = self.numbers | numbers
        self.numbers = {}
        if len(self.updates) >= self.logging_steps:
            self.flush()
        with contextlib.suppress(OSError):  # a closed pipe, such as `| tee` after Ctrl-C, must not end the run
            self.bar.update()

    def flush(self):
        """Read the numbers from the device and log them; raise UserError if a loss or gradient is not finite."""
        if not self.updates:
            return
        own = [{name: float(number) for name, number in numbers.items()} for numbers in self.updates.values()]
        rows = {}
        for step, *parts in zip(self.updates, *gather_object([own]), strict=True):  # a part from each process
            rows[step] = dict(ChainMap(*parts)) | {name: sum(part[name] for part in parts) for name in self.SUMMED}
        seconds = time.perf_counter() - self.started
        rows[step] |= {"images_per_second": self.num_images / seconds, "data_wait": self.waited / seconds,
                       "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30}
        self.updates, self.waited, self.num_images = {}, 0.0, 0
        for step, numbers in rows.items():
            with log_failure("sending numbers to the trackers"):
                self.accelerator.log(numbers, step=step)
            self.overflows = 0 if math.isfinite(numbers["grad_norm"]) else self.overflows + 1
            allowed = 30 if self.accelerator.scaler else 0  # whose updates are skipped, and the scale of 65,536 halved
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


# ---- Main -----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    accelerator = make_accelerator(args)
    with accelerator.local_main_process_first():
        configs = load_model_configs(args)
    lock = open_output_dir(args, accelerator)  # held until the end
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    with accelerator.main_process_first():
        images = make_captioned_images(args, None if args.dataset_name else args.train_data_dir)
        held_out_images = make_captioned_images(args, args.validation_data_dir) if args.validation_data_dir else None
    record = start_run(args, accelerator, images, checkpoint)
    check_changes(checkpoint, record)
    data = make_data(args, images, held_out_images, record["seed"], configs)
    preview_data(args, accelerator, data.train)

    with FileLock(f"{lock.lock_file}.turn", mode=0o666) if args.fsdp else contextlib.nullcontext():  # one at a time
        models = load_models(args, accelerator, configs)
        shard_networks(args, accelerator, models)
    cache_encodings(args, accelerator, models, data.train)
    objective = make_objective(args, models.scheduler_config, accelerator.device)
    prepare_training(args, accelerator, models, data.train)
    shard_optimizer(args, models)
    update_in_backward(args, models)
    progress = resume(accelerator, models, checkpoint) if checkpoint else Progress()

    log_run_header(args, accelerator, models, data.train, record["seed"], checkpoint)
    signal_number = train(args, accelerator, models, objective, data, progress, record)
    if not signal_number:
        validate(args, accelerator, models, objective, data, progress, tag="test")
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
