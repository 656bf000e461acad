#!/usr/bin/env python
"""Make quickstart/base, a tiny Stable Diffusion, from scratch: Noto emoji by name.

    python quickstart/make_base.py                              everything, trained
    python quickstart/make_base.py --num_unet_steps 0           the UNet with random weights: minutes instead of hours

Stages, each skipped when what it leaves in --work_dir is already there (delete it to have it made again):

    1. noto/                      Noto emoji (npm: emoji-datasource-google) as an image folder with metadata.jsonl
    2. vae/                       train_vae.py, on noto/ and quickstart/images
    3. tokenizer/, text_encoder/  train_text_encoder.py, on the same
    4. start/                     the pipeline of these and a UNet with random weights
    5. trained/                   train_text_to_image.py --use_ema on noto/, from start/

At last the pipeline is written to --output_dir in half precision.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from make_images import (
    NAMES_PACKAGE,
    fetch_package,
    get_picture,
    load_emoji,
    load_members,
    make_caption,
    make_file_stem,
    make_plain_name,
)
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

HERE = Path(__file__).resolve().parent
NOTO_PACKAGE = "emoji-datasource-google@16.0.0"
NOTO_PREFIX = "package/img/google/64/"


def make_noto(noto_package: Path, names_package: Path, folder: Path) -> None:
    """Write the Noto pictures, 64 px, as an image folder with metadata.jsonl, and all emoji names beside it."""
    all_names = json.loads(load_members(names_package, "package/data-by-emoji.json")[""])
    captions = [make_caption(make_plain_name(facts["name"])) for facts in all_names.values()]
    pictures, rows = load_members(noto_package, NOTO_PREFIX), []
    folder.mkdir(parents=True)
    for emoji in load_emoji(names_package):
        content = get_picture(pictures, emoji.code, ".png")
        if content is None:
            continue
        file_name = f"{make_file_stem(emoji.name)}.png"
        (folder / file_name).write_bytes(content)
        rows.append(json.dumps({"file_name": file_name, "text": emoji.caption}))
    (folder.parent / "names.txt").write_text("\n".join(captions) + "\n")
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def make_unet(text_width: int) -> UNet2DConditionModel:
    """Return a UNet with random weights for latents of 4 x 16 x 16; text is attended to at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=16,
        block_out_channels=(48, 64, 96), cross_attention_dim=text_width, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def make_scheduler() -> DDIMScheduler:
    """Return the noise schedule of Stable Diffusion 1.x."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon", steps_offset=1,
        clip_sample=False, set_alpha_to_one=False,
    )


def save_start(work: Path) -> None:
    """Write start/: the trained VAE and text encoder with a UNet of random weights."""
    torch.manual_seed(0)
    text_encoder = CLIPTextModel.from_pretrained(work / "text_encoder")
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"), text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"), unet=make_unet(text_encoder.config.hidden_size),
        scheduler=make_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipeline.save_pretrained(work / "start")


def export(pipeline_folder: Path, tokenizer_folder: Path, folder: Path) -> None:
    """Write the pipeline in half precision, without the names of the folders that it was made in."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)  # not the one that drawing has left its padding in
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None, tokenizer=tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(folder)
    for path in [folder / "model_index.json", *folder.rglob("*config.json")]:
        path.write_text(json.dumps(drop_places(json.loads(path.read_text())), indent=2) + "\n")
    # transformers reads weights in the type that the config names: without this a pipeline asked for no type in
    # particular gets a text encoder in float16 beside a UNet in float32.
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")


def drop_places(config: dict) -> dict:
    """Return a configuration without what tells where it was loaded from."""
    return {name: value for name, value in config.items() if name not in ("_name_or_path", "local_files_only")}


def run(*command: object) -> None:
    """Run a Python script with this interpreter; exit with its status when it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], check=False)
    if done.returncode:
        sys.exit(f"make_base.py: {command[0]} ended with status {done.returncode}; what it printed above says why.")


def train_unet(args: argparse.Namespace) -> None:
    """Run train_text_to_image.py on the Noto pictures, going on from its newest checkpoint."""
    output = args.work_dir / "trained"
    resume = ["--resume_from_checkpoint", "latest"] if list(output.glob("checkpoint-*")) else []
    run(
        "-m", "accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no",
        "--dynamo_backend", "no", "--num_cpu_threads_per_process", torch.get_num_threads(),
        HERE.parent / "train_text_to_image.py",
        "--pretrained_model_name_or_path", args.work_dir / "start", "--train_data_dir", args.work_dir / "noto",
        "--resolution", 64, "--random_flip", "--train_batch_size", 16, "--max_train_steps", args.num_unet_steps,
        "--learning_rate", 1e-3, "--lr_scheduler", "cosine", "--lr_warmup_steps", 100,
        "--snr_gamma", 5, "--proportion_empty_prompts", 0.1, "--use_ema", "--ema_decay", 0.9995,
        "--checkpointing_steps", 500, "--checkpoints_total_limit", 2, "--seed", 0, "--output_dir", output, *resume,
    )


def fetch_packages(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Return the files of the pictures and the names: those given, else as npm fetches them."""
    return args.noto or fetch_package(NOTO_PACKAGE, folder), args.names or fetch_package(NAMES_PACKAGE, folder)


def main() -> None:
    """Make what is missing, stage by stage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--noto", type=Path, help=f"The npm package {NOTO_PACKAGE} as a .tgz file.")
    parser.add_argument("--names", type=Path, help=f"The npm package {NAMES_PACKAGE} as a .tgz file.")
    parser.add_argument("--work_dir", type=Path, default=HERE / "out-base", help="Where the stages leave their work.")
    parser.add_argument("--output_dir", type=Path, default=HERE / "base")
    parser.add_argument("--vae_minutes", type=float, default=20)
    parser.add_argument("--num_text_steps", type=int, default=400)
    parser.add_argument("--num_unet_steps", type=int, default=9000, help="0 leaves the UNet random.")
    args = parser.parse_args()
    work, images = args.work_dir, HERE / "images"
    if not (work / "noto" / "metadata.jsonl").is_file():
        shutil.rmtree(work / "noto", ignore_errors=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                make_noto(*fetch_packages(args, Path(folder)), work / "noto")
            except (RuntimeError, FileNotFoundError) as error:
                sys.exit(f"make_base.py: {error}")
    if not (work / "vae" / "config.json").is_file():
        run(HERE / "train_vae.py", "--images", work / "noto", images, "--output_dir", work / "vae",
            "--minutes", args.vae_minutes)
    if not (work / "text_encoder" / "config.json").is_file():
        run(HERE / "train_text_encoder.py", "--names", work / "names.txt", "--images", work / "noto", images,
            "--output_dir", work, "--num_train_steps", args.num_text_steps)
    save_start(work)
    if args.num_unet_steps:
        train_unet(args)
    export(work / ("trained" if args.num_unet_steps else "start"), work / "tokenizer", args.output_dir)
    size = sum(path.stat().st_size for path in args.output_dir.rglob("*") if path.is_file())
    print(f"saved {args.output_dir} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
