"""Tiny real components that every test runs the real scripts on: random weights, made once, offline."""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

# No test cuts the power: what a killed process has written stays. Waiting for the disk takes a fifth of a short run.
os.fsync = lambda file: None

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("train_text_to_image*.py"))
TORCH_SCRIPTS = [name for name in SCRIPTS if "flax" not in name]
SDXL_SCRIPTS = [name for name in TORCH_SCRIPTS if "sdxl" in name]
FULL_SCRIPTS = [name for name in TORCH_SCRIPTS if "lora" not in name]  # that train and export whole networks


# For a test of what has the same text in each script, and takes long: it runs with the first script alone, which saves
# the time of the others. tests/check_copies.py keeps them equal.
in_first_script = pytest.mark.parametrize("script", TORCH_SCRIPTS[:1], indirect=True)
# The same where whole networks and adapters, or the two kinds of model, may differ: one script of each.
in_two_scripts = pytest.mark.parametrize(
    "script", ["train_text_to_image.py", "train_text_to_image_lora_sdxl.py"], indirect=True)


def load_script(name: str):
    """Return a script as a module, loaded by its path, once."""
    module_name = Path(name).stem
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, ROOT / name)
        sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module_name])
    return sys.modules[module_name]


@pytest.fixture(params=TORCH_SCRIPTS)
def script(request):
    """Each torch script in turn, as a module."""
    return load_script(request.param)


@pytest.fixture(params=TORCH_SCRIPTS)
def each_script(request):
    """The same, for test modules in which `script` is the first script alone."""
    return load_script(request.param)


@pytest.fixture
def first_script():
    """One script for all, as a module: for what tests/check_copies.py keeps equal in the others."""
    return load_script(TORCH_SCRIPTS[0])


@pytest.fixture(params=FULL_SCRIPTS)
def full_script(request):
    """Each torch script that trains and exports whole networks, in turn, as a module."""
    return load_script(request.param)


@pytest.fixture(params=SDXL_SCRIPTS)
def sdxl_script(request):
    """Each script for Stable Diffusion XL in turn, as a module."""
    return load_script(request.param)


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Forget accelerate's singletons, so that each run in this process starts as a new one would."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def make_tokenizer(folder: Path, **options) -> CLIPTokenizer:
    """Return a CLIP tokenizer that spells every text byte by byte."""
    characters = sorted(ByteLevel.alphabet())
    tokens = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24, **options)


def make_tiny_stable_diffusion(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Write a Stable Diffusion with a million random weights: images of 32 px, latents of 16 x 16."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "tokenizer-source")
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    noise_scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type)
    StableDiffusionPipeline(
        vae=make_vae(), text_encoder=CLIPTextModel(make_text_config(tokenizer)), tokenizer=tokenizer, unet=unet,
        scheduler=noise_scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False).save_pretrained(folder)
    return folder


def make_small_stable_diffusion(folder: Path) -> Path:
    """Write an even smaller one, whose UNet has one resolution and whose text encoder one layer."""
    make_tiny_stable_diffusion(folder)
    tokenizer = make_tokenizer(folder / "small-source")
    UNet2DConditionModel(
        sample_size=16, block_out_channels=(32,), norm_num_groups=8, layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=8, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).save_pretrained(folder / "unet")
    CLIPTextModel(make_text_config(tokenizer, num_hidden_layers=1)).save_pretrained(folder / "text_encoder")
    return folder


