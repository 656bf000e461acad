#!/usr/bin/env python
"""Fine-tune the tiny Stable Diffusion in quickstart/base on the 3D emoji in quickstart/images, and show what changed.

    python quickstart/quickstart.py            all weights of the UNet, with train_text_to_image.py
    python quickstart/quickstart.py --lora     adapters beside them, with train_text_to_image_lora.py

It draws the prompts below, runs the script with `accelerate launch`, draws them again from the same noise, and leaves
in quickstart/out/run-N:

    before_after.png       each prompt before and after, and a real 3D picture of the thing
    progress.png           some prompts over the course of training
    loss.png               the training loss of every update, and the held-out loss
    summary.json           the numbers that it prints
    (the rest)             what the script leaves: pipeline or adapter, checkpoints, validation pictures, logs
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a network

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from diffusers import StableDiffusionPipeline  # noqa: E402
from diffusers.utils import logging as diffusers_logging  # noqa: E402

TRAINED_PROMPTS = [
    "a red apple", "a banana", "a fox", "an elephant", "a rose", "an evergreen tree", "a blue book", "a pizza",
]  # fmt: skip
HELD_OUT_PROMPTS = [
    "a strawberry", "a pineapple", "a frog", "a penguin", "a sunflower", "a cactus", "a rocket", "a soccer ball",
]  # fmt: skip
PROMPTS = TRAINED_PROMPTS + HELD_OUT_PROMPTS
SHOWN_PROMPTS = ["a red apple", "a fox", "a frog", "a rocket"]  # drawn in the course of training
RESOLUTION = 64  # pixels
DRAWS_PER_PROMPT = 2
DRAW_BATCH_SIZE = 8
INFERENCE_STEPS = 25
GUIDANCE_SCALE = 2.0
NOISE_DRAWS = 4  # per held-out picture
ENLARGEMENT = 2  # of the pictures in the grid
SEED = 1
TRAIN_ARGS = [
    "--resolution", RESOLUTION, "--train_batch_size", 16, "--snr_gamma", 5,
    "--lr_scheduler", "cosine", "--lr_warmup_steps", 20, "--proportion_empty_prompts", 0.1,
    "--use_ema", "--ema_decay", 0.99, "--seed", SEED, "--cache_latents", "--cache_crops", 1, "--cache_text_embeddings",
    "--checkpoints_total_limit", 1, "--report_to", "tensorboard",
    "--validation_inference_steps", INFERENCE_STEPS, "--validation_guidance_scale", GUIDANCE_SCALE,
]  # fmt: skip


class Method(NamedTuple):
    """A script, and the flags that are its own."""

    script: Path
    args: list


FULL = Method(HERE.parent / "train_text_to_image.py", ["--learning_rate", 5e-4])
LORA = Method(HERE.parent / "train_text_to_image_lora.py", [
    "--learning_rate", 2e-3, "--rank", 16, "--lora_target", "attention", "feed_forward", "convolution"])  # fmt: skip


class Captioned(NamedTuple):
    """The pictures of an image folder, [n, 3, 64, 64] in [-1, 1], and their captions."""

    pixel_values: Tensor
    captions: list[str]


def check_inputs(base: str, script: Path) -> None:
    """Raise FileNotFoundError when the base, the pictures or the script are not there."""
    remedies = {
        Path(base, "model_index.json"): "git checkout quickstart/base, or python quickstart/make_base.py",
        HERE / "images" / "metadata.jsonl": "git checkout quickstart/images, or python quickstart/make_images.py",
        HERE / "validation_images" / "metadata.jsonl": "git checkout quickstart/validation_images",
        HERE / "families" / "metadata.jsonl": "git checkout quickstart/families",
        script: "run this file inside a clone of the repository",
    }
    for path, remedy in remedies.items():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; to have it: {remedy}.")


def make_output_dir(parent: Path) -> Path:
    """Return a new folder run-N in the parent."""
    numbers = [int(path.name[4:]) for path in parent.glob("run-*") if path.name[4:].isdigit()]
    folder = parent / f"run-{max(numbers, default=0) + 1}"
    folder.mkdir(parents=True)
    return folder


def load_pipeline(folder: str, adapter: Path | None = None) -> StableDiffusionPipeline:
    """Return the pipeline in float32, on the GPU if there is one, with a LoRA if one is given."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
        pipeline.fuse_lora()  # draws faster
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)


