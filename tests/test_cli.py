"""The command line: what is accepted, what is refused before anything is loaded, and that a token is written nowhere.

The text of --help is kept in tests/golden. Renew it after a change of a flag with: python tests/test_cli.py
"""

import argparse
import functools
import importlib
import importlib.util
import itertools
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    ROOT,
    SCRIPTS,
    TORCH_SCRIPTS,
    in_first_script,
    in_two_scripts,
    load_script,
    make_args,
    make_image_folder,
)
from runs import keep_configs_only
from safetensors.torch import load_file, save_file

import diffusers

GOLDEN = Path(__file__).parent / "golden"
CONTRACT = json.loads((Path(__file__).parent / "cli.json").read_text())

# The numbers that a flag may not be given, besides those that no flag may.
NO_NUMBERS = ("nan", "inf", "-inf", "1e30", "1" + "0" * 30, "-1")
POSITIVE_COUNTS = [
    "bucket_step", "preview_data", "train_batch_size", "num_train_epochs", "max_train_steps", "max_train_samples",
    "gradient_accumulation_steps", "lr_num_cycles", "checkpointing_steps", "logging_steps", "checkpoints_total_limit",
    "validation_epochs", "validation_steps", "validation_inference_steps", "rank", "cache_crops", "clip_skip"]
POSITIVE_REALS = [
    "lr_power", "snr_gamma", "adam_epsilon", "timestep_bias_multiplier", "lora_alpha"]
NONNEGATIVE_COUNTS = [
    "seed", "lr_warmup_steps", "dataloader_num_workers", "num_validation_images", "timestep_bias_begin"]
NONNEGATIVE_REALS = [
    "adam_weight_decay", "noise_offset", "input_perturbation", "dream_detail_preservation",
    "validation_guidance_scale", "learning_rate", "text_encoder_lr", "max_grad_norm"]
FRACTIONS = ["proportion_empty_prompts", "timestep_bias_portion", "ema_decay", "adam_beta1", "adam_beta2",
             "lora_dropout"]
UNBOUNDED = {"local_rank", "timestep_bias_end"}  # not used; bounded by --timestep_bias_begin and the model
IMPOSSIBLE_VALUES = [
    *((flag, "0", "must be from 1 to 1e+15") for flag in POSITIVE_COUNTS),
    *((flag, "0", "must be from 1e-30 to 1e+15") for flag in POSITIVE_REALS),
    *((flag, "-1", "must be from 0 to 1e+15") for flag in NONNEGATIVE_COUNTS),
    *((flag, "-0.1", "must be from 0 to 1e+15") for flag in NONNEGATIVE_REALS),
    *((flag, value, "must be from 0 to 1") for flag, value in itertools.product(FRACTIONS, ("-0.1", "1.5"))),
    ("lr_scheduler", "cosinus", "choose from linear, cosine, "),
    ("report_to", "tensorbord", "choose from tensorboard, wandb, "),
    ("report_to", "", "choose from tensorboard, wandb, "),
    ("report_to", "none,tensorboard", "or none alone"),
    ("lr_scheduler", "piecewise_constant", "choose from linear, cosine, "),  # its rules have no flag
    ("prediction_type", "x0", "choose from epsilon, v_prediction, sample"),
    ("mixed_precision", "fp8", "choose from"),
    ("image_interpolation_mode", "cubic", "choose from"),
    ("timestep_bias_strategy", "middle", "choose from"),
    ("resolution", "big", "must be from 1 to 99999, such as 512 or 768x512"),
    ("resolution", "0", "must be from 1 to 99999, such as 512 or 768x512"),
    ("validation_size", "-1", "must be from 1 to 99999, such as 512 or 768x512"),
    ("learning_rate", "1e", "invalid float value"),
    ("max_train_steps", "10.5", "invalid int value"),
]

