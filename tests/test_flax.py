"""The JAX script: its networks and its training against torch's, and what it promises as the other scripts do.

Each program that JAX compiles takes seconds here, so runs share their settings, and through a cache their programs.
Whole runs have the smallest networks: that larger ones compute what torch's do is shown of each network by itself.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from conftest import (
    ROOT,
    load_script,
    make_args,
    make_image,
    make_image_folder,
    make_small_stable_diffusion,
    make_tiny_stable_diffusion,
    make_tokenizer,
    read_scalars,
)
from PIL import Image
from runs import (
    Run,
    assert_damage_is_found,
    assert_same_files,
    fail_at,
    list_names,
    prepare,
    read_folder,
    read_record,
    run_and_measure_shares,
    run_elsewhere,
)
from safetensors.torch import load_file, save_file
from test_cli import CONTRACT, GOLDEN, describe, expect, format_help, get_flags
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler

# Networks this small are compiled far longer than they run, but at level 0 convolutions in loops take seconds. The
# flag is read when JAX first looks for devices.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1"
jax = pytest.importorskip("jax")
pytest.importorskip("orbax.checkpoint")
jnp = jax.numpy

NAME = "train_text_to_image_flax.py"
RUN_ONCE = {"xla_backend_optimization_level": 0}  # for a program that is compiled longer than it runs
SAME_IMAGES = {"image_interpolation_mode": "lanczos"}  # the torch scripts' own


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """Keep what is compiled, for later runs in this process and in others."""
    folder = str(tmp_path_factory.mktemp("jax-cache"))
    settings = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
                "JAX_PLATFORMS": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_default_matmul_precision", "highest")
        yield folder
        jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def flax():
    """The script as a module."""
    return load_script(NAME)


@pytest.fixture(scope="module")
def sd():
    """The torch script that trains the same networks, as a module."""
    return load_script("train_text_to_image.py")


@pytest.fixture(scope="module")
def tiny_model(tiny_models):
    """Folder of a tiny Stable Diffusion, for all tests of this module."""
    return tiny_models["sd"]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """Folder of a Stable Diffusion that compiles in half the time of the tiny one."""
    return make_small_stable_diffusion(tmp_path_factory.mktemp("small") / "small")


def make_second_stable_diffusion(folder: Path) -> Path:
    """Write a tiny model of the shape of Stable Diffusion 2: heads per block, matrices for convolutions, gelu, v."""
    torch.manual_seed(1)
    make_tiny_stable_diffusion(folder, "v_prediction")
    tokenizer = make_tokenizer(folder / "second-source")
    UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 48), norm_num_groups=8, layers_per_block=2, cross_attention_dim=32,
        attention_head_dim=(2, 3), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), use_linear_projection=True, upcast_attention=True,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(16, 32), norm_num_groups=8, latent_channels=4, sample_size=32, layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.5
    ).save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=24, hidden_act="gelu", bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def models_of(flax, sd, tiny_model, image_folder, tmp_path_factory):
    """The networks of the two shapes, loaded by both scripts."""
    folder = tmp_path_factory.mktemp("shapes")
    bases = {"first": tiny_model, "second": make_second_stable_diffusion(folder / "second")}
    loaded = {}
    for shape, base in bases.items():
        args = flax.parse_args(make_args(base, image_folder, folder / "out"))
        models = flax.load_models(args, SimpleNamespace(mixed_precision="no"), flax.load_model_configs(args))
        theirs = SimpleNamespace(
            unet=UNet2DConditionModel.from_pretrained(base / "unet"), vae=AutoencoderKL.from_pretrained(base / "vae"),
            text_encoder=CLIPTextModel.from_pretrained(base / "text_encoder"), trained=("unet", "text_encoder"),
            clip_skip=None, scheduler_config=models.scheduler_config)
        theirs.vae.requires_grad_(False)
        loaded[shape] = models, theirs
    return loaded


def make_numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_batch(num_tokens: int, height: int = 32, width: int = 24) -> dict[str, np.ndarray]:
    """Return a batch of three as the torch scripts have it."""
    rng, latents = np.random.default_rng(0), (3, 4, height // 2, width // 2)
    return {"images": rng.integers(0, 256, (3, 3, height, width), np.uint8), "noise": make_numbers(*latents, seed=2),
            "posterior_noise": make_numbers(*latents, seed=1), "offset_noise": make_numbers(3, 4, 1, 1, seed=3),
            "perturbation_noise": make_numbers(*latents, seed=4), "timesteps": np.array([3, 480, 999]),
            "input_ids": rng.integers(0, 500, (3, num_tokens))}


def put_channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


def assert_near(ours, theirs, tolerance: float = 1e-4) -> None:
    """Fail unless two arrays differ by less than a share of the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


# ---- Networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["first", "second"])
def test_decoder_agrees_with_torch(flax, models_of, shape):
    """The half of the VAE that no loss passes through."""
    (models, theirs), latents = models_of[shape], make_numbers(2, 4, 10, 7)
    decoded = jax.jit(lambda weights: flax.with_weights(models, weights).vae.decode(put_channels_last(latents)),
                      compiler_options=RUN_ONCE)(models.frozen)
    with torch.no_grad():
        expected = theirs.vae.decode(torch.tensor(latents) / theirs.vae.config.scaling_factor).sample
    assert_near(decoded, put_channels_last(expected.numpy()))


