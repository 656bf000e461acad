"""Checkpoints that cannot lose a run: their names and content, the limit, kills and full disks."""

import json
import logging
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import in_first_script, in_two_scripts, load_script, make_args
from peft import get_peft_model_state_dict
from runs import (
    DAMAGES,
    Run,
    assert_damage_is_found,
    assert_same_checkpoint,
    assert_same_files,
    list_names,
    load_pipeline,
    read_folder,
    read_record,
    read_trained,
    recorded,
    run,
)
from safetensors.torch import load_file

from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

# These tests stop processes at a moment of their own, which a busy machine may let pass: each gets one more try.


@pytest.fixture(autouse=True)
def all_logs(caplog):
    """Show these tests what is logged as information, too."""
    caplog.set_level(logging.INFO)


@pytest.fixture
def args(tiny_model, image_folder):
    """Return a function that gives the command line of a run of these tests."""
    return lambda output_dir, **flags: make_args(tiny_model, image_folder, output_dir, **{"use_ema": True, **flags})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function that gives the output of a run of four updates that saves every two."""
    done = {}

    def get(script, args):
        if script not in done:
            done[script] = tmp_path_factory.mktemp("saved") / "out"
            run(script, args(done[script], max_train_steps=4, checkpointing_steps=2))
        return done[script]

    return get


@pytest.fixture
def copied(script, args, saved, tmp_path):
    """A copy of that output, to be changed."""
    return shutil.copytree(saved(script, args), tmp_path / "out")


def assert_loads(checkpoint: Path, like: Path) -> None:
    """Fail unless a checkpoint has every file of another one, and each can be read to its end."""
    names = {str(path.relative_to(like)) for path in like.rglob("*") if path.is_file()}
    assert {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()} == names
    for path in (checkpoint / name for name in names):
        if path.suffix in (".bin", ".pkl"):
            torch.load(path, weights_only=False)
        elif path.suffix == ".safetensors":
            assert load_file(path)
        else:
            json.loads(path.read_text())


def assert_same_export(output_dir: Path, other: Path) -> None:
    """Fail unless two output folders hold the same pipeline, or the same adapter, which is one file."""
    contents, others = read_folder(output_dir), read_folder(other)
    exported = [name for name in others if name.endswith((".json", ".safetensors")) and "checkpoint-" not in name]
    assert exported and [name for name in exported if contents.get(name) != others[name]] == []


def count_files(folder: Path, pattern: str) -> int:
    """Return how many files lie in folders whose path matches a pattern, while they may be going."""
    return sum(len(files) for place, _, files in os.walk(folder) if re.search(pattern, place))


# ---- What is kept --------------------------------------------------------------------------------------------------


@in_first_script
def test_names_are_those_that_the_reference_pins(script, args, saved, tmp_path):
    """Four updates, every two: 2 and 4. Six with limit 2: 4 and 6. On to eight with limit 2: 6 and 8."""
    assert list_names(saved(script, args), "*checkpoint*") == {"checkpoint-2", "checkpoint-4"}
    run(script, args(tmp_path / "six", max_train_steps=6, checkpointing_steps=2, checkpoints_total_limit=2))
    assert list_names(tmp_path / "six", "*checkpoint*") == {"checkpoint-4", "checkpoint-6"}
    shutil.copytree(saved(script, args), tmp_path / "eight")
    run(script, args(tmp_path / "eight", max_train_steps=8, checkpointing_steps=2, checkpoints_total_limit=2,
                     resume_from_checkpoint="checkpoint-4"))
    assert list_names(tmp_path / "eight", "*checkpoint*") == {"checkpoint-6", "checkpoint-8"}


@in_first_script
def test_last_update_leaves_a_checkpoint(script, args, tmp_path):
    """Also when --checkpointing_steps is larger than the run, or does not divide it."""
    run(script, args(tmp_path / "out", max_train_steps=3, checkpointing_steps=2))
    assert list_names(tmp_path / "out") == {"checkpoint-2", "checkpoint-3"}


def test_files_of_a_checkpoint(script, args, saved, caplog):
    """Optimizer, schedule and random states lie as in the reference; the record says what the run was."""
    checkpoint = saved(script, args) / "checkpoint-2"
    assert {"optimizer.bin", "scheduler.bin", "random_states_0.pkl", "run_record.json"} <= list_names(checkpoint, "*")
    record = read_record(checkpoint)
    assert record["progress"] == {"global_step": 2, "epoch": 0, "samples_seen": 4}
    assert (record["seed"], record["num_processes"]) == (0, 1)
    assert (record["flags"]["train_batch_size"], record["flags"]["gradient_accumulation_steps"]) == (2, 1)
    assert record["captions_digest"]


def test_networks_of_a_checkpoint_load_in_diffusers(full_script, args, saved):
    """Its unet/ and unet_ema/ are model folders, and EMAModel takes the second as one of its own."""
    checkpoint = saved(full_script, args) / "checkpoint-2"
    unet = UNet2DConditionModel.from_pretrained(saved(full_script, args), subfolder="checkpoint-2/unet")
    averaged = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet_ema")
    averages = EMAModel.from_pretrained(checkpoint / "unet_ema", UNet2DConditionModel)
    assert averages.optimization_step == 2 and averages.decay == 0.9999
    for tensor, (name, parameter) in zip(averages.shadow_params, averaged.named_parameters(), strict=True):
        assert torch.equal(tensor, parameter) and not torch.equal(tensor, unet.get_parameter(name))


def test_output_loads_as_a_pipeline(script, tiny_model, args, saved):
    """What stands in --output_dir draws pictures, with the averaged weights of the last update."""
    out = saved(script, args)
    if "lora" not in script.__name__:
        assert (out / "unet/diffusion_pytorch_model.safetensors").is_file()
        assert (out / "scheduler/scheduler_config.json").is_file()
    pipeline = load_pipeline(out, tiny_model)
    averaged = read_trained(out / "checkpoint-4", averaged=True)
    loaded = pipeline.unet.state_dict()
    if "lora" in script.__name__:
        loaded = get_peft_model_state_dict(pipeline.unet, adapter_name="default_0")
        names = {".lora.down.": ".lora_A.", ".lora.up.": ".lora_B.", "unet.": ""}
        for kept, meant in names.items():
            averaged = {name.replace(kept, meant): tensor for name, tensor in averaged.items()}
    assert loaded.keys() == averaged.keys()
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in loaded.items())
    assert pipeline("a", num_inference_steps=1, output_type="np").images.shape[0] == 1


# ---- Which one is meant --------------------------------------------------------------------------------------------

FOREIGN = ("checkpoint-old", "checkpoints", "checkpoint-3.bak", "my-checkpoint-5", "checkpoint-")


@in_first_script
def test_foreign_names_are_passed_over(script, args, copied):
    """Folders and files of other names are no checkpoints: neither resumed from, nor counted, nor removed."""
    for name in FOREIGN:
        shutil.copytree(copied / "checkpoint-2", copied / name)
    (copied / "checkpoint-7").write_text("a file")
    assert [path.name for path in script.list_checkpoints(str(copied))] == ["checkpoint-2", "checkpoint-4"]
    run(script, args(copied, max_train_steps=5, checkpoints_total_limit=1, resume_from_checkpoint="latest"))
    assert list_names(copied, "*checkpoint*") == {"checkpoint-5", "checkpoint-7", *FOREIGN}
    assert read_record(copied / "checkpoint-5")["progress"]["global_step"] == 5


@in_first_script
def test_incomplete_folder_is_not_the_latest(script, args, copied):
    """What was copied or saved by halves is passed over by `latest` and by the limit, and refused by name."""
    partial = copied / "checkpoint-99"
    shutil.copytree(copied / "checkpoint-4", partial)
    for name in ("run_record.json", "random_states_0.pkl", "optimizer.bin", "scheduler.bin"):
        (partial / name).unlink()
    with pytest.raises(ValueError, match="--resume_from_checkpoint checkpoint-99 is not a complete checkpoint"):
        script.find_checkpoint("checkpoint-99", copied)
    run(script, args(copied, max_train_steps=5, checkpoints_total_limit=1, resume_from_checkpoint="latest"))
    assert list_names(copied) == {"checkpoint-5", "checkpoint-99"}


@in_first_script
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(script, copied, damage):
    assert_damage_is_found(script, copied / "checkpoint-4", copied / "checkpoint-2", damage)


@in_first_script
def test_missing_checkpoint_is_refused_with_those_that_exist(script, args, copied):
    """Before any weights are loaded; the same for a folder that holds none."""
    for output_dir, hint in ((copied, "checkpoint-2, checkpoint-4"), (copied / "empty", "no checkpoint")):
        with pytest.raises(ValueError, match=f"--resume_from_checkpoint checkpoint-900 is not .* holds {hint}\\."):
            script.main(args(output_dir, resume_from_checkpoint="checkpoint-900"))


@in_first_script
@pytest.mark.parametrize("ending", ["", "/"])
def test_checkpoint_elsewhere_is_honoured(script, args, copied, ending, tmp_path, monkeypatch):
    """A path means that path, wherever it lies, with or without a slash at its end."""
    (copied / "best").mkdir()
    (copied / "checkpoint-2").rename(copied / "best" / "checkpoint-2")
    monkeypatch.chdir(copied)
    argv = args(tmp_path / "new", max_train_steps=4, resume_from_checkpoint="./best/checkpoint-2" + ending)
    run(script, argv)
    assert list_names(tmp_path / "new") == {"checkpoint-4"}
    assert_same_checkpoint(tmp_path / "new/checkpoint-4", copied / "checkpoint-4")


@in_first_script
def test_name_with_a_slash_means_the_one_in_the_output(script, args, copied):
    """`checkpoint-2/`, as a shell completes it, is checkpoint-2 in --output_dir."""
    run(script, args(copied, max_train_steps=3, resume_from_checkpoint="checkpoint-2/"))
    assert list_names(copied) == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}


@in_first_script
def test_latest_without_any_starts_afresh(script, args, saved, tmp_path):
    """So a job that restarts itself can always say `latest`; and it is the newest by number, not by name."""
    run(script, args(tmp_path / "out", max_train_steps=2, resume_from_checkpoint="latest"))
    assert_same_checkpoint(tmp_path / "out/checkpoint-2", saved(script, args) / "checkpoint-2")
    for step in (9, 10):
        shutil.copytree(tmp_path / "out/checkpoint-2", tmp_path / f"out/checkpoint-{step}")
    assert script.find_checkpoint("latest", str(tmp_path / "out")).name == "checkpoint-10"


@pytest.mark.parametrize("name", [None, "latest"])
def test_fresh_start_over_another_run_is_refused(script, args, copied, capsys, name):
    """Two runs must not mix in one folder by mistake: exit status 2, and nothing is touched.

    `latest` starts anew where no checkpoint is, but not over a finished run whose checkpoints were removed.
    """
    if name == "latest":
        for folder in copied.glob("checkpoint-*"):
            shutil.rmtree(folder)
    before = read_folder(copied)
    with pytest.raises(SystemExit) as exits:
        script.main(args(copied, resume_from_checkpoint=name))
    assert exits.value.code == 2
    assert f"holds {'checkpoint-2' if name is None else script.RESULT}" in capsys.readouterr().err
    assert read_folder(copied) == before


@in_first_script
def test_a_checkpoint_of_another_script_is_refused(script, args, tmp_path):
    """In one line, as what the user can put right."""
    run(load_script("train_text_to_image_lora.py"), args(tmp_path / "lora", max_train_steps=1, use_ema=False))
    with pytest.raises(script.UserError, match="checkpoint-1 cannot be loaded"):
        run(script, args(tmp_path / "out", use_ema=False, resume_from_checkpoint=tmp_path / "lora/checkpoint-1"))


@in_first_script
def test_a_file_system_without_permissions_takes_checkpoints(script, args, tmp_path, monkeypatch):
    """There chmod fails, and nothing else does."""
    def refuse(path, mode):
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "chmod", refuse)
    run(script, args(tmp_path / "out"))
    assert list_names(tmp_path / "out", "*") >= {"checkpoint-2", "model_index.json"}


@in_first_script
def test_a_checkpoint_that_cannot_be_removed_ends_no_run(script, args, tmp_path, monkeypatch):
    """As on NFS, where a reader has it open: it is out of the way, and each later start tries again."""
    def refuse(path, **flags):
        if ".partial-removed-" in str(path):
            raise OSError(16, "Device or resource busy")
        rmdir(path, **flags)

    out, rmdir = tmp_path / "out", os.rmdir
    with monkeypatch.context() as busy:
        busy.setattr(os, "rmdir", refuse)
        for last in (2, 3):
            run(script, args(out, max_train_steps=last, checkpointing_steps=1, checkpoints_total_limit=1,
                             resume_from_checkpoint="latest"))
    assert list_names(out) == {"checkpoint-3"}
    assert list_names(out, ".partial-removed-ch*") == {f".partial-removed-checkpoint-{step}" for step in (1, 2)}
    run(script, args(out, max_train_steps=4, resume_from_checkpoint="latest"))
    assert not list_names(out, ".partial-*")


# ---- Nothing is lost -----------------------------------------------------------------------------------------------


@in_first_script
def test_old_checkpoint_goes_only_when_the_new_one_is_complete(script, args, tmp_path, monkeypatch):
    """With limit 1, too, there is a complete checkpoint at every moment, and never fewer than the limit."""
    seen = []

    def replace_folder(new, place):
        if place.name.startswith("checkpoint-"):
            seen.append(sorted(list_names(tmp_path / "out")))
            assert_loads(new, new)
            assert (new / "run_record.json").is_file()
        original(new, place)
        if place.name.startswith("checkpoint-"):
            seen.append(sorted(list_names(tmp_path / "out")))

    original = script.replace_folder
    monkeypatch.setattr(script, "replace_folder", replace_folder)
    run(script, args(tmp_path / "out", max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=1))
    assert seen == [[], ["checkpoint-1"], ["checkpoint-1"], ["checkpoint-1", "checkpoint-2"], ["checkpoint-2"],
                    ["checkpoint-2", "checkpoint-3"]]
    assert list_names(tmp_path / "out") == {"checkpoint-3"}


@in_two_scripts
def test_the_mark_of_a_result_is_exported_last(script, args, tmp_path, monkeypatch):
    """A folder with model_index.json, or a LoRA's file, holds all of the result, whenever the export was killed."""
    original, names = script.replace_folder, []
    monkeypatch.setattr(script, "replace_folder", lambda new, place: names.append(place.name) or original(new, place))
    flags = {"save_kohya_format": True} if "lora" in script.__name__ else {}
    run(script, args(tmp_path / "out", max_train_steps=1, **flags))
    assert len(set(names)) > 2 and names[-1] == script.RESULT


