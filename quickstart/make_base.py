#!/usr/bin/env python
"""Make quickstart/base, a tiny Stable Diffusion, from scratch: emoji of four families by name.

    pip install resvg-py                                        draws SVG
    python quickstart/make_base.py                              everything, trained
    python quickstart/make_base.py --num_unet_steps 0           the UNet with random weights: minutes instead of hours

"a red apple" is a flat Fluent emoji, and comes twice as often as those of the other families, which have their names
in the caption: "a red apple, noto style".

Stages, each skipped when what it leaves in --work_dir is already there (delete it to have it made again):

    1. emoji/                     the four families, from npm packages, as an image folder with metadata.jsonl
    2. vae/                       train_vae.py, on emoji/ and quickstart/images
    3. tokenizer/, text_encoder/  train_text_encoder.py, on the same
    4. start/                     the pipeline of these and a UNet with random weights
    5. trained/                   train_text_to_image.py --use_ema on emoji/, from start/

At last the pipeline is written to --output_dir in half precision, and the four families' pictures of the quickstart's
prompts to quickstart/families.
"""

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import resvg_py
import torch
from make_images import (
    NAMES_PACKAGE,
    Emoji,
    fetch_package,
    get_picture,
    load_emoji,
    load_members,
    make_caption,
    make_file_stem,
    make_plain_name,
    save_image_folder,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from quickstart import PROMPTS

HERE = Path(__file__).resolve().parent
NAMED_BY_CODE = {  # family: npm package, folder and suffix of its pictures
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/", ".png"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/", ".png"),
    "flat": ("@lobehub/fluent-emoji-flat@1.1.0", "package/assets/", ".svg"),
}
NAMED_BY_WORDS = {"blob": "@iconify-json/noto-v1@1.2.5"}  # family: npm package; Noto's emoji of before 2017
DEFAULT_FAMILY = "flat"  # what a caption without a family's name stands for
SIZE = 64  # pixels


def load_families(names_package: Path, packages: dict[str, Path]) -> dict[str, dict[Emoji, bytes]]:
    """Return each family's pictures, PNG or SVG, of the emoji that the quickstart is about."""
    families, all_emoji = {}, load_emoji(names_package)
    for family, (package, prefix, suffix) in NAMED_BY_CODE.items():
        files = load_members(packages[package], prefix)
        families[family] = {emoji: get_picture(files, emoji.code, suffix) for emoji in all_emoji}
    for family, package in NAMED_BY_WORDS.items():
        icons = json.loads(load_members(packages[package], "package/icons.json")[""])
        names = {emoji: make_file_stem(emoji.name) for emoji in all_emoji}
        families[family] = {emoji: make_svg(icons, name) for emoji, name in names.items() if name in icons["icons"]}
    return {family: {emoji: content for emoji, content in pictures.items() if content}
            for family, pictures in families.items()}


def make_svg(icons: dict, name: str) -> bytes:
    """Return an icon of Iconify's JSON as a file of its own."""
    icon = {**icons, **icons["icons"][name]}
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {icon["width"]} {icon["height"]}">{icon["body"]}</svg>').encode()


def draw_picture(content: bytes) -> Image.Image:
    """Return a PNG or an SVG in SIZE pixels over white."""
    if not content.startswith(b"\x89PNG"):
        content = bytes(resvg_py.svg_to_bytes(svg_string=content.decode(), width=4 * SIZE, height=4 * SIZE))
    picture = Image.open(io.BytesIO(content)).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def make_emoji(names_package: Path, packages: dict[str, Path], work: Path) -> None:
    """Write emoji/, an image folder of all families, and names.txt, the captions of all emoji there are."""
    pictures = []
    for family, contents in load_families(names_package, packages).items():
        style, times = ("", 2) if family == DEFAULT_FAMILY else (f", {family} style", 1)
        pictures += times * [(f"{family} {emoji.name}", emoji.caption + style, draw_picture(content))
                             for emoji, content in contents.items()]
    all_names = json.loads(load_members(names_package, "package/data-by-emoji.json")[""])
    captions = [make_caption(make_plain_name(facts["name"])) for facts in all_names.values()]
    (work / "names.txt").write_text("\n".join([*captions, *(caption for _, caption, _ in pictures)]) + "\n")
    save_image_folder(work / "emoji", pictures, ".png")


