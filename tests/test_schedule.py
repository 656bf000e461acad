"""The learning rate of every update, against closed forms: schedules count updates, whatever these are made of."""

import math

import pytest
import torch
from conftest import TORCH_SCRIPTS, load_script, make_args, make_namespace, read_scalars
from runs import run
from test_data import make_item, make_samples

from diffusers.optimization import SchedulerType, get_scheduler

RATE, WARMUP, UPDATES = 2e-3, 2, 6


@pytest.fixture
def script(first_script):
    """One script alone, to save time: what is tested here has the same text in each (tests/check_copies.py)."""
    return first_script


def get_progress(update: int) -> float:
    """Return the share of the updates after the warm-up that are done before update number `update`, from 0."""
    return (update - WARMUP) / (UPDATES - WARMUP)


def warm_up(factor):
    """Return a factor that rises from 0 to 1 in the warm-up and then follows `factor` of the progress."""
    return lambda update: update / WARMUP if update < WARMUP else factor(get_progress(update))


SCHEDULES = {  # name: more flags, and the factor of the rate at each update from 0
    "constant": ({}, lambda update: 1),
    "constant_with_warmup": ({}, warm_up(lambda progress: 1)),
    "linear": ({}, warm_up(lambda progress: 1 - progress)),
    "cosine": ({}, warm_up(lambda progress: (1 + math.cos(math.pi * progress)) / 2)),
    "cosine_with_restarts": ({"lr_num_cycles": 2}, warm_up(lambda progress: (
        1 + math.cos(math.pi * (2 * progress % 1))) / 2)),
    "polynomial": ({"lr_power": 3}, warm_up(lambda progress: (1 - 1e-7 / RATE) * (1 - progress) ** 3 + 1e-7 / RATE)),
}
# Ten images in batches of 1, six updates: of one sample each, or in two epochs of updates of 4, 4 and 2 samples.
LENGTHS = {
    "accumulation 1": {"gradient_accumulation_steps": 1, "max_train_steps": 6},
    "accumulation 4": {"gradient_accumulation_steps": 4, "max_train_steps": None, "num_train_epochs": 2},
}


