"""LoRA: what is trained, how it is scaled, and files that others load and that draw the same pictures."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, load_script, make_args, read_scalars
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from runs import assert_same_checkpoint, read_file, read_record, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"
DRAWING = {"validation_prompts": ["a picture"], "validation_inference_steps": 3}
EVERYTHING = {"lora_target": ["attention", "feed_forward", "convolution"], "train_text_encoder": True}
KINDS = {
    "alpha": {"lora_alpha": 9, "rank": 3},
    "rslora": {"use_rslora": True, "lora_alpha": 6, "rank": 9},
    "everything": EVERYTHING,
    "names": {"lora_target": ["attn2.to_k", "conv_out"], "train_text_encoder": True},
    "dora": {**EVERYTHING, "use_dora": True},
    "dropout": {**EVERYTHING, "lora_dropout": 0.3},
    "averaged": {**EVERYTHING, "use_ema": True, "ema_decay": 0.5},
}


@pytest.fixture(params=[name for name in SCRIPTS if name == "train_text_to_image_lora.py"])
def script(request):
    """The LoRA script for Stable Diffusion 1.x and 2.x."""
    return load_script(request.param)


@pytest.fixture
def train(script, tiny_model, image_folder, tmp_path):
    """Return a function that runs the script at a rate that is plain to see, and returns its output folder."""

    def with_flags(name: str = "out", **flags) -> Path:
        defaults = {"max_train_steps": 3, "learning_rate": 0.05, "text_encoder_lr": None, **flags}
        run(script, make_args(tiny_model, image_folder, tmp_path / name, **defaults))
        return tmp_path / name

    return with_flags


@pytest.fixture(scope="module")
def finished(tiny_models, image_folder, tmp_path_factory):
    """Return a function that gives the output folder of a run with some flags, made once for all tests."""
    done = {}

    def with_flags(**flags) -> Path:
        key = str(sorted(flags.items()))
        if key not in done:
            done[key] = tmp_path_factory.mktemp("finished") / "out"
            run(load_script("train_text_to_image_lora.py"), make_args(
                tiny_models["sd"], image_folder, done[key], **{"learning_rate": 0.05, **flags}))
        return done[key]

    return with_flags


def draw(script, model: Path, lora: Path | None, weight_name: str = FILE, fuse: bool = False) -> np.ndarray:
    """Return what a pipeline with a LoRA file draws as the run did at its end; any warning is an error."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="Could not find a config file")  # of the base, for PEFT
            pipeline.load_lora_weights(lora, weight_name=weight_name)
        if fuse:
            pipeline.fuse_lora()
    generator = torch.Generator().manual_seed(int(script.make_rng(0, "validation", 0).integers(2**31)))
    return np.asarray(pipeline("a picture", height=32, width=32, num_inference_steps=3, guidance_scale=7.5,
                               generator=generator).images[0]).astype(int)


def get_drawn(out: Path, step: int = 3) -> np.ndarray:
    """Return what the run itself drew at its end."""
    return np.asarray(Image.open(out / "validation" / f"step-{step}" / "00.png")).astype(int)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_draws_what_the_run_drew(script, train, tiny_model, kind):
    """The exported file, the checkpoint's, and the file for kohya's tools give the picture of the run itself."""
    out = train(**DRAWING, **KINDS[kind], save_kohya_format=True)
    drawn, base = get_drawn(out), draw(script, tiny_model, None)
    assert np.abs(drawn - base).mean() > 2  # the adapter does something
    assert np.abs(drawn - draw(script, tiny_model, out)).max() <= 1
    if "use_ema" in KINDS[kind]:
        assert np.abs(drawn - draw(script, tiny_model, out / "checkpoint-3")).mean() > 0.1
        assert np.abs(drawn - draw(script, tiny_model, out / "checkpoint-3" / "lora_ema")).max() <= 1
    else:
        assert np.abs(drawn - draw(script, tiny_model, out / "checkpoint-3")).max() <= 1
    assert np.abs(drawn - draw(script, tiny_model, out, fuse=True)).max() <= 1
    if kind != "dora":  # diffusers drops the magnitudes of a kohya file
        assert np.abs(drawn - draw(script, tiny_model, out, KOHYA_FILE)).max() <= 1