def copy_families(emoji: Path, folder: Path) -> None:
    """Copy the pictures of the quickstart's prompts."""
    rows = [json.loads(line) for line in dict.fromkeys((emoji / "metadata.jsonl").read_text().splitlines())]
    save_image_folder(folder, [(Path(row["file_name"]).stem, row["text"], Image.open(emoji / row["file_name"]))
                               for row in rows if row["text"].split(",")[0] in PROMPTS], ".png")


def make_unet(text_width: int) -> UNet2DConditionModel:
    """Return a UNet with random weights for latents of 4 x 16 x 16; text is attended to at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=16,
        block_out_channels=(48, 96, 160), cross_attention_dim=text_width, attention_head_dim=8,
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
    """Run train_text_to_image.py on the four families, going on from its newest checkpoint."""
    output = args.work_dir / "trained"
    resume = ["--resume_from_checkpoint", "latest"] if list(output.glob("checkpoint-*")) else []
    run(
        "-m", "accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no",
        "--dynamo_backend", "no", "--num_cpu_threads_per_process", torch.get_num_threads(),
        HERE.parent / "train_text_to_image.py",
        "--pretrained_model_name_or_path", args.work_dir / "start", "--train_data_dir", args.work_dir / "emoji",
        "--resolution", SIZE, "--train_batch_size", 16, "--cache_latents", "--cache_text_embeddings",
        "--max_train_steps", args.num_unet_steps, "--learning_rate", 1e-3, "--lr_scheduler", "cosine",
        "--lr_warmup_steps", 100, "--snr_gamma", 5, "--proportion_empty_prompts", 0.1,
        "--use_ema", "--ema_decay", 0.9995,
        "--checkpointing_steps", 500, "--checkpoints_total_limit", 2, "--seed", 0, "--output_dir", output, *resume,
    )


def fetch_packages(folder: Path | None, target: Path) -> dict[str, Path]:
    """Return the file of each npm package: in the folder if one is given, else as npm fetches it to the target."""
    packages = [NAMES_PACKAGE, *NAMED_BY_WORDS.values(), *(package for package, *_ in NAMED_BY_CODE.values())]
    if folder is None:
        return {package: fetch_package(package, target) for package in packages}
    return {package: folder / f"{re.sub('[@/]', '-', package).strip('-')}.tgz" for package in packages}


def main() -> None:
    """Make what is missing, stage by stage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--packages", type=Path, help="A folder of what `npm pack` makes; else npm fetches it.")
    parser.add_argument("--work_dir", type=Path, default=HERE / "out-base", help="Where the stages leave their work.")
    parser.add_argument("--output_dir", type=Path, default=HERE / "base")
    parser.add_argument("--vae_minutes", type=float, default=20)
    parser.add_argument("--num_text_steps", type=int, default=900)
    parser.add_argument("--num_unet_steps", type=int, default=27500, help="0 leaves the UNet random.")
    args = parser.parse_args()
    work, images = args.work_dir, HERE / "images"
    if not (work / "emoji" / "metadata.jsonl").is_file():
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                packages = fetch_packages(args.packages, Path(folder))
                make_emoji(packages.pop(NAMES_PACKAGE), packages, work)
            except (RuntimeError, FileNotFoundError) as error:
                sys.exit(f"make_base.py: {error}")
    if not (work / "vae" / "config.json").is_file():
        run(HERE / "train_vae.py", "--images", work / "emoji", images, "--output_dir", work / "vae",
            "--minutes", args.vae_minutes)
    if not (work / "text_encoder" / "config.json").is_file():
        run(HERE / "train_text_encoder.py", "--names", work / "names.txt", "--images", work / "emoji", images,
            "--output_dir", work, "--num_train_steps", args.num_text_steps)
    save_start(work)
    if args.num_unet_steps:
        train_unet(args)
    export(work / ("trained" if args.num_unet_steps else "start"), work / "tokenizer", args.output_dir)
    copy_families(work / "emoji", HERE / "families")
    size = sum(path.stat().st_size for path in args.output_dir.rglob("*") if path.is_file())
    print(f"saved {args.output_dir} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
