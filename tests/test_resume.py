"""A run that was stopped and resumed is the run that was never stopped, and what changes in between is said."""

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import (
    TORCH_SCRIPTS,
    in_first_script,
    in_two_scripts,
    make_args,
    make_image_folder,
    read_scalars,
)
from runs import (
    Run,
    assert_same_checkpoint,
    assert_same_files,
    get_command,
    list_exported,
    list_names,
    read_record,
    recorded,
    run,
)

# These tests stop processes at a moment of their own, which a busy machine may let pass: each gets one more try.

NUM_UPDATES = 6
EVERY_OPTION = {
    "snr_gamma": 5, "noise_offset": 0.1, "input_perturbation": 0.1, "proportion_empty_prompts": 0.5,
    "random_flip": True, "timestep_bias_strategy": "later", "timestep_bias_multiplier": 3,
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "max_train_samples": 9,
    "gradient_accumulation_steps": 2, "lr_scheduler": "polynomial", "scale_lr": True}
CASES = {  # what is trained, and the update in which it is stopped: five make an epoch, with accumulation three
    "in the middle of an epoch": ({}, 3),
    "at the end of an epoch": ({}, 5),
    "accumulation": ({"gradient_accumulation_steps": 2}, 2),
    "accumulation at the end of an epoch": ({"gradient_accumulation_steps": 2}, 3),
    "two loader workers": ({"dataloader_num_workers": 2}, 3),
    "every option": (EVERY_OPTION, 4),
    "DREAM": ({"dream_training": True, "gradient_checkpointing": True}, 2),
    "without averages": ({"use_ema": False, "random_flip": True}, 2),
}


def watch(script, argv: list, stop_in: int | None = None, number: int = signal.SIGTERM) -> list[dict]:
    """Run a script that gets a signal while update `stop_in` is computed; return what each micro step trained on."""

    def before(step, seen):
        updates = sum(each["step"].ends_update for each in seen)
        if updates + 1 == stop_in and (not seen or seen[-1]["step"].ends_update):
            os.kill(os.getpid(), number)

    with recorded(script, before) as seen, pytest.raises(SystemExit) if stop_in else contextlib.nullcontext() as exits:
        run(script, argv)
    assert stop_in is None or exits.value.code == 128 + number
    return seen


@pytest.fixture(autouse=True)
def all_logs(caplog):
    """Show these tests what is logged as information, too."""
    caplog.set_level(logging.INFO)


@pytest.fixture
def args(tiny_model, image_folder):
    """Return a function that gives the command line of a run of these tests."""
    defaults = {"use_ema": True, "report_to": "tensorboard", "lr_scheduler": "cosine", "lr_warmup_steps": 2,
                "max_train_steps": NUM_UPDATES, "checkpointing_steps": 100, "seed": 3}
    return lambda output_dir, **flags: make_args(tiny_model, image_folder, output_dir, **{**defaults, **flags})


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """Return a function that gives the folder and the batches of a run without a stop, made once for each."""
    done = {}

    def get(script, args, **flags):
        key = script.__name__, str(sorted(flags.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("whole") / "out"
            done[key] = folder, watch(script, args(folder, **flags))
        return done[key]

    return get


def assert_same_run(folder: Path, whole: Path, num_updates: int = NUM_UPDATES) -> None:
    """Fail unless two runs logged the same for every update, and left the same checkpoint and export."""
    for tag in ("train_loss", "lr", "grad_norm", "epoch"):
        logged = read_scalars(folder, tag)
        assert list(logged) == list(range(1, num_updates + 1)), tag
        assert logged == read_scalars(whole, tag), tag
    assert_same_checkpoint(folder / f"checkpoint-{num_updates}", whole / f"checkpoint-{num_updates}")
    assert list_exported(folder) == list_exported(whole) != set()
    for name in list_exported(whole):
        assert_same_files(folder / name, whole / name)


# ---- Exactly the same run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "case"), [*((TORCH_SCRIPTS[0], case) for case in CASES),
                                              *((name, "every option") for name in TORCH_SCRIPTS[1:])],
                         indirect=["script"])
