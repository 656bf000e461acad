"""What a run shows: pictures, held-out loss, numbers in trackers, its model card; and what happens when that fails."""

import contextlib
import http.server
import json
import logging
import math
import re
import shutil
import threading
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
import wandb
from conftest import (
    in_first_script,
    in_two_scripts,
    list_fast_flags,
    load_script,
    make_args,
    make_image,
    make_image_folder,
    read_scalars,
)
from huggingface_hub import ModelCard
from PIL import Image
from runs import assert_same_checkpoint, list_names, load_pipeline, read_folder, run, run_pair
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers import DDIMScheduler

TOKEN = "hf_thisMustNotBeWrittenAnywhere"
STANDS_STILL = 1e-30  # a learning rate at which float32 weights do not move


@pytest.fixture(autouse=True)
def all_logs(caplog):
    """Show these tests what is logged as information, too."""
    caplog.set_level(logging.INFO)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Folder of five captioned pictures to measure the loss on."""
    return make_image_folder(tmp_path_factory.mktemp("held-out") / "images", count=5)


@pytest.fixture
def args(tiny_model, image_folder):
    """Return a function that gives the command line of a run of these tests."""
    defaults = {"use_ema": True, "validation_inference_steps": 2}
    return lambda output_dir, **flags: make_args(tiny_model, image_folder, output_dir, **{**defaults, **flags})


@pytest.fixture(scope="module")
def done():
    """What the next fixture has run."""
    return {}


@pytest.fixture
def drawn(script, args, held_out, done, tmp_path_factory):
    """Output of eleven updates, five to an epoch, of a network that stands still, validated every 4."""
    if script not in done:
        done[script] = tmp_path_factory.mktemp("drawn") / "out"
        run(script, args(
            done[script], max_train_steps=11, learning_rate=STANDS_STILL, resolution=48, report_to="tensorboard",
            validation_prompts=["a cat", "a dog"], validation_steps=4, validation_epochs=2, logging_steps=3,
            validation_data_dir=held_out))
    return done[script]


def read_images(output_dir, tag: str) -> dict[int, tuple[int, int]]:
    """Return the width and height of what TensorBoard shows under a tag, by step."""
    sizes = {}
    for path in sorted(output_dir.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(path), size_guidance={"images": 0})
        events.Reload()
        if tag in events.Tags()["images"]:
            sizes |= {event.step: (event.width, event.height) for event in events.Images(tag)}
    return sizes


def read_pixels(path) -> np.ndarray:
    """Return a picture as an array."""
    return np.asarray(Image.open(path))


# ---- Pictures and the held-out loss ---------------------------------------------------------------------------------


@in_two_scripts
def test_pictures_are_drawn_when_asked_for_and_at_the_end(drawn):
    """After updates 4 and 8, not after the second epoch, and after the last: in folders and tracker."""
    assert list_names(drawn / "validation", "*") == {"step-4", "step-8", "step-11"}
    for folder in (drawn / "validation").iterdir():
        assert list_names(folder, "*") == {"00.png", "01.png", "grid.png"}
    assert sorted(read_images(drawn, "validation")) == [4, 8]
    assert sorted(read_images(drawn, "test")) == [11]


def test_pictures_have_the_resolution_of_the_run(drawn):
    """They are as large as what is trained on, not as the model was once; the grid holds them side by side."""
    folder = drawn / "validation/step-11"
    pictures = [read_pixels(folder / name) for name in ("00.png", "01.png")]
    assert pictures[0].shape == pictures[1].shape == (48, 48, 3)
    assert (read_pixels(folder / "grid.png") == np.hstack(pictures)).all()


def test_pictures_come_from_the_same_noise_each_time(drawn):
    """A network that stands still draws the same pictures, so that what changes between steps is what was learned."""
    for name in ("00.png", "01.png"):
        first, *others = (read_pixels(folder / name) for folder in sorted((drawn / "validation").iterdir()))
        assert all((first == other).all() for other in others)
    assert (read_pixels(drawn / "validation/step-4/00.png") != read_pixels(drawn / "validation/step-4/01.png")).any()


def test_pictures_are_those_of_the_saved_pipeline(script, tiny_model, args, tmp_path):
    """The last ones were drawn with what was exported: averaged weights, noise schedule, steps and guidance."""
    out = tmp_path / "out"
    flags = {"validation_prompt": "a cat", "num_validation_images": 2, "validation_inference_steps": 3,
             "validation_guidance_scale": 2, "validation_epochs": 1}
    run(script, args(out, **flags, max_train_steps=6, learning_rate=1e-2, prediction_type="v_prediction"))
    assert list_names(out / "validation", "*") == {"step-5", "step-6"}  # after an epoch and at the end
    pipeline = load_pipeline(out, tiny_model, prediction_type="v_prediction")
    for index in range(2):
        seed = int(script.make_rng(0, "validation", index).integers(2**31))
        (image,) = pipeline("a cat", height=32, width=32, num_inference_steps=3, guidance_scale=2,
                            generator=torch.Generator().manual_seed(seed)).images
        difference = np.asarray(image).astype(int) - read_pixels(out / f"validation/step-6/{index:02d}.png")
        assert abs(difference).max() <= 1


@in_two_scripts
def test_held_out_loss_is_the_same_in_any_run(script, args, held_out, drawn, tmp_path):
    """Its noise and timesteps are fixed: before training, runs with other seeds and batches log the same number."""
    logged = read_scalars(drawn, "validation_loss")
    assert list(logged) == [4, 8, 11] and len(set(logged.values())) == 1
    for seed, flags in ((1, {"train_batch_size": 3}), (2, {"snr_gamma": 5, "random_flip": True})):
        argv = args(tmp_path / str(seed), seed=seed, max_train_steps=1, learning_rate=STANDS_STILL, resolution=48,
                    report_to="tensorboard", validation_data_dir=held_out, noise_offset=0.1, **flags)
        run(script, argv)
        assert read_scalars(tmp_path / str(seed), "validation_loss") == {1: pytest.approx(logged[11], rel=1e-5)}


@in_first_script
def test_held_out_loss_falls_with_training(script, args, held_out, tmp_path):
    """Twenty-four updates more on pictures of the same kind bring it down by a fifth at least."""
    run(script, args(tmp_path / "out", max_train_steps=30, use_ema=False, report_to="tensorboard",
                     validation_data_dir=held_out, validation_steps=6,
                     **list_fast_flags(script)))
    logged = read_scalars(tmp_path / "out", "validation_loss")
    assert list(logged) == [6, 12, 18, 24, 30]
    assert logged[30] < 0.8 * logged[6], logged


@in_two_scripts
def test_validation_does_not_change_the_training(script, args, held_out, tmp_path):
    """With pictures and a held-out loss after every update, the checkpoint is the same bit for bit as without."""
    run(script, args(tmp_path / "without", max_train_steps=4))
    run(script, args(tmp_path / "with", max_train_steps=4, validation_steps=1, validation_prompts=["a", "b"],
                     validation_data_dir=held_out))
    assert len(list_names(tmp_path / "with/validation", "*")) == 4
    assert_same_checkpoint(tmp_path / "with/checkpoint-4", tmp_path / "without/checkpoint-4")


@in_first_script
def test_no_pictures_of_a_prompt(script, args, tmp_path):
    """--num_validation_images 0 beside a prompt draws none and fails nowhere: the reference's tests pass it."""
    run(script, args(tmp_path / "out", validation_prompt="a", num_validation_images=0, validation_steps=1,
                     report_to="tensorboard"))
    assert not (tmp_path / "out/validation").exists() and read_images(tmp_path / "out", "validation") == {}
    assert "val_imgs_grid" not in (tmp_path / "out/README.md").read_text()