@in_first_script
def test_limit_spares_the_checkpoint_just_saved(script, args, copied):
    """Resumed from an earlier checkpoint, a run keeps its own new one rather than those of the course it left."""
    run(script, args(copied, max_train_steps=3, checkpoints_total_limit=1, resume_from_checkpoint="checkpoint-2"))
    assert list_names(copied) == {"checkpoint-3"}


@in_first_script
def test_checkpoint_saved_again_replaces_the_old_one(script, args, copied, tmp_path, caplog):
    """A run that goes on from checkpoint-2 with another rate writes its own checkpoint-4, whole.

    Until then, `latest` is the one of the course that it left: it says so, however checkpoint-2 is spelled.
    """
    earlier = os.path.relpath(copied / "checkpoint-2")
    run(script, args(copied, max_train_steps=4, learning_rate=1e-5, resume_from_checkpoint=earlier))
    assert f"`latest` would return to checkpoint-4, newer than {earlier}" in caplog.text
    assert list_names(copied, ".partial*") == set() and list_names(copied) == {"checkpoint-2", "checkpoint-4"}
    assert_loads(copied / "checkpoint-4", copied / "checkpoint-2")
    assert read_record(copied / "checkpoint-4")["flags"]["learning_rate"] == 1e-5


@in_first_script
def test_kill_in_the_middle_of_a_save_costs_nothing(script, args, tmp_path):
    """Killed while it saves, a run leaves whole checkpoints only, and goes on from the newest."""
    out = tmp_path / "out"
    flags = {"max_train_steps": 100_000, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "random_flip": True}
    steps = [0]
    for count in (1, 2, 4):  # files that it has begun to write
        with Run(script, args(out, resume_from_checkpoint="latest", **flags), tmp_path / f"log-{count}") as child:
            child.wait_until((out / f"checkpoint-{steps[-1] + 1}").exists)
            child.wait_until(lambda: count_files(out, r"/\.partial-") >= count)  # noqa: B023
            child.kill(signal.SIGKILL)
            assert child.end() == -signal.SIGKILL
        found = list_names(out)
        assert found == {path.name for path in script.list_checkpoints(str(out))}
        steps.append(max(int(name.removeprefix("checkpoint-")) for name in found))
        for name in found:
            assert_loads(out / name, out / f"checkpoint-{steps[-1]}")
    assert steps == sorted(set(steps))
    last = steps[-1] + 1
    run(script, args(out, resume_from_checkpoint="latest", **{**flags, "max_train_steps": last}))
    assert list_names(out, ".partial*") == set()
    run(script, args(tmp_path / "whole", **{**flags, "max_train_steps": last, "checkpointing_steps": 100}))
    assert_same_checkpoint(out / f"checkpoint-{last}", tmp_path / f"whole/checkpoint-{last}")


