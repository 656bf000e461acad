"""The training commands of the reference's README.md and README_sdxl.md run as they stand there.

They are those of examples/text_to_image in huggingface/diffusers in August 2026. Only what a test cannot have is
replaced: the model, the VAE and the data set by tiny local ones, the resolution, and the lengths of the runs. Left out
are --push_to_hub, --enable_xformers_memory_efficient_attention (not installed), DeepSpeed's configuration (needs a
GPU), and on machines without a GPU fp16 in the torch scripts. One command with a launcher and one without are started
as they are. The others differ in what stands behind the script's name, which it is given in processes of its own;
test_distributed.py has the launcher of several.
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, load_script, make_image_folder, make_small_stable_diffusion
from runs import LORA_FILE, Run, load_pipeline, read_record, read_trained, set_up_child, start_pair
from safetensors.torch import load_file

FULL = """--use_ema --resolution=512 --center_crop --random_flip --train_batch_size=1 --gradient_accumulation_steps=4
    --gradient_checkpointing --max_train_steps=15000 --learning_rate=1e-05 --max_grad_norm=1
    --lr_scheduler="constant" --lr_warmup_steps=0 --output_dir="sd-naruto-model" """
JAX = """--resolution=512 --center_crop --random_flip --train_batch_size=1 --mixed_precision="fp16"
    --max_train_steps=15000 --learning_rate=1e-05 --max_grad_norm=1 --output_dir="sd-naruto-model" """
MODEL, NAME, FOLDER = (
    "--pretrained_model_name_or_path=$MODEL_NAME", "--dataset_name=$DATASET_NAME", "--train_data_dir=$TRAIN_DIR")
VAE = "--pretrained_vae_model_name_or_path=$VAE_NAME"
COMMANDS = {
    "full": f'accelerate launch --mixed_precision="fp16"  train_text_to_image.py {MODEL} {NAME} {FULL}',
    "full, own folder": f'accelerate launch --mixed_precision="fp16" train_text_to_image.py {MODEL} {FOLDER} {FULL}',
    "full, several GPUs":
        f'accelerate launch --mixed_precision="fp16" --multi_gpu  train_text_to_image.py {MODEL} {NAME} {FULL}',
    "LoRA": f"""accelerate launch --mixed_precision="fp16" train_text_to_image_lora.py {MODEL} {NAME}
        --caption_column="text" --resolution=512 --random_flip --train_batch_size=1 --num_train_epochs=100
        --checkpointing_steps=5000 --learning_rate=1e-04 --lr_scheduler="constant" --lr_warmup_steps=0 --seed=42
        --output_dir="sd-naruto-model-lora" --validation_prompt="cute dragon creature" --report_to="wandb" """,
    "JAX": f"python train_text_to_image_flax.py {MODEL} {NAME} {JAX}",  # own folder: as for the full one
    "SDXL full": f"""accelerate launch train_text_to_image_sdxl.py {MODEL} {VAE} {NAME} --resolution=512 --center_crop
        --random_flip --proportion_empty_prompts=0.2 --train_batch_size=1 --gradient_accumulation_steps=4
        --gradient_checkpointing --max_train_steps=10000 --use_8bit_adam --learning_rate=1e-06
        --lr_scheduler="constant" --lr_warmup_steps=0 --mixed_precision="fp16" --report_to="wandb"
        --validation_prompt="a cute Sundar Pichai creature" --validation_epochs 5 --checkpointing_steps=5000
        --output_dir="sdxl-naruto-model" """,
    "SDXL LoRA": f"""accelerate launch train_text_to_image_lora_sdxl.py {MODEL} {VAE} {NAME} --caption_column="text"
        --resolution=1024 --random_flip --train_batch_size=1 --num_train_epochs=2 --checkpointing_steps=500
        --learning_rate=1e-04 --lr_scheduler="constant" --lr_warmup_steps=0 --mixed_precision="fp16" --seed=42
        --output_dir="sd-naruto-model-lora-sdxl" --validation_prompt="cute dragon creature" --report_to="wandb" """,
    "SDXL LoRA, DeepSpeed": f"""accelerate launch train_text_to_image_lora_sdxl.py {MODEL} {VAE} {NAME}
        --caption_column="text" --resolution=1024 --train_batch_size=1 --num_train_epochs=2 --checkpointing_steps=2
        --learning_rate=1e-04 --lr_scheduler="constant" --lr_warmup_steps=0 --mixed_precision="fp16"
        --max_train_steps=20 --validation_epochs=20 --seed=1234 --output_dir="sd-naruto-model-lora-sdxl"
        --validation_prompt="cute dragon creature" """,
    "SDXL LoRA, text encoders": f"""accelerate launch train_text_to_image_lora_sdxl.py {MODEL} {NAME}
        --caption_column="text" --resolution=1024 --random_flip --train_batch_size=1 --num_train_epochs=2
        --checkpointing_steps=500 --learning_rate=1e-04 --lr_scheduler="constant" --lr_warmup_steps=0 --seed=42
        --output_dir="sd-naruto-model-lora-sdxl-txt" --train_text_encoder
        --validation_prompt="cute dragon creature" --report_to="wandb" """,
}
STARTED = ("full", "JAX")  # as a user starts them
SHORTER = {"--resolution": 32, "--max_train_steps": 2, "--num_train_epochs": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four captioned pictures: one update of the full commands, four of the LoRA ones, is an epoch."""
    return make_image_folder(tmp_path_factory.mktemp("few") / "images", count=4)