def make_tiny_sdxl(folder: Path, *, force_zeros_for_empty_prompt: bool = True) -> Path:
    """Write a Stable Diffusion XL with a million random weights: images of 32 px, latents of 16 x 16."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "tokenizer-source")
    tokenizer_2 = make_tokenizer(folder / "tokenizer-2-source", pad_token="!")  # as the real one
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1, cross_attention_dim=80,
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 24,
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    noise_scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)
    StableDiffusionXLPipeline(
        vae=make_vae(), unet=unet, scheduler=noise_scheduler, tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        text_encoder=CLIPTextModel(make_text_config(tokenizer, num_hidden_layers=3)),
        text_encoder_2=CLIPTextModelWithProjection(make_text_config(
            tokenizer, hidden_size=48, projection_dim=24, hidden_act="gelu", num_hidden_layers=3)),
        force_zeros_for_empty_prompt=force_zeros_for_empty_prompt, add_watermarker=False).save_pretrained(folder)
    return folder


def make_text_config(tokenizer: CLIPTokenizer, **changes) -> CLIPTextConfig:
    """Return the shape of a tiny text encoder."""
    shape = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, **changes}
    return CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id,
                          eos_token_id=tokenizer.eos_token_id, **shape)


def make_vae(**changes) -> AutoencoderKL:
    """Return a tiny VAE with random weights that shrinks images by two."""
    return AutoencoderKL(
        block_out_channels=(16, 32), norm_num_groups=8, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **changes)


def make_image(index: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """Return a picture that no other index gives: two colours and a gradient, width by height."""
    rng = np.random.default_rng(index)
    low, high = rng.integers(0, 256, (2, 3))
    ramp = np.linspace(0, 1, size[0])[None, :, None] * np.linspace(1, 0.5, size[1])[:, None, None]
    return Image.fromarray((low + (high - low) * ramp).astype(np.uint8))


def make_image_folder(folder: Path, count: int = 10, column: str = "text") -> Path:
    """Write `count` pictures with captions in metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        make_image(index).save(folder / f"{index:03d}.png")
        rows.append(json.dumps({"file_name": f"{index:03d}.png", column: f"picture number {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, Path]:
    """Folders of a tiny Stable Diffusion and a tiny SDXL, which predict epsilon."""
    folder = tmp_path_factory.mktemp("models")
    return {"sd": make_tiny_stable_diffusion(folder / "tiny"), "sdxl": make_tiny_sdxl(folder / "tiny-xl")}


@pytest.fixture
def tiny_model(tiny_models, request) -> Path:
    """Folder of a tiny model of the kind that the test's script trains."""
    names = [name for name in ("each_script", "sdxl_script", "full_script", "script") if name in request.fixturenames]
    return tiny_models["sdxl" if names and "sdxl" in request.getfixturevalue(names[0]).__name__ else "sd"]


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Folder of ten captioned pictures."""
    return make_image_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def base_args(tiny_model, image_folder, tmp_path) -> list[str]:
    """Flags of a run of two updates that takes about a second."""
    return make_args(tiny_model, image_folder, tmp_path / "out")


def make_args(model: Path, data: Path, output_dir: Path, **flags) -> list[str]:
    """Return a command line: small defaults overridden by `flags`; True is a bare flag, None leaves one out."""
    defaults = {
        "pretrained_model_name_or_path": model, "train_data_dir": data, "output_dir": output_dir, "resolution": 32,
        "train_batch_size": 2, "max_train_steps": 2, "seed": 0, "report_to": "none", "lr_warmup_steps": 0,
        "learning_rate": 1e-3}
    argv = []
    for name, value in {**defaults, **flags}.items():
        if value is None or value is False:
            continue
        argv.append(f"--{name}")
        argv += [] if value is True else [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
    return argv


UNCACHED = {"no_cache_latents": True, "no_cache_text_embeddings": True}  # for scripts that cache by themselves


def list_adapter_flags(script, **flags) -> dict:
    """Return `flags` for a script that trains adapters, none for one that trains whole networks."""
    return flags if "lora" in script.__name__ else {}


def list_fast_flags(script) -> dict:
    """Return flags with which a network of random weights learns something in a few updates."""
    targets = ["attention", "feed_forward", "convolution", "conv_out"]
    return {"learning_rate": 2e-3, **list_adapter_flags(script, learning_rate=5e-3, rank=16, lora_target=targets)}


def make_namespace(script, argv: list[str]) -> argparse.Namespace:
    """Return what a script's own parser makes of a command line."""
    return script.parse_args(argv)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Compute in one thread: networks this small lose by sharing, and by far where other programs want the cores."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory):
    """Keep what `datasets` and the scripts cache out of the home of the person who runs the tests."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets-cache")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)  # for the processes that tests start
    huggingface_hub.constants.HF_HOME = str(tmp_path_factory.mktemp("hf-home"))
    os.environ["HF_HOME"] = huggingface_hub.constants.HF_HOME


def read_scalars(output_dir: Path, tag: str) -> dict[int, float]:
    """Return a TensorBoard scalar of a run by its step."""
    values = {}
    for path in sorted(Path(output_dir).rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(path))
        events.Reload()
        if tag in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars(tag)}
    return values