@in_first_script
def test_kill_in_the_middle_of_a_removal_leaves_no_broken_checkpoint(script, args, copied, tmp_path):
    """A checkpoint that is being removed is none from the start: what is left of it goes at the next run."""
    ballast = copied / "checkpoint-2/ballast"
    ballast.mkdir()
    for number in range(30_000):  # so that removing them takes a while
        (ballast / str(number)).touch()
    argv = args(copied, max_train_steps=5, checkpoints_total_limit=2, resume_from_checkpoint="latest")

    def is_half_removed() -> bool:
        """Look while the run is halted, and leave it so if it is."""
        child.kill(signal.SIGSTOP)
        if 0 < count_files(copied, "/ballast$") < 30_000:  # none while the folder is renamed
            return True
        child.kill(signal.SIGCONT)
        return False

    with Run(script, argv, tmp_path / "log") as child:
        child.wait_until((copied / "checkpoint-5").exists)
        child.wait_until(is_half_removed)
        child.kill(signal.SIGKILL)
        child.end()
    assert list_names(copied) == {"checkpoint-4", "checkpoint-5"}
    run(script, argv)
    assert list_names(copied, ".partial*") == set() and not list(copied.rglob("ballast"))
    assert list_names(copied) == {"checkpoint-4", "checkpoint-5"}