# ---- Validation that fails ------------------------------------------------------------------------------------------


@pytest.fixture
def broken(held_out, tmp_path):
    """The held-out folder with a file that is no picture."""
    folder = shutil.copytree(held_out, tmp_path / "broken")
    (folder / "003.png").write_bytes(b"no picture")
    return folder


FAILURES = {
    "drawing": {"validation_prompts": ["a", "b"], "resolution": 36},  # diffusers draws multiples of 8 only
    "writing": {"validation_prompts": ["a", "b"]},
    "measuring": {"validation_prompts": None},
}


@in_first_script
@pytest.mark.parametrize("failure", FAILURES)
def test_failing_validation_does_not_end_the_run(script, args, failure, broken, tmp_path, caplog):
    """It is logged, the trained weights are put back, and the run goes on as one without validation."""
    out, without = tmp_path / "out", tmp_path / "without"
    flags = {"max_train_steps": 3, **FAILURES[failure]}
    run(script, args(without, **{**flags, "validation_prompts": None}))
    out.mkdir()
    if failure == "writing":
        (out / "validation").write_text("a file where the folder should be")
    if failure == "measuring":
        flags["validation_data_dir"] = broken
    run(script, args(out, validation_steps=1, **flags))
    assert "failed; the run goes on" in caplog.text
    assert_same_checkpoint(out / "checkpoint-3", without / "checkpoint-3")
    assert list_names(out, "*") >= list_names(without, "*")