def load_images(folder: Path) -> Captioned:
    """Return the pictures of an image folder over white, and their captions."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pictures = []
    for row in rows:
        picture = Image.open(folder / row["file_name"]).convert("RGBA").resize((RESOLUTION,) * 2, Image.LANCZOS)
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1)
    return Captioned(torch.stack(pictures), [row["text"] for row in rows])


@torch.no_grad()
def encode_images(pipeline: StableDiffusionPipeline, pixel_values: Tensor) -> Tensor:
    """Return the latents' means [n, 4, 16, 16] of pictures [n, 3, 64, 64]."""
    vae, parts = pipeline.vae, pixel_values.to(pipeline.device).split(32)
    return torch.cat([vae.encode(part).latent_dist.mean for part in parts]) * vae.config.scaling_factor


def draw_images(pipeline: StableDiffusionPipeline, label: str) -> list[Image.Image]:
    """Return DRAWS_PER_PROMPT pictures of each prompt, from the same noise at every call."""
    prompts, pictures = [prompt for prompt in PROMPTS for _ in range(DRAWS_PER_PROMPT)], []
    for start in tqdm(range(0, len(prompts), DRAW_BATCH_SIZE), desc=f"drawing {label}"):
        part = prompts[start : start + DRAW_BATCH_SIZE]
        generators = [torch.Generator().manual_seed(SEED + start + offset) for offset in range(len(part))]
        pictures += pipeline(
            part, height=RESOLUTION, width=RESOLUTION, generator=generators,
            num_inference_steps=INFERENCE_STEPS, guidance_scale=GUIDANCE_SCALE).images  # fmt: skip
    return pictures


@torch.no_grad()
def compute_held_out_loss(pipeline: StableDiffusionPipeline, held_out: Captioned) -> float:
    """Return the mean squared error of the predicted noise, over the same NOISE_DRAWS draws per picture each time."""
    generator, device = torch.Generator().manual_seed(SEED), pipeline.device
    latents, losses = encode_images(pipeline, held_out.pixel_values), []
    tokens = pipeline.tokenizer(held_out.captions, padding="max_length", truncation=True, return_tensors="pt")
    encoder_hidden_states = pipeline.text_encoder(tokens.input_ids.to(device))[0]
    count, num_timesteps = len(latents), pipeline.scheduler.config.num_train_timesteps
    for _ in range(NOISE_DRAWS):
        # One timestep in each of as many equal parts of the range as there are pictures, in random order.
        parts = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
        timesteps = (parts / count * num_timesteps).long().clamp(max=num_timesteps - 1).to(device)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        noisy_latents = pipeline.scheduler.add_noise(latents, noise, timesteps)
        model_pred = pipeline.unet(noisy_latents, timesteps, encoder_hidden_states).sample
        losses.append(torch.nn.functional.mse_loss(model_pred, noise).item())
    return sum(losses) / len(losses)