@in_first_script
def test_full_disk_leaves_earlier_checkpoints_untouched(script, args, copied, tmp_path):
    """A save that fails costs no checkpoint, and what it has written is cleared at the next start."""
    before, log = read_folder(copied / "checkpoint-4"), tmp_path / "log"
    argv = args(copied, max_train_steps=6, checkpoints_total_limit=1, resume_from_checkpoint="latest")
    with Run(script, argv, log, limit=50_000) as child:  # no file may be larger: as little room as on a full disk
        assert child.end() == 1
    assert re.search("checkpoint-6 could not be written: .+ Is the disk full", log.read_text())
    assert list_names(copied) == {"checkpoint-2", "checkpoint-4"}
    assert read_folder(copied / "checkpoint-4") == before
    run(script, argv)
    assert list_names(copied) == {"checkpoint-6"} and list_names(copied, ".partial*") == set()


@pytest.mark.parametrize("is_mount_point", [False, True])
@in_first_script
def test_a_disk_that_is_gone_ends_the_run(script, args, tmp_path, is_mount_point):
    """Nothing is written to what lies under a disk that was unmounted; its checkpoints are as they were."""
    out, disk = tmp_path / "out", tmp_path / "disk"

    def unmount(step, seen):
        if len(seen) == 1:
            out.rename(disk)
            if is_mount_point:
                out.mkdir()

    with recorded(script, unmount), pytest.raises(RuntimeError, match="checkpoint-2 could not be written: .* or gone"):
        run(script, args(out, max_train_steps=3, checkpointing_steps=1))
    assert list_names(disk) == {"checkpoint-1"} and list_names(out, "*") == set()
    run(script, args(disk, max_train_steps=2, resume_from_checkpoint="latest"))
    assert list_names(disk) == {"checkpoint-1", "checkpoint-2"} and list_names(disk, ".partial*") == set()