def test_stopped_and_resumed_run_repeats_the_uninterrupted_one(script, args, never_stopped, case, tmp_path, caplog):
    """Weights, averages, optimizer, schedule, random states, logged numbers and batches are the same bit for bit."""
    flags, stop_in = CASES[case]
    whole, batches = never_stopped(script, args, **flags)
    argv = args(tmp_path / "out", **flags)
    before = watch(script, argv, stop_in=stop_in)
    assert list_names(tmp_path / "out") == {f"checkpoint-{stop_in}"}
    assert "--resume_from_checkpoint latest" in caplog.text
    after = watch(script, [*argv, "--resume_from_checkpoint", "latest"])
    assert before + after == batches
    assert_same_run(tmp_path / "out", whole)
    assert "with the same captions, noise and settings" in caplog.text


@in_two_scripts
@pytest.mark.parametrize("workers", [(0, 2), (2, 0)], ids="{0[0]} then {0[1]}".format)
def test_number_of_loader_workers_may_change(script, args, never_stopped, workers, tmp_path, caplog):
    """The number of processes that load data is no part of the training: any repeats the run without them."""
    whole, batches = never_stopped(script, args, random_flip=True)
    out = tmp_path / "out"
    first, second = (args(out, random_flip=True, dataloader_num_workers=number) for number in workers)
    before = watch(script, first, stop_in=3)
    after = watch(script, [*second, "--resume_from_checkpoint", "latest"])
    assert before + after == batches
    assert_same_run(out, whole)
    assert "with the same captions, noise and settings" in caplog.text


@in_first_script
def test_run_that_validates_is_resumed_exactly(script, args, image_folder, tmp_path):
    """Pictures and held-out losses, too, are those of the uninterrupted run, also right after the stop."""
    flags = {"validation_prompts": ["a", "b"], "validation_steps": 2, "validation_inference_steps": 2,
             "validation_data_dir": image_folder}
    run(script, args(tmp_path / "whole", **flags))
    watch(script, args(tmp_path / "out", **flags), stop_in=3)
    run(script, args(tmp_path / "out", **flags, resume_from_checkpoint="latest"))
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    assert list_names(tmp_path / "out/validation", "*") == {"step-2", "step-4", "step-6"}
    losses = read_scalars(tmp_path / "out", "validation_loss")
    assert list(losses) == [2, 4, 6] and losses == read_scalars(tmp_path / "whole", "validation_loss")


@in_first_script
def test_second_stop_changes_nothing(script, args, never_stopped, tmp_path):
    """A run may be stopped as often as one likes, also in its first and its last update."""
    whole, batches = never_stopped(script, args, gradient_accumulation_steps=2)
    argv = [*args(tmp_path / "out", gradient_accumulation_steps=2), "--resume_from_checkpoint", "latest"]
    stops = [watch(script, argv, stop_in=1), watch(script, argv, stop_in=2), watch(script, argv, stop_in=3)]
    assert list_names(tmp_path / "out") == {"checkpoint-1", "checkpoint-3", "checkpoint-6"}
    assert watch(script, argv) == [] and sum(stops, []) == batches
    assert_same_run(tmp_path / "out", whole)


# ---- The seed -------------------------------------------------------------------------------------------------------


@in_first_script
def test_seed_that_was_drawn_is_kept_with_the_checkpoint(script, args, tmp_path):
    """Without --seed each run draws one, and a resumed run takes that of its checkpoint."""
    run(script, args(tmp_path / "whole", seed=None, max_train_steps=4, checkpointing_steps=2))
    run(script, args(tmp_path / "out", seed=None, max_train_steps=4,
                     resume_from_checkpoint=tmp_path / "whole/checkpoint-2"))
    assert_same_checkpoint(tmp_path / "out/checkpoint-4", tmp_path / "whole/checkpoint-4")
    run(script, args(tmp_path / "other", seed=None, max_train_steps=1))
    seeds = [read_record(tmp_path / name)["seed"] for name in ("whole/checkpoint-2", "out/checkpoint-4",
                                                               "other/checkpoint-1")]
    assert seeds[0] == seeds[1] != seeds[2]
    assert read_scalars(tmp_path / "other", "train_loss")[1] != read_scalars(tmp_path / "whole", "train_loss")[1]


