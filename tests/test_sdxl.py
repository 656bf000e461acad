"""What Stable Diffusion XL has of its own: sizes, two text encoders, a VAE that overflows, names in LoRA files."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SDXL_SCRIPTS, UNCACHED, load_script, make_args, make_tiny_sdxl
from PIL import Image
from runs import LORA_FILE, assert_same_checkpoint, load_pipeline, prepare, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffusers import DDPMScheduler, StableDiffusionXLPipeline

KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
CAPTIONS = ["a cat", "", "  ", "a dog under a tree that is far too tall to be named within the tokens that there are"]
TIMESTEPS = torch.tensor([0, 1, 500, 999])


@pytest.fixture(scope="module")
def model_without_zeros(tmp_path_factory) -> Path:
    """Folder of a tiny SDXL whose pipeline encodes the empty caption where it guides."""
    return make_tiny_sdxl(tmp_path_factory.mktemp("model") / "tiny-xl", force_zeros_for_empty_prompt=False)


@pytest.fixture(scope="module")
def noise_folder(tmp_path_factory) -> Path:
    """Folder of three pictures of noise, of which no two crops are alike, wide, high and square."""
    return write_pictures(tmp_path_factory.mktemp("noise"), [(48, 20), (22, 40), (33, 33)])


def write_pictures(folder: Path, sizes: list[tuple[int, int]], captions: list[str] | None = None) -> Path:
    """Write pictures of noise of the given widths and heights, with captions."""
    rows = []
    for index, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        caption = captions[index] if captions else f"noise {index}"
        rows.append(json.dumps({"file_name": f"{index}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(params=[name for name in SDXL_SCRIPTS if "lora" in name])
def lora_script(request):
    """The LoRA script for SDXL."""
    return load_script(request.param)


@pytest.fixture
def assemble(sdxl_script, tiny_model, image_folder, tmp_path):
    """Return a function that makes the parts of a run from flags, with caches if they ask for them."""

    def make(model: Path = tiny_model, data: Path = image_folder, **flags):
        flags = flags if flags.keys() & {"cache_latents", "cache_text_embeddings"} else {**UNCACHED, **flags}
        args, models, samples = prepare(sdxl_script, make_args(model, data, tmp_path / "parts", **flags))
        for name, parameter in models.unet.named_parameters():
            if "lora_B" in name:  # at 0, where it starts, an adapter does nothing
                torch.nn.init.normal_(parameter, std=0.1)
        return SimpleNamespace(args=args, models=models, samples=samples)

    return make


def make_batch(script, parts, visits) -> dict[str, torch.Tensor]:
    """Return samples as a batch."""
    return script.collate([parts.samples[script.SampleUse(*visit)] for visit in visits],
                          script.list_tokenizers(parts.models))


def encode(script, models, captions: list[str]) -> dict[str, torch.Tensor]:
    """Return what a script makes of captions."""
    batch = script.collate([{"caption": caption} for caption in captions], script.list_tokenizers(models))
    return script.encode_captions(models, batch)


# ---- Sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("flags", [{}, {"center_crop": True}, {"random_flip": True},
                                   {"center_crop": True, "random_flip": True}], ids=lambda flags: " ".join(flags))
def test_sizes_are_those_of_the_crop_that_is_encoded(sdxl_script, assemble, noise_folder, flags, cached):
    """The latents are those of the crop at the place in time_ids, of the plain image or of the mirrored one."""
    caches = {"cache_latents": True, "cache_dtype": "fp32"} if cached else {}
    parts = assemble(data=noise_folder, resolution=16, **flags, **caches)
    batch = make_batch(sdxl_script, parts, [(epoch, index) for epoch in range(12) for index in range(3)])
    assert ("moments" in batch) == cached
    batch["posterior_noise"].zero_()
    latents, seen = sdxl_script.encode_batch(parts.models, batch)[0], set()
    for number, (found, time_ids) in enumerate(zip(latents, batch["time_ids"], strict=True)):
        height, width, top, left, *size = time_ids.int().tolist()
        image = Image.open(noise_folder / f"{number % 3}.png")
        assert (height, width, size) == (image.height, image.width, [16, 16])
        small = image.resize([16 * side // min(image.size) for side in image.size], Image.Resampling.LANCZOS)
        errors = []
        for mirrored in (small, small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
            crop = np.asarray(mirrored.crop((left, top, left + 16, top + 16))).transpose(2, 0, 1)
            with torch.no_grad():
                mean = parts.models.vae.encode(torch.from_numpy(crop.copy())[None] / 127.5 - 1).latent_dist.mean
            errors.append((mean[0] * parts.models.vae.config.scaling_factor - found).abs().max().item())
        assert min(errors) < 1e-5 < 1e-2 < max(errors)
        seen.add((number % 3, errors[1] < errors[0], top, left))
    flips, places = {flip for _, flip, _, _ in seen}, {(index, *place) for index, _, *place in seen}
    assert flips == ({False, True} if "random_flip" in flags else {False})
    assert len(places) == 3 if "center_crop" in flags else len(places) > 5


@pytest.mark.parametrize("flags", [UNCACHED, {"cache_latents": True}], ids=["uncached", "cached"])
def test_sizes_reach_the_unet_in_float32(sdxl_script, tiny_model, tmp_path, monkeypatch, flags):
    """Under bf16 autocast the UNet turns into waves the very numbers of pixels, which bf16 could not hold."""
    for index, size in enumerate([(1365, 1023), (3001, 2047)]):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("a picture")
    seen, original = [], sdxl_script.load_models

    def load_models(*given):
        models = original(*given)
        models.unet.add_time_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
        return models

    monkeypatch.setattr(sdxl_script, "load_models", load_models)
    run(sdxl_script, make_args(tiny_model, tmp_path, tmp_path / "out", **flags, mixed_precision="bf16",
                               max_train_steps=1))
    (sizes,) = seen
    assert sizes.dtype == torch.float32
    assert sorted(sizes.view(2, 6)[:, :2].tolist()) == [[1023, 1365], [2047, 3001]]
    assert sizes.view(2, 6)[:, 4:].tolist() == [[32, 32]] * 2


# ---- Text -----------------------------------------------------------------------------------------------------------


def test_text_is_that_of_the_pipeline(sdxl_script, assemble, tiny_model):
    """Penultimate states of both encoders side by side, and the second's pooled output: what encode_prompt returns."""
    parts, pipeline = assemble(), StableDiffusionXLPipeline.from_pretrained(tiny_model)
    for caption in (CAPTIONS[0], CAPTIONS[3]):
        found = encode(sdxl_script, parts.models, [caption])
        states, _, pooled, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
        assert states.shape == (1, 24, 32 + 48) and pooled.shape == (1, 24)
        torch.testing.assert_close(found["encoder_hidden_states"], states)
        torch.testing.assert_close(found["pooled_prompt_embeds"], pooled)
    ids = pipeline.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        layers = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states
    found = encode(sdxl_script, parts.models, ["a cat"])["encoder_hidden_states"][..., :32]
    torch.testing.assert_close(found, layers[2])  # of the embeddings and three layers
    assert not torch.allclose(found, layers[3], atol=1e-2)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("zeros", [True, False])
