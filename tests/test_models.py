"""What a run starts from: text states before the last, and models as other tools save them."""

import json
import re
import shutil

import accelerate
import numpy as np
import pytest
import torch
from conftest import UNCACHED, in_first_script, in_two_scripts, list_adapter_flags, make_args
from PIL import Image
from runs import keep_configs_only, prepare, run
from safetensors.torch import save_file

from diffusers import DiffusionPipeline

CAPTIONS = ["a cat", "picture number 1"]


def encode_as_the_pipeline(model, captions: list[str], clip_skip: int) -> torch.Tensor:
    """Return the text states that the model's own pipeline makes of captions."""
    pipeline = DiffusionPipeline.from_pretrained(model)
    if not hasattr(pipeline.text_encoder, "text_model"):  # where StableDiffusionPipeline looks for the final norm
        vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    return pipeline.encode_prompt(captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False,
                                  clip_skip=clip_skip)[0]


@pytest.mark.parametrize("cached", [False, True])
def test_clip_skip_gives_the_states_of_the_pipeline(script, tiny_model, image_folder, tmp_path, cached):
    """They are what encode_prompt returns, and a cache of them is not that of a run without the flag."""
    flags = {"cache_text_embeddings": True, "cache_dtype": "fp32", "no_cache_latents": True} if cached else UNCACHED
    found = []
    for clip_skip in (1, None):
        _, models, samples = prepare(script, make_args(
            tiny_model, image_folder, tmp_path / "out", encoded_dir=tmp_path / "encoded" if cached else None,
            clip_skip=clip_skip, **flags))
        items = [samples[script.SampleUse(0, index)] for index in range(2)]
        batch = script.collate(items, script.list_tokenizers(models))
        found.append(script.encode_batch(models, batch)[1]["encoder_hidden_states"])
    captions = [f"picture number {index}" for index in range(2)]
    torch.testing.assert_close(found[0], encode_as_the_pipeline(tiny_model, captions, 1), rtol=1e-5, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_clip_skip_is_drawn_with_and_stands_on_the_card(script, tiny_model, image_folder, tmp_path):
    """The picture at the end is that of a pipeline with `clip_skip`; the card's code says so."""
    out, flags = tmp_path / "out", {"validation_prompt": "a cat", "num_validation_images": 1,
                                    "validation_inference_steps": 2, "validation_guidance_scale": 5,
                                    "learning_rate": 0, "max_train_steps": 1}
    run(script, make_args(tiny_model, image_folder, out, clip_skip=1, **flags))
    pipeline = DiffusionPipeline.from_pretrained(tiny_model)
    if not hasattr(pipeline.text_encoder, "text_model"):
        vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    seed = int(script.make_rng(0, "validation", 0).integers(2**31))
    with torch.no_grad():
        pictures = [np.asarray(pipeline(
            "a cat", height=32, width=32, num_inference_steps=2, guidance_scale=5, clip_skip=clip_skip,
            generator=torch.Generator().manual_seed(seed)).images[0]).astype(int) for clip_skip in (1, None)]
    drawn = np.asarray(Image.open(out / "validation" / "step-1" / "00.png")).astype(int)
    assert np.abs(drawn - pictures[0]).max() <= 1 < np.abs(drawn - pictures[1]).max()
    card = (out / "README.md").read_text()
    assert "clip_skip=1)" in card and "- clip_skip: 1" in card


def test_layers_that_are_skipped_are_not_trained(script, tiny_model, image_folder, tmp_path):
    """A text encoder is trained up to the states that are used: what comes after would get no gradient."""
    flags = {**UNCACHED, "train_text_encoder": True, **list_adapter_flags(script, rank=2)}
    _, models, samples = prepare(script, make_args(
        tiny_model, image_folder, tmp_path / "out", clip_skip=1, **flags))
    models.text_encoder.train()
    batch = script.collate([samples[script.SampleUse(0, 0)]], script.list_tokenizers(models))
    states = script.encode_captions(models, batch)
    sum(tensor.square().sum() for tensor in states.values()).backward()
    parameters = [(name, parameter) for name, parameter in models.text_encoder.named_parameters()
                  if parameter.requires_grad]
    assert parameters and [name for name, parameter in parameters if parameter.grad is None] == []
    count = models.text_encoder.config.num_hidden_layers - (2 if "sdxl" in script.__name__ else 1)
    assert {int(name.split("layers.")[1].split(".")[0]) for name, _ in parameters if "layers." in name} == set(
        range(count))


# ---- Models as other tools save them --------------------------------------------------------------------------------


def load_networks(script, model, images, out, **flags) -> dict[str, torch.Tensor]:
    """Return the tokenizer's length and all weights that a run would start with, by part and name."""
    args = script.parse_args(make_args(model, images, out, **flags))
    accelerator = script.make_accelerator(args)
    models = script.load_models(args, accelerator, script.load_model_configs(args))
    return {"length": torch.tensor(models.tokenizer.model_max_length), **{
        f"{part}.{name}": tensor.detach().float() for part in ("unet", "vae", *script.TEXT_ENCODERS)
        for name, tensor in getattr(models, part).state_dict().items() if "lora" not in name}}


def assert_same_networks(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance) -> None:
    """Fail unless two sets of weights are the same."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **{"rtol": 0, "atol": 0, **tolerance}, msg=name)


@pytest.fixture(scope="module")
def done() -> dict:
    """What the next fixture has loaded."""
    return {}


@pytest.fixture
def expected(script, tiny_model, image_folder, tmp_path, done) -> dict[str, torch.Tensor]:
    """What `load_networks` returns of the tiny model."""
    if script not in done:
        done[script] = load_networks(script, tiny_model, image_folder, tmp_path / "out")
    return done[script]


def rename_weights(folder, old: str, new: str) -> None:
    """Give the weight files of a model other names."""
    for path in [*folder.rglob(f"*{old}")]:
        path.rename(path.with_name(path.name.replace(old, new)))


def save_fp16_unet(model) -> None:
    rename_weights(model / "unet", ".safetensors", ".fp16.safetensors")


def save_all_fp16(model) -> None:
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        rename_weights(model / part, ".safetensors", ".fp16.safetensors")


def save_bin(model) -> None:
    pipeline = DiffusionPipeline.from_pretrained(model)
    for part in ("unet", "vae", "text_encoder"):
        for path in (model / part).glob("*.safetensors"):
            path.unlink()
    pipeline.unet.save_pretrained(model / "unet", safe_serialization=False)
    pipeline.vae.save_pretrained(model / "vae", safe_serialization=False)
    torch.save(pipeline.text_encoder.state_dict(), model / "text_encoder" / "pytorch_model.bin")


def save_shards(model) -> None:
    pipeline = DiffusionPipeline.from_pretrained(model)
    for path in (model / "unet").glob("*.safetensors"):
        path.unlink()
    pipeline.unet.save_pretrained(model / "unet", max_shard_size="500KB", variant="fp16")


def drop_max_length(model) -> None:
    path = model / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({
        name: value for name, value in json.loads(path.read_text()).items() if name != "model_max_length"}))


def keep_vocabulary_only(model) -> None:
    for path in (model / "tokenizer").iterdir():
        path.unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(model / "tokenizer-source" / name, model / "tokenizer")


def drop_index(model) -> None:
    (model / "model_index.json").unlink()


@in_two_scripts
@pytest.mark.parametrize(("change", "flags"), [
    (drop_index, {}), (save_fp16_unet, {}), (save_fp16_unet, {"variant": "fp16"}), (save_all_fp16, {}), (save_bin, {}),
    (save_shards, {}), (save_shards, {"variant": "fp16"}), (drop_max_length, {}), (keep_vocabulary_only, {})])
def test_models_as_other_tools_save_them(script, tiny_model, image_folder, tmp_path, expected, change, flags):
    """They load as the pipeline does it, also without model_index.json, and fp16 weights where there are no others."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    change(model)
    assert_same_networks(load_networks(script, model, image_folder, tmp_path / "out", **flags), expected)


@in_first_script
@pytest.mark.parametrize(("part", "name", "value"), [
    ("unet", "class_embed_type", "projection"), ("unet", "time_cond_proj_dim", 256),
    ("unet", "encoder_hid_dim_type", "text_image_proj"),
    ("vae", "shift_factor", 0.1), ("vae", "latents_mean", [0, 1, 2, 3]), ("scheduler", "use_flow_sigmas", True)])
def test_settings_that_training_cannot_honor_are_refused(
        script, tiny_model, image_folder, tmp_path, part, name, value):
    """The setting is named before any weights are read: here there are none."""
    model = keep_configs_only(tiny_model, tmp_path / "model", **{part: {name: value}})
    with pytest.raises(ValueError, match=f"the {part} has {name} = .*, which this script cannot train with"):
        run(script, make_args(model, image_folder, tmp_path / "out"))


@in_first_script
@pytest.mark.parametrize("change", [{"_class_name": "FlaxPNDMScheduler"}, {"beta_schedule": "unheard of"}])
def test_a_scheduler_that_diffusers_lacks_is_refused(script, tiny_model, image_folder, tmp_path, change):
    """Before the training, as the export could not be written after it."""
    model = keep_configs_only(tiny_model, tmp_path / "model", scheduler=change)
    with pytest.raises(ValueError, match="cannot be loaded: its scheduler: "):
        run(script, make_args(model, image_folder, tmp_path / "out"))


@in_first_script
def test_a_vae_of_before_classes_were_named_is_loaded(script, tiny_model, image_folder, tmp_path):
    model = keep_configs_only(tiny_model, tmp_path / "model")
    path = model / "vae" / "config.json"
    config = json.loads(path.read_text())
    del config["_class_name"]
    path.write_text(json.dumps(config))
    args = script.parse_args(make_args(model, image_folder, tmp_path / "out"))
    accelerate.PartialState()  # the log's
    assert script.load_model_configs(args)["vae"]["latent_channels"] == 4


@in_two_scripts
def test_what_is_odd_is_named(script, tiny_model, image_folder, tmp_path, caplog):
    """The scaling factor of the other kind of model stands in the log; settings that no library knows do no harm."""
    other = 0.18215 if "sdxl" in script.__name__ else 0.13025
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for part, new in (("vae", {"scaling_factor": other, "odd_vae": 1}), ("unet", {"odd_unet": 1}),
                      ("text_encoder", {"odd_text": 1})):
        path = model / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **new}))
    load_networks(script, model, image_folder, tmp_path / "out")
    own = 0.13025 if "sdxl" in script.__name__ else 0.18215
    assert f"has scaling_factor {other}" in caplog.text and f"set it to {own}" in caplog.text