@in_two_scripts
def test_pipeline_that_cannot_be_made_does_not_end_the_run(script, args, tmp_path, monkeypatch, caplog):
    """Whatever fails while the averages are in place, they are taken out again, and later pictures are drawn."""
    calls = []

    def make_pipeline(*given, **extras):
        calls.append(given)
        if len(calls) == 2:
            raise MemoryError("no room to draw")
        return original(*given, **extras)

    original = script.make_pipeline
    monkeypatch.setattr(script, "make_pipeline", make_pipeline)
    run(script, args(tmp_path / "out", max_train_steps=4, validation_prompts=["a"], validation_steps=1))
    run(script, args(tmp_path / "without", max_train_steps=4))
    assert "no room to draw" in caplog.text and "the run goes on" in caplog.text
    assert list_names(tmp_path / "out/validation", "*") == {"step-1", "step-3", "step-4"}
    assert_same_checkpoint(tmp_path / "out/checkpoint-4", tmp_path / "without/checkpoint-4")


@in_first_script
def test_encoders_that_find_no_room_do_not_end_the_run(script, args, tmp_path, monkeypatch, caplog):
    """Cached runs bring the encoders back for validation: out of memory there costs the pictures alone."""
    @contextlib.contextmanager
    def encoders_on_device(*given):
        if "saved" in caplog.text:  # the first checkpoint: only the caches are made before
            raise torch.OutOfMemoryError("no room for the VAE")
        with original(*given):
            yield

    original = script.encoders_on_device
    monkeypatch.setattr(script, "encoders_on_device", encoders_on_device)
    run(script, args(tmp_path / "out", validation_prompts=["a"], cache_latents=True, cache_text_embeddings=True))
    assert "no room for the VAE" in caplog.text and "the run goes on" in caplog.text
    assert (tmp_path / "out/model_index.json").is_file() and not (tmp_path / "out/validation").exists()


@in_two_scripts
def test_loss_that_is_not_finite_stops_the_run(script, args, tmp_path):
    """The error names the first such update and the usual causes; the last good checkpoint stays what it was."""
    out = tmp_path / "out"
    run(script, args(out, max_train_steps=2))
    before = read_folder(out)
    argv = args(out, max_train_steps=9, learning_rate=1e15, resume_from_checkpoint="latest", report_to="tensorboard")
    with pytest.raises(script.UserError, match=r"the loss is (nan|inf) at step 4 .*too high a learning.*untouched"):
        run(script, argv)
    after = read_folder(out)
    assert list_names(out) == {"checkpoint-2"} and {name: after[name] for name in before} == before
    logged = read_scalars(out, "train_loss")
    assert math.isfinite(logged[3]) and not math.isfinite(logged[4])


@in_first_script
@pytest.mark.parametrize(("scaler", "allowed"), [(None, 0), ("GradScaler", 30)])
def test_gradients_that_are_not_finite_stop_the_run(script, args, tmp_path, scaler, allowed):
    """Such an update has ruined the weights, or is skipped in fp16; but a run that skips all would train nothing."""
    namespace = script.parse_args(args(tmp_path / "out"))
    accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=False, mixed_precision="no",
                                  log=lambda numbers, step: None, scaler=scaler)
    numbers = {"train_loss": 1.0, "long_captions": 0, "lr": 1e-4}
    meter = script.Meter(namespace, accelerator, 0, 99)
    for step in (*range(allowed), "finite", *range(allowed)):
        norm = 1.0 if step == "finite" else torch.inf
        meter.end_update(step, {**numbers, "grad_norm": torch.tensor(norm)})
        meter.flush()
    meter.end_update(77, {**numbers, "grad_norm": torch.tensor(torch.inf)})
    with pytest.raises(script.UserError, match="at step 77 .gradient norm inf"):
        meter.flush()