def compute_quality(pipeline: StableDiffusionPipeline, drawn: list[Image.Image], known: Captioned,
                    families: Captioned, look: Captioned) -> dict[str, float]:
    """Return what can be counted of the pictures drawn of each prompt, DRAWS_PER_PROMPT each.

    `right_thing`: the share whose nearest known 3D picture, in VAE latents, is the one with their prompt as its
    caption; by luck that is 1 / n. `look_3d`: the share that is nearer to the 3D picture of their thing than to the
    pictures of it in the families that the base knows. Both for `trained` prompts and for `others`. `sharpness`: the
    mean difference between neighbouring pixels, relative to that of the real pictures of their things in the look that
    they should have.
    """
    prompts = [prompt for prompt in PROMPTS for _ in range(DRAWS_PER_PROMPT)]
    pixel_values = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in drawn]) / 127.5 - 1
    latents, known_latents, family_latents = (
        encode_images(pipeline, values).flatten(1).cpu()
        for values in (pixel_values, known.pixel_values, families.pixel_values))
    own = torch.tensor([known.captions.index(prompt) for prompt in prompts])
    is_nearest = (torch.cdist(latents, known_latents).argmin(1) == own).float()
    to_3d, to_families = (latents - known_latents[own]).norm(dim=1), torch.cdist(latents, family_latents)
    is_other_thing = [[caption.split(",")[0] != prompt for caption in families.captions] for prompt in prompts]
    to_families[torch.tensor(is_other_thing)] = math.inf
    real = look.pixel_values[[look.captions.index(prompt) for prompt in prompts]]
    is_3d = (to_3d < to_families.min(1).values).float()
    shares = {f"{name}_{names}": part.mean().item()
              for name, values in (("right_thing", is_nearest), ("look_3d", is_3d))
              for names, part in zip(("trained", "others"), values.chunk(2), strict=True)}
    return {**shares, "sharpness": compute_sharpness(pixel_values) / compute_sharpness(real)}


def compute_sharpness(pixel_values: Tensor) -> float:
    """Return the mean absolute difference between neighbouring pixels of pictures [n, 3, h, w]."""
    return (pixel_values.diff(dim=2).abs().mean() + pixel_values.diff(dim=3).abs().mean()).item()