@pytest.mark.parametrize(("shape", "flags"), [
    ("first", {"snr_gamma": 5.0, "noise_offset": 0.1, "input_perturbation": 0.1}),
    ("first", {"dream_training": True}),
    ("second", {"snr_gamma": 5.0, "rescale_betas_zero_snr": True}),
])
def test_loss_and_gradients_agree_with_torch(flax, sd, models_of, shape, flags, tmp_path, image_folder):
    """The same draws give the same loss of each sample and, but for DREAM's, the same gradient of each weight.

    That is of the UNet's weights and of the text encoder's; the images are encoded by the VAE. DREAM's latents have
    odd sides, which do not halve.
    """
    has_gradients = "dream_training" not in flags
    (models, theirs), batch = models_of[shape], make_batch(24) if has_gradients else make_batch(24, 30, 22)
    base = Path(next(iter(models.files.values()))).parent.parent
    args = flax.parse_args(make_args(base, image_folder, tmp_path / "out", **flags))
    config = flax.make_scheduler_config(args, models.configs["scheduler"])
    objective, expected = flax.make_objective(args, config), sd.make_objective(args, config, torch.device("cpu"))
    assert_near(objective.alpha, expected.alpha, 1e-5)
    assert_near(objective.sigma, expected.sigma, 1e-5)

    def compute_mean(weights, batch):
        networks = flax.with_weights(models, {**models.frozen, **weights})
        losses = flax.compute_loss(networks.unet, objective, *flax.encode_batch(networks, batch), batch)
        return losses.mean(), losses

    batch_ours = {name: put_channels_last(array) for name, array in batch.items()}
    compute = jax.value_and_grad(compute_mean, has_aux=True) if has_gradients else compute_mean
    text_weights = {name: array for name, array in models.frozen.items() if name.startswith("text_encoder.")}
    results = jax.jit(compute, compiler_options=RUN_ONCE)({**models.initial, **text_weights}, batch_ours)
    batch = {name: torch.tensor(array) for name, array in batch.items()}
    losses = sd.compute_loss(theirs.unet, expected, *sd.encode_batch(theirs, batch), batch)
    if not has_gradients:
        assert_near(results[1], losses.detach())
        return
    (_, ours), gradients = results
    assert_near(ours, losses.detach())
    theirs.unet.zero_grad()
    theirs.text_encoder.zero_grad()
    losses.mean().backward()
    for part in ("unet", "text_encoder"):
        names = flax.list_shapes(part, models.configs[part]).keys()
        parameters = {name.removeprefix("text_model."): parameter
                      for name, parameter in getattr(theirs, part).named_parameters()}
        assert names == parameters.keys()
        scale = max(parameter.grad.abs().max() for parameter in parameters.values())
        assert scale > 1e-6
        for name in names:
            gradient = flax.change_layout(name, np.asarray(gradients[f"{part}.{name}"]), to_torch=True)
            assert np.abs(gradient - parameters[name].grad.numpy()).max() <= 1e-4 * scale, name


def test_recomputation_keeps_less(flax, models_of, tiny_model, image_folder, tmp_path):
    """With --gradient_checkpointing the backward pass is given a fraction of the activations."""
    plain, _ = models_of["first"]
    args = flax.parse_args(make_args(tiny_model, image_folder, tmp_path / "out", gradient_checkpointing=True))
    remat = flax.load_models(args, SimpleNamespace(mixed_precision="no"), flax.load_model_configs(args))
    noisy, timesteps, states = make_numbers(2, 16, 16, 4), np.array([1, 500]), make_numbers(2, 24, 32)
    sizes, own = [], sum(array.size for array in plain.initial.values())  # the weights, which are kept either way
    for models in (plain, remat):
        def compute_sum(weights, models=models):
            return jnp.square(flax.with_weights(models, weights).unet(noisy, timesteps, states)).sum()

        kept = jax.eval_shape(lambda weights: jax.vjp(compute_sum, weights)[1], plain.initial)
        sizes.append(sum(array.size for array in jax.tree.leaves(kept)) - own)
    assert 0 < sizes[1] < 0.3 * sizes[0]