@in_first_script
def test_peak_memory_is_of_training_alone(script, args, tmp_path, monkeypatch):
    """It is counted anew from each batch after a reading: encoding before it and drawing are not training."""
    anew, used = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: anew.append(len(used)))
    meter = script.Meter(script.parse_args(args(tmp_path / "out")), SimpleNamespace(is_main_process=False), 0, 9)
    for batch in meter.time_waits(iter(range(5))):
        used.append(batch)
        meter.num_images = 0 if batch == 2 else 1  # where it has been read
    assert anew == [0, 3]


# ---- Trackers -------------------------------------------------------------------------------------------------------


@in_two_scripts
def test_numbers_of_every_update_reach_tensorboard(drawn):
    """Loss, rate, gradient norm and epoch have each update's own step; the speed comes with every reading."""
    every = list(range(1, 12))
    numbers = {tag: read_scalars(drawn, tag) for tag in (
        "train_loss", "lr", "grad_norm", "epoch", "images_per_second", "data_wait")}
    assert all(list(numbers[tag]) == every for tag in ("train_loss", "lr", "grad_norm", "epoch"))
    assert len(set(numbers["train_loss"].values())) == 11
    assert all(0 < numbers["train_loss"][step] < 10 and numbers["grad_norm"][step] > 0 for step in every)
    assert [numbers["epoch"][step] for step in every] == [0] * 5 + [1] * 5 + [2]
    readings = [3, 4, 7, 8, 11]  # every third update, and before each validation
    for tag in ("images_per_second", "data_wait"):
        assert list(numbers[tag]) == readings, tag
    assert all(0 < speed < 1e5 for speed in numbers["images_per_second"].values())
    assert all(0 <= share <= 1 for share in numbers["data_wait"].values())


def test_pictures_reach_tensorboard(drawn):
    """They are shown side by side, as they were drawn."""
    assert read_images(drawn, "validation")[8] == read_images(drawn, "test")[11] == (2 * 48, 48)


@in_first_script
def test_numbers_do_not_depend_on_how_often_they_are_read(script, args, tmp_path):
    """--logging_steps decides when the device is asked, not what is logged."""
    for every in (1, 4):
        run(script, args(tmp_path / str(every), max_train_steps=6, logging_steps=every, report_to="tensorboard"))
    for tag in ("train_loss", "grad_norm", "lr", "epoch"):
        logged = read_scalars(tmp_path / "1", tag)
        assert list(logged) == list(range(1, 7)) and logged == read_scalars(tmp_path / "4", tag)
    assert list(read_scalars(tmp_path / "4", "data_wait")) == [4, 6]


@pytest.fixture
def debug_script():
    """The script that has --debug_loss."""
    return load_script("train_text_to_image_lora_sdxl.py")


def test_an_image_seen_twice_in_an_update_has_its_last_loss(debug_script, tmp_path):
    """Micro steps add up to train_loss alone."""
    namespace = SimpleNamespace(logging_steps=9)
    accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=False)
    meter = debug_script.Meter(namespace, accelerator, 0, 9)
    batch = {"weights": torch.ones(1), "num_long": torch.zeros(1)}
    for loss in (0.5, 0.25):
        meter.add(SimpleNamespace(indices=[0]), batch, {"train_loss": loss, "loss_for_a.png": 2 * loss})
    assert meter.numbers == {"train_loss": 0.75, "loss_for_a.png": 0.5, "long_captions": 0}


def read_image_losses(output_dir, step: int) -> dict[str, float]:
    """Return the loss of each image in an update, by the name that --debug_loss logs."""
    found = {}
    for path in sorted(output_dir.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(path))
        events.Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("loss_for_")]
        found |= {tag: event.value for tag in tags for event in events.Scalars(tag) if event.step == step}
    return found