def train(method: Method, base: str, output_dir: Path, num_steps: int) -> float:
    """Run the script and return its seconds; RuntimeError when it fails."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1,
        "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", torch.get_num_threads(),
        method.script, "--pretrained_model_name_or_path", base,
        "--train_data_dir", HERE / "images", "--validation_data_dir", HERE / "validation_images",
        "--validation_prompts", *SHOWN_PROMPTS, "--validation_steps", max(1, num_steps // 5),
        "--max_train_steps", num_steps, "--checkpointing_steps", num_steps, "--output_dir", output_dir,
        "--encoded_dir", output_dir.parent / "encoded", *TRAIN_ARGS, *method.args,
    ]  # fmt: skip
    command = [str(part) for part in command]
    quoted = " ".join(f'"{part}"' if " " in part else part for part in command[3:])
    print(f"accelerate launch {quoted}\n", flush=True)
    started = time.monotonic()
    status = subprocess.run(command, check=False).returncode
    if status:
        raise RuntimeError(f"{method.script.name} ended with status {status}; its last lines above say why.")
    return time.monotonic() - started


def load_scalars(logs: Path) -> dict[str, list[tuple[int, float]]]:
    """Return train_loss and validation_loss as (update, value) pairs from the TensorBoard files below a folder."""
    scalars = {"train_loss": [], "validation_loss": []}
    for folder in {path.parent for path in logs.rglob("events.out.tfevents.*")}:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for tag in scalars.keys() & set(events.Tags()["scalars"]):
            scalars[tag] += [(event.step, event.value) for event in events.Scalars(tag)]
    return {tag: sorted(values) for tag, values in scalars.items()}


def draw_rows(rows: list[tuple[str, list[Image.Image]]], titles: list[str], rows_per_column: int) -> Image.Image:
    """Return a sheet of captioned rows of pictures, with a title over each column of pictures."""
    size, gap, line, font = RESOLUTION * ENLARGEMENT, 24, 22, ImageFont.load_default(size=14)
    columns, width, height = math.ceil(len(rows) / rows_per_column), len(titles) * size + gap, size + line
    sheet = Image.new("RGB", (columns * width + gap, rows_per_column * height + line), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (caption, pictures) in enumerate(rows):
        left, top = gap + index // rows_per_column * width, line + index % rows_per_column * height
        for column, (title, picture) in enumerate(zip(titles, pictures, strict=True)):
            place = (left + column * size, top)
            sheet.paste(picture.resize((size, size), Image.BICUBIC), place)
            draw.rectangle((*place, place[0] + size, top + size), outline="silver")
            if top == line:
                draw.text((place[0] + size // 2, 4), title, fill="black", font=font, anchor="ma")
        draw.text((left + len(titles) * size // 2, top + size + 2), caption, fill="black", font=font, anchor="ma")
    return sheet


def make_grid(before: list[Image.Image], after: list[Image.Image], known: Captioned) -> Image.Image:
    """Return the first picture of each prompt before and after, and the 3D one: trained things left, others right."""
    rows = []
    for index, prompt in enumerate(PROMPTS):
        real = (known.pixel_values[known.captions.index(prompt)] + 1) * 127.5
        rows.append((prompt + " (never trained on)" * (prompt in HELD_OUT_PROMPTS), [
            before[index * DRAWS_PER_PROMPT], after[index * DRAWS_PER_PROMPT],
            Image.fromarray(real.round().byte().permute(1, 2, 0).numpy())]))
    return draw_rows(rows, ["before", "after", "real"], len(TRAINED_PROMPTS))


def make_progress_sheet(validation: Path) -> Image.Image:
    """Return what the script has drawn of SHOWN_PROMPTS in the course of training, a row for each."""
    steps = sorted(int(folder.name.removeprefix("step-")) for folder in validation.glob("step-*"))
    rows = [(prompt, [Image.open(validation / f"step-{step}" / f"{index:02d}.png") for step in steps])
            for index, prompt in enumerate(SHOWN_PROMPTS)]
    return draw_rows(rows, [f"update {step}" for step in steps], len(SHOWN_PROMPTS))


def make_loss_curve(scalars: dict[str, list[tuple[int, float]]]) -> Image.Image:
    """Return the training loss of each update (grey), its moving mean (blue) and the held-out loss (red dots)."""
    width, height, margin, font = 720, 360, 50, ImageFont.load_default(size=13)
    picture = Image.new("RGB", (width, height), "white")
    draw, train_loss, mean = ImageDraw.Draw(picture), scalars["train_loss"], []
    for _, value in train_loss:
        mean.append(value if not mean else 0.9 * mean[-1] + 0.1 * value)
    last, top_value = train_loss[-1][0], max(value for values in scalars.values() for _, value in values)

    def place(step: float, value: float) -> tuple[float, float]:
        return margin + step / last * (width - 2 * margin), height - margin - value / top_value * (height - 2 * margin)

    for part in range(5):
        step, value = last * part // 4, top_value * part / 4
        draw.line((place(0, value), place(last, value)), fill="gainsboro")
        draw.text((margin - 6, place(0, value)[1]), f"{value:.2f}", fill="black", font=font, anchor="rm")
        draw.text((place(step, 0)[0], height - margin + 6), str(step), fill="black", font=font, anchor="ma")
    draw.line([place(*point) for point in train_loss], fill="lightgray")
    moving = [place(step, value) for (step, _), value in zip(train_loss, mean, strict=True)]
    draw.line(moving, fill="royalblue", width=2)
    for x, y in (place(*point) for point in scalars["validation_loss"]):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill="firebrick")
    draw.text((width // 2, height - 18), "update", fill="black", font=font, anchor="mm")
    for index, (text, color) in enumerate((("train_loss, each update", "gray"), ("its moving mean", "royalblue"),
                                           ("validation_loss (held-out pictures)", "firebrick"))):
        draw.text((margin + 200 * index, 14), text, fill=color, font=font)
    return picture


def save_results(output_dir: Path, summary: dict, sheets: dict[str, Image.Image]) -> None:
    """Write the sheets, the loss curve and the numbers, and print where they are and what they say."""
    sheets["progress"] = make_progress_sheet(output_dir / "validation")
    sheets["loss"] = make_loss_curve(load_scalars(output_dir / "logs"))
    for name, sheet in sheets.items():
        sheet.save(output_dir / f"{name}.png", optimize=True)
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{'':66}before   after")
    for label, name, form in (
        (f"Loss on {summary['held_out_pictures']} held-out pictures", "loss", ".4f"),
        (f"The right thing: of all {summary['known_pictures']} 3D pictures its own is the nearest", "", ""),
        ("  for names in the training set", "right_thing_trained", ".0%"),
        ("  for names never trained on", "right_thing_others", ".0%"),
        ("The 3D look: its 3D picture is nearer than those of other families", "", ""),
        ("  for names in the training set", "look_3d_trained", ".0%"),
        ("  for names never trained on", "look_3d_others", ".0%"),
        ("Sharpness, relative to real pictures: flat ones, 3D ones", "sharpness", ".0%")):
        print(f"{label:64}", *(f"{summary[when][name]:>7{form}}" for when in ("before", "after") if name))
    print(f"""
