"""Images of every shape: sizes, the bucket of each image, updates of one size, and runs that are resumed exactly."""

import collections
import itertools
import math

import numpy as np
import pytest
from accelerate import PartialState
from conftest import in_first_script, make_args, make_image, make_namespace, read_scalars
from PIL import Image, PngImagePlugin
from runs import assert_same_checkpoint, keep_configs_only, run, run_pair
from test_data import make_ruler, make_samples
from test_resume import watch

SIZES = [(40, 36), (80, 40), (81, 41), (40, 80), (30, 90), (64, 64), (33, 33), (20, 60), (100, 30), (50, 40), (41, 44)]
BUCKETS = {"aspect_ratio_buckets": True, "bucket_step": 8}


@pytest.fixture(autouse=True)
def logs():
    """Let what is logged outside of runs be logged."""
    PartialState(cpu=True)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Folder of captioned images of many shapes, width by height as in SIZES."""
    folder = tmp_path_factory.mktemp("shapes")
    for index, size in enumerate(SIZES):
        make_image(index, size).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"{size[0]} by {size[1]}")
    return folder


@pytest.fixture
def args(tiny_model, shapes):
    """Return a function that gives the command line of a run with buckets."""
    defaults = {**BUCKETS, "report_to": "tensorboard", "max_train_steps": 8, "random_flip": True,
                "checkpointing_steps": 100}
    return lambda output_dir, **flags: make_args(tiny_model, shapes, output_dir, **{**defaults, **flags})


def list_sizes(script, **flags) -> list[tuple[int, int]]:
    return script.list_sizes(make_namespace(script, make_args("model", ".", "no-such-output", **flags)))


def make_items(sizes=SIZES) -> list[dict]:
    return [{"image": make_image(index, size), "captions": ["a"]} for index, size in enumerate(sizes)]


# ---- Sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (768, 32), ("768x512", 64), (32, 8)])
def test_sizes_have_about_the_same_area(first_script, resolution, step):
    """Sides are multiples of the step, no area is larger, and each size stands on its side as well."""
    sizes = list_sizes(first_script, resolution=resolution, aspect_ratio_buckets=True, bucket_step=step)
    area = math.prod(first_script.parse_size(resolution))
    for height, width in sizes:
        assert height % step == width % step == 0 and max(height, width) <= 4 * min(height, width)
        assert max(height * (width + step), (height + step) * width) > area >= height * width
        assert (width, height) in sizes
    assert len(set(sizes)) == len(sizes) > 4


def test_sizes_are_those_of_sdxl(first_script):
    """Those that SDXL was trained at are among ours (Podell et al. 2023, appendix I), height by width."""
    sizes = list_sizes(first_script, resolution=1024, aspect_ratio_buckets=True)
    assert {(512, 2048), (640, 1600), (768, 1344), (832, 1216), (896, 1152), (1024, 1024), (1216, 832), (1344, 768),
            (2048, 512)} <= set(sizes)


def test_one_size_without_buckets(first_script):
    assert list_sizes(first_script, resolution=512) == [(512, 512)]
    assert list_sizes(first_script, resolution="768x512") == [(512, 768)]


@pytest.mark.parametrize("resolution", ["0", "512x", "x512", "512x0", "-1", "big", "512x512x3", "1.5"])
def test_other_sizes_are_refused(script, resolution, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(make_args("model", tmp_path, tmp_path / "out", resolution=resolution))
    message = f"must be from 1 to 99999, such as 512 or 768x512 (width x height), got {resolution!r}"
    assert message in capsys.readouterr().err


def test_a_step_that_leaves_no_size_is_refused(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(make_args("model", tmp_path, tmp_path / "out", aspect_ratio_buckets=True))
    assert "--bucket_step 64 leaves no size of about --resolution 32" in capsys.readouterr().err


def test_sizes_fit_the_vae(script, tiny_model, shapes, tmp_path):
    for flags in ({"aspect_ratio_buckets": True, "bucket_step": 9}, {"validation_size": ["33x32"]}):
        with pytest.raises(ValueError, match="--validation_size, and --bucket_step .* must be multiples of 2"):
            run(script, make_args(tiny_model, shapes, tmp_path / "out", **flags))


# ---- The bucket of an image -----------------------------------------------------------------------------------------


def test_each_image_gets_the_size_nearest_in_aspect_ratio(script):
    samples = make_samples(script, make_items(), **BUCKETS)
    for (width, height), bucket in zip(SIZES, samples.buckets, strict=True):
        distances = [abs(math.log(width / height * high / wide)) for high, wide in samples.sizes]
        assert distances[bucket] == min(distances)


def test_more_of_an_image_is_kept_than_by_a_square(first_script):
    """The share of pixels that the crops keep, over images of mixed shapes."""
    samples, kept = make_samples(first_script, make_items(), **BUCKETS), []
    for (width, height), bucket in zip(SIZES, samples.buckets, strict=True):
        aspects = sorted((width / height, samples.sizes[bucket][1] / samples.sizes[bucket][0]))
        kept.append((aspects[0] / aspects[1], min(width, height) / max(width, height)))
    ours, square = np.mean(kept, axis=0)
    assert ours > 0.9 and square < 0.65


def test_a_rotated_photo_is_measured_as_it_is_shown(first_script, tmp_path):
    """EXIF orientation 6 turns a wide file into a tall image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    make_image(0, (80, 40)).save(tmp_path / "0.jpg", exif=exif)
    samples = make_samples(first_script, [{"image": {"path": tmp_path / "0.jpg"}, "captions": ["a"]}], **BUCKETS)
    height, width = samples.sizes[samples.buckets[0]]
    assert height > width and samples[first_script.SampleUse(0, 0)]["images"].shape == (3, height, width)