def test_each_image_has_its_own_loss(debug_script, tiny_models, image_folder, tmp_path):
    """--debug_loss logs loss_for_FILE of each image that an update saw; their mean is the update's loss."""
    out = tmp_path / "out"
    run(debug_script, make_args(tiny_models["sdxl"], image_folder, out, debug_loss=True, report_to="tensorboard",
                                max_train_steps=3, gradient_accumulation_steps=2, logging_steps=2))
    losses, own = read_scalars(out, "train_loss"), [read_image_losses(out, step) for step in (1, 2, 3)]
    assert [len(numbers) for numbers in own] == [4, 4, 2]  # ten images in updates of two times two
    assert sorted(name for numbers in own for name in numbers) == [f"loss_for_{i:03d}.png" for i in range(10)]
    for step, numbers in enumerate(own, 1):
        assert losses[step] == pytest.approx(np.mean(list(numbers.values())), rel=1e-5)
        assert len(set(numbers.values())) == len(numbers)


def test_images_without_a_file_have_a_loss_by_their_row(debug_script, tiny_models, tmp_path):
    """Of a data set that holds its images --debug_loss names the rows, of the subset that is trained on."""
    images = [make_image(index) for index in range(5)]
    rows = datasets.Dataset.from_dict({"image": images, "text": [f"picture {index}" for index in range(5)]})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "rows")
    run(debug_script, make_args(tiny_models["sdxl"], None, tmp_path / "out", train_data_dir=None,
                                dataset_name=tmp_path / "rows", debug_loss=True, report_to="tensorboard",
                                max_train_samples=3, train_batch_size=4, max_train_steps=1))
    own = read_image_losses(tmp_path / "out", 1)
    assert own.keys() == {f"loss_for_row-{index}" for index in range(3)}
    assert read_scalars(tmp_path / "out", "train_loss")[1] == pytest.approx(np.mean(list(own.values())), rel=1e-5)


def test_two_processes_log_the_losses_of_all_images(debug_script, tiny_models, image_folder, tmp_path):
    """Also of an update with a single image, for which one of them waits: the numbers are those of one process."""
    own = {}
    for name, batch_size in (("pair", 2), ("single", 4)):
        argv = make_args(tiny_models["sdxl"], image_folder, tmp_path / name, debug_loss=True, report_to="tensorboard",
                         max_train_samples=9, max_train_steps=4, logging_steps=1, train_batch_size=batch_size)
        run_pair(debug_script, argv, tmp_path / "log") if name == "pair" else run(debug_script, argv)
        own[name] = [read_image_losses(tmp_path / name, step) for step in (1, 2, 3, 4)]
    assert [len(numbers) for numbers in own["pair"]] == [4, 4, 1, 4]
    for numbers, expected in zip(own["pair"], own["single"], strict=True):
        assert numbers == pytest.approx(expected, rel=1e-3)


@in_first_script
def test_encoders_leave_the_device_also_after_an_error(script, args, tmp_path):
    """Or a failed validation would take the memory that training needs."""
    class Network(torch.nn.Module):
        def to(self, place):
            self.place = place

    class LargeNetwork(Network):
        def to(self, place):
            super().to(place)
            if place == "cuda":
                raise RuntimeError("no room")

    parsed = script.parse_args(args(tmp_path / "out", cache_latents=True, cache_text_embeddings=True))
    for text_encoder in (Network(), LargeNetwork()):
        models = SimpleNamespace(vae=Network(), text_encoder=text_encoder, prompts=None, trained=("unet",))
        with pytest.raises(RuntimeError), script.encoders_on_device(parsed, SimpleNamespace(device="cuda"), models):
            assert models.vae.place == models.text_encoder.place == "cuda"
            raise RuntimeError("no room to draw")
        assert models.vae.place == models.text_encoder.place == "cpu"


@in_first_script
def test_a_tracker_without_pictures_says_where_they_are(script, args, tmp_path, monkeypatch, caplog):
    def save_images(parsed, accelerator, *given):
        original(parsed, SimpleNamespace(trackers=[SimpleNamespace(name="comet_ml")]), *given)

    original = script.save_images
    monkeypatch.setattr(script, "save_images", save_images)
    run(script, args(tmp_path / "out", max_train_steps=1, validation_prompts=["a"]))
    assert f"pictures are not sent to comet_ml: see {tmp_path / 'out/validation/step-1'}" in caplog.text