def make_words(text: str, model: Path, data: Path, on_cpu: bool) -> list[str]:
    """Return a command of the README with local and smaller things in it."""
    local = {"MODEL_NAME": model, "VAE_NAME": model / "vae", "DATASET_NAME": data, "TRAIN_DIR": data}
    for name, value in local.items():
        text = text.replace(f"${name}", str(value))
    for flag, value in SHORTER.items():
        text = re.sub(rf"{flag}=\d+", f"{flag}={value}", text)
    if "--validation_prompt" in text:
        text += " --validation_inference_steps=2"
    if on_cpu:
        text = text.replace("--multi_gpu", "--multi_gpu --num_processes=2")
        text = text if "flax" in text else text.replace('--mixed_precision="fp16"', "")
    return shlex.split(text)


def start(words: list[str], environment: dict[str, str], log: Path) -> int:
    """Run a command as it is; return its exit status."""
    program = {"accelerate": ["-m", "accelerate.commands.accelerate_cli"], "python": []}[words[0]]
    words = [str(ROOT / word) if word.startswith("train_") else word for word in words]
    with log.open("w") as stream:
        return subprocess.run([sys.executable, *program, *words[1:]], cwd=log.parent, env=os.environ | environment,
                              stdout=stream, stderr=subprocess.STDOUT, check=False).returncode


def run_main(name: str, argv: list[str], log: str, *others) -> None:
    """Run a script in a process and a folder of its own."""
    set_up_child(log, *others)
    os.chdir(Path(log).parent)
    load_script(name).main(argv)


def start_without_launcher(words: list[str], environment: dict[str, str], log: Path) -> int:
    """Run a command without its launcher, in the environment that this would make; return its exit status."""
    place = next(index for index, word in enumerate(words) if word.startswith("train_"))
    script, argv = SimpleNamespace(__file__=words[place]), words[place + 1 :]
    launcher = launch_command_parser().parse_args(words[2 : place + 1]) if words[0] == "accelerate" else None
    environment = {**environment, "ACCELERATE_MIXED_PRECISION": getattr(launcher, "mixed_precision", None) or "no"}
    runs = (start_pair(script, argv, log, target=run_main, **environment) if getattr(launcher, "multi_gpu", False)
            else [Run(script, argv, log, target=run_main, **environment)])
    with contextlib.ExitStack() as stack:
        return max([abs(run.end()) for run in [*map(stack.enter_context, runs)]])


@pytest.mark.parametrize("name", COMMANDS)
def test_command_of_the_reference_runs(name, tiny_models, data, tmp_path):
    text, processes = COMMANDS[name], 2 if "several" in name else 1
    model, on_cpu = tiny_models["sdxl" if "SDXL" in name else "sd"], torch.cuda.device_count() < processes
    if "JAX" in name:
        pytest.importorskip("jax")
        model = make_small_stable_diffusion(tmp_path / "model")
    environment = {"ACCELERATE_USE_CPU": str(on_cpu).lower(), "WANDB_MODE": "offline", "JAX_PLATFORMS": "cpu",
                   "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    out, log = tmp_path / re.search(r'--output_dir="(.*?)"', text)[1], tmp_path / "log"
    words = make_words(text, model, data, on_cpu)
    run_command = start if name in STARTED else start_without_launcher
    assert run_command(words, environment, log) == 0, log.read_text()[-3000:]

    trained = read_trained(out)
    if "lora" in text:
        assert any(tensor.abs().max() > 0 for key, tensor in trained.items() if "lora_B" in key or "lora.up" in key)
        assert ("--train_text_encoder" in text) == any(key.startswith("text_encoder") for key in trained)
    else:
        before = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
        assert trained.keys() == before.keys() and any((trained[key] != before[key]).any() for key in before)
    load_pipeline(out, model)
    assert (LORA_FILE if "lora" in text else "model_index.json") in {path.name for path in out.iterdir()}
    checkpoint = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert read_record(checkpoint)["num_processes"] == processes
    assert len(list(tmp_path.rglob("offline-run-*"))) == ("wandb" in text)
    assert len(list(out.glob("validation/*/grid.png"))) >= ("--validation_prompt" in text)