def test_captions_without_a_word_are_the_unconditional_branch(
        sdxl_script, assemble, tiny_model, model_without_zeros, tmp_path, zeros, cached):
    """Dropped and empty captions get zeros where the pipeline guides by zeros, and else the encoding of nothing."""
    model = tiny_model if zeros else model_without_zeros
    data = write_pictures(tmp_path, [(32, 32)] * 4, CAPTIONS)
    caches = {"cache_text_embeddings": True, "cache_dtype": "fp32"} if cached else {}
    _, unconditional, _, pooled = StableDiffusionXLPipeline.from_pretrained(model).encode_prompt("a cat")
    assert unconditional.any() == (not zeros)
    for proportion, empty in ((0, {1, 2}), (1, {0, 1, 2, 3})):
        parts = assemble(model, data, proportion_empty_prompts=proportion, **caches)
        batch = make_batch(sdxl_script, parts, [(0, index) for index in range(4)])
        assert ("encoder_hidden_states" in batch) == cached
        _, found = sdxl_script.encode_batch(parts.models, batch)
        for index in range(4):
            for name, states, expected in (
                    ("states", found["encoder_hidden_states"], unconditional),
                    ("pooled", found["added_cond_kwargs"]["text_embeds"], pooled)):
                is_same = torch.allclose(states[index], expected[0], atol=1e-4)
                assert is_same == (index in empty), (name, index)  # two spaces have no token either