def list_equations(jaxpr):
    """Yield the operations of a program, also of the programs inside."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            inner = getattr(value, "jaxpr", value)
            yield from list_equations(inner) if hasattr(inner, "eqns") else ()


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_precision_of_each_operation(flax, tiny_model, image_folder, tmp_path, precision):
    """bf16 and fp16 are for products of matrices; softmax, timesteps, noising, norms and loss are always float32."""
    args = flax.parse_args(make_args(tiny_model, image_folder, tmp_path / "out", mixed_precision=precision))
    configs = flax.load_model_configs(args)
    models = flax.load_models(args, SimpleNamespace(mixed_precision=precision), configs)
    objective, batch = flax.make_objective(args, models.scheduler_config), make_batch(24)
    expected = np.dtype({"no": np.float32, "bf16": jnp.bfloat16, "fp16": np.float16}[precision])
    assert all(array.dtype == expected for array in models.frozen.values())
    assert all(array.dtype == jnp.float32 for array in models.initial.values())

    def compute_losses(weights, batch):
        networks = flax.with_weights(models, weights)
        return flax.compute_loss(networks.unet, objective, *flax.encode_batch(networks, batch), batch)

    program = jax.make_jaxpr(compute_losses)(
        {**models.frozen, **models.initial}, {name: put_channels_last(array) for name, array in batch.items()})
    assert [value.aval.dtype for value in program.jaxpr.outvars] == [jnp.float32]
    found = {}
    for equation in list_equations(program.jaxpr):
        if equation.invars:
            found.setdefault(equation.primitive.name, set()).add(equation.invars[0].aval.dtype)
    assert found["conv_general_dilated"] == {expected} and found["dot_general"] == {expected}
    assert found["exp"] == found["cos"] == found["sin"] == found["rsqrt"] == {np.dtype(np.float32)}
    squares = {equation.invars[0].aval.dtype for equation in list_equations(program.jaxpr)
               if equation.primitive.name in ("square", "integer_pow")}
    assert squares == {np.dtype(np.float32)}


def test_attention_in_parts_is_attention(flax, monkeypatch):
    """A table of pairs that is made in parts gives the same, and keeps nothing of itself for the backward pass."""
    query, key, value = (make_numbers(2, length, 16, seed=length) for length in (60, 24, 24))

    def attend(query, key):
        return flax.compute_attention(query, key, value, 4)

    whole, whole_gradients = attend(query, key), jax.grad(lambda *xs: attend(*xs).sum(), argnums=(0, 1))(query, key)
    monkeypatch.setattr(flax, "QUERIES_AT_ONCE", 16)  # 60 is four times 15
    assert_near(attend(query, key), whole, 1e-6)
    for ours, expected in zip(jax.grad(lambda *xs: attend(*xs).sum(), argnums=(0, 1))(query, key), whole_gradients,
                              strict=True):
        assert_near(ours, expected, 1e-5)
    kept = jax.eval_shape(lambda *xs: jax.vjp(attend, *xs)[1], query, key)
    assert sum(array.size for array in jax.tree.leaves(kept)) <= query.size + key.size + 2 * value.size
    tables = [equation.outvars[0].aval.shape for equation in list_equations(
        jax.make_jaxpr(attend)(query, key).jaxpr) if equation.primitive.name == "exp"]
    assert tables == [(2, 4, 15, 24)]


# ---- Model folders --------------------------------------------------------------------------------------------------


def load(flax, base: Path, images: Path, out: Path, **flags):
    """Return the models of a base folder."""
    args = flax.parse_args(make_args(base, images, out, **flags))
    return flax.load_models(args, SimpleNamespace(mixed_precision="no"), flax.load_model_configs(args))


def test_other_forms_of_the_same_model_are_read(flax, models_of, tiny_model, image_folder, tmp_path):
    """Shards, files named *.fp16.safetensors and the names of older versions give the same weights."""
    plain, theirs = models_of["first"]
    base = shutil.copytree(tiny_model, tmp_path / "base")
    for part in ("unet", "vae", "text_encoder"):
        for file in (base / part).glob("*.safetensors"):
            file.unlink()
    theirs.unet.save_pretrained(base / "unet", max_shard_size="200KB", variant="fp16")
    assert (base / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(tiny_model / "vae" / "diffusion_pytorch_model.safetensors")
    for new, old in old_names.items():
        weights = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensor
                   for name, tensor in weights.items()}
    assert any(".query." in name for name in weights)
    save_file(weights, base / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    weights = load_file(tiny_model / "text_encoder" / "model.safetensors")
    weights = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(weights, base / "text_encoder" / "model.fp16.safetensors")

    other = load(flax, base, image_folder, tmp_path / "out", variant="fp16")
    for ours, expected in ((other.initial, plain.initial), (other.frozen, plain.frozen)):
        assert ours.keys() == expected.keys()
        assert all(np.array_equal(ours[name], expected[name]) for name in ours)
    with pytest.raises(OSError, match=r"no diffusion_pytorch_model\.safetensors"):
        load(flax, base, image_folder, tmp_path / "out")
    shutil.copytree(tiny_model / "vae", base / "vae", dirs_exist_ok=True)
    (base / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()  # one part may have no such variant
    mixed = load(flax, base, image_folder, tmp_path / "out", variant="fp16")
    assert all(np.array_equal(mixed.frozen[name], plain.frozen[name]) for name in plain.frozen)


@pytest.fixture(scope="module")
def flax_and_torch_folders(tmp_path_factory):
    """A folder as diffusers wrote it from Flax models, and the torch models that these were made from."""
    folder = tmp_path_factory.mktemp("formats")
    sys.path.insert(0, str(ROOT / "tests" / "fixtures"))
    import make_flax_folder as source
    sys.path.pop(0)
    tokenizer = make_tokenizer(folder / "tokenizer-source")
    parts = {"unet": UNet2DConditionModel(**source.UNET), "vae": AutoencoderKL(**source.VAE),
             "text_encoder": CLIPTextModel(CLIPTextConfig(**source.TEXT))}
    for network in parts.values():
        source.fill(network)
    StableDiffusionPipeline(**parts, tokenizer=tokenizer, scheduler=PNDMScheduler(**source.SCHEDULER),
                            safety_checker=None, feature_extractor=None,
                            requires_safety_checker=False).save_pretrained(folder / "torch")
    shutil.copytree(ROOT / "tests" / "fixtures" / "flax_model", folder / "flax")
    shutil.copytree(folder / "torch" / "tokenizer", folder / "flax" / "tokenizer")
    return folder / "flax", folder / "torch"


def test_flax_folders_are_read_and_written_as_torch(flax, flax_and_torch_folders, image_folder, tmp_path):
    """The numbers are those of the torch folder; what is exported are safetensors with torch's class names."""
    base, expected = flax_and_torch_folders
    ours, theirs = (load(flax, folder, image_folder, tmp_path / "out") for folder in (base, expected))
    assert ours.initial and ours.frozen and ours.scheduler_config["_class_name"] == "PNDMScheduler"
    for mine, others in ((ours.initial, theirs.initial), (ours.frozen, theirs.frozen)):
        assert mine.keys() == others.keys()
        assert all(np.array_equal(mine[name], others[name]) for name in mine)

    out = tmp_path / "out"
    args = flax.parse_args(make_args(base, image_folder, out))
    models = dataclasses.replace(ours, state=SimpleNamespace(weights=ours.initial, averages=None))
    flax.export_model(args, SimpleNamespace(is_main_process=True), models)
    assert not list(out.rglob("*.msgpack")) and "Flax" not in "".join(
        file.read_text() for file in out.rglob("*.json") if file.parent.name != "tokenizer")
    pipeline, reference = (StableDiffusionPipeline.from_pretrained(folder) for folder in (out, expected))
    for part in ("unet", "vae", "text_encoder"):
        found, wanted = (getattr(side, part).state_dict() for side in (pipeline, reference))
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_takes_earlier_text_states(flax, models_of, image_folder, tmp_path, skip):
    """The states that diffusers' pipelines use; what comes after them is not trained, and exported as it was."""
    _, theirs = models_of["second"]
    base = Path(models_of["second"][0].files["vae/config.json"]).parent.parent
    out = tmp_path / "out"
    args = flax.parse_args(make_args(base, image_folder, out, clip_skip=skip, train_text_encoder=True))
    models = flax.load_models(args, SimpleNamespace(mixed_precision="no"), flax.load_model_configs(args))
    ids = np.arange(48).reshape(2, 24)
    weights = {**models.frozen, **models.initial}
    states = flax.encode_captions(flax.with_weights(models, weights), {"input_ids": ids})["encoder_hidden_states"]
    with torch.no_grad():
        output = theirs.text_encoder(torch.tensor(ids), output_hidden_states=True)
        (norm,) = (module for name, module in theirs.text_encoder.named_modules() if name.endswith("final_layer_norm"))
        assert_near(states, norm(output.hidden_states[-skip - 1]))
    layers = {name.split(".")[3] for name in models.initial if "encoder.layers" in name}
    assert layers == {str(number) for number in range(3 - skip)}

    models.state = SimpleNamespace(weights=models.initial, averages=None)
    flax.export_model(args, SimpleNamespace(is_main_process=True), models)
    exported, original = (CLIPTextModel.from_pretrained(place / "text_encoder").state_dict() for place in (out, base))
    assert exported.keys() == original.keys() and all(torch.equal(exported[name], original[name]) for name in original)
    assert f"clip_skip={skip}" in flax.make_example(args, "a cat")


def test_more_skipped_layers_than_there_are_are_refused(flax, tiny_model, image_folder, tmp_path):
    with pytest.raises(flax.UserError, match="--clip_skip 9 skips all layers"):
        flax.main(make_args(tiny_model, image_folder, tmp_path / "out", clip_skip=9))