def test_names_are_those_of_the_reference(finished):
    """A file has the reference's final names, with text_model in those of the text encoder."""
    names = set(load_file(finished(train_text_encoder=True, max_train_steps=1) / FILE))
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    assert {f"unet.{block}.attn1.{layer}.lora.{side}.weight" for layer in ("to_q", "to_k", "to_v", "to_out.0")
            for side in ("down", "up")} <= names
    layers = [f"text_encoder.text_model.encoder.layers.{index}.self_attn.{layer}.lora_linear_layer.{side}.weight"
              for index in (0, 1) for layer in ("q_proj", "k_proj", "v_proj", "out_proj") for side in ("down", "up")]
    assert {name for name in names if not name.startswith("unet.")} == set(layers)


def test_kohya_file_has_the_names_of_the_converter(script, train, tiny_model):
    """Names and shapes are what diffusers' converter makes of PEFT's, with `lora_te_` as kohya has it for SD 1.x."""
    out = train(**EVERYTHING, lora_alpha=6, rank=3, save_kohya_format=True)
    found = load_file(out / KOHYA_FILE)
    unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    targets = [module for name in EVERYTHING["lora_target"] for module in script.LORA_TARGETS[name]]
    unet.add_adapter(LoraConfig(r=3, target_modules=targets))
    expected = convert_state_dict_to_kohya(
        {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(unet).items()})
    of_unet = {name: tensor for name, tensor in found.items() if name.startswith("lora_unet_")}
    assert {name: tensor.shape for name, tensor in of_unet.items()} == {
        name: tensor.shape for name, tensor in expected.items()}
    assert {tensor.item() for name, tensor in found.items() if name.endswith(".alpha")} == {6}
    rest = sorted(found.keys() - of_unet.keys())
    assert len(rest) == 2 * 6 * 3 and all(
        name.startswith("lora_te_text_model_encoder_layers_") for name in rest)
    metadata = read_metadata(out / KOHYA_FILE)
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_network_module"]) == (
        "3", "6.0", "networks.lora")
    assert metadata["ss_base_model_version"] == "sd_v1" and metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_kohya_file_of_dora_has_a_norm_per_output(train):
    """`dora_scale` is a column beside the weights of its outputs, as ComfyUI and LyCORIS read it."""
    found = load_file(train(**EVERYTHING, use_dora=True, save_kohya_format=True) / KOHYA_FILE)
    scales = {name: tensor for name, tensor in found.items() if name.endswith(".dora_scale")}
    assert len(scales) == sum(name.endswith(".lora_up.weight") for name in found)
    for name, scale in scales.items():
        up, down = (found[name.replace("dora_scale", f"lora_{side}.weight")] for side in ("up", "down"))
        assert scale.shape == (up.shape[0], *[1] * (down.ndim - 1))


def test_metadata_tells_what_the_adapter_is(train, tiny_model):
    """A file records base model, rank, alpha and layers, and no dropout, in checkpoints and at the end."""
    out = train(lora_alpha=6, rank=3, lora_dropout=0.1, use_rslora=True)
    for path in (out / FILE, out / "checkpoint-3" / FILE):
        metadata = read_metadata(path)
        assert (metadata["rank"], metadata["lora_alpha"], metadata["lora_target"]) == ("3", "6.0", "attention")
        assert metadata["base_model"] == str(tiny_model)
        rebuilt = json.loads(metadata["lora_adapter_metadata"])
        assert rebuilt["unet.r"] == 3 and rebuilt["unet.lora_alpha"] == 6 and rebuilt["unet.use_rslora"] is True
        assert not any("dropout" in name for name in rebuilt)


def get_models(script, monkeypatch) -> list:
    """Return a list that will hold the models of the next run."""
    seen, original = [], script.load_models

    def load_models(*given):
        seen.append(original(*given))
        return seen[-1]

    monkeypatch.setattr(script, "load_models", load_models)
    return seen