@pytest.mark.parametrize("exif", [{}, {"exif": b"broken"}], ids=["without EXIF", "broken EXIF"])
def test_only_headers_are_read(first_script, tmp_path, monkeypatch, exif):
    """The size of a PNG is known without its pixels, also where its EXIF data is broken."""
    make_image(0, (80, 40)).save(tmp_path / "0.png", **exif)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("decoded"))
    samples = make_samples(first_script, [{"image": {"path": tmp_path / "0.png"}, "captions": ["a"]}], **BUCKETS)
    height, width = samples.sizes[samples.buckets[0]]
    assert height < width


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("width", "height"), [(80, 40), (40, 80), (96, 30), (33, 32), (32, 32), (200, 50)])
def test_an_image_covers_its_size_and_time_ids_tell_where(script, width, height, flip):
    """SDXL's sizes by hand: the original's, the crop's place in the resized and mirrored image, and the crop's."""
    samples = make_samples(script, [make_ruler(width, height)], image_interpolation_mode="nearest", **BUCKETS)
    size = high, wide = samples.sizes[samples.buckets[0]]
    scale = max(high / height, wide / width)
    resized_height, resized_width = int(height * scale + 1e-9), int(width * scale + 1e-9)
    for corner in ((0.0, 0.0), (0.999, 0.999), (0.5, 0.3)):
        result = script.transform_image(make_ruler(width, height)["image"], samples.args, size, np.array(corner), flip)
        top = int(corner[0] * (resized_height - high + 1))
        left = int(corner[1] * (resized_width - wide + 1))
        assert result["time_ids"].tolist() == [height, width, top, left, high, wide]
        red, green, _ = result["images"].astype(int)
        assert red.shape == (high, wide)
        columns = np.arange(left, left + wide) if not flip else resized_width - 1 - np.arange(left, left + wide)
        assert np.abs(red[0] - (columns + 0.5) * width / resized_width).max() <= 1
        assert np.abs(green[:, 0] - (np.arange(top, top + high) + 0.5) * height / resized_height).max() <= 1


def test_sizes_are_told(first_script, caplog):
    caplog.set_level("INFO")
    make_samples(first_script, make_items([(64, 64), (20, 60), (64, 66)]), **BUCKETS)
    assert "images by width x height: 2 of 32x32, 1 of 16x48" in caplog.text


def test_a_broken_image_is_replaced_at_the_size_of_its_place(first_script, tmp_path):
    """An image found in its place takes its size, since the update has that size."""
    (tmp_path / "broken.png").write_bytes(b"no picture")
    items = [*make_items([(80, 40)] * 3), {"image": {"path": tmp_path / "broken.png"}, "captions": ["b"]}]
    samples = make_samples(first_script, items, skip_broken_images=True, **BUCKETS)
    assert samples[first_script.SampleUse(0, 3)]["images"].shape == (3, 32, 32)


# ---- The order of samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "accumulation"), itertools.product((1, 2, 3, 8), (1, 2, 4)))
def test_updates_have_one_size_and_use_each_image_once(script, batch, accumulation):
    samples = make_samples(script, make_items(SIZES * 3), train_batch_size=batch, max_train_steps=None,
                           gradient_accumulation_steps=accumulation, num_train_epochs=2, **BUCKETS)
    count = script.compute_last_step(samples.args, samples, 1)
    steps = list(script.plan_micro_steps(samples, script.Progress(), count, batch, accumulation))
    used, seen = collections.defaultdict(list), script.Progress()
    updates = [list(update) for _, update in itertools.groupby(
        steps, lambda step: (step.epoch, sum(other.ends_update for other in steps[:steps.index(step)])))]
    assert len(updates) == count
    for place, update in enumerate(updates):
        assert len({samples.buckets[index] for step in update for index in step.indices}) == 1
        assert {step.window_size for step in update} == {sum(len(step.indices) for step in update)}
        assert all(len(step.indices) <= batch for step in update)
        assert list(script.plan_micro_steps(samples, seen, count - place, batch, accumulation)) == sum(
            updates[place:], [])  # the same from anywhere
        for step in update:
            used[step.epoch] += step.indices
        seen.epoch, seen.samples_seen = update[-1].epoch, update[-1].last
    assert {epoch: sorted(indices) for epoch, indices in used.items()} == dict.fromkeys(range(2), list(range(33)))
    assert used[0] != used[1]


