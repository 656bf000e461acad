"""Build what the benchmarks train: models of a published shape with random weights, and a folder of pictures.

Random weights cost what trained ones cost: the same number of operations, bytes and kernels. Nothing is downloaded;
everything is made once and kept in a cache folder:

    python benchmarks/build.py --cache benchmarks/cache --config sd15 --num_images 256 --image_size 768
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import pathlib
import shutil

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers import AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel

DOWN = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
UP = ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
SD15 = {
    "unet": {
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": DOWN,
        "up_block_types": UP,
        "attention_head_dim": 8,  # in the published files this is the number of heads
        "cross_attention_dim": 768,
    },
    "vae": {
        "sample_size": 512,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    },
    "parameters": 859_520_964,
}
# stable-diffusion-2-1-base: the shape of all 2.x UNets, at 512 and with epsilon prediction.
SD21 = copy.deepcopy(SD15)
SD21["unet"].update(attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024, use_linear_projection=True)
SD21["vae"].update(sample_size=768)
SD21["text_encoder"].update(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
    projection_dim=512,
)
SD21["parameters"] = 865_910_724
# SD 1.5 with a fifth of the UNet's channels and a quarter of the VAE's and the text encoder's, for CPUs.
SMALL = copy.deepcopy(SD15)
SMALL["unet"].update(block_out_channels=[64, 128, 256, 256], cross_attention_dim=192)
SMALL["vae"].update(block_out_channels=[32, 64, 128, 128], norm_num_groups=16)
SMALL["text_encoder"].update(hidden_size=192, intermediate_size=768, num_attention_heads=6, projection_dim=192)
SMALL["parameters"] = None
# stable-diffusion-xl-base-1.0.
SDXL = {
    "unet": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {**SD15["vae"], "sample_size": 1024, "scaling_factor": 0.13025},
    "text_encoder": SD15["text_encoder"],
    "text_encoder_2": {
        "vocab_size": 49408,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
    "parameters": 2_567_463_684,
}
# A fifth of the channels again, and 4 in place of 10 transformer layers in the innermost blocks.
SMALL_SDXL = copy.deepcopy(SDXL)
SMALL_SDXL["unet"].update(
    block_out_channels=[64, 128, 256],
    transformer_layers_per_block=[1, 2, 4],
    attention_head_dim=[1, 2, 4],
    cross_attention_dim=192 + 320,
    projection_class_embeddings_input_dim=6 * 256 + 320,
)
SMALL_SDXL["vae"].update(SMALL["vae"], sample_size=1024)
SMALL_SDXL["text_encoder"] = SMALL["text_encoder"]
SMALL_SDXL["text_encoder_2"].update(
    hidden_size=320, intermediate_size=1280, num_attention_heads=5, projection_dim=320
)
SMALL_SDXL["parameters"] = None
CONFIGS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL, "small": SMALL, "small_sdxl": SMALL_SDXL}

COLOURS = ["red", "orange", "yellow", "green", "blue", "violet", "white", "black", "brown", "pink"]
SHAPES = ["circle", "square", "triangle"]
PLACES = ["meadow", "beach", "street", "forest", "kitchen", "mountain", "river", "garden", "harbour", "desert"]
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 500


@contextlib.contextmanager
def written_aside(folder: pathlib.Path):
    """Give a folder to write in that takes its name when it is complete; give None where it stands already."""
    if folder.exists():
        yield None
        return
    aside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    aside.rename(folder)


def make_caption(index: int) -> str:
    """Return the caption of a picture: its shapes' colour and kind, and a place."""
    colour, shape = COLOURS[index % len(COLOURS)], SHAPES[index // 10 % len(SHAPES)]
    return f"a photograph of a {colour} {shape} in a {PLACES[index // 30 % len(PLACES)]}, number {index}"


def make_picture(index: int, size: int) -> Image.Image:
    """Return a picture whose shorter side is `size`: smooth colours, shapes and grain, so that JPEG has work to do."""
    rng = np.random.default_rng(index)
    width, height = [(size, size), (size * 4 // 3, size), (size, size * 4 // 3)][index % 3]
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(8):
        x, y, r = rng.integers(0, width), rng.integers(0, height), rng.integers(size // 16, size // 4)
        corners = 3 + index // 10 % len(SHAPES)
        draw.regular_polygon((int(x), int(y), int(r)), corners, int(rng.integers(0, 360)), COLOURS[index % 10])
    grain = rng.normal(0, 6, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))


def build_pictures(cache: pathlib.Path, num_images: int, size: int) -> pathlib.Path:
    """Return an image folder of `num_images` JPEG files with captions in metadata.jsonl."""
    folder = cache / f"pictures-{num_images}x{size}"
    with written_aside(folder) as aside:
        if aside:
            lines = []
            for index in range(num_images):
                name = f"{index:05d}.jpg"
                make_picture(index, size).save(aside / name, quality=92)
                lines.append(json.dumps({"file_name": name, "text": make_caption(index)}) + "\n")
            (aside / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def save_tokenizer(folder: pathlib.Path) -> CLIPTokenizer:
    """Save and return a CLIP tokenizer, 77 tokens a caption, with merges learned from our own captions."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + MERGES,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator((make_caption(index) for index in range(1000)), trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    # CLIP's order: every byte, every byte that ends a word, the merges, the two special tokens.
    words = [*alphabet, *(char + "</w>" for char in alphabet), *map("".join, merges), START, END]
    vocab = {word: number for number, word in enumerate(dict.fromkeys(words))}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_model(cache: pathlib.Path, name: str, *, with_weights: bool = True) -> pathlib.Path:
    """Return a folder in the layout of a pipeline of Stable Diffusion or SDXL, float32, random weights or none."""
    folder, config = cache / f"model-{name}", CONFIGS[name]
    with written_aside(folder) as aside:
        if aside:
            torch.manual_seed(0)
            with torch.device("cpu" if with_weights else "meta"):
                networks = {"unet": UNet2DConditionModel(**config["unet"]), "vae": AutoencoderKL(**config["vae"])}
            count = sum(parameter.numel() for parameter in networks["unet"].parameters())
            if config["parameters"] not in (None, count):
                raise RuntimeError(f"the {name} UNet has {count:,} parameters, not {config['parameters']:,}.")
            for part, network in networks.items():
                (network.save_pretrained if with_weights else network.save_config)(aside / part)
            kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
            for part in config.keys() & kinds.keys():
                tokenizer = save_tokenizer(aside / part.replace("text_encoder", "tokenizer"))
                ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
                text_config = CLIPTextConfig(**config[part], **ids, pad_token_id=tokenizer.pad_token_id)
                (kinds[part](text_config) if with_weights else text_config).save_pretrained(aside / part)
            save_scheduler_and_index(aside, is_sdxl="text_encoder_2" in config)
    return folder


def save_scheduler_and_index(folder: pathlib.Path, *, is_sdxl: bool) -> None:
    """Write the published noise schedule and the pipeline's table of contents."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    noise_scheduler = EulerDiscreteScheduler(**betas) if is_sdxl else PNDMScheduler(**betas, skip_prk_steps=True)
    noise_scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if is_sdxl:
        index |= {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": True,
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
        del index["safety_checker"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Build what the command line asks for, where it does not stand already."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=pathlib.Path, required=True)
    parser.add_argument("--config", choices=sorted(CONFIGS), required=True)
    parser.add_argument("--num_images", type=int, default=256)
    parser.add_argument("--image_size", type=int, default=768)
    args = parser.parse_args()
    print(build_model(args.cache, args.config))
    print(build_pictures(args.cache, args.num_images, args.image_size))


if __name__ == "__main__":
    main()