# What cannot go together: flags, and what the message says of them beside their names. FOLDER is one that exists,
# USED an output folder with a checkpoint, MISSING nothing at all.
IMPOSSIBLE_PAIRS = {
    "no data": ({"train_data_dir": None}, "--train_data_dir", "--dataset_name"),
    "data that is no folder": ({"train_data_dir": "MISSING"}, "--train_data_dir MISSING", "--dataset_name"),
    "output into the data": ({"output_dir": "FOLDER", "train_data_dir": "FOLDER"}, "--output_dir FOLDER",
                             "--train_data_dir"),
    "output into held-out data": (
        {"output_dir": "FOLDER", "train_data_dir": None, "dataset_name": "x", "validation_data_dir": "FOLDER"},
        "--output_dir FOLDER", "--validation_data_dir"),
    "output into a data set": ({"output_dir": "FOLDER", "train_data_dir": None, "dataset_name": "FOLDER"},
                               "--output_dir FOLDER", "--dataset_name"),
    "output over another run": ({"output_dir": "USED"}, "--output_dir USED", "checkpoint-4, checkpoint-12",
                                "--resume_from_checkpoint latest"),
    "output over folders of one's own": ({"output_dir": "OWN"}, "--output_dir OWN", "unet", "name another"),
    "dream and perturbation": ({"dream_training": True, "input_perturbation": 0.1}, "--dream_training",
                               "--input_perturbation"),
    "two optimizers": ({"use_8bit_adam": True, "use_adafactor": True}, "--use_8bit_adam", "--use_adafactor"),
    "an optimizer that changes the format": ({"use_8bit_adam": True, "channels_last": True}, "--use_8bit_adam",
                                             "--channels_last"),
    "an update in backward with accumulation": (
        {"optimizer_in_backward": True, "max_grad_norm": 0, "gradient_accumulation_steps": 2},
        "--optimizer_in_backward", "--gradient_accumulation_steps 1"),
    "an update in backward with clipping": ({"optimizer_in_backward": True}, "--optimizer_in_backward",
                                            "--max_grad_norm 0"),
    "an update in backward with compilation": (
        {"optimizer_in_backward": True, "max_grad_norm": 0, "torch_compile": True}, "--optimizer_in_backward",
        "--torch_compile"),
    "bf16 weights after the backward pass": (
        {"weight_dtype": "bf16", "mixed_precision": "bf16"}, "--weight_dtype bf16", "--optimizer_in_backward"),
    "bf16 weights with averages": (
        {"weight_dtype": "bf16", "mixed_precision": "bf16", "optimizer_in_backward": True, "max_grad_norm": 0,
         "use_ema": True}, "--weight_dtype bf16", "no --use_ema"),
    "rate of a frozen text encoder": ({"text_encoder_lr": 1e-4}, "--text_encoder_lr", "--train_text_encoder"),
    **{f"token and {trackers}": ({"hub_token": "hf_secret", "report_to": trackers}, "--hub_token",
                                 f"--report_to {trackers}", "HF_TOKEN")
       for trackers in ("wandb", "all", "tensorboard,wandb")},
}


class ParserMade(Exception):
    """Carries a script's parser out of its `parse_args`, complete and before it parses."""


def make_parser(script) -> argparse.ArgumentParser:
    """Return the parser that a script reads its command line with."""

    def leave(parser, *args, **kwargs):
        raise ParserMade(parser)

    original, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, leave
    try:
        script.parse_args([])
    except ParserMade as error:
        return error.args[0]
    finally:
        argparse.ArgumentParser.parse_args = original


def get_flags(script) -> dict[str, argparse.Action]:
    """Return a script's flags by name, without the dashes, without --help and those that undo others."""
    return {action.dest: action for action in make_parser(script)._actions
            if action.dest != "help" and not isinstance(action, argparse._StoreFalseAction)}


