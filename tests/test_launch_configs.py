"""Every example configuration is read by `accelerate launch` and means what its name says."""

import pathlib

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "accelerate_configs"
EXPECTED = {
    "one_gpu": {"num_processes": 1},
    "several_gpus": {"multi_gpu": True, "num_machines": 1},
    "several_machines": {"multi_gpu": True, "num_machines": 2, "num_processes": 16},
}
WAYS = ["multi_gpu", "use_fsdp", "use_deepspeed"]


def test_every_configuration_is_expected():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_configuration_means_what_its_name_says(name):
    argv = ["--config_file", str(FOLDER / f"{name}.yaml"), "train_text_to_image.py"]
    args = _validate_launch_command(launch_command_parser().parse_args(argv))[0]
    assert {way: getattr(args, way) for way in WAYS} == {way: EXPECTED[name].get(way, False) for way in WAYS}
    assert {key: getattr(args, key) for key in EXPECTED[name]} == EXPECTED[name]
    assert args.mixed_precision == "bf16"
    # Given here it would override the script's own flag.
    assert args.gradient_accumulation_steps is None