@pytest.mark.parametrize("flags", [{}, {**EVERYTHING, "use_dora": True, "gradient_checkpointing": True}])
def test_the_base_never_changes_and_every_adapter_does(script, train, tiny_model, monkeypatch, flags):
    """After a run the frozen weights are those of the file, bit for bit, and no adapter is what it was."""
    seen = get_models(script, monkeypatch)
    train(**flags)
    unet = seen[0].unet
    base = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    kept = {name.replace(".base_layer", ""): parameter for name, parameter in unet.named_parameters()
            if not parameter.requires_grad}
    assert kept.keys() == base.keys()
    assert all(torch.equal(kept[name], base[name]) for name in base)
    trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert all(parameter.abs().max() > 0 for name, parameter in trained.items() if "lora_B" in name)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in trained.values())


@pytest.mark.parametrize(("flags", "scale"), [({}, 1), ({"rank": 2, "lora_alpha": 8}, 4),
                                              ({"rank": 4, "lora_alpha": 8, "use_rslora": True}, 4)])
def test_alpha_scales(script, train, tiny_model, flags, scale):
    """What a layer adds is lora_alpha / rank times B A, or lora_alpha / sqrt(rank)."""
    out = train(lora_target=["attn2.to_k"], **flags)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.load_lora_weights(out)
    weights, states = load_file(out / FILE), torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    stem = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    down, up = (weights[f"unet.{stem}.lora.{side}.weight"] for side in ("down", "up"))
    layer = pipeline.unet.get_submodule(stem)
    torch.testing.assert_close(layer(states) - layer.base_layer(states), scale * states @ down.T @ up.T,
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", None])
def test_precision_from_the_launcher_leaves_adapters_in_float32(script, train, monkeypatch, precision):
    """Adapters are float32 and the rest is in the run's precision, wherever that was set."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    seen = get_models(script, monkeypatch)
    out = train(mixed_precision=precision, train_text_encoder=True, use_dora=True, max_train_steps=1)
    networks = seen[0]
    for network in (networks.unet, networks.text_encoder):
        dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in network.parameters()}
        assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert {tensor.dtype for tensor in load_file(out / FILE).values()} == {torch.float32}


def test_inputs_of_adapters_are_not_copied_to_float32(script, train, monkeypatch):
    dtypes, original = set(), script.add_adapter

    def add_adapter(network, config):
        original(network, config)
        for name, module in network.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_pre_hook(lambda module, inputs: dtypes.add(inputs[0].dtype))

    monkeypatch.setattr(script, "add_adapter", add_adapter)
    train(mixed_precision="bf16", max_train_steps=1)
    assert dtypes == {torch.bfloat16}


def test_dora_starts_from_the_norms_of_the_base(script, tiny_model, tmp_path, image_folder):
    """The magnitudes are the float32 norms of the frozen weights also where those are in half precision."""
    args = script.parse_args(make_args(tiny_model, image_folder, tmp_path / "out", use_dora=True,
                                       mixed_precision="bf16", lora_target=["attention", "convolution"]))
    unet = script.load_models(args, script.make_accelerator(args), script.load_model_configs(args)).unet
    found = 0
    for module in unet.modules():
        for magnitude in getattr(module, "lora_magnitude_vector", {}).values():
            expected = module.base_layer.weight.double().flatten(1).norm(dim=1)
            torch.testing.assert_close(magnitude.weight.flatten().double(), expected, rtol=1e-6, atol=0)
            found += 1
    assert found > 10


def test_the_order_of_targets_does_not_matter(train):
    """The same layers in another order are the same adapter."""
    train(max_train_steps=1, lora_target=["attention", "feed_forward"])
    train(max_train_steps=2, lora_target=["feed_forward", "attention", "attention"], resume_from_checkpoint="latest")


def test_only_the_adapter_is_saved(train):
    """Checkpoints and the output hold the adapter, and no base weights."""
    out = train(use_ema=True)
    large = [path for path in out.rglob("*") if path.suffix in (".safetensors", ".bin") and
             path.stat().st_size > 400_000]
    assert large == [] and not list(out.rglob("diffusion_pytorch_model*"))


def test_the_text_encoder_has_its_own_rate(train):
    """--text_encoder_lr moves the text encoder alone; `lr` is that of the UNet."""
    out = train(train_text_encoder=True, learning_rate=0, text_encoder_lr=0.05, report_to="tensorboard",
                lr_scheduler="linear", max_train_steps=4)
    weights = load_file(out / FILE)
    moved = {name.split(".")[0] for name, tensor in weights.items()
             if name.endswith((".up.weight",)) and tensor.abs().max() > 0}
    assert moved == {"text_encoder"}
    assert set(read_scalars(out, "lr").values()) == {0}


def test_magnitudes_are_not_decayed(script, train, monkeypatch):
    """Weight decay shrinks A and B, and leaves DoRA's magnitudes where the frozen weights put them."""
    seen = get_models(script, monkeypatch)
    train(use_dora=True, train_text_encoder=True, adam_weight_decay=0.3, text_encoder_lr=0.01, max_train_steps=1)
    groups = seen[0].optimizer.param_groups
    assert [(group["initial_lr"], group["weight_decay"]) for group in groups] == [
        (0.05, 0.3), (0.05, 0), (0.01, 0.3), (0.01, 0)]
    assert all(parameter.ndim == 1 for group in groups[1::2] for parameter in group["params"])


RUN = {"max_train_steps": 2, "rank": 3, "lora_alpha": 6, "use_ema": True}
OTHERS = [
    {"rank": 4}, {"lora_alpha": 3}, {"lora_target": ["attention", "feed_forward"]}, {"use_dora": True},
    {"use_rslora": True}, {"train_text_encoder": True}, {"use_8bit_adam": True}, {"use_ema": None},
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda flags: next(iter(flags)))
def test_resuming_with_other_adapters_is_refused(script, train, finished, monkeypatch, other):
    """A checkpoint with another rank, scale, set of layers or kind is refused by the flag's name, before loading."""
    checkpoint = finished(**RUN) / "checkpoint-2"
    seen = get_models(script, monkeypatch)
    with pytest.raises(ValueError, match=f"does not fit: {next(iter(other))} .* -> .*Give the command as it was"):
        train(**{**RUN, **other}, resume_from_checkpoint=checkpoint)
    assert seen == []


NAMINGS = {
    "peft": ((".lora.down.", ".lora_A."), (".lora.up.", ".lora_B."), (".lora_linear_layer.down.", ".lora_A."),
             (".lora_linear_layer.up.", ".lora_B.")),
    "flat": ((".text_model.", "."),),  # as transformers 5 names the first text encoder
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_files_with_other_names_are_resumed(train, naming):
    """A checkpoint whose file has the reference's other names goes on as one with ours."""
    flags = {"train_text_encoder": True, "use_dora": True, "max_train_steps": 2}
    for name in ("first", "second"):
        out = train(name, **flags)
        if name == "second":
            path = out / "checkpoint-2" / FILE
            weights, metadata = load_file(path), read_metadata(path)
            for old, new in NAMINGS[naming]:
                weights = {key.replace(old, new): tensor for key, tensor in weights.items()}
            assert weights.keys() != load_file(path).keys()
            save_file(weights, path, metadata=metadata)
            record = {**read_record(out / "checkpoint-2"), "files": {}}  # the reference keeps no digests
            (out / "checkpoint-2/run_record.json").write_text(json.dumps(record))
        train(name, **{**flags, "max_train_steps": 3}, resume_from_checkpoint="latest")
    assert_same_checkpoint(out / "checkpoint-3", out.parent / "first" / "checkpoint-3")


@pytest.fixture
def read_start(script, tiny_model, image_folder, tmp_path):
    """Return a function that returns the adapter that a run starts from, by the script's own functions."""

    def with_flags(start: Path, **flags) -> dict[str, torch.Tensor]:
        args = script.parse_args(make_args(tiny_model, image_folder, tmp_path / "new", **flags,
                                           pretrained_lora_model_name_or_path=start))
        accelerator, configs = script.make_accelerator(args), script.load_model_configs(args)
        models = script.load_models(args, accelerator, configs)
        script.load_initial_adapter(args, models, None)
        return script.name_lora_weights(vars(models))

    return with_flags


STARTS = {
    "plain": {}, "dora": {**EVERYTHING, "use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 6, "rank": 9, "train_text_encoder": True},
}


@pytest.mark.parametrize("kind", STARTS)
def test_a_run_starts_from_a_finished_adapter(train, kind):
    """A run with a learning rate of 0 that starts from an adapter ends with it, bit for bit."""
    out = train(max_train_steps=2, **STARTS[kind])
    new = train("new", max_train_steps=1, learning_rate=0, pretrained_lora_model_name_or_path=out, **STARTS[kind])
    before, after = load_file(out / FILE), load_file(new / FILE)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


OLD_NAMES = ((".to_out.0.lora.", ".processor.to_out_lora."),
             *((f".to_{kind}.lora.", f".processor.to_{kind}_lora.") for kind in "qkv"))


@pytest.mark.parametrize("naming", ["old", *NAMINGS])
def test_a_start_with_other_names_is_the_same(finished, read_start, tmp_path, naming):
    """Names of PEFT and of older versions of diffusers are read; without metadata lora_alpha is the rank."""
    flags = {"train_text_encoder": True} if naming != "old" else {}
    out, start = finished(max_train_steps=1, **flags), tmp_path / "renamed.safetensors"
    weights = load_file(out / FILE)
    for old, new in {**NAMINGS, "old": OLD_NAMES}[naming]:
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    assert weights.keys() != load_file(out / FILE).keys()
    save_file(weights, start)
    expected = read_start(out, **flags)
    found = read_start(start, **flags)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("source", ["ours", "kohya", "peft"])
@pytest.mark.parametrize(("flags", "scale"), [
    ({"lora_alpha": 6}, 2), ({"lora_alpha": 2, "use_rslora": True}, 2 / 3**0.5)])
def test_a_start_has_the_scale_of_its_file(finished, read_start, tiny_model, tmp_path, source, flags, scale):
    """Whatever --lora_alpha says, a layer starts with what the file adds to it, by the alpha in the file."""
    trains_text = {"train_text_encoder": source != "peft"}
    out = finished(max_train_steps=2, rank=3, save_kohya_format=True, **flags, **trains_text)
    start = {"ours": out, "kohya": out / KOHYA_FILE, "peft": tmp_path / "peft"}[source]
    if source == "peft":
        unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
        wrapped = get_peft_model(unet, LoraConfig(r=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"], **flags))
        weights = load_file(out / FILE)
        for old, new in (("unet.", "base_model.model."), *NAMINGS["peft"]):
            weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
        set_peft_model_state_dict(wrapped, weights)
        wrapped.save_pretrained(start)
    found = read_start(start, rank=3, lora_alpha=1.5, **trains_text)
    expected = read_start(out, rank=3, **flags, **trains_text)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        factor = scale / 0.5 if ".lora_B." in name else 1
        torch.testing.assert_close(found[name], factor * tensor, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("flags", "told"), [
    ({"rank": 8}, "lora_A"),
    ({"lora_target": ["attention", "feed_forward"]}, "proj_in"),
    ({"lora_target": ["attn1.to_q"]}, "attn1.to_k"),
    ({"use_dora": True}, "magnitude"), ({"train_text_encoder": True}, "text_encoder")])
def test_a_start_that_does_not_fit_is_refused(train, finished, flags, told):
    """Another rank or other layers are named."""
    with pytest.raises(ValueError, match=f"--pretrained_lora_model_name_or_path .*{told}"):
        train(pretrained_lora_model_name_or_path=finished(max_train_steps=1), **flags)


def test_a_start_that_cannot_be_read_is_refused(train, tiny_model):
    """What is no LoRA is refused by the flag's name."""
    for start in (tiny_model / "unet", tiny_model / "nowhere"):
        with pytest.raises(ValueError, match="--pretrained_lora_model_name_or_path .*(cannot be read|does not fit)"):
            train(pretrained_lora_model_name_or_path=start)


def test_a_resumed_run_goes_on_with_its_own_adapter(train):
    """On resume the checkpoint wins over --pretrained_lora_model_name_or_path, which need not be there any more."""
    flags = {"pretrained_lora_model_name_or_path": train("first", max_train_steps=1)}
    whole = train("whole", max_train_steps=3, **flags)
    train("part", max_train_steps=2, **flags)
    flags["pretrained_lora_model_name_or_path"].rename(whole.parent / "moved")
    part = train("part", max_train_steps=3, resume_from_checkpoint="latest", **flags)
    assert read_file(whole / FILE) == read_file(part / FILE)


def test_an_alpha_that_other_tools_overlook_is_told(train, caplog):
    """Where lora_alpha is not the rank, tools without metadata need the file for kohya's."""
    for flags, is_told in (({"lora_alpha": 8}, True), ({"lora_alpha": 8, "save_kohya_format": True}, False),
                           ({}, False), ({"use_rslora": True}, True)):
        caplog.clear()
        train("-".join(flags) or "plain", max_train_steps=1, **flags)
        assert any("--save_kohya_format" in message for message in caplog.messages) == is_told


def test_every_option_resumes_exactly(train):
    """Stopped and resumed in the middle of an epoch, a run with every option ends as an uninterrupted one."""
    flags = {**EVERYTHING, "use_dora": True, "lora_dropout": 0.2, "use_ema": True, "gradient_checkpointing": True,
             "text_encoder_lr": 0.01, "checkpointing_steps": 3, "lr_scheduler": "cosine"}
    whole = train("whole", **flags, max_train_steps=6)
    part = train("part", **flags, max_train_steps=6)
    (part / "checkpoint-6").rename(part / "away")
    train("part", **flags, max_train_steps=6, resume_from_checkpoint="latest")
    assert_same_checkpoint(whole / "checkpoint-6", part / "checkpoint-6")
    assert read_file(whole / FILE) == read_file(part / FILE)


@pytest.mark.parametrize(("target", "found"), [("to_z", "to_z"), ("attn1", "attn1"), ("", " ")])
def test_layers_that_are_not_there_are_refused(train, target, found):
    """A name that ends no layer's name is refused, with the names that there are."""
    with pytest.raises(ValueError, match=f"--lora_target {found}.*attention.*to_q"):
        train(lora_target=["attention", target])


def test_the_card_tells_how_to_load_it(train, tiny_model):
    """The model card loads the base and the adapter, and says what was trained."""
    card = (train(train_text_encoder=True, validation_prompt="a cat", num_validation_images=1,
                  validation_inference_steps=2) / "README.md").read_text()
    assert f"from_pretrained({str(tiny_model)!r})" in card and "load_lora_weights(" in card
    assert "train_text_encoder: True" in card and "- lora" in card and "rank: 4" in card


def test_the_card_draws_with_the_schedule_that_was_trained(train):
    """An adapter brings no schedule along, so the card's code sets one where it is not the base's."""
    card = (train("other", prediction_type="v_prediction", rescale_betas_zero_snr=True) / "README.md").read_text()
    assert "DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type='v_prediction', " in card
    assert "rescale_betas_zero_snr=True" in card and "import DDIMScheduler, StableDiffusionPipeline" in card
    assert "scheduler" not in (train("same") / "README.md").read_text().replace("lr_scheduler", "")


def test_a_file_for_kohya_is_kept_up_to_date(train):
    """Resumed without --save_kohya_format, a run does not leave an older adapter beside the newer one."""
    out = train(save_kohya_format=True, max_train_steps=1)
    before = load_file(out / KOHYA_FILE)
    train(max_train_steps=2, resume_from_checkpoint="latest")
    after, adapter = load_file(out / KOHYA_FILE), load_file(out / FILE)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert sorted(tensor.sum().item() for name, tensor in after.items() if not name.endswith(".alpha")) == sorted(
        tensor.sum().item() for tensor in adapter.values())


def test_a_finished_adapter_is_not_overwritten(script, train, capsys):
    """Where the checkpoints of a run are gone, its result still keeps a fresh run out."""
    out = train(max_train_steps=1)
    (out / "checkpoint-1").rename(out.parent / "away")
    with pytest.raises(SystemExit):
        train(max_train_steps=1)
    assert FILE in capsys.readouterr().err


def test_dora_in_a_layout_that_it_cannot_read_is_refused(train, capsys):
    """--use_dora with --channels_last is refused on the command line, where PEFT would fail at the first update."""
    with pytest.raises(SystemExit):
        train(use_dora=True, channels_last=True)
    assert "--use_dora excludes --channels_last" in capsys.readouterr().err