def test_a_tokenizer_without_a_length_gets_the_text_encoders(flax, tiny_model, image_folder, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    path = base / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    models = load(flax, base, image_folder, tmp_path / "out")
    assert models.tokenizer.model_max_length == 24


def test_a_model_in_one_file_is_refused_with_what_to_do(flax, tiny_model, image_folder, tmp_path):
    with pytest.raises(ValueError, match=r"is one file.*from_single_file"):
        load(flax, tiny_model / "unet" / "diffusion_pytorch_model.safetensors", image_folder, tmp_path / "out")


@pytest.mark.parametrize(("part", "name", "value"), [
    ("unet", "class_embed_type", "timestep"), ("unet", "transformer_layers_per_block", [1, 2]),
    ("unet", "down_block_types", ["DownBlock2D", "AttnDownBlock2D"]), ("unet", "act_fn", "gelu"),
    ("vae", "act_fn", "relu"), ("text_encoder", "hidden_act", "relu"), ("scheduler", "beta_schedule", "sigmoid"),
])
def test_settings_that_are_not_implemented_are_refused(flax, tiny_model, image_folder, tmp_path, part, name, value):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    path = base / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match="not implemented|does not support|cannot train with") as error:
        load(flax, base, image_folder, tmp_path / "out")
    assert str(value[-1] if isinstance(value, list) else value) in str(error.value)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused_by_name(flax, tiny_model, image_folder, tmp_path, change):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    if change == "unexpected":
        weights["conv_in.extra"] = torch.zeros(1)
    elif change == "missing":
        del weights["conv_in.weight"]
    else:
        weights["conv_in.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"conv_in\.(weight|extra)"):
        load(flax, base, image_folder, tmp_path / "out")


# ---- Optimization ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "flags"), [
    ("constant", {}), ("constant_with_warmup", {}), ("linear", {}), ("cosine", {}),
    ("cosine_with_restarts", {"lr_num_cycles": 3}), ("polynomial", {"lr_power": 2.0})])
def test_schedules_are_those_of_the_torch_scripts(flax, tiny_model, image_folder, tmp_path, name, flags):
    args = flax.parse_args(make_args(tiny_model, image_folder, tmp_path / "out", lr_scheduler=name, lr_warmup_steps=4,
                                     learning_rate=1e-3, **flags))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    expected = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=13,
                             num_cycles=args.lr_num_cycles, power=args.lr_power).lr_lambdas[0]
    factor = flax.make_lr_factor(args, 1e-3, 13)
    np.testing.assert_allclose([factor(step) for step in range(14)], [expected(step) for step in range(14)], atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 1e-8])
def test_polynomial_does_not_raise_a_tiny_learning_rate(flax, tiny_model, image_folder, tmp_path, rate):
    """It ends at 1e-7, above such a rate, which then stays as it is."""
    args = flax.parse_args(make_args(tiny_model, image_folder, tmp_path / "out", lr_scheduler="polynomial"))
    factor = flax.make_lr_factor(args, rate, 13)
    assert [factor(step) for step in (600, 900)] == [1, 1]


def train(script, base: Path, images: Path, out: Path, **flags) -> dict[int, float]:
    """Run a script; return its losses by update."""
    script.main(make_args(base, images, out, report_to="tensorboard", **flags))
    return read_scalars(out, "train_loss")


COMMON = {"max_train_steps": 6, "random_flip": True, "train_batch_size": 3, "gradient_accumulation_steps": 2,
          "use_ema": True, "adam_weight_decay": 0.1, "noise_offset": 0.1, "snr_gamma": 5, "logging_steps": 2,
          "checkpointing_steps": 3, "proportion_empty_prompts": 0.3, "prediction_type": "v_prediction",
          "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2, "skip_broken_images": True, **SAME_IMAGES}


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    """Folder of ten pictures of which one is broken, and of which half have captions that fill all tokens."""
    folder = make_image_folder(tmp_path_factory.mktemp("odd") / "images")
    (folder / "004.png").write_bytes(b"broken")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        row["text"] = " ".join(["picture"] * 30)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def full_run(flax, small_model, odd_folder, tmp_path_factory):
    """A run of six updates of three epochs, of which every second is of four samples, and how often it compiled."""
    out, compiled, original = tmp_path_factory.mktemp("full") / "out", [], flax.Meter.end_update
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *rest, **facts: events.append(name) if "compile" in name else None)

    def end_update(self, *rest):
        compiled.append(len(events))
        return original(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flax.Meter, "end_update", end_update)
        losses = train(flax, small_model, odd_folder, out, **COMMON)
    return SimpleNamespace(out=out, losses=losses, compiled=compiled)


def test_updates_follow_those_of_torch(sd, full_run, small_model, odd_folder, tmp_path):
    """Six updates with AdamW, warm-up, Min-SNR, offset noise and averages give torch's losses, weights and files.

    Here each is of two micro steps of three, also where the second has one sample only, and there of one.
    """
    out = tmp_path / "torch"
    whole = {"train_batch_size": 6, "gradient_accumulation_steps": 1}
    losses = train(sd, small_model, odd_folder, out, **{**COMMON, **whole})
    assert list(full_run.losses) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(full_run.losses.values()), list(losses.values()), rtol=1e-4)
    for tag in ("grad_norm", "lr", "ema_decay", "epoch", "long_captions"):
        ours, theirs = (list(read_scalars(folder, tag).values()) for folder in (full_run.out, out))
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, err_msg=tag)
    ours, theirs, base = (load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
                          for folder in (full_run.out, out, small_model))
    assert ours.keys() == theirs.keys()
    difference = sum((ours[name] - theirs[name]).square().sum() for name in ours)
    moved = sum((theirs[name] - base[name]).square().sum() for name in ours)
    assert difference < 1e-3 * moved and moved > 0
    assert list_keys(full_run.out / "text_encoder") == list_keys(small_model / "text_encoder")
    configs = [json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
               for folder in (full_run.out, out)]
    assert [config["prediction_type"] for config in configs] == ["v_prediction"] * 2
    assert configs[0]["_class_name"] == configs[1]["_class_name"]
    ours, theirs = (json.loads((folder / "model_index.json").read_text()) for folder in (full_run.out, out))
    assert ours.items() <= theirs.items()