@functools.cache
def find_script(*flags: str):
    """Return the first script that has some flags, as a module: the others refuse what it refuses by the same text."""
    return next(script for script in map(load_script, TORCH_SCRIPTS) if set(flags) <= set(get_flags(script)))


def describe(action: argparse.Action) -> dict:
    """Return a flag in the form of cli.json."""
    is_switch = action.nargs == 0
    return {"type": None if is_switch else (action.type or str).__name__, "default": action.default,
            "choices": action.choices and sorted(action.choices), "nargs": None if is_switch else action.nargs,
            "action": "store_true" if is_switch else None, "required": action.required}


def expect(entry: dict) -> dict:
    """Return an entry of cli.json with its choices in an order to compare by."""
    return {**entry, "choices": entry["choices"] and sorted(entry["choices"])}


def format_help(name: str) -> str:
    """Return the text of a script's --help, the same in every terminal and under every name."""
    parser = make_parser(load_script(name))
    parser.prog, parser.color = name, False  # Python 3.14 would colour it
    before, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "100"
    try:
        return parser.format_help()
    finally:
        os.environ.pop("COLUMNS")
        os.environ |= {} if before is None else {"COLUMNS": before}


@pytest.fixture
def places(tmp_path) -> dict[str, str]:
    """What stands for the words FOLDER, USED, OWN and MISSING in a command line."""
    folder, used, own = tmp_path / "folder", tmp_path / "used", tmp_path / "own"
    folder.mkdir()
    (own / "unet").mkdir(parents=True)
    for step in (4, 12):
        (used / f"checkpoint-{step}").mkdir(parents=True)
        (used / f"checkpoint-{step}" / "run_record.json").write_text("{}")
    return {"FOLDER": str(folder), "USED": str(used), "OWN": str(own), "MISSING": str(tmp_path / "missing")}


def fill_in(text, places: dict[str, str]):
    """Return a value or message with the words of `places` replaced."""
    for word, path in places.items():
        text = text.replace(word, path) if isinstance(text, str) else text
    return text


def get_refusal(capsys, places, **flags) -> str:
    """Return the one line with which a script ends at a command line, having seen that its status is 2."""
    script = find_script(*sorted(flags))
    flags = {"train_data_dir": "FOLDER", "output_dir": "MISSING"} | flags
    argv = make_args("no-such-model", flags.pop("train_data_dir"), flags.pop("output_dir"), **flags)
    with pytest.raises(SystemExit) as stopped:
        script.main([fill_in(value, places) for value in argv])
    output = capsys.readouterr()
    assert stopped.value.code == 2
    assert output.out == ""
    usage, _, message = output.err.partition(" error: ")
    assert usage.startswith("usage: ")
    assert not Path(places["MISSING"]).exists()
    assert message.endswith("\n")
    assert "\n" not in message.strip("\n")
    return message.strip()


def test_flags_are_those_of_the_contract(script):
    """Every flag that users of the reference type has its name, type, default, choices and so on."""
    flags = {f"--{name}": describe(action) for name, action in get_flags(script).items()}
    contract = {name: expect(entry) for name, entry in CONTRACT[f"{script.__name__}.py"].items()}
    assert {name: flags.get(name) for name in contract} == contract


def test_flags_taken_from_siblings_are_theirs(script):
    """A flag that only other scripts have in the contract is the same flag here, with the default of one of them."""
    flags, own = get_flags(script), CONTRACT[f"{script.__name__}.py"]
    differing = {}
    for name, action in flags.items():
        theirs = [expect(entries[f"--{name}"]) for entries in CONTRACT.values() if f"--{name}" in entries]
        ours = describe(action)
        if name == "tracker_project_name":  # no flag of some siblings, which have names of their own for it
            ours["default"] = ours["default"].removesuffix("-sdxl")
        if f"--{name}" not in own and theirs and ours not in theirs:
            differing[name] = (ours, theirs)
    assert differing == {}