@in_first_script
@pytest.mark.parametrize("seed", [3, None, 4])
def test_another_seed_is_named_in_a_warning(script, args, never_stopped, seed, tmp_path, caplog):
    """The seed of the checkpoint, given again or not, is no change; another one is, and it is the one that counts."""
    whole, batches = never_stopped(script, args, checkpointing_steps=3)
    after = watch(script, args(tmp_path / "out", seed=seed, resume_from_checkpoint=whole / "checkpoint-3"))
    assert ("seed 3 -> 4" in caplog.text) == (seed == 4)
    assert (after == batches[3:]) == (seed != 4)
    assert ("with the same captions, noise and settings" in caplog.text) == (seed != 4)


# ---- Signals --------------------------------------------------------------------------------------------------------


@in_first_script
def test_sigterm_to_the_command_saves_and_says_how_to_go_on(script, args, tmp_path):
    """The process ends with status 143 and a checkpoint, from which the run goes on as if it had not been stopped."""
    out, log = tmp_path / "out", tmp_path / "log"
    with log.open("w") as stream, subprocess.Popen(
            get_command(script, args(out, max_train_steps=100_000, lr_scheduler="constant", lr_warmup_steps=0)),
            stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        end = time.monotonic() + 120
        while "loss" not in log.read_text() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)  # the bar shows a loss after the first ten updates
        process.terminate()
        assert process.wait(60) == 143, log.read_text()
    (saved,) = list_names(out)
    step = int(saved.removeprefix("checkpoint-"))
    message = log.read_text().strip().splitlines()[-1]
    assert f"SIGTERM after update {step}, which is saved" in message
    assert "--resume_from_checkpoint latest" in message
    assert "Traceback" not in log.read_text()
    flags = {"max_train_steps": step + 2, "lr_scheduler": "constant", "lr_warmup_steps": 0}
    run(script, args(out, **flags, resume_from_checkpoint="latest"))
    run(script, args(tmp_path / "whole", **flags))
    assert_same_run(out, tmp_path / "whole", step + 2)


def find_newest_step(script, out: Path) -> int:
    """Return the step of the newest checkpoint."""
    return int(script.list_checkpoints(str(out))[-1].name.removeprefix("checkpoint-"))


@in_first_script
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=["Ctrl-C", "SIGTERM", "USR1"])
def test_signal_to_all_processes_of_a_run_saves_too(script, args, number, tmp_path):
    """Ctrl-C and batch systems signal the loader's processes as well: the run still saves and ends in good order."""
    out, log = tmp_path / "out", tmp_path / "log"
    argv = args(out, max_train_steps=100_000, checkpointing_steps=2, checkpoints_total_limit=2,
                dataloader_num_workers=2)
    with Run(script, argv, log) as child:
        child.wait_until(lambda: script.list_checkpoints(str(out)))
        loaders = psutil.Process(child.process.pid).children()
        assert len(loaders) == 2
        for process in loaders:
            process.send_signal(number)
        before = find_newest_step(script, out)
        child.wait_until(lambda: find_newest_step(script, out) >= before + 10)  # more than was loaded ahead
        child.kill(number)
        assert child.end() == 128 + number, log.read_text()
    newest = script.list_checkpoints(str(out))[-1].name
    assert f"after update {newest.removeprefix('checkpoint-')}, which is saved" in log.read_text()
    assert "Traceback" not in log.read_text()