def change_config(model: Path, folder: Path, part: str, **changes) -> Path:
    """Copy a model with other settings of one part; those that are None go."""
    shutil.copytree(model, folder)
    path = folder / part / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def test_a_first_text_encoder_with_a_projection_is_loaded_without(sdxl_script, assemble, tiny_model, tmp_path):
    """Only the pooled output of the second is used."""
    models = assemble().models
    assert (type(models.text_encoder), type(models.text_encoder_2)) == (CLIPTextModel, CLIPTextModelWithProjection)
    other = change_config(tiny_model, tmp_path / "other", "text_encoder",
                          architectures=["CLIPTextModelWithProjection"], projection_dim=24)
    path = other / "model_index.json"
    path.write_text(path.read_text().replace('"CLIPTextModel"', '"CLIPTextModelWithProjection"'))
    (path,) = (other / "text_encoder").glob("*.safetensors")
    save_file({**load_file(path), "text_projection.weight": torch.eye(24, 32)}, path, metadata={"format": "pt"})
    found = assemble(other).models
    assert type(found.text_encoder) is CLIPTextModel
    states = [encode(sdxl_script, each, ["a cat"]) for each in (models, found)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


# ---- The VAE --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "named", "expected"), [
    ({}, None, torch.float32), ({"force_upcast": None}, None, torch.float32),
    ({"force_upcast": False}, None, torch.bfloat16), ({}, {"force_upcast": None}, torch.bfloat16),
    ({"force_upcast": False}, {"force_upcast": True}, torch.float32), ({}, {"force_upcast": False}, torch.bfloat16),
], ids=["own", "own, silent", "own, safe", "named, silent", "named", "named, safe"])
def test_the_vae_is_float32_unless_it_is_known_to_be_safe(
        sdxl_script, assemble, tiny_model, tmp_path, own, named, expected):
    """Its configuration decides; of one that was named and says nothing it is believed that half precision is safe."""
    model = change_config(tiny_model, tmp_path / "model", "vae", **own)
    flags = {}
    if named is not None:
        folder = change_config(tiny_model, tmp_path / "named", "vae", **named) / "vae"
        flags = {"pretrained_vae_model_name_or_path": folder}
    models = assemble(model, mixed_precision="bf16", **flags).models
    assert {parameter.dtype for parameter in models.vae.parameters()} == {expected}
    assert {parameter.dtype for parameter in models.text_encoder_2.parameters()} == {torch.bfloat16}


def read_picture(out: Path, step: int = 2) -> np.ndarray:
    """Return what a run drew at its end."""
    return np.asarray(Image.open(out / "validation" / f"step-{step}" / "00.png")).astype(int)