def test_flag_names_are_their_attributes(script):
    """Each flag has one spelling: two dashes and the name under which the code reads it, or no_ to undo that."""
    spellings = {name: action.option_strings for name, action in get_flags(script).items()}
    assert spellings == {name: [f"--{name}"] for name in spellings}
    undoing = [action for action in make_parser(script)._actions if isinstance(action, argparse._StoreFalseAction)]
    assert [action.option_strings for action in undoing] == [[f"--no_{action.dest}"] for action in undoing]


@pytest.mark.parametrize("name", TORCH_SCRIPTS)
def test_help_is_the_golden_one(name):
    """The text of --help changes only on purpose: python tests/test_cli.py renews it."""
    assert format_help(name) == (GOLDEN / Path(name).with_suffix(".txt")).read_text(encoding="utf-8")


def test_every_flag_has_help(script):
    """--help says what each flag does, ends in a full stop, and leaves the default to argparse."""
    helps = {name: action.help or "" for name, action in get_flags(script).items()}
    assert [name for name, text in helps.items() if not text.endswith((".", ")"))] == []
    assert [name for name, text in helps.items() if "efault" in text] == []


def test_help_ends_with_status_0(script, capsys, monkeypatch):
    """Without a list of arguments `main` reads the command line of the process."""
    monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 0
    assert "--pretrained_model_name_or_path" in capsys.readouterr().out


def test_numbers_have_bounds(script, capsys):
    """No flag that takes a number accepts every number."""
    parser, accepted = make_parser(script), []
    numbers = {name for name, action in get_flags(script).items()
               if action.type and action.type.__name__ in ("int", "float")}
    for name, value in itertools.product(numbers, NO_NUMBERS):
        try:
            parser.parse_args(["--pretrained_model_name_or_path", "m", f"--{name}={value}"])
            accepted.append((name, value))
        except SystemExit:
            assert f"argument --{name}: " in capsys.readouterr().err
    assert {name for name, _ in accepted} <= UNBOUNDED
    assert numbers <= {flag for flag, _, _ in IMPOSSIBLE_VALUES} | UNBOUNDED


@pytest.mark.parametrize(("flag", "value", "rule"), IMPOSSIBLE_VALUES)
def test_impossible_values_are_refused(capsys, places, flag, value, rule):
    """A value that cannot work ends with status 2 and one line: the flag, the value, what is accepted."""
    message = get_refusal(capsys, places, **{flag: value})
    assert f"--{flag}" in message
    assert rule in message
    given = value.split(",")[-1]
    assert given in message or str(float(given)) in message


@pytest.mark.parametrize("case", IMPOSSIBLE_PAIRS)
def test_impossible_pairs_are_refused(capsys, places, case):
    """Flags that cannot go together end with status 2 and one line that names them and a way out."""
    flags, *parts = IMPOSSIBLE_PAIRS[case]
    message = get_refusal(capsys, places, **flags)
    assert [part for part in (fill_in(part, places) for part in parts) if part not in message] == []


@pytest.mark.parametrize("trackers", ["wandb", "comet_ml", "mlflow", "aim", "clearml", "dvclive", "swanlab", "trackio",
                                      "tensorboard,comet_ml"])
def test_trackers_that_are_not_installed_are_named(capsys, places, trackers):
    """A tracker that is not there is refused: accelerate would leave it out without a word."""
    package = trackers.split(",")[-1]
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    message = get_refusal(capsys, places, report_to=trackers)
    assert f"--report_to {package} is unknown or not installed" in message


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("given_to", ["the script", "accelerate launch"])
def test_half_precision_without_a_gpu_is_refused(capsys, places, monkeypatch, given_to):
    """fp16 needs a GPU: without one it is refused, rather than left out without a word as accelerate does."""
    if given_to == "accelerate launch":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    message = get_refusal(capsys, places, **({"mixed_precision": "fp16"} if given_to == "the script" else {}))
    assert "--mixed_precision fp16" in message
    assert "bf16" in message