def catches(pid: int, number: int) -> bool:
    """Return whether a process has a handler of its own for a signal; Python's for Ctrl-C counts as one."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1]
    return bool(int(caught, 16) >> (number - 1) & 1)


@in_first_script
def test_second_ctrl_c_stops_at_once(script, args, tmp_path):
    """Who cannot wait for the end of an update asks again, and the process is gone without a checkpoint."""
    out, log = tmp_path / "out", tmp_path / "log"
    with Run(script, args(out, dataloader_num_workers=1, max_train_steps=100_000), log) as child:
        process = psutil.Process(child.process.pid)
        child.wait_until(process.children)
        (loader,) = process.children()
        loader.suspend()  # so that the update cannot end
        try:
            child.wait_until(lambda: all(catches(process.pid, number) for number in script.STOP_SIGNALS))
            child.kill(signal.SIGINT)
            child.wait_until(lambda: "ask again" in log.read_text())
            child.kill(signal.SIGINT)
            assert child.end() == -signal.SIGINT
        finally:
            loader.kill()
    assert list_names(out) == set()


# ---- Runs that are at their end, or beyond --------------------------------------------------------------------------


@in_two_scripts
def test_finished_run_trains_no_further_and_exports(script, args, never_stopped, tmp_path):
    """Resuming a run that has reached --max_train_steps exports it again and leaves its checkpoints alone."""
    whole, _ = never_stopped(script, args, checkpointing_steps=3)
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in list_exported(out):
        script.remove(out / name)
    assert watch(script, args(out, resume_from_checkpoint="latest", report_to="none")) == []
    assert_same_run(out, whole)
    assert list_names(out) == {"checkpoint-3", "checkpoint-6"}


@in_first_script
@pytest.mark.parametrize("use_ema", [False, True])
def test_run_resumed_beyond_its_end_takes_one_update(script, args, use_ema, tmp_path, caplog):
    """The reference's own tests pin this: from checkpoint-4 with --max_train_steps 2 comes checkpoint-5."""
    out = tmp_path / "out"
    run(script, args(out, max_train_steps=4, checkpointing_steps=2, use_ema=use_ema))
    shutil.rmtree(out / "checkpoint-2")
    batches = watch(script, args(out, max_train_steps=2, checkpointing_steps=1, use_ema=use_ema,
                                 resume_from_checkpoint="checkpoint-4"))
    assert len(batches) == 1
    assert list_names(out) == {"checkpoint-4", "checkpoint-5"}
    assert "update 4 is beyond --max_train_steps 2" in caplog.text


# ---- Resuming with something else -----------------------------------------------------------------------------------


@in_first_script
@pytest.mark.parametrize("changed", [{"train_batch_size": 3}, {"train_batch_size": 10},
                                     {"gradient_accumulation_steps": 2}], ids=str)