@in_first_script
def test_a_tracker_that_fails_costs_no_run(script, args, tmp_path, monkeypatch, caplog):
    """The run goes on and is exported, with the reason in the log: here the pipe of the event file is closed."""
    original, closed = script.train_step, []

    def train_step(accelerator, *given):
        if not closed:
            (tracker,) = accelerator.trackers
            closed.append(tracker.writer.file_writer.event_writer.close())
        return original(accelerator, *given)

    monkeypatch.setattr(script, "train_step", train_step)
    run(script, args(tmp_path / "out", max_train_steps=3, logging_steps=1, report_to="tensorboard"))
    assert "sending numbers to the trackers failed; the run goes on" in caplog.text
    assert list_names(tmp_path / "out", "*") >= {"checkpoint-3", "model_index.json", "README.md"}


@in_first_script
def test_weights_and_biases_offline(script, args, tmp_path, monkeypatch):
    """Every update's numbers and all pictures are in the files that `wandb sync` would upload, and no token is."""
    settings = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true", "HF_TOKEN": TOKEN,
                "WANDB__SERVICE_WAIT": "300"}  # seconds: a busy machine is slow to start its service
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # the settings of the run before, in this process
    run(script, args(tmp_path / "out", max_train_steps=7, report_to="wandb", validation_prompts=["a cat", "a dog"],
                     validation_steps=3, logging_steps=2))
    (record,) = tmp_path.rglob("*.wandb")
    assert record.read_bytes().count(b"train_loss") >= 7
    media = sorted(path.name.rpartition("_")[0] for path in record.parent.rglob("media/**/*.png"))
    assert media == sorted(["validation_3", "validation_6", "test_7"] * 2)
    assert not find_token(tmp_path)


@in_first_script
def test_no_tracker(script, args, tmp_path):
    """--report_to none writes no logs, and everything else as ever."""
    run(script, args(tmp_path / "out", report_to="none", validation_prompts=["a"]))
    assert list_names(tmp_path / "out", "*") >= {"checkpoint-2", "validation", "README.md"}
    assert not (tmp_path / "out/logs").exists()


# ---- The model card and the hub -------------------------------------------------------------------------------------