def test_numbers_at_the_bounds_are_accepted(script, places):
    """What is just possible is possible."""
    flags = get_flags(script)
    edges = {**dict.fromkeys(POSITIVE_COUNTS, 1), **dict.fromkeys(POSITIVE_REALS, 1e-9),
             **dict.fromkeys(NONNEGATIVE_COUNTS + NONNEGATIVE_REALS + FRACTIONS, 0)}
    edges = {name: value for name, value in edges.items() if name in flags}
    argv = make_args("m", places["FOLDER"], places["MISSING"], train_text_encoder=True, cache_latents=True,
                     no_cache_text_embeddings=True, **edges)
    args = script.parse_args(argv)
    assert {name: getattr(args, name) for name in edges} == edges
    ones = {name: 1.0 for name in FRACTIONS if name in flags}
    args = script.parse_args(make_args("m", places["FOLDER"], places["MISSING"], **ones))
    assert {name: getattr(args, name) for name in ones} == ones


@pytest.mark.parametrize("trackers", ["none", "tensorboard"])
def test_token_is_accepted_where_nothing_publishes_it(script, places, trackers):
    """A token goes with trackers that stay on this machine."""
    argv = make_args("m", places["FOLDER"], places["MISSING"], hub_token="hf_secret", report_to=trackers)
    assert script.parse_args(argv).hub_token == "hf_secret"