def test_buckets_and_caches_follow_those_of_torch(flax, sd, small_model, tmp_path, monkeypatch):
    """Images of two shapes and captions, encoded beforehand, give torch's losses; each shape is compiled once."""
    for index, size in enumerate([(40, 36), (80, 40), (41, 40), (84, 41), (36, 40), (60, 30)]):
        make_image(index, size).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"picture {index}")
    flags = {"aspect_ratio_buckets": True, "bucket_step": 8, "center_crop": True, "gradient_accumulation_steps": 2,
             "train_batch_size": 1, "max_train_steps": 5, "report_to": "tensorboard", **SAME_IMAGES}
    caches = {"cache_latents": True, "cache_text_embeddings": True, "cache_dtype": "fp32"}
    compiled, original = [], flax.compile_train_step
    monkeypatch.setattr(flax, "compile_train_step", lambda *given: compiled.append(0) or original(*given))
    losses = {}
    for name, (script, more) in {"torch": (sd, {}), "jax": (flax, caches)}.items():
        out = tmp_path.parent / f"{tmp_path.name}-{name}"
        script.main(make_args(small_model, tmp_path, out, **flags, **more))
        losses[name] = list(read_scalars(out, "train_loss").values())
    assert len(losses["torch"]) == 5 and len(compiled) == 2
    assert losses["jax"] == pytest.approx(losses["torch"], rel=1e-4)


def list_keys(folder: Path) -> set[str]:
    """Return the names of the tensors in a part of a model."""
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def test_nothing_is_compiled_after_the_first_update(full_run):
    """Not for the smaller last batch of an epoch either, nor for the checkpoint in the middle."""
    assert len(full_run.compiled) == 6 and full_run.compiled[0] > 0
    assert full_run.compiled[1:] == full_run.compiled[:1] * 5


def test_resumed_run_is_the_uninterrupted_one(flax, full_run, small_model, odd_folder, tmp_path):
    """From a checkpoint in an epoch the same losses, weights and averages follow, bit for bit."""
    out = tmp_path / "out"
    shutil.copytree(full_run.out / "checkpoint-3", out / "checkpoint-3")
    losses = train(flax, small_model, odd_folder, out, **{**COMMON, "resume_from_checkpoint": "latest",
                                                           "checkpoints_total_limit": 1})
    assert losses == {step: loss for step, loss in full_run.losses.items() if step > 3}
    assert list_names(out) == {"checkpoint-6"} and list_names(full_run.out) == {"checkpoint-3", "checkpoint-6"}
    assert read_record(out / "checkpoint-6")["progress"] == read_record(full_run.out / "checkpoint-6")["progress"]
    assert_same_files(out / "unet", full_run.out / "unet")
    assert not list(out.glob(".partial-*"))

    for name in ("unet", "model_index.json"):  # a checkpoint is exported by resuming it at its end
        flax.remove(out / name)
    flax.main(make_args(small_model, odd_folder, out, **COMMON, resume_from_checkpoint="latest", report_to="none"))
    assert_same_files(out / "unet", full_run.out / "unet")
    assert (out / "model_index.json").is_file()


def test_averages_need_their_flag_and_another_script_is_told(flax, full_run, small_model, image_folder, tmp_path):
    checkpoint = full_run.out / "checkpoint-3"
    with pytest.raises(ValueError, match="checkpoint-3 does not fit: use_ema True -> False"):
        flax.main(make_args(small_model, image_folder, tmp_path / "out", resume_from_checkpoint=checkpoint))
    other = tmp_path / "checkpoint-2"
    other.mkdir()
    (other / "run_record.json").write_text(json.dumps({**read_record(checkpoint), "files": {}}))
    with pytest.raises(ValueError, match="checkpoint-2 cannot be loaded"):
        flax.main(make_args(small_model, image_folder, tmp_path / "out", resume_from_checkpoint=other))


def test_a_damaged_checkpoint_is_refused(flax, full_run, tmp_path):
    out = shutil.copytree(full_run.out, tmp_path / "out")
    assert_damage_is_found(flax, out / "checkpoint-6", out / "checkpoint-3", "cut")