def find_token(folder) -> list[str]:
    """Return the files below a folder that hold the token."""
    return [path.name for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_model_card(script, drawn, tiny_model):
    """It names the base model, shows the last pictures, says how to use the result and how it was trained."""
    card = ModelCard.load(drawn / "README.md")
    assert str(tiny_model) in card.text and card.data.license
    kind = "stable-diffusion-xl" if "sdxl" in script.__name__ else "stable-diffusion"
    assert {"text-to-image", "diffusers", "diffusers-training", kind} <= set(card.data.tags)
    (picture,) = re.findall(r"!\[.*?\]\(\.?/?(.*?)\)", card.text)
    assert read_pixels(drawn / picture).shape == read_pixels(drawn / "validation/step-11/grid.png").shape
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    compile(snippet, "README.md", "exec")
    assert str(drawn) in snippet and "a cat" in snippet
    for fact in ("updates: 11", "seed: 0", "learning_rate: 1e-30", "resolution: 48", "train_batch_size: 2"):
        assert f"- {fact}\n" in card.text + "\n", fact


def test_model_card_of_a_model_from_the_hub(script, args, tmp_path):
    """Its header names the base, by which the hub links the two, and which a folder on this machine cannot be."""
    for base, named in (("somebody/apples", "somebody/apples"), (tmp_path, None)):
        out = tmp_path / f"of {named}"
        out.mkdir(parents=True)
        flags = script.parse_args(args(out, pretrained_model_name_or_path=base, dataset_name="somebody/fruit"))
        script.save_model_card(flags, 5, script.Progress(3))
        card = ModelCard.load(out / "README.md")
        assert card.data.base_model == named and "somebody/fruit" in card.text


@in_first_script
def test_hub_that_cannot_be_reached_is_noticed_before_training(script, args, tmp_path):
    """--push_to_hub makes the repository first, so that a missing network or login costs seconds, not the night."""
    with pytest.raises(Exception, match=r"repos/create.*HF_HUB_OFFLINE"):
        run(script, args(tmp_path / "out", push_to_hub=True))
    assert list_names(tmp_path / "out") == set()


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that makes repositories and refuses to store anything in them; it keeps what it was asked."""

    requests = []

    def do_POST(self):  # noqa: N802
        """Answer as the hub does."""
        body = self.read_body()
        self.requests.append((self.path, self.headers["Authorization"], body))
        status, answer = 200, {}
        if self.path == "/api/repos/create":
            answer = {"url": f"http://{self.headers['Host']}/somebody/{body['name']}"}
        elif "/preupload/" in self.path:
            answer = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                for file in body["files"]]}
        elif "/commit/" in self.path:
            status, answer = 403, {"error": "no room left for somebody"}
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def read_body(self) -> dict:
        """Return what was sent as JSON; a commit, which is several lines of it in chunks, is only passed over."""
        if "Content-Length" in self.headers:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            return json.loads(content) if "/commit/" not in self.path else {}
        while size := int(self.rfile.readline(), 16):
            self.rfile.read(size + 2)
        self.rfile.readline()
        return {}

    def log_message(self, *given):
        """Stay quiet."""


@pytest.fixture
def hub(monkeypatch):
    """Let a server on this machine be the hub."""
    Hub.requests.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        address, constants = f"http://127.0.0.1:{server.server_port}", huggingface_hub.constants
        for place, name, value in ((constants, "HF_HUB_OFFLINE", False), (constants, "ENDPOINT", address),
                                   (huggingface_hub.hf_api.api, "endpoint", address)):
            monkeypatch.setattr(place, name, value)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield
        server.shutdown()
        thread.join()


@in_first_script
@pytest.mark.usefixtures("hub")
def test_upload_that_fails_loses_nothing(script, args, drawn, tmp_path, caplog, capfd):
    """The model is saved by then, the error says how to repeat the upload, and the token is written nowhere."""
    out = tmp_path / "out"
    argv = args(out, push_to_hub=True, hub_model_id="apples", hub_private_repo=True, hub_token=TOKEN,
                validation_prompts=["a"], report_to="tensorboard")
    with pytest.raises(script.UserError, match=f"uploading {out} to somebody/apples failed: (.|\\n)*no room left for "
                                           "somebody(.|\\n)*--resume_from_checkpoint latest") as error:
        run(script, argv)
    assert {path.name for path in out.iterdir()} >= {path.name for path in drawn.iterdir()} - list_names(drawn) - {
        "validation"}
    path, _, asked = Hub.requests[0]
    assert path == "/api/repos/create" and (asked.get("visibility") == "private" or asked.get("private"))
    assert {authorization for _, authorization, _ in Hub.requests} == {f"Bearer {TOKEN}"}
    offered = {file["path"] for path, _, body in Hub.requests if "/preupload/" in path for file in body["files"]}
    assert "README.md" in offered and any(path.endswith(".safetensors") for path in offered)
    assert not [path for path in offered if path.startswith(("checkpoint-", "logs/", "."))]
    assert not find_token(out) and TOKEN not in "".join([str(error.value), caplog.text, *capfd.readouterr()])


@in_two_scripts
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])  # v_prediction: the saved pipeline's, above
def test_every_prediction_type_is_drawn_with(script, tiny_model, image_folder, tmp_path, prediction_type):
    """The pictures of the run and the exported pipeline are drawn with the type that was trained."""
    flags = {"prediction_type": prediction_type, "validation_prompts": ["a"], "validation_inference_steps": 2}
    script.main(make_args(tiny_model, image_folder, tmp_path / "out", **flags))
    picture = read_pixels(tmp_path / "out" / "validation" / "step-2" / "00.png").astype(int)
    pipeline = load_pipeline(tmp_path / "out", tiny_model, prediction_type=prediction_type)
    assert pipeline.scheduler.config.prediction_type == prediction_type
    if prediction_type == "sample":  # which PNDM, the scheduler of the base, cannot draw with
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    seed = int(script.make_rng(0, "validation", 0).integers(2**31))
    (image,) = pipeline("a", num_inference_steps=2, height=32, width=32,
                        generator=torch.Generator().manual_seed(seed)).images
    assert abs(np.asarray(image) - picture).max() <= 1