def test_changed_batch_neither_repeats_nor_skips_samples(script, args, changed, tmp_path, caplog):
    """The epoch that was begun is finished with the samples that are left, whatever the new size of an update."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    before = [each["step"] for each in watch(script, args(whole, max_train_steps=2))]
    argv = args(out, max_train_steps=5, resume_from_checkpoint=whole / "checkpoint-2", **changed)
    after = [each["step"] for each in watch(script, argv) if each["step"].epoch == 0]
    used = [index for step in before + after for index in range(step.last - len(step.indices), step.last)]
    assert used == list(range(10))
    assert after[0].last == min(10, 4 + changed.get("train_batch_size", 2))
    assert all(f"{name} " in caplog.text and f" -> {value}" in caplog.text for name, value in changed.items())
    assert "with the same captions, noise and settings" not in caplog.text


@in_first_script
def test_changed_data_are_named_in_a_warning(script, tiny_model, args, tmp_path, caplog):
    """A checkpoint knows its captions: with fewer of them the run goes on, in a new epoch if need be, and says so."""
    fewer = make_image_folder(tmp_path / "fewer", count=3)
    run(script, args(tmp_path / "out", max_train_steps=3))
    argv = args(tmp_path / "out", train_data_dir=fewer, max_train_steps=5, resume_from_checkpoint="latest")
    assert [each["step"].epoch for each in watch(script, argv)] == [1, 1]
    assert "captions_digest" in caplog.text


@in_first_script
def test_fp16_holds_rate_and_averages_at_an_overflow(script, args, tmp_path, monkeypatch):
    """A run in fp16 goes on from a checkpoint in float32; skipped updates do not count; and it resumes bit for bit.

    On the CPU, where accelerate refuses fp16: in float32 with its loss scaling, and gradients that are set to inf.
    """
    make_accelerator, train_step, overflows = script.make_accelerator, script.train_step, {3, 4, 6}

    def make_scaling_accelerator(flags):
        accelerator = make_accelerator(flags)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        return accelerator

    def overflow(accelerator, models, objective, batch, step):
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        numbers = train_step(accelerator, models, objective, batch, step)
        if 5 * step.epoch + step.last // 2 in overflows:  # five updates of two samples are an epoch
            next(iter(script.name_trained_parameters(models).values())).grad.fill_(torch.inf)
        return numbers

    out, flags = tmp_path / "out", {"max_train_steps": 7, "checkpointing_steps": 2, "lr_scheduler": "linear",
                                    "lr_warmup_steps": 0, "ema_decay": 0.5}
    run(script, args(out, **{**flags, "max_train_steps": 2}))
    monkeypatch.setattr(script, "make_accelerator", make_scaling_accelerator)
    monkeypatch.setattr(script, "train_step", overflow)
    run(script, args(out, **flags, resume_from_checkpoint="latest"))
    rates, decays = read_scalars(out, "lr"), read_scalars(out, "ema_decay")
    assert [rates[step] for step in range(3, 8)] == pytest.approx([1e-3 * part / 7 for part in (5, 5, 5, 4, 4)])
    assert decays == pytest.approx({1: 0, 2: 2 / 11, 5: 3 / 12, 7: 4 / 13})
    assert torch.load(out / "checkpoint-7/scaler.pt")["scale"] == 2.0**5
    run(script, args(tmp_path / "again", **flags, resume_from_checkpoint=out / "checkpoint-4"))
    assert_same_checkpoint(tmp_path / "again/checkpoint-7", out / "checkpoint-7")


@in_two_scripts
def test_checkpoint_of_the_reference_is_resumed(script, args, tmp_path, caplog):
    """It has the same files but no record, and a schedule that counts processes: the run goes on, with a warning."""
    first = tmp_path / "first"
    run(script, args(first, max_train_steps=4))
    (first / "checkpoint-4/run_record.json").unlink()
    state = torch.load(first / "checkpoint-4/scheduler.bin", weights_only=False)
    torch.save({**state, "last_epoch": 8, "_step_count": 9}, first / "checkpoint-4/scheduler.bin")
    run(script, args(tmp_path / "out", resume_from_checkpoint=first / "checkpoint-4"))
    assert "has no run_record.json" in caplog.text
    run(script, args(tmp_path / "whole"))
    rates = read_scalars(tmp_path / "whole", "lr")
    assert read_scalars(tmp_path / "out", "lr") == {5: rates[5], 6: rates[6]}
    saved = read_record(tmp_path / "out/checkpoint-6")["progress"]
    assert saved == {"global_step": 6, "epoch": 0, "samples_seen": 4}
    optimizer = torch.load(tmp_path / "out/checkpoint-6/optimizer.bin", weights_only=False)
    assert {int(state["step"]) for state in optimizer["state"].values()} == {6}


@in_first_script
@pytest.mark.parametrize("use_ema", [False, True])
def test_ema_weights_come_and_go_with_a_new_run_only(script, args, use_ema, tmp_path):
    """With --use_ema they must be in the checkpoint, without it they would be lost: refused before a model loads."""
    run(script, args(tmp_path / "first", max_train_steps=1, use_ema=use_ema))
    with pytest.raises(ValueError, match=f"checkpoint-1 does not fit: use_ema {use_ema} -> {not use_ema}"):
        run(script, args(tmp_path / "out", resume_from_checkpoint=tmp_path / "first/checkpoint-1",
                         use_ema=not use_ema))
    assert list_names(tmp_path / "out") == set()


@in_first_script
def test_changed_optimizer_flags_are_honoured(script, args, never_stopped, tmp_path, caplog):
    """The learning rate and AdamW's settings of the command line win over those in the checkpoint, with a warning."""
    whole, _ = never_stopped(script, args, checkpointing_steps=3)
    changed = {"learning_rate": 5e-4, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_weight_decay": 0.1,
               "adam_epsilon": 1e-6, "lr_scheduler": "constant"}
    run(script, args(tmp_path / "out", resume_from_checkpoint=whole / "checkpoint-3", **changed))
    assert read_scalars(tmp_path / "out", "lr") == pytest.approx(dict.fromkeys((4, 5, 6), 5e-4))
    (group,) = torch.load(tmp_path / "out/checkpoint-6/optimizer.bin", weights_only=False)["param_groups"]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (5e-4, (0.8, 0.99), 0.1, 1e-6)
    assert "learning_rate 0.001 -> 0.0005" in caplog.text and "adam_epsilon 1e-08 -> 1e-06" in caplog.text