@in_first_script
def test_a_folder_that_cannot_be_written_is_refused_at_the_start(script, args, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--output_dir .*file/out cannot be written"):
        run(script, args(tmp_path / "file/out"))


@in_two_scripts
def test_full_disk_at_the_export_keeps_the_pipeline_that_was_there(script, args, copied, saved, tmp_path):
    """The finished weights are in the checkpoint by then; the pipeline of before stays whole."""
    log = tmp_path / "log"
    argv = args(copied, max_train_steps=4, resume_from_checkpoint="latest")
    with Run(script, argv, log, limit=50_000) as child:
        assert child.end() == 1
    assert list_names(copied) == {"checkpoint-2", "checkpoint-4"}
    assert_same_export(copied, saved(script, args))
    assert_same_files(copied / "checkpoint-4", saved(script, args) / "checkpoint-4")
    run(script, argv)
    assert list_names(copied, ".partial*") == set()


@in_first_script
def test_folder_of_a_run_that_is_not_over_is_refused(script, args, tmp_path, monkeypatch):
    """Two runs at once would clear away each other's saves: the second is told to wait, and the first goes on."""
    out, acquire = tmp_path / "out", script.FileLock.acquire
    monkeypatch.setattr(script.FileLock, "acquire", lambda lock, timeout=None, **more: acquire(
        lock, timeout and timeout / 20, **more))  # it waits for half a second only
    argv = args(out, max_train_steps=100_000, checkpointing_steps=2, resume_from_checkpoint="latest")
    with Run(script, argv, tmp_path / "log") as child:
        child.wait_until((out / "checkpoint-2").exists)
        with pytest.raises(ValueError, match="in use by another run"):
            run(script, args(out, resume_from_checkpoint="latest"))
        child.wait_until((out / "checkpoint-4").exists)
        child.kill(signal.SIGKILL)
        child.end()
    last = 2 + max(int(name.removeprefix("checkpoint-")) for name in list_names(out))
    run(script, args(out, max_train_steps=last, resume_from_checkpoint="latest"))
    assert f"checkpoint-{last}" in list_names(out)


@in_first_script
def test_leftovers_of_a_killed_save_are_cleared_at_the_next_start(script, args, copied, caplog):
    """Whatever the kill has left."""
    shutil.copytree(copied / "checkpoint-2", copied / ".partial-removed-checkpoint-3")
    (copied / ".partial-checkpoint-6/unet").mkdir(parents=True)
    (copied / ".partial-checkpoint-6/unet/config.json").write_text("{")
    run(script, args(copied, max_train_steps=5, resume_from_checkpoint="latest"))
    assert list_names(copied) == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}
    assert list_names(copied, ".partial*") == set()
    assert f"starting from {copied / 'checkpoint-4'}" in caplog.text