def test_a_tilde_is_the_home(script, tmp_path, monkeypatch):
    """The shell leaves the ~ of --output_dir=~/out alone: it is expanded here, in every flag that names a place."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine/checkpoint-3").mkdir(parents=True)
    (tmp_path / "mine/checkpoint-3/run_record.json").write_text("{}")
    names = ("output_dir", "train_data_dir", "validation_data_dir", "cache_dir", "encoded_dir",
             "pretrained_vae_model_name_or_path", "resume_from_checkpoint")
    flags = {**dict.fromkeys(names, "~/mine"), "cache_latents": True, "output_dir": "~/out",
             "resume_from_checkpoint": "~/mine/checkpoint-3"}
    args = script.parse_args(make_args("m", flags.pop("train_data_dir"), flags.pop("output_dir"), **flags))
    assert [getattr(args, name) for name in names[:6]] == [str(tmp_path / "out")] + [str(tmp_path / "mine")] * 5
    assert args.resume_from_checkpoint == str(tmp_path / "mine/checkpoint-3")


def test_non_ema_revision_falls_back_to_revision(full_script, places):
    """--revision alone names the revision of every part."""
    for flags, expected in (({}, None), ({"revision": "a"}, "a"), ({"revision": "a", "non_ema_revision": "b"}, "b")):
        args = full_script.parse_args(make_args("m", places["FOLDER"], places["MISSING"], **flags))
        assert args.non_ema_revision == expected


@in_two_scripts
@pytest.mark.parametrize(
    ("changes", "flags", "parts"),
    [
        ({}, {"resolution": 33}, ["--resolution 33", "multiples of 2, for the VAE"]),
        ({}, {"resolution": 1}, ["--resolution 1", "multiples of 2, for the VAE"]),
        ({"unet": {"in_channels": 9}}, {}, ["9 channels", "4", "inpainting"]),
        ({"unet": {"addition_embed_type": "text_image"}}, {}, ["text_image", "SDXL"]),
        ({"scheduler": {"prediction_type": "flow_prediction"}}, {}, ["flow_prediction", "epsilon"]),
        ({"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}}, {}, ["FlowMatchEulerDiscreteScheduler"]),
        ({"scheduler": {"prediction_type": "v_prediction"}}, {"dream_training": True},
         ["--dream_training", "epsilon", "v_prediction"]),
        ({}, {"dream_training": True, "prediction_type": "sample"}, ["--dream_training", "epsilon", "sample"]),
        *(({}, {"rescale_betas_zero_snr": True, **flags},
           ["--rescale_betas_zero_snr", "--prediction_type v_prediction or sample"])
          for flags in ({}, {"prediction_type": "epsilon"})),
        ({"scheduler": {"num_train_timesteps": 800}},
         {"timestep_bias_strategy": "range", "timestep_bias_end": 801}, ["--timestep_bias_end 801", "800 timesteps"]),
        ({}, {"timestep_bias_strategy": "range", "timestep_bias_begin": 500, "timestep_bias_end": 500},
         ["--timestep_bias_begin 500", "--timestep_bias_end 500"]),
        ({}, {"clip_skip": 2}, ["--clip_skip 2 skips all layers"]),  # of two; SDXL has three and never takes the last
    ],
)
def test_models_that_cannot_be_trained_are_refused(script, tiny_model, image_folder, tmp_path, changes, flags, parts):
    """What the configurations of a model rule out is refused before any weights are read: here there are none."""
    model = keep_configs_only(tiny_model, tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=".") as refusal:
        script.main(make_args(model, image_folder, tmp_path / "out", **flags))
    assert [part for part in parts if part not in str(refusal.value)] == []
    assert not (tmp_path / "out").exists()


def test_the_other_kind_of_model_is_refused(script, tiny_models, image_folder, tmp_path):
    """A model for the scripts with sdxl in their names is none for the others, and the reverse: the error says so."""
    own, other = ("sdxl", "sd") if "sdxl" in script.__name__ else ("sd", "sdxl")
    model = keep_configs_only(tiny_models[other], tmp_path / "model")
    kinds = {"sd": "Stable Diffusion 1.x or 2.x", "sdxl": "Stable Diffusion XL"}
    with pytest.raises(ValueError, match=f"addition_embed_type.* trains {kinds[own]} .*have sdxl in their names"):
        script.main(make_args(model, image_folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@in_two_scripts
@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "text_encoder", "tokenizer"])
def test_a_model_folder_without_a_part_is_refused(script, tiny_model, image_folder, tmp_path, part):
    """The message names the folder, the part that it lacks, and what a model folder holds."""
    model = keep_configs_only(tiny_model, tmp_path / "model")
    shutil.rmtree(model / part)
    with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path .*model cannot be loaded: its {part}: "):
        script.main(make_args(model, image_folder, tmp_path / "out"))


@in_two_scripts
@pytest.mark.parametrize(("lost", "parts"), [
    ("vocabulary", ["its tokenizer: it has a vocabulary of 2", "tokenizer.json"]),
    ("weights of the text encoder", ["its text_encoder: the weights lack encoder.layers.0.mlp.fc1.bias"]),
    ("weights of the UNet", ["its unet: the weights lack conv_in.bias (1 tensors in all)"]),
])
def test_a_model_with_holes_is_refused(script, tiny_model, image_folder, tmp_path, lost, parts):
    """What an interrupted download leaves out is named: libraries would train with random values in its place."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    if lost == "vocabulary":
        for path in (model / "tokenizer").glob("*"):
            if path.name != "tokenizer_config.json":
                path.unlink()
    else:
        folder, name = (("text_encoder", "encoder.layers.0.mlp.fc1.bias") if "text" in lost
                        else ("unet", "conv_in.bias"))
        (path,) = (model / folder).glob("*.safetensors")
        weights = {key: tensor for key, tensor in load_file(path).items() if key.removeprefix("text_model.") != name}
        save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path .*model cannot be loaded") as refusal:
        script.main(make_args(model, image_folder, tmp_path / "out"))
    assert [part for part in parts if part not in str(refusal.value)] == []


def import_what_is_missing():
    importlib.import_module("no_such_package")


@pytest.mark.parametrize("fail", [
    import_what_is_missing, functools.partial(transformers.utils.check_peft_version, "99.0"),
    functools.partial(diffusers.utils.check_peft_version, "99.0")])