# The schedule does not depend on the number of updates, which would be in the compiled program.
PLAIN = {"max_train_steps": 4, "train_batch_size": 4, "center_crop": True, "use_ema": True,
         "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}


@pytest.fixture(scope="module")
def plain_run(flax, small_model, image_folder, tmp_path_factory):
    """A run of updates of four, four, two and four samples, and its losses."""
    out = tmp_path_factory.mktemp("plain") / "out"
    return SimpleNamespace(out=out, losses=train(flax, small_model, image_folder, out, **PLAIN))


def test_caches_belong_to_their_network_and_must_be_finite(flax, tiny_model, image_folder, tmp_path):
    """Each caption has its own states. Another VAE's latents are made anew; those that are not finite end the run."""
    base, encoded = shutil.copytree(tiny_model, tmp_path / "base"), tmp_path / "encoded"
    flags = {"cache_latents": True, "cache_text_embeddings": True, "encoded_dir": encoded}
    _, models, samples = prepare(flax, make_args(base, image_folder, tmp_path / "out", **flags))
    captions = ["", "picture number 3", "picture number 8"]
    batch = flax.collate([{"caption": caption} for caption in captions], flax.list_tokenizers(models))
    states = flax.encode_captions(flax.with_weights(models, models.frozen), batch)["encoder_hidden_states"]
    rows = [samples.text_states.read(samples.caption_rows[caption]) for caption in captions]
    assert_near([row["encoder_hidden_states"] for row in rows], states, 2e-3)
    before = read_folder(encoded)
    prepare(flax, make_args(base, image_folder, tmp_path / "out", **flags))
    assert read_folder(encoded) == before
    path = base / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({**weights, "quant_conv.bias": torch.full_like(weights["quant_conv.bias"], torch.inf)}, path)
    with pytest.raises(flax.UserError, match="are not finite as float16"):
        prepare(flax, make_args(base, image_folder, tmp_path / "out", **flags))


def test_bf16_and_a_trained_text_encoder(flax, plain_run, small_model, image_folder, tmp_path):
    """Losses are near those of float32; weights stay float32, move, and load in torch."""
    out = tmp_path / "out"
    losses = train(flax, small_model, image_folder, out, **PLAIN, mixed_precision="bf16", train_text_encoder=True,
                   text_encoder_lr=1e-5)
    np.testing.assert_allclose(list(losses.values()), list(plain_run.losses.values()), rtol=0.03)
    assert all(name.startswith("text_model.") for name in list_keys(out / "text_encoder"))
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    base = StableDiffusionPipeline.from_pretrained(small_model)
    for part in ("unet", "text_encoder"):
        pairs = list(zip(getattr(pipeline, part).parameters(), getattr(base, part).parameters(), strict=True))
        assert all(ours.dtype == torch.float32 for ours, _ in pairs)
        most = max((ours - theirs).abs().max() for ours, theirs in pairs)
        rate = 1e-3 if part == "unet" else 1e-5
        assert 1.25 * rate < most < 4.5 * rate  # AdamW's first steps are as long as the rate, which are 2.5 of four
    assert_same_files(out / "vae", small_model / "vae")


def test_loss_scale_is_adapted_as_by_torch(flax, monkeypatch):
    """Halved by an overflow, doubled after a while without one, with what is counted until then."""
    monkeypatch.setattr(flax, "LOSS_SCALE_INTERVAL", 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=flax.FIRST_LOSS_SCALE, growth_interval=3)
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight])
    ours = flax.LossScale(jnp.float32(flax.FIRST_LOSS_SCALE), jnp.int32(0))
    for gradient in (1.0, 1.0, np.inf, 1.0, 1.0, 1.0, 1.0, np.nan, np.inf, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        scaler.scale(weight.sum() * gradient).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ours = flax.adapt_loss_scale(ours, jnp.isfinite(gradient))
        assert float(ours.scale) == scaler.get_scale() and int(ours.num_finite) == scaler._get_growth_tracker()


def test_fp16_skips_overflows_and_resumes(flax, plain_run, small_model, image_folder, tmp_path, monkeypatch):
    """Losses are near float32's until the loss scale is too large, doubled by each update as it is here.

    Such an update is skipped: it changes nothing but the loss scale. Resume is bit for bit.
    """
    flags = {**PLAIN, "mixed_precision": "fp16", "max_train_steps": 12, "checkpointing_steps": 6, "logging_steps": 1}
    monkeypatch.setattr(flax, "LOSS_SCALE_INTERVAL", 1)
    out = tmp_path / "out"
    losses, scales, norms, rates, decays = (train(flax, small_model, image_folder, out, **flags), *(
        read_scalars(out, tag) for tag in ("loss_scale", "grad_norm", "lr", "ema_decay")))
    skipped, done = [step for step in norms if not np.isfinite(norms[step])], 0
    assert scales[1] == 2.0**16 and 3 <= skipped[0] < 12 and np.isfinite(list(losses.values())).all()
    for step in range(1, min(4, skipped[0]) + 1):
        assert losses[step] == pytest.approx(plain_run.losses[step], rel=0.01)
    for step in range(1, 13):  # the schedule and the average move on with the weights only
        assert rates[step] == pytest.approx(1e-3 * min(1, done / 2))
        assert decays[step] == pytest.approx(float(flax.compute_ema_decay(done + 1, 0.9999)))
        done += step not in skipped
        assert step == 12 or scales[step + 1] == scales[step] * (0.5 if step in skipped else 2)

    resumed = tmp_path / "resumed"
    shutil.copytree(out / "checkpoint-6", resumed / "checkpoint-6")
    assert train(flax, small_model, image_folder, resumed, **flags, resume_from_checkpoint="latest") == {
        step: loss for step, loss in losses.items() if step > 6}
    assert read_scalars(resumed, "loss_scale") == {step: scale for step, scale in scales.items() if step > 6}
    assert_same_files(resumed / "unet", out / "unet")


def test_numbers_are_read_late_and_one_that_is_not_finite_ends_the_run(flax, tiny_model, image_folder, tmp_path):
    """Those of two updates while two later ones are computed; before anything is saved, all of them."""
    args = flax.parse_args(make_args(tiny_model, image_folder, tmp_path / "out", logging_steps=2))
    accelerator = SimpleNamespace(is_main_process=False, log=lambda numbers, step: None, mixed_precision="no")
    meter = flax.Meter(args, accelerator, 0, 9)
    step = flax.MicroStep(0, 2, 2, ends_update=True, indices=[])
    for update, loss in enumerate((1.0, 2.0, 3.0, np.nan), start=1):
        meter.end_update(update, step, make_metrics(loss, 1.0))
        assert len(meter.updates) == (update if update < 3 else update - 2)
    with pytest.raises(flax.UserError, match="the loss is nan at step 4 .*learning rate"):
        meter.flush()
    assert not meter.updates
    meter.end_update(5, step, make_metrics(1.0, np.inf))
    with pytest.raises(flax.UserError, match="at step 5 .gradient norm inf"):
        meter.flush()


def make_metrics(loss: float, norm: float) -> dict:
    """Return an update's numbers."""
    return {"train_loss": jnp.array(loss), "grad_norm": jnp.array(norm), "lr": jnp.array(1e-4),
            "signal": jnp.array(0), "long_captions": jnp.array(2)}


def test_matrices_are_multiplied_exactly_unless_asked_otherwise(flax, tiny_model, image_folder, tmp_path):
    """On GPUs and TPUs, whose default for float32 is a shorter format."""
    before = jax.config.jax_default_matmul_precision
    try:
        for flags, expected in (({}, "highest"), ({"allow_tf32": True}, None), ({"mixed_precision": "bf16"}, None)):
            jax.config.update("jax_default_matmul_precision", None)
            flax.make_accelerator(flax.parse_args(make_args(tiny_model, image_folder, tmp_path / "out", **flags)))
            assert jax.config.jax_default_matmul_precision == expected
    finally:
        jax.config.update("jax_default_matmul_precision", before)


# ---- Devices and processes ------------------------------------------------------------------------------------------

def test_four_devices_give_the_loss_of_one(flax, plain_run, small_model, image_folder, tmp_path):
    """Each with a sample of its own, with whole copies of the weights or a part of them; also for the 2 left over.

    An epoch is of three updates then, --scale_lr multiplies the rate by four, pictures are those of one device, and
    the backward pass may compute activations again.
    """
    flags = {**PLAIN, "train_batch_size": 1, "report_to": "tensorboard"}
    epoch = {"max_train_steps": None, "num_train_epochs": 1, "scale_lr": True, "learning_rate": 1e-3 / 4, "fsdp": True,
             "gradient_checkpointing": True, "validation_prompts": ["a cat", "a dog"], "validation_size": ["48x16"],
             "validation_inference_steps": 3}
    runs = [make_args(small_model, image_folder, tmp_path / name, **{**flags, **more})
            for name, more in (("whole", {}), ("divided", epoch))]
    devices = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=4"
    settings = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    with Run(flax, [], tmp_path / "log", target=functools.partial(run_and_measure_shares, runs), **settings,
             XLA_FLAGS=devices) as run:
        assert run.end() == 0, run.log.read_text()
    for name, count in (("whole", 4), ("divided", 3)):
        losses = read_scalars(tmp_path / name, "train_loss")
        np.testing.assert_allclose(list(losses.values()), list(plain_run.losses.values())[:count], rtol=1e-5)
    whole, divided = json.loads((tmp_path / "log.json").read_text())
    for name in ("weights", "moments", "averages"):
        assert whole[name] == 1 and 0.25 <= divided[name] < 0.3
    for facts in (whole, divided):
        assert facts["batch"] == 0.25 and facts["donated"] > 0.99
    assert_drawn_by_torch(tmp_path / "divided", "step-3", ["a cat", "a dog"], (48, 16), 3, 7.5)


def start_hosts(flax, argv: list, log: Path, target) -> list[Run]:
    """Start two processes that train together, as Slurm would."""
    slurm = {"SLURM_JOB_ID": os.getpid(), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2, "SLURM_LOCALID": 0}
    return [Run(flax, argv, log, target=target, JAX_PLATFORMS="cpu", RANK=rank, SLURM_PROCID=rank, **slurm)
            for rank in range(2)]


def test_validation_that_fails_in_one_process_ends_both(flax, tiny_model, image_folder, tmp_path):
    """The other waits for its part of the loss: going on would pair that with the next update's gradients."""
    broken = make_image_folder(tmp_path / "broken", count=4)
    (broken / "001.png").write_bytes(b"no picture")
    argv = make_args(tiny_model, image_folder, tmp_path / "out", multi_host=True, validation_data_dir=broken,
                     validation_steps=1, max_train_steps=3)
    first, second = start_hosts(flax, argv, tmp_path / "log", target=run_elsewhere)
    with first, second:
        assert first.end() != 0 and second.end() != 0
    log = (tmp_path / "log").read_text()
    assert re.search(r"row 1 of the data .* cannot be read as an image", log) and "the run goes on" not in log


def test_when_one_process_hangs_the_other_ends(flax, tiny_model, image_folder, tmp_path):
    """JAX ends it as soon as the first has not been heard of for so long: by default 100 seconds, here 4."""
    log, argv = tmp_path / "log", make_args(tiny_model, image_folder, tmp_path / "out", multi_host=True)
    first, second = start_hosts(flax, argv, log, target=functools.partial(fail_at, "load_models", 1, signal.SIGSTOP))
    with first, second:
        assert first.end() == -signal.SIGABRT
    assert re.search("JAX distributed service detected .*stopped sending heartbeats", log.read_text(), re.DOTALL)


REFUSE = """
import importlib.machinery, runpy, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        refused = name.split(".")[0] in ("torch", "torchvision", "accelerate", "diffusers", "tensorflow")
        return None if refused else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@contextlib.contextmanager
def started(argv: list[str], log: Path):
    """Start the script in a process that has no torch; it is killed at the end."""
    with log.open("w") as stream:
        process = subprocess.Popen([sys.executable, "-c", REFUSE, str(ROOT / NAME), *argv], stdout=stream,
                                   stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_without_torch_a_stopped_run_saves_and_goes_on(plain_run, small_model, image_folder, tmp_path):
    """SIGTERM ends it with 128 + 15 and a checkpoint; the run that goes on ends as one that was never stopped."""
    out, log = tmp_path / "out", tmp_path / "log"
    argv = make_args(small_model, image_folder, out, **{**PLAIN, "report_to": "tensorboard",
                                                          "max_train_steps": 100_000, "checkpointing_steps": 1})
    with started(argv, log) as process:
        end = time.monotonic() + 120
        while not list_names(out):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM, log.read_text()
    text = log.read_text()
    assert "stopped by SIGTERM" in text and "compiled the update for" in text and "Traceback" not in text
    latest = max(read_record(out / name)["progress"]["global_step"] for name in list_names(out))
    assert f"after update {latest}" in text
    losses = read_scalars(out, "train_loss")
    assert list(losses) == list(range(1, latest + 1))
    common = [step for step in losses if step in plain_run.losses]
    assert [losses[step] for step in common] == [plain_run.losses[step] for step in common]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signals_ask_for_a_stop_once(flax, name):
    """SLURM warns with SIGUSR1; a second one ends the process."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with flax.StopRequest(SimpleNamespace(num_processes=1)) as stop_request:
            assert stop_request.agreed({}) == 0
            signal.raise_signal(number)
            assert stop_request.agreed({}) == number and signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_run_in_a_thread_leaves_signals_alone(flax, caplog):
    with ThreadPoolExecutor() as pool, caplog.at_level("WARNING"):
        stop_request = pool.submit(flax.StopRequest(SimpleNamespace(num_processes=1)).__enter__).result()
        pool.submit(stop_request.__exit__, None, None, None).result()
    assert "not in the main thread" in caplog.text and stop_request.previous == {}


def test_loader_has_as_many_threads_as_asked_for(flax, tiny_model, image_folder, tmp_path, monkeypatch):
    args = flax.parse_args(make_args(tiny_model, image_folder, tmp_path / "out"))
    configs = flax.load_model_configs(args)
    data = flax.make_data(args, flax.make_captioned_images(args, args.train_data_dir), None, 0, configs)
    models, accelerator = SimpleNamespace(tokenizer=configs["tokenizer"]), SimpleNamespace(
        process_index=0, num_processes=1)
    counts = []
    monkeypatch.setattr(flax, "ThreadPoolExecutor", lambda count: counts.append(count) or ThreadPoolExecutor(count))
    for workers in (0, 3):
        steps = [flax.MicroStep(0, 2, 2, ends_update=True, indices=[0, 1])]
        ((_, batch),) = flax.make_dataloader(data.train, steps, models, workers, accelerator, 2)
        assert len(batch["weights"]) == 2 * jax.local_device_count()
    assert counts == [8, 3]


# ---- Pictures and the whole cycle -----------------------------------------------------------------------------------


def read_readme_command() -> list[str]:
    """Return the arguments of the README's command for the JAX script, with the places of its files."""
    command = re.search(rf"^python {NAME} ((?:.*\\\n)*.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    words = shlex.split(command[1].replace("\\\n", " "))
    return [str(ROOT / word) if word.startswith("quickstart/") else word for word in words]


def test_the_base_of_the_readme_is_read(flax, tmp_path):
    """The files fit the networks that the script makes of its configurations."""
    args = flax.parse_args([*read_readme_command(), "--output_dir", str(tmp_path / "out")])
    models = flax.load_models(args, SimpleNamespace(mixed_precision="no"), flax.load_model_configs(args))
    assert models.initial.keys() == {f"unet.{name}" for name in flax.list_shapes("unet", models.configs["unet"])}


@pytest.fixture(scope="module")
def quickstart_run(flax, small_model, tmp_path_factory):
    """The README's command, shorter, on the smallest network, and with W&B."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    changes = {"pretrained_model_name_or_path": small_model, "resolution": 32, "max_train_steps": 12,
               "max_train_samples": 48, "lr_warmup_steps": 2, "validation_steps": 6,
               "validation_inference_steps": 10, "output_dir": out, "encoded_dir": out.parent / "encoded",
               "report_to": "tensorboard,wandb"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
            patch.setenv(name, value)
        wandb.teardown()  # the settings of a run before, in this process
        more = [str(word) for name, value in changes.items() for word in (f"--{name}", value)]
        flax.main([*read_readme_command(), *more])
    return SimpleNamespace(out=out)


def test_a_whole_cycle_ends_in_a_pipeline_of_torch(quickstart_run, small_model):
    """It lowers the held-out loss, and leaves what the other scripts leave."""
    out = quickstart_run.out
    losses = read_scalars(out, "validation_loss")
    assert list(losses) == [6, 12] and losses[12] < losses[6]
    for tag in ("images_per_second", "data_wait"):
        assert read_scalars(out, tag)
    assert list_names(out, "*") == {
        "model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler", "README.md", "validation", "logs",
        "checkpoint-12", "val_imgs_grid.png", "wandb"}
    (record,) = (out / "wandb").rglob("*.wandb")
    assert record.read_bytes().count(b"train_loss") >= 12
    media = sorted(path.name.rpartition("_")[0] for path in record.parent.rglob("media/**/*.png"))
    assert media == sorted(["validation_6", "test_12"] * 2)
    assert "diffusers-training" in (out / "README.md").read_text()
    for part in ("vae", "text_encoder"):
        assert_same_files(out / part, small_model / part)
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "PNDMScheduler"


def assert_drawn_by_torch(out: Path, folder: str, prompts: list[str], size: tuple[int, int], steps: int,
                          scale: float) -> None:
    """Fail unless the exported pipeline draws by DDIM the validation pictures in a folder, from the same noise.

    `size` is their width and height.
    """
    pipeline, script = StableDiffusionPipeline.from_pretrained(out), load_script(NAME)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    for index, prompt in enumerate(prompts):
        drawn = Image.open(out / "validation" / folder / f"{index:02d}.png")
        width, height = drawn.size
        assert (width, height) == size
        shape = (1, 4, height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor)
        noise = script.make_rng(0, "validation", index).standard_normal(shape, np.float32)
        expected = pipeline(prompt, height=height, width=width, latents=torch.tensor(noise), num_inference_steps=steps,
                            guidance_scale=scale).images[0]
        assert np.abs(np.asarray(drawn).astype(int) - np.asarray(expected)).max() <= 2


def test_pictures_are_those_that_torch_draws(quickstart_run):
    """The exported pipeline draws the last validation pictures from the same noise."""
    assert_drawn_by_torch(quickstart_run.out, "step-12", ["a red apple", "a frog"], (32, 32), 10, 3)


def test_held_out_loss_is_the_one_that_torch_measures(sd, quickstart_run, tmp_path):
    """Unweighted, of the averaged weights, which are what was exported."""
    out = tmp_path / "out"
    sd.main(make_args(quickstart_run.out, ROOT / "quickstart" / "images", out, resolution=32, train_batch_size=16,
                      max_train_steps=1, max_train_samples=1, learning_rate=1e-30, report_to="tensorboard",
                      validation_data_dir=ROOT / "quickstart" / "validation_images", **{
                          **SAME_IMAGES, "image_interpolation_mode": "bilinear"}))
    ours, theirs = (read_scalars(folder, "validation_loss") for folder in (quickstart_run.out, out))
    assert ours[12] == pytest.approx(theirs[1], rel=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_step_of_drawing_is_that_of_diffusers(flax, prediction_type):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(5)
    timesteps, variances, after = flax.make_ddim_steps(dict(scheduler.config), 5)
    latents, model_pred = make_numbers(2, 4, 4, 4), make_numbers(2, 4, 4, 4, seed=1)
    for timestep, variance, next_variance in zip(timesteps, variances, after, strict=True):
        expected = scheduler.step(torch.tensor(model_pred), int(timestep), torch.tensor(latents)).prev_sample
        assert_near(flax.take_ddim_step(latents, model_pred, variance, next_variance, prediction_type), expected, 1e-5)


@pytest.mark.parametrize(("prediction_type", "settings"), [
    ("v_prediction", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    ("sample", {"timestep_spacing": "linspace"}), ("epsilon", {"steps_offset": 1, "set_alpha_to_one": False}),
    ("epsilon", {})])
def test_sampling_steps_are_those_of_diffusers(flax, prediction_type, settings):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type, clip_sample=False,
                              **settings)
    scheduler.set_timesteps(7)
    config = {name: value for name, value in scheduler.config.items() if name in settings or "beta" in name}
    timesteps, variances, after = flax.make_ddim_steps(config, 7)  # what a file leaves out has diffusers' defaults
    assert timesteps.tolist() == scheduler.timesteps.tolist()
    np.testing.assert_allclose(variances, scheduler.alphas_cumprod[scheduler.timesteps], atol=1e-6)
    before = [scheduler.alphas_cumprod[step - 1000 // 7] if step >= 1000 // 7 else scheduler.final_alpha_cumprod
              for step in scheduler.timesteps]
    np.testing.assert_allclose(after, before, atol=1e-6)


# ---- Command line ---------------------------------------------------------------------------------------------------


def test_flags_are_those_of_the_reference(flax):
    flags, contract = get_flags(flax), CONTRACT[NAME]
    assert contract.keys() <= {f"--{name}" for name in flags}
    assert {name: describe(flags[name.removeprefix("--")]) for name in contract} == {
        name: expect(entry) for name, entry in contract.items()}


def test_help_is_the_golden_one():
    assert format_help(NAME) == (GOLDEN / "train_text_to_image_flax.txt").read_text()


@pytest.mark.parametrize(("flags", "message"), [
    ({"attention": "cudnn"}, "--mixed_precision bf16"),
    ({"report_to": "mlflow"}, "choose from tensorboard, wandb"), ({"learning_rate": -1}, "must be from 0 to 1e+15"),
    ({"use_8bit_adam": True}, "unrecognized arguments"), ({"lr_scheduler": "cosinus"}, "choose from linear"),
    ({"dream_training": True, "input_perturbation": 0.1}, "exclude each other"),
])
def test_impossible_flags_are_refused(flax, tiny_model, image_folder, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        flax.parse_args(make_args(tiny_model, image_folder, tmp_path / "out", **flags))
    assert error.value.code == 2 and message in capsys.readouterr().err.replace("\n", " ")