@in_first_script
def test_a_linked_checkpoint_is_unlinked_and_what_it_points_to_kept(script, tiny_model, image_folder, tmp_path):
    """The limit removes a link to a checkpoint elsewhere, not the checkpoint, and the next start works."""
    script.main(make_args(tiny_model, image_folder, tmp_path / "first", max_train_steps=1))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-1").symlink_to(tmp_path / "first" / "checkpoint-1")
    flags = {"resume_from_checkpoint": "latest", "checkpoints_total_limit": 1}
    script.main(make_args(tiny_model, image_folder, tmp_path / "out", max_train_steps=2, **flags))
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint-*")] == ["checkpoint-2"]
    assert (tmp_path / "first" / "checkpoint-1" / "optimizer.bin").is_file()


@in_first_script
def test_another_optimizer_is_refused(script, tiny_model, image_folder, tmp_path):
    """Moments of one optimizer are not loaded into another, and the error names the flag."""
    script.main(make_args(tiny_model, image_folder, tmp_path / "out", max_train_steps=1))
    flags = {"resume_from_checkpoint": "latest", "use_8bit_adam": True}
    with pytest.raises(ValueError, match="checkpoint-1 does not fit: use_8bit_adam False -> True"):
        script.main(make_args(tiny_model, image_folder, tmp_path / "out", max_train_steps=2, **flags))


@in_two_scripts
def test_others_can_read_what_a_run_leaves(script, base_args, tmp_path):
    """Files have the permissions that the umask gives, whatever the library that wrote them."""
    previous = os.umask(0o022)
    try:
        run(script, [*base_args, "--use_ema"])
    finally:
        os.umask(previous)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*.*") if path.is_file()}
    assert {name: mode for name, mode in modes.items() if mode != 0o644} == {}