def draw(script, pipeline: StableDiffusionXLPipeline) -> np.ndarray:
    """Return what a pipeline makes of "a cat" as a run draws it."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(int(script.make_rng(0, "validation", 0).integers(2**31)))
    return np.asarray(pipeline("a cat", height=32, width=32, num_inference_steps=3, guidance_scale=5.0,
                               generator=generator).images[0]).astype(int)


def assert_same_picture(script, out: Path, base: Path) -> None:
    """Fail unless what a run left draws what the run drew, up to one grey level."""
    pipeline = load_pipeline(out, base)
    assert type(pipeline) is StableDiffusionXLPipeline
    assert np.abs(draw(script, pipeline) - read_picture(out)).max() <= 1


@pytest.mark.parametrize("zeros", [True, False])
def test_what_is_left_draws_what_the_run_drew(
        sdxl_script, tiny_model, model_without_zeros, image_folder, tmp_path, zeros):
    """StableDiffusionXLPipeline loads it, with the unconditional branch that the base has, and draws the same."""
    model = tiny_model if zeros else model_without_zeros
    run(sdxl_script, make_args(model, image_folder, tmp_path / "out", validation_prompt="a cat", use_ema=True,
                               num_validation_images=1, validation_inference_steps=3, learning_rate=0.01))
    assert_same_picture(sdxl_script, tmp_path / "out", model)
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    assert np.abs(draw(sdxl_script, pipeline) - read_picture(tmp_path / "out")).mean() > 0.5
    if "lora" not in sdxl_script.__name__:
        assert load_pipeline(tmp_path / "out", model).config.force_zeros_for_empty_prompt == zeros


# ---- The loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_loss_by_hand(sdxl_script, assemble, tiny_model, image_folder, prediction_type):
    """Encoded, noised and predicted by the pipeline's own parts, the samples have the losses of the script."""
    parts = assemble(prediction_type=prediction_type)
    batch = make_batch(sdxl_script, parts, [(0, index) for index in range(4)])
    batch["timesteps"] = TIMESTEPS
    models = parts.models
    objective = sdxl_script.make_objective(parts.args, models.scheduler_config, torch.device("cpu"))
    loss = sdxl_script.compute_loss(models.unet, objective, *sdxl_script.encode_batch(models, batch), batch)

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_model, unet=models.unet)  # with its adapters
    scheduler, noise = DDPMScheduler.from_config(pipeline.scheduler.config), batch["noise"]
    captions = [f"picture number {index}" for index in range(4)]
    states, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    posterior = pipeline.vae.encode(batch["images"] / 127.5 - 1).latent_dist
    latents = (posterior.mean + posterior.std * batch["posterior_noise"]) * pipeline.vae.config.scaling_factor
    down, left = batch["time_ids"][:, 2].tolist(), batch["time_ids"][:, 3].tolist()
    sizes = torch.stack([pipeline._get_add_time_ids(
        (36, 40), (int(down[i]), int(left[i])), (32, 32), torch.float32, pipeline.text_encoder_2.config.projection_dim,
    )[0] for i in range(4)])
    model_pred = pipeline.unet(scheduler.add_noise(latents, noise, TIMESTEPS), TIMESTEPS, states,
                               added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(latents, noise, TIMESTEPS),
              "sample": latents}[prediction_type]
    torch.testing.assert_close(loss, ((model_pred - target) ** 2).mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_text_encoders_are_trained_where_their_states_are_used(sdxl_script, assemble):
    """With --train_text_encoder each trained parameter gets a gradient, and none behind the penultimate layer."""
    parts = assemble(train_text_encoder=True)
    models = parts.models
    for text_encoder in (models.text_encoder, models.text_encoder_2):
        for name, parameter in text_encoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    sdxl_script.set_up_networks(parts.args, models)
    batch = make_batch(sdxl_script, parts, [(0, index) for index in range(4)])
    objective = sdxl_script.make_objective(parts.args, models.scheduler_config, torch.device("cpu"))
    sdxl_script.compute_loss(models.unet, objective, *sdxl_script.encode_batch(models, batch), batch).mean().backward()
    trained = sdxl_script.name_trained_parameters(models)
    assert [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()] == []
    names = [re.fullmatch(r"(text_encoder\w*)\.encoder\.layers\.(\d)\..+", name) for name in trained]
    layers = {(name[1], int(name[2])) for name in names if name}
    assert layers == {("text_encoder", 0), ("text_encoder", 1), *(("text_encoder_2", index) for index in range(3))}
    if "lora" not in sdxl_script.__name__:  # whole networks: all that stands before the penultimate states
        frozen = {name for name, parameter in models.text_encoder.named_parameters() if not parameter.requires_grad}
        assert frozen and all(".layers.2." in name or "final_layer_norm" in name for name in frozen)
        assert all(parameter.requires_grad for parameter in models.text_encoder_2.parameters())


def test_training_text_encoders_resumes_exactly(sdxl_script, tiny_model, image_folder, tmp_path):
    """Stopped and resumed, a run that trains all three networks, with averages, ends as an uninterrupted one."""
    flags = {"train_text_encoder": True, "no_cache_text_embeddings": True, "cache_latents": True, "use_ema": True,
             "text_encoder_lr": 1e-4, "proportion_empty_prompts": 0.3, "random_flip": True, "checkpointing_steps": 2}
    whole, part = tmp_path / "whole", tmp_path / "part"
    run(sdxl_script, make_args(tiny_model, image_folder, whole, **flags, max_train_steps=4))
    run(sdxl_script, make_args(tiny_model, image_folder, part, **flags, max_train_steps=4,
                               resume_from_checkpoint=whole / "checkpoint-2"))
    assert_same_checkpoint(whole / "checkpoint-4", part / "checkpoint-4")
    first, last = (read_text_weights(whole / f"checkpoint-{step}") for step in (2, 4))
    assert first.keys() == last.keys() and {name.split("/")[0] for name in last} == {"text_encoder", "text_encoder_2"}
    for part_name in ("text_encoder", "text_encoder_2"):
        assert any(not torch.equal(first[name], last[name]) for name in last if name.split("/")[0] == part_name)


def read_text_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds of the text encoders, their names in front."""
    if (checkpoint / LORA_FILE).is_file():
        weights = load_file(checkpoint / LORA_FILE)
        return {name.replace(".", "/", 1): tensor for name, tensor in weights.items() if name.startswith("text_")}
    return {f"{part}/{name}": tensor for part in ("text_encoder", "text_encoder_2")
            for name, tensor in load_file(checkpoint / part / "model.safetensors").items()}


# ---- LoRA files -----------------------------------------------------------------------------------------------------

TARGETS = {
    "attention": ["attention"],
    "what stands outside the blocks": ["conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2"],
    "conv_in": ["conv_in"],
    "all": ["attention", "feed_forward", "convolution", "conv_in", "conv_out", "time_embedding.linear_1"],
}


@pytest.mark.parametrize("targets", TARGETS)
def test_a_file_for_kohya_draws_the_same(lora_script, tiny_models, image_folder, tmp_path, targets):
    """diffusers makes the same picture from either file as the run did, whatever was adapted; and it is no other."""
    out, trains_text = tmp_path / "out", targets in ("attention", "all")
    run(lora_script, make_args(
        tiny_models["sdxl"], image_folder, out, lora_target=TARGETS[targets], train_text_encoder=trains_text, rank=3,
        lora_alpha=6, save_kohya_format=True, learning_rate=0.05, max_train_steps=3, validation_prompt="a cat",
        num_validation_images=1, validation_inference_steps=3))
    drawn, base = read_picture(out, 3), StableDiffusionXLPipeline.from_pretrained(tiny_models["sdxl"])
    assert np.abs(drawn - draw(lora_script, base)).mean() > 0.5
    for name in (LORA_FILE, KOHYA_FILE):
        pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_models["sdxl"])
        pipeline.load_lora_weights(out, weight_name=name)
        assert np.abs(draw(lora_script, pipeline) - drawn).max() <= 1, name


def test_a_run_starts_from_a_finished_adapter(lora_script, tiny_models, image_folder, tmp_path):
    """A run with a learning rate of 0 ends with the adapter it starts from, in diffusers' format or in kohya's.

    Layers that are not trained here and add nothing are passed over: others have them in the first text encoder.
    """
    flags = {"lora_target": ["attention", "feed_forward", "convolution"], "train_text_encoder": True, "rank": 3,
             "save_kohya_format": True}
    out = tmp_path / "out"
    run(lora_script, make_args(tiny_models["sdxl"], image_folder, out, **flags, max_train_steps=1, lora_alpha=6))
    expected = load_file(out / LORA_FILE)
    surplus = {name.replace("layers.0", "layers.2"): torch.zeros_like(tensor) for name, tensor in expected.items()
               if name.startswith("text_encoder.") and "layers.0" in name}
    with safe_open(out / LORA_FILE, framework="pt") as file:
        save_file({**expected, **surplus}, tmp_path / "surplus.safetensors", metadata=file.metadata())
    for number, start in enumerate((out / LORA_FILE, out / KOHYA_FILE, tmp_path / "surplus.safetensors")):
        new = tmp_path / f"new-{number}"
        run(lora_script, make_args(
            tiny_models["sdxl"], image_folder, new, **flags, lora_alpha=6, max_train_steps=1, learning_rate=0,
            pretrained_lora_model_name_or_path=start))
        found = load_file(new / LORA_FILE)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), start


def test_names_in_lora_files(lora_script, tiny_models, image_folder, tmp_path):
    """Parts and layers are named as in diffusers, and in the file for kohya as in its tools: by Stability's blocks."""
    run(lora_script, make_args(
        tiny_models["sdxl"], image_folder, tmp_path / "out", lora_target=TARGETS["all"], train_text_encoder=True,
        save_kohya_format=True, max_train_steps=1))
    plain, kohya = (load_file(tmp_path / "out" / name) for name in (LORA_FILE, KOHYA_FILE))
    assert len(kohya) == len(plain) * 3 // 2  # an alpha to each pair
    sides = ("down", "up")
    attention = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    layers = [("text_encoder", 0), ("text_encoder", 1), *(("text_encoder_2", index) for index in range(3))]
    expected = {f"{part}.text_model.encoder.layers.{index}.{'mlp' if layer[:2] == 'fc' else 'self_attn'}.{layer}."
                f"lora_linear_layer.{side}.weight" for part, index in layers for layer in attention for side in sides}
    assert {name for name in plain if not name.startswith("unet.")} == expected
    expected = {f"lora_te{part.endswith('2') + 1}_text_model_encoder_layers_{index}_"
                f"{'mlp' if layer[:2] == 'fc' else 'self_attn'}_{layer}"
                for part, index in layers for layer in attention}
    assert {name.split(".")[0] for name in kohya if not name.startswith("lora_unet_")} == expected
    pairs = {  # ours, and Stability's: one of each kind
        "conv_in": "input_blocks_0_0", "conv_out": "out_2", "time_embedding.linear_1": "time_embed_0",
        "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
        "down_blocks.0.resnets.0.time_emb_proj": "input_blocks_1_0_emb_layers_1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_3_0_skip_connection",
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0":
            "input_blocks_3_1_transformer_blocks_1_attn2_to_out_0",
        "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
        "mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj":
            "middle_block_1_transformer_blocks_1_ff_net_0_proj",
        "up_blocks.0.attentions.1.proj_in": "output_blocks_1_1_proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_1_2_conv",
        "up_blocks.1.resnets.1.conv1": "output_blocks_3_0_in_layers_2",
    }
    for ours, theirs in pairs.items():
        for side in sides:
            assert torch.equal(plain[f"unet.{ours}.lora.{side}.weight"],
                               kohya[f"lora_unet_{theirs}.lora_{side}.weight"]), ours