@in_first_script
def test_longer_schedule_is_honoured(script, args, tmp_path):
    """A finished run goes on with another --max_train_steps, on the curve that the new length gives."""
    flags = {"lr_scheduler": "linear", "lr_warmup_steps": 0}
    run(script, args(tmp_path / "out", max_train_steps=2, **flags))
    run(script, args(tmp_path / "out", max_train_steps=8, resume_from_checkpoint="latest", **flags))
    logged = read_scalars(tmp_path / "out", "lr")
    assert logged == pytest.approx({step: 1e-3 * (1 - (step - 1) / (2 if step <= 2 else 8)) for step in range(1, 9)})


@in_first_script
def test_interrupt_that_also_closes_the_output_still_saves(script, tiny_model, image_folder, tmp_path):
    """Ctrl-C ends the `tee` that a run writes to as well: the broken pipe must not cost the checkpoint."""
    argv = make_args(tiny_model, image_folder, tmp_path / "out", max_train_steps=4000)
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, script.__file__, *argv], stdout=writer, stderr=writer)
    os.close(writer)
    printed = b""
    while not re.search(rb" ([3-9]|\d\d+)/4000", printed):  # a quick bar does not show every number
        part = os.read(reader, 4096)
        assert part, printed.decode()
        printed += part
    os.close(reader)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) in (128 + signal.SIGINT, 120)  # Python's own for output that it cannot get rid of
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 1


@in_first_script
def test_another_layout_of_the_weights_is_refused(script, args, tmp_path):
    """AdamW's moments lie in memory as the weights do: --channels_last must stay what it was."""
    run(script, args(tmp_path / "out", max_train_steps=1))
    with pytest.raises(ValueError, match="checkpoint-1 does not fit: channels_last False -> True"):
        run(script, args(tmp_path / "out", max_train_steps=2, channels_last=True, resume_from_checkpoint="latest"))


@in_first_script
def test_a_checkpoint_without_a_record_is_resumed_if_its_files_load(script, args, never_stopped, tmp_path):
    """As one of the reference is; what is wrong with its files shows when they are read."""
    whole, _ = never_stopped(script, args, checkpointing_steps=3)
    out = tmp_path / "out"
    shutil.copytree(whole / "checkpoint-3", out / "checkpoint-3")
    (out / "checkpoint-3/run_record.json").unlink()
    run(script, args(out, max_train_steps=4, resume_from_checkpoint="checkpoint-3"))
    assert (out / "checkpoint-4").is_dir()
    path = out / "checkpoint-3/optimizer.bin"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="checkpoint-3.*Name another checkpoint"):
        run(script, args(out, max_train_steps=4, resume_from_checkpoint="checkpoint-3"))