Time             {summary["train_seconds"]:.0f} s of training, {summary["seconds"]:.0f} s in all

Look at          {", ".join(f"{name}.png" for name in sheets)} in {output_dir}
The result       {output_dir}  (its README.md says how to draw with it)
TensorBoard      tensorboard --logdir {output_dir / "logs"}""")


def run_quickstart(method: Method, base: str, parent: Path, num_steps: int) -> None:
    """Draw, train, draw again, and report."""
    started = time.monotonic()
    check_inputs(base, method.script)
    output_dir = make_output_dir(parent)
    images, held_out, families = (load_images(HERE / name) for name in ("images", "validation_images", "families"))
    known = Captioned(torch.cat([images.pixel_values, held_out.pixel_values]), images.captions + held_out.captions)

    def measure(pipeline: StableDiffusionPipeline, label: str, look: Captioned) -> tuple[list, dict[str, float]]:
        drawn = draw_images(pipeline, label)
        quality = compute_quality(pipeline, drawn, known, families, look)
        return drawn, {"loss": compute_held_out_loss(pipeline, held_out), **quality}

    before, numbers_before = measure(load_pipeline(base), "before training", families)
    train_seconds = train(method, base, output_dir, num_steps)
    trained = load_pipeline(base, output_dir) if method is LORA else load_pipeline(output_dir)
    after, numbers_after = measure(trained, "after training", known)
    summary = {
        "num_steps": num_steps, "train_seconds": train_seconds, "seconds": time.monotonic() - started,
        "before": numbers_before, "after": numbers_after, "known_pictures": len(known.captions),
        "held_out_pictures": len(held_out.captions)}
    save_results(output_dir, summary, {"before_after": make_grid(before, after, known)})


def main() -> None:
    """Run the quickstart; a mistake that can be helped is told in one line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--base", default=str(HERE / "base"), help="The model to start from.")
    parser.add_argument("--output_dir", type=Path, default=HERE / "out", help="Where run-1, run-2, ... go.")
    parser.add_argument("--lora", action="store_true", help="Train adapters with train_text_to_image_lora.py instead.")
    parser.add_argument("--max_train_steps", type=int, default=580, help="Updates; fewer for a shorter run.")
    args = parser.parse_args()
    if args.max_train_steps < 1:
        parser.error(f"--max_train_steps must be positive, got {args.max_train_steps}.")
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        run_quickstart(LORA if args.lora else FULL, args.base, args.output_dir, args.max_train_steps)
    except (FileNotFoundError, RuntimeError) as error:
        sys.exit(f"quickstart: {error}")
    except KeyboardInterrupt:
        sys.exit("quickstart: stopped before the end; start it again for a new run.")


if __name__ == "__main__":
    main()