def test_buckets_are_mixed(first_script):
    """The sizes of an epoch's updates do not come one after the other."""
    samples = make_samples(first_script, make_items([(40, 36), (80, 40)] * 20), **BUCKETS)
    order = samples.buckets[samples.make_order(0, 2)]
    assert 4 < np.count_nonzero(np.diff(order)) < 20


# ---- Runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "flags"), [
    ("train_text_to_image.py", {"dataloader_num_workers": 1, "gradient_accumulation_steps": 2}),
    ("train_text_to_image_lora_sdxl.py", {"cache_latents": True, "cache_text_embeddings": True})],
    ids=["workers", "cached"], indirect=["script"])
def test_a_run_with_buckets_is_resumed_exactly(script, args, flags, tmp_path):
    whole = watch(script, args(tmp_path / "whole", **flags))
    before = watch(script, args(tmp_path / "out", **flags), stop_in=3)
    after = watch(script, args(tmp_path / "out", **flags, resume_from_checkpoint="latest"))
    assert before + after == whole
    assert_same_checkpoint(tmp_path / "out/checkpoint-8", tmp_path / "whole/checkpoint-8")


@in_first_script
def test_cached_images_train_as_encoded_ones(script, args, tmp_path):
    """With one crop per image and float32 in the cache the losses are the same but for rounding."""
    flags = {"center_crop": True, "random_flip": False, "cache_dtype": "fp32"}
    run(script, args(tmp_path / "plain", **flags))
    run(script, args(tmp_path / "cached", **flags, cache_latents=True))
    plain, cached = (read_scalars(tmp_path / name, "train_loss") for name in ("plain", "cached"))
    assert len(plain) == 8 and cached == pytest.approx(plain, rel=1e-4)


@in_first_script
def test_two_processes_train_as_one(script, args, shapes, tmp_path):
    flags = {"validation_data_dir": shapes, "logging_steps": 1}
    run_pair(script, args(tmp_path / "pair", train_batch_size=1, **flags), tmp_path / "log")
    run(script, args(tmp_path / "one", train_batch_size=2, **flags))
    for tag in ("train_loss", "validation_loss"):
        pair, one = (read_scalars(tmp_path / name, tag) for name in ("pair", "one"))
        assert pair and pair == pytest.approx(one, rel=1e-4)


@in_first_script
def test_accumulation_trains_as_a_larger_batch(script, args, tmp_path):
    """An update has one size, so its micro steps may be one batch."""
    run(script, args(tmp_path / "parts", train_batch_size=1, gradient_accumulation_steps=4))
    run(script, args(tmp_path / "whole", train_batch_size=4))
    parts, whole = (read_scalars(tmp_path / name, "train_loss") for name in ("parts", "whole"))
    assert len(parts) == 8 and parts == pytest.approx(whole, rel=1e-4)


def test_sizes_of_training_and_drawing(script, tiny_model, shapes, tmp_path):
    """--resolution 48x32 trains at this size; pictures have sizes of their own, and stand side by side."""
    out = tmp_path / "out"
    run(script, make_args(tiny_model, shapes, out, resolution="48x32", validation_prompts=["a", "b"],
                          validation_size=["16x32", "32x16"], validation_inference_steps=1))
    sizes = {path.name: Image.open(path).size for path in (out / "validation/step-2").iterdir()}
    assert sizes == {"00.png": (16, 32), "01.png": (32, 16), "grid.png": (64, 32)}
    samples = make_samples(script, make_items(), resolution="48x32")
    assert {samples[script.SampleUse(0, index)]["images"].shape for index in range(5)} == {(3, 32, 48)}


# ---- Preview --------------------------------------------------------------------------------------------------------


def test_a_preview_needs_no_weights(script, tiny_model, shapes, tmp_path):
    """--preview_data writes a sheet of what training would see, and stops."""
    model = keep_configs_only(tiny_model, tmp_path / "model")
    argv = make_args(model, shapes, tmp_path / "out", preview_data=5, report_to="tensorboard", push_to_hub=True,
                     **BUCKETS)
    with pytest.raises(SystemExit) as exits:
        run(script, argv)
    assert exits.value.code == 0
    with Image.open(tmp_path / "out/preview.png") as sheet:
        assert sheet.size == (800, 5 * 256)
        pixels = np.asarray(sheet)
    assert (pixels[:250, :40] != 255).any() and (pixels[:20, 260:400] != 255).any()  # a picture, and text beside it
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"preview.png"}