def test_an_installation_at_fault_does_not_blame_the_model(each_script, tiny_model, image_folder, tmp_path, fail):
    """A missing package, or one of a version that does not fit, is reported with how to install."""
    args = each_script.parse_args(make_args(tiny_model, image_folder, tmp_path / "out"))
    with pytest.raises(ImportError, match="pip install -r requirements.*-c constraints.txt") as told, \
            each_script.explained_load(args, ""):
        fail()
    assert "no_such_package" in str(told.value) or "99.0" in str(told.value)
    assert str(tiny_model) not in str(told.value)


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_data_is_checked_before_weights_are_read(script, tiny_model, image_folder, tmp_path, monkeypatch):
    """A wrong column costs no load of the model, which has no weights here; it is told in one line, no traceback."""
    model = keep_configs_only(tiny_model, tmp_path / "model")
    argv = make_args(model, image_folder, tmp_path / "out", caption_column="story")
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, argv)])
    with pytest.raises(SystemExit) as exits:
        runpy.run_path(script.__file__, run_name="__main__")
    told = "error: --caption_column story is not in .*l: its columns are image, text."
    assert re.fullmatch(told, exits.value.code)  # which Python prints


def test_a_mistake_that_a_loader_process_finds_is_told_without_its_traceback(tiny_models, tmp_path, monkeypatch):
    data = make_image_folder(tmp_path / "data", 2)
    (data / "001.png").write_bytes(b"no image")
    path = ROOT / TORCH_SCRIPTS[0]
    argv = make_args(tiny_models["sd"], data, tmp_path / "out", dataloader_num_workers=1, max_train_steps=1)
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, argv)])
    with pytest.raises(SystemExit) as exits:
        runpy.run_path(str(path), run_name="__main__")
    assert re.match("error: row 1 of the data .* cannot be read as an image.*--skip_broken_images", exits.value.code)


@in_first_script
def test_token_is_written_nowhere(script, tiny_model, tmp_path, caplog, capfd):
    """Neither records, trackers, hparams, card nor logs hold the token; the other flags they do hold."""
    secret, out = "hf_VerySecretToken", tmp_path / "out"
    caplog.set_level("DEBUG")  # of every library as well
    script.main(make_args(tiny_model, make_image_folder(tmp_path / "data", 2), out, hub_token=secret,
                          report_to="tensorboard", max_train_steps=1, learning_rate=0.0123))
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert [name for name, content in files.items() if secret.encode() in content] == []
    printed = capfd.readouterr()
    assert "seed 0" in caplog.text
    assert secret not in caplog.text + printed.out + printed.err
    assert b"0.0123" in files["checkpoint-1/run_record.json"]
    assert b"0.0123" in files["README.md"]
    hparams = [name for name in files if name.endswith("hparams.yml")]
    assert [name for name in hparams if b"0.0123" in files[name]] == hparams != []


@in_first_script
def test_a_seed_is_drawn_and_recorded(script, tiny_model, image_folder, tmp_path, caplog):
    """Without --seed each run has its own, logged and kept with the checkpoint."""
    caplog.set_level("INFO")
    seeds = []
    for name in "ab":
        script.main(make_args(tiny_model, image_folder, tmp_path / name, seed=None, max_train_steps=1))
        seeds.append(json.loads((tmp_path / name / "checkpoint-1" / "run_record.json").read_text())["seed"])
        assert f"seed {seeds[-1]}" in caplog.text
    assert seeds[0] != seeds[1]
    assert all(0 <= seed < 2**32 for seed in seeds)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for script_name in SCRIPTS if importlib.util.find_spec("jax") else TORCH_SCRIPTS:
        (GOLDEN / script_name).with_suffix(".txt").write_text(format_help(script_name), encoding="utf-8")
        print(f"wrote {(GOLDEN / script_name).with_suffix('.txt')}")