def list_rates(script, argv) -> list[float]:
    """Return the rates that the script's schedule sets, one per update, without training."""
    args = make_namespace(script, argv)
    rate = script.compute_learning_rate(args, "unet", 1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    lr_scheduler, rates = script.make_lr_scheduler(args, optimizer, args.max_train_steps), []
    for _ in range(args.max_train_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        lr_scheduler.step()
    return rates


def test_every_schedule_is_tested(script):
    """All names that --lr_scheduler accepts are below."""
    assert set(SCHEDULES) == set(script.LR_SCHEDULERS) <= {kind.value for kind in SchedulerType}


@pytest.mark.parametrize(("name", "length"), [
    ("linear", "accumulation 1"), *((name, "accumulation 4") for name in SCHEDULES)])
def test_each_update_has_its_rate(script, tiny_model, image_folder, tmp_path, name, length):
    """The rate that each update is made with is the closed form at its number, with short windows and without."""
    flags, factor = SCHEDULES[name]
    flags = {"lr_scheduler": name, "lr_warmup_steps": WARMUP, "train_batch_size": 1, "resolution": 8, **flags,
             **LENGTHS[length]}
    run(script, make_args(tiny_model, image_folder, tmp_path, learning_rate=RATE, report_to="tensorboard", **flags))
    expected = {update + 1: RATE * factor(update) for update in range(UPDATES)}
    assert read_scalars(tmp_path, "lr") == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_diffusers(script, image_folder, tmp_path, name):
    """A long schedule is get_scheduler's, counted in updates."""
    flags, _ = SCHEDULES[name]
    found = list_rates(script, make_args(
        "model", image_folder, tmp_path, lr_scheduler=name, learning_rate=RATE, lr_warmup_steps=30,
        max_train_steps=200, gradient_accumulation_steps=4, **flags))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    reference, expected = get_scheduler(name, optimizer, num_warmup_steps=30, num_training_steps=200,
                                        num_cycles=flags.get("lr_num_cycles", 1), power=flags.get("lr_power", 1)), []
    for _ in range(200):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("warmup", [0, 5, 6, 500])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warm_up_of_any_length_is_possible(script, image_folder, tmp_path, name, warmup):
    """Also one that takes the whole run, as the default of 500 does in a run of 500: rates stay finite to its end."""
    flags, _ = SCHEDULES[name]
    rates = list_rates(script, make_args("model", image_folder, tmp_path, lr_scheduler=name, learning_rate=RATE,
                                         lr_warmup_steps=warmup, max_train_steps=6, **flags))
    assert all(0 <= rate <= RATE for rate in rates)
    if name != "constant":
        rising = [RATE * update / warmup for update in range(min(warmup, 6))]
        assert rates[: len(rising)] == pytest.approx(rising)


@pytest.mark.parametrize("num_processes", [1, 4])
def test_the_rate_is_scaled_by_the_batch(script, image_folder, tmp_path, num_processes):
    """--scale_lr multiplies by accumulation, batch size and processes; without it nothing does."""
    flags = {"learning_rate": RATE, "train_batch_size": 3, "gradient_accumulation_steps": 2}
    for scale_lr, expected in ((True, RATE * 6 * num_processes), (False, RATE)):
        args = make_namespace(script, make_args("model", image_folder, tmp_path, scale_lr=scale_lr, **flags))
        assert script.compute_learning_rate(args, "unet", num_processes) == pytest.approx(expected)


def test_a_scaled_rate_is_scheduled(script, tiny_model, image_folder, tmp_path):
    """With --scale_lr the schedule ends at the scaled rate, and so does what is logged."""
    run(script, make_args(tiny_model, image_folder, tmp_path, scale_lr=True, learning_rate=RATE, resolution=8,
                          train_batch_size=3, gradient_accumulation_steps=2, lr_scheduler="constant_with_warmup",
                          lr_warmup_steps=2, max_train_steps=3, report_to="tensorboard"))
    assert read_scalars(tmp_path, "lr") == pytest.approx({1: 0, 2: 3 * RATE, 3: 6 * RATE}, rel=1e-5)


@pytest.mark.parametrize(
    ("counts", "expected"),  # samples, batch, accumulation, processes
    [((10, 1, 1, 1), 30), ((10, 4, 1, 1), 9), ((10, 1, 4, 1), 9), ((10, 2, 2, 2), 6), ((10, 16, 4, 2), 3),
     ((1, 1, 1, 4), 3), ((12, 2, 3, 2), 3), ((13, 2, 3, 2), 6)],
)
def test_epochs_are_counted_in_updates(script, image_folder, tmp_path, counts, expected):
    """Three epochs are three times the updates that one epoch takes, its short last one included."""
    num_samples, batch, accumulation, num_processes = counts
    flags = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "num_train_epochs": 3}
    args = make_namespace(script, make_args("model", image_folder, tmp_path, max_train_steps=None, **flags))
    samples = make_samples(script, [make_item()] * num_samples)
    assert script.compute_last_step(args, samples, num_processes) == expected
    args = make_namespace(script, make_args("model", image_folder, tmp_path, max_train_steps=7, **flags))
    assert script.compute_last_step(args, samples, num_processes) == 7


@pytest.fixture(scope="module")
def half_done(tiny_models, image_folder, tmp_path_factory):
    """Return a function that goes on from the middle of a linear schedule, and returns its rates and its folder."""
    folder = tmp_path_factory.mktemp("schedule")

    def go(name, **flags):
        run(load_script(TORCH_SCRIPTS[0]), make_args(tiny_models["sd"], image_folder, folder / name, **{
            "lr_scheduler": "linear", "learning_rate": RATE, "max_train_steps": 6, "checkpointing_steps": 3,
            "resolution": 8, "report_to": "tensorboard", **flags}))
        return read_scalars(folder / name, "lr"), folder / name

    go("first")
    return lambda name, **flags: go(name, resume_from_checkpoint=folder / "first" / "checkpoint-3", **flags)


def test_a_resumed_schedule_goes_on(half_done, caplog):
    """Resumed with the same flags, the updates that are left have the rates that they would have had."""
    caplog.set_level("INFO")
    rates, _ = half_done("same")
    assert rates == pytest.approx({4: RATE * 3 / 6, 5: RATE * 2 / 6, 6: RATE / 6}, rel=1e-5)
    assert "with the same captions, noise and settings" in caplog.text


def test_a_resumed_run_has_the_settings_of_its_command_line(half_done, caplog):
    """A new --learning_rate, and new settings of AdamW, hold from the next update on, and the log says so."""
    caplog.set_level("INFO")
    rates, out = half_done("other", learning_rate=3 * RATE, adam_beta1=0.5, adam_weight_decay=0.5, adam_epsilon=1e-6)
    assert rates == pytest.approx({4: 3 * RATE * 3 / 6, 5: 3 * RATE * 2 / 6, 6: 3 * RATE / 6}, rel=1e-5)
    for change in (f"learning_rate {RATE} -> {3 * RATE}", "adam_beta1 0.9 -> 0.5", "adam_weight_decay 0.01 -> 0.5"):
        assert change in caplog.text
    assert "exactly as if" not in caplog.text
    (group,) = torch.load(out / "checkpoint-6" / "optimizer.bin", weights_only=True)["param_groups"]
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.5, 0.999), 0.5, 1e-6)


def test_a_resumed_run_may_have_another_schedule(half_done):
    """A longer run, or another schedule, is followed from the number of the next update on."""
    rates, _ = half_done("longer", max_train_steps=8, learning_rate=2 * RATE)
    assert rates == pytest.approx({4: 2 * RATE * 5 / 8, 5: 2 * RATE / 2, 6: 2 * RATE * 3 / 8, 7: 2 * RATE / 4,
                                   8: 2 * RATE / 8}, rel=1e-5)
    rates, _ = half_done("constant", lr_scheduler="constant")
    assert rates == pytest.approx({4: RATE, 5: RATE, 6: RATE}, rel=1e-5)