# ---- Models in one file ---------------------------------------------------------------------------------------------

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
UNET = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}


def name_in_unet(name: str) -> str:
    """Return what Stability AI's code calls a weight of a UNet with one layer per block."""
    for ours, theirs in UNET.items():
        name = re.sub(rf"^{ours}\.", f"{theirs}.", name)
    if ".resnets." in name:
        for ours, theirs in RESNET.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    number = lambda match: int(match[1]) * 2  # noqa: E731
    name = re.sub(r"^down_blocks\.(\d)\.resnets\.0\.", lambda m: f"input_blocks.{number(m) + 1}.0.", name)
    name = re.sub(r"^down_blocks\.(\d)\.attentions\.0\.", lambda m: f"input_blocks.{number(m) + 1}.1.", name)
    name = re.sub(r"^down_blocks\.(\d)\.downsamplers\.0\.conv\.",
                  lambda m: f"input_blocks.{number(m) + 2}.0.op.", name)
    name = re.sub(r"^up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f"output_blocks.{number(m) + int(m[2])}.0.", name)
    name = re.sub(r"^up_blocks\.(\d)\.attentions\.(\d)\.", lambda m: f"output_blocks.{number(m) + int(m[2])}.1.", name)
    name = name.replace("up_blocks.0.upsamplers.0.", "output_blocks.1.2.")  # the first has attention
    name = re.sub(r"^mid_block\.resnets\.(\d)\.", lambda m: f"middle_block.{2 * int(m[1])}.", name)
    return "model.diffusion_model." + name.replace("mid_block.attentions.0.", "middle_block.1.")


def name_in_vae(name: str) -> str:
    """Return what the original code calls a weight of a VAE of two blocks."""
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{1 - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{1 - int(m[1])}.upsample.", name)
    name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
    for ours, theirs in {"mid_block.attentions.0.": "mid.attn_1.", "group_norm": "norm", "to_q": "q", "to_k": "k",
                         "to_v": "v", "to_out.0": "proj_out", "conv_norm_out": "norm_out",
                         "conv_shortcut": "nin_shortcut"}.items():
        name = name.replace(ours, theirs)
    return "first_stage_model." + name


def list_open_clip_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of SDXL's second text encoder as OpenCLIP names and keeps them."""
    weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    found = {"positional_embedding": weights["embeddings.position_embedding.weight"],
             "token_embedding.weight": weights["embeddings.token_embedding.weight"],
             "text_projection": weights["text_projection.weight"].T.contiguous(),
             "ln_final.weight": weights["final_layer_norm.weight"], "ln_final.bias": weights["final_layer_norm.bias"]}
    for name, tensor in weights.items():
        if name.startswith("encoder.layers."):
            number, rest = name.removeprefix("encoder.layers.").split(".", 1)
            for ours, theirs in OPEN_CLIP.items():
                rest = rest.replace(ours, theirs)
            if "q_proj" in rest:
                tensor = torch.cat([weights[name.replace("q_proj", kind)] for kind in ("q_proj", "k_proj", "v_proj")])
                rest = f"attn.in_proj_{rest.split('.')[-1]}"
            if "k_proj" not in rest and "v_proj" not in rest:
                found[f"transformer.resblocks.{number}.{rest}"] = tensor
    return found


def save_single_file(model, path) -> None:
    """Write a tiny model as one file, under the names of the original code."""
    pipeline = DiffusionPipeline.from_pretrained(model)
    weights = {name_in_unet(name): tensor for name, tensor in pipeline.unet.state_dict().items()}
    for name, tensor in pipeline.vae.state_dict().items():
        is_square = ".attentions." in name and tensor.ndim == 2  # 1 x 1 convolutions in the original
        weights[name_in_vae(name)] = tensor[:, :, None, None] if is_square else tensor
    text = {f"transformer.text_model.{name.removeprefix('text_model.')}": tensor
            for name, tensor in pipeline.text_encoder.state_dict().items()}
    if hasattr(pipeline, "text_encoder_2"):
        weights["v_pred"] = torch.zeros(0)  # the sign of a model that predicts v
        weights |= {f"conditioner.embedders.0.{name}": tensor for name, tensor in text.items()}
        second = list_open_clip_weights(pipeline.text_encoder_2.state_dict())
        weights |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    else:
        weights |= {f"cond_stage_model.{name}": tensor for name, tensor in text.items()}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)


@pytest.fixture(scope="session")
def single_files(tiny_models, tmp_path_factory) -> dict:
    """Both tiny models, each in one file."""
    folder = tmp_path_factory.mktemp("files")
    for name, model in tiny_models.items():
        save_single_file(model, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in tiny_models}


def get_kind(script) -> str:
    return "sdxl" if "sdxl" in script.__name__ else "sd"


@in_two_scripts
def test_a_model_in_one_file_is_the_same_model(script, tiny_model, single_files, image_folder, tmp_path, expected):
    """It is converted once, with the configurations of a local folder, and has the same weights; a run exports."""
    configs = keep_configs_only(tiny_model, tmp_path / "configs")
    flags = {"single_file_config": configs, "cache_dir": tmp_path / "cache"}
    for _ in range(2):
        found = load_networks(script, single_files[get_kind(script)], image_folder, tmp_path / "out", **flags)
        assert_same_networks(found, expected)
        (folder,) = (tmp_path / "cache" / "converted").iterdir()
        (folder / "mark").touch()  # and still there after the second load, which has not converted again
    assert (folder / "mark").exists()
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == {"sd": "epsilon", "sdxl": "v_prediction"}[get_kind(script)]
    run(script, make_args(single_files[get_kind(script)], image_folder, tmp_path / "out", max_train_steps=1, **flags))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"# Fine-tuned {single_files[get_kind(script)]}" in card and ("from_single_file" in card) == (
        "lora" in script.__name__)


@in_two_scripts
def test_one_file_of_another_kind_is_refused(script, single_files, tiny_model, image_folder, tmp_path):
    """Another family, a file that is no model, and one that could run code are refused by the flag."""
    other = "sd" if get_kind(script) == "sdxl" else "sdxl"
    save_file({"lora_unet_x.alpha": torch.zeros(1)}, tmp_path / "lora.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"x" * 99)
    for file in (single_files[other], tmp_path / "lora.safetensors", tmp_path / "model.ckpt"):
        with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path {file} cannot be loaded") as refusal:
            run(script, make_args(file, image_folder, tmp_path / "out", single_file_config=tiny_model,
                                  cache_dir=tmp_path / "cache"))
        print(refusal.value)
        assert file.suffix == ".ckpt" or f"Is it a {script.MODEL_KIND} model?" in str(refusal.value)


def test_one_file_without_configurations_names_the_flag(first_script, single_files, image_folder, tmp_path):
    """Without a network, what the file lacks cannot be fetched."""
    with pytest.raises(ValueError, match="--single_file_config names"):
        run(first_script, make_args(single_files["sd"], image_folder, tmp_path / "out", cache_dir=tmp_path / "cache"))
    assert not (tmp_path / "cache" / "converted").exists()
