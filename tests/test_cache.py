"""The caches: what they hold, when they are used again, and that training with them is the training without."""

import gc
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    UNCACHED,
    in_first_script,
    in_two_scripts,
    list_adapter_flags,
    make_args,
    make_image,
    make_image_folder,
    read_scalars,
)
from PIL import Image
from runs import Run, assert_same_checkpoint, list_names, prepare, run, run_pair
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from transformers import CLIPTextModel

from diffusers import AutoencoderKL

CACHED = {"cache_latents": True, "cache_text_embeddings": True}
EXACT = {**CACHED, "cache_dtype": "fp32"}


@pytest.fixture
def train(script, tiny_model, image_folder, tmp_path):
    """Return a function that runs the script with a cache of its own, and returns its output folder."""

    def with_flags(name: str = "out", data: Path = image_folder, model: Path = tiny_model, **flags) -> Path:
        place = {"encoded_dir": tmp_path / "encoded"} if CACHED.keys() & flags.keys() else {}
        run(script, make_args(model, data, tmp_path / name, **place, **flags))
        return tmp_path / name

    return with_flags


@pytest.fixture
def encode(script, tiny_model, image_folder, tmp_path):
    """Return a function that makes the caches of a run, and trains nothing."""

    def with_flags(data: Path = image_folder, model: Path = tiny_model, **flags) -> None:
        prepare(script, make_args(model, data, tmp_path / "out", encoded_dir=tmp_path / "encoded",
                                  **{**CACHED, **flags}))

    return with_flags


def read_cache(folder: Path, kind: str) -> dict[str, np.ndarray]:
    """Return all rows of the one cache of a kind in a folder."""
    (place,) = Path(folder).glob(f"{kind}-*")
    rows = np.concatenate([np.load(path) for path in sorted(place.glob("*.npy"))])
    assert not list(place.glob(".*"))
    return {name: rows[name] for name in rows.dtype.names}


@in_two_scripts
def test_training_with_caches_is_training_without(train):
    """Where a crop is all there is, each update has the loss that it has without caches."""
    flags = {"center_crop": True, "max_train_steps": 7, "proportion_empty_prompts": 0.4, "report_to": "tensorboard"}
    plain, cached = (read_scalars(train(name, **flags, **more), "train_loss")
                     for name, more in (("plain", UNCACHED), ("cached", EXACT)))
    assert len(plain) == 7 and cached == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_rows_are_the_moments_of_the_crops_they_name(script, tiny_model, image_folder, tmp_path, dtype):
    """Each row holds what the VAE makes of the crop, mirrored or not, at the place in its time ids."""
    _, models, samples = prepare(script, make_args(
        tiny_model, image_folder, tmp_path / "out", encoded_dir=tmp_path / "encoded", cache_latents=True,
        cache_dtype=dtype, random_flip=True, cache_crops=3, resolution=16))
    rows, seen = read_cache(tmp_path / "encoded", "images"), set()
    assert len(rows["moments"]) == 10 * 3 * 2 and rows["moments"].dtype.itemsize * 8 == int(dtype[2:])
    for number, (moments, time_ids) in enumerate(zip(rows["moments"], rows["time_ids"], strict=True)):
        index, flip = number // 6, number % 2
        image = make_image(index)
        small = image.resize((40 * 16 // 36, 16), 1)  # Lanczos, by the shorter side
        small = small.transpose(0) if flip else small
        height, width, top, left, *size = time_ids.astype(int).tolist()
        assert (height, width, size) == (36, 40, [16, 16])
        crop = torch.from_numpy(np.asarray(small.crop((left, top, left + 16, top + 16))).copy()).permute(2, 0, 1)[None]
        with torch.no_grad():
            posterior = models.vae.encode(crop / 127.5 - 1).latent_dist
        expected = torch.cat([posterior.mean, posterior.std], dim=1)[0].numpy()
        np.testing.assert_allclose(moments, expected.ravel(), rtol=2e-3, atol=2e-2)
        seen.add((index, top, left))
    assert len(seen) > 10  # of 20 places in all


@in_first_script
def test_visits_draw_all_variants(script, tiny_model, image_folder, tmp_path):
    """Over the epochs each crop is drawn as often as any other, and half of them mirrored, as without the cache."""
    _, _, samples = prepare(script, make_args(
        tiny_model, image_folder, tmp_path / "out", encoded_dir=tmp_path / "encoded", **CACHED, random_flip=True,
        cache_crops=6, resolution=16))
    rows = read_cache(tmp_path / "encoded", "images")["moments"][3 * 12 : 4 * 12]
    counts = np.zeros(12)
    for epoch in range(600):
        moments = samples[script.SampleUse(epoch, 3)]["moments"].ravel()
        same = [number for number in range(12) if np.array_equal(rows[number], moments)]
        assert same and len({number % 2 for number in same}) == 1  # two crops may fall on one place
        counts[same] += 1 / len(same)
    assert counts.sum() == pytest.approx(600) and counts.min() > 25


@in_two_scripts
def test_moments_of_latents_are_those_of_training_without(script, tiny_model, image_folder, tmp_path):
    """Mean and variance of the latents that updates see are the same with and without the cache."""
    found = {}
    for name, flags in (("plain", UNCACHED), ("cached", {**CACHED, "encoded_dir": tmp_path / "encoded"})):
        _, models, samples = prepare(script, make_args(
            tiny_model, image_folder, tmp_path / "out", **flags, random_flip=True))
        visits = [samples[script.SampleUse(epoch, index)] for epoch in range(12) for index in range(10)]
        batch = script.collate(visits, script.list_tokenizers(models))
        found[name] = script.encode_batch(models, batch)[0].double()
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(found["plain"]), statistic(found["cached"]), rtol=0.03, atol=0.02)


@in_first_script
def test_distinct_captions_are_encoded_once(script, train, tiny_model, image_folder, tmp_path):
    """Ten pictures with two captions give three rows: those and the empty one."""
    lines = [f'{{"file_name": "{index:03d}.png", "text": ["one", "{"two" if index % 2 else "one"}"]}}'
             for index in range(10)]
    data = make_image_folder(tmp_path / "lists")
    (data / "metadata.jsonl").write_text("\n".join(lines))
    train(data=data, cache_text_embeddings=True, proportion_empty_prompts=0.5, max_train_steps=6)
    rows = read_cache(tmp_path / "encoded", "captions")
    assert len(rows["num_long"]) == 3


@in_two_scripts
@pytest.mark.parametrize(("first", "workers"), [(3, 2), (5, 0)])
def test_resuming_is_exact(train, first, workers):
    """A run with caches goes on from the middle or the end of an epoch as if it had not stopped, to the last bit."""
    flags = {**CACHED, "random_flip": True, "proportion_empty_prompts": 0.3, "dataloader_num_workers": workers}
    whole = train("whole", **flags, max_train_steps=7)
    part = train("part", **flags, max_train_steps=first)
    train("part", **flags, max_train_steps=7, resume_from_checkpoint="latest")
    assert_same_checkpoint(whole / "checkpoint-7", part / "checkpoint-7")


def list_caches(tmp_path: Path) -> list[str]:
    """Return the names of all caches."""
    return sorted(list_names(tmp_path / "encoded", "*-*"))


SAME = {"learning_rate": 1e-5, "seed": 5, "train_batch_size": 3, "max_train_steps": 1, "proportion_empty_prompts": 0.5,
        "noise_offset": 0.1, "dataloader_num_workers": 1}
OTHERS = [({"resolution": 16}, "images"), ({"image_interpolation_mode": "nearest"}, "images"),
          ({"center_crop": True}, "images"), ({"random_flip": True}, "images"), ({"cache_crops": 2}, "images"),
          ({"vae_tiling": True}, "images"), ({"cache_dtype": "fp32"}, "images captions"),
          ({"mixed_precision": "bf16"}, "images captions")]


def count_caches(tmp_path: Path) -> dict[str, int]:
    """Return how many caches there are of images, and of captions."""
    return {kind: len(list_names(tmp_path / "encoded", f"{kind}-*")) for kind in ("images", "captions")}


@in_first_script
def test_what_does_not_matter_uses_the_cache_again(train, tmp_path):
    """Another rate, folder, seed, batch and so on find what the run before has encoded, and encode nothing."""
    train("first", **CACHED)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "encoded").rglob("*")}
    train("second", **CACHED, **SAME)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "encoded").rglob("*")} == before
    assert len(list_caches(tmp_path)) == 2


@in_two_scripts
def test_crops_are_not_taken_for_mirrored_ones(script, encode, tmp_path):
    """Two crops and their mirror images are as many as four crops, and of a white square look the same."""
    folder = make_image_folder(tmp_path / "data", count=2)
    for file in folder.glob("*.png"):
        Image.new("RGB", (32, 32), "white").save(file)
    encode(folder, random_flip=True, cache_crops=2)
    encode(folder, cache_crops=4)
    assert count_caches(tmp_path)["images"] == 2


@in_two_scripts
def test_what_matters_makes_another_cache(script, encode, tmp_path, monkeypatch):
    """Another transform or number format is encoded anew, beside the old, also a transform of the user's own."""
    encode()
    for flags, kinds in OTHERS:
        if "sdxl" in script.__name__ and "mixed_precision" in flags:
            kinds = "captions"  # the VAE is float32 all the same
        before = count_caches(tmp_path)
        encode(**flags)
        assert count_caches(tmp_path) == {kind: count + (kind in kinds) for kind, count in before.items()}, flags
    original, before = script.transform_image, count_caches(tmp_path)

    def transform_image(*given):
        made = original(*given)
        return {**made, "images": 255 - made["images"]}

    monkeypatch.setattr(script, "transform_image", transform_image)
    encode()
    assert count_caches(tmp_path) == {"images": before["images"] + 1, "captions": before["captions"]}


@in_two_scripts
def test_other_content_makes_another_cache(encode, tiny_model, tmp_path):
    """Another picture under the same name, another caption, or other weights in the same place are encoded anew."""
    data, model = make_image_folder(tmp_path / "data"), tmp_path / "model"
    shutil.copytree(tiny_model, model)
    encode(data, model)
    changes = ["picture", "caption", "vae", "text_encoder"]
    for change in changes + ["text_encoder_2", "force_zeros"] * (model / "text_encoder_2").is_dir():
        before, metadata, index = count_caches(tmp_path), data / "metadata.jsonl", model / "model_index.json"
        if change == "picture":
            make_image(77).save(data / "004.png")
        elif change == "caption":
            metadata.write_text(metadata.read_text().replace("number 4", "number four"))
        elif change == "force_zeros":  # of the pipeline: what the empty caption means
            index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": False}))
        else:
            (path,) = (model / change).glob("*.safetensors")
            weights = {name: 1.01 * tensor if tensor.is_floating_point() else tensor
                       for name, tensor in load_tensors(path).items()}
            save_tensors(weights, path, metadata={"format": "pt"})
        encode(data, model)
        changed = "images" if change in ("picture", "vae") else "captions"
        assert count_caches(tmp_path) == {kind: count + (kind == changed) for kind, count in before.items()}, change


@in_first_script
def test_a_touched_or_moved_picture_is_the_same(encode, tmp_path):
    """A folder that was copied elsewhere, with new dates, needs no encoding."""
    first, second = make_image_folder(tmp_path / "one"), make_image_folder(tmp_path / "two")
    encode(first)
    encode(second)
    assert len(list_caches(tmp_path)) == 2


DIGEST = """
import sys
import train_text_to_image as script
parts = {"vae": script.AutoencoderKL, "text_encoder": script.CLIPTextModel}
print(*(script.digest_network(kind.from_pretrained(sys.argv[1], subfolder=part)) for part, kind in parts.items()))
"""


def test_networks_have_the_same_name_in_every_process_and_place(first_script, tiny_model, tmp_path):
    """A digest depends on neither Python's hashes nor the folder, also where a configuration lacks newer settings."""
    path = shutil.copytree(tiny_model, tmp_path / "one") / "vae" / "config.json"
    config = json.loads(path.read_text())
    for name in ("shift_factor", "latents_mean", "force_upcast", "mid_block_add_attention"):
        config.pop(name, None)
    path.write_text(json.dumps(config))
    other = shutil.copytree(tmp_path / "one", tmp_path / "two")
    done = subprocess.run([sys.executable, "-c", DIGEST, str(other)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONHASHSEED": "1"}, check=True)  # here the seed is another one
    networks = (AutoencoderKL.from_pretrained(tmp_path / "one", subfolder="vae"),
                CLIPTextModel.from_pretrained(tmp_path / "one", subfolder="text_encoder"))
    assert done.stdout.split()[-2:] == [first_script.digest_network(network) for network in networks]


@in_first_script
def test_one_changed_row_of_an_embedding_is_seen(script, tiny_model):
    """A token that was taught anew makes another text encoder."""
    text_encoder = CLIPTextModel.from_pretrained(tiny_model, subfolder="text_encoder")
    before = script.digest_network(text_encoder)
    with torch.no_grad():
        text_encoder.get_input_embeddings().weight[77] += 0.01
    assert script.digest_network(text_encoder) != before


@in_first_script
def test_samples_can_be_sent_to_loader_processes(script, tiny_model, image_folder, tmp_path):
    """With caches made, samples can be pickled, as loader processes that are not forked need, and read the same."""
    _, _, samples = prepare(script, make_args(
        tiny_model, image_folder, tmp_path / "out", encoded_dir=tmp_path / "encoded", **CACHED))
    sample = samples.__getitems__([script.SampleUse(0, 3)])[0]
    other = pickle.loads(pickle.dumps(samples))[script.SampleUse(0, 3)]
    assert sample.keys() == other.keys() and all(np.array_equal(sample[name], other[name]) for name in sample)


@in_first_script
def test_killed_in_the_middle_it_goes_on(script, tiny_model, image_folder, tmp_path):
    """kill -9 while encoding leaves whole files only; the next run makes what is missing, and the same result."""
    data = make_image_folder(tmp_path / "many", count=48)
    argv = make_args(tiny_model, data, tmp_path / "out", encoded_dir=tmp_path / "encoded", **EXACT, cache_crops=4,
                     random_flip=True, train_batch_size=1, max_train_steps=1)
    with Run(script, argv, tmp_path / "log") as child:
        child.wait_until(lambda: len(list((tmp_path / "encoded").glob("images-*/[0-9]*"))) >= 2)
        child.kill(signal.SIGKILL)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "encoded").glob("images-*/[0-9]*")}
    assert 2 <= len(written) < 16
    run(script, argv)
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    for path in (tmp_path / "encoded").glob("images-*/.partial-*"):
        path.unlink()
    found = read_cache(tmp_path / "encoded", "images")
    run(script, make_args(tiny_model, data, tmp_path / "other", encoded_dir=tmp_path / "again", **EXACT, cache_crops=4,
                          random_flip=True, train_batch_size=1, max_train_steps=1))
    whole = read_cache(tmp_path / "again", "images")
    assert all(np.array_equal(found[name], whole[name]) for name in whole)


@in_two_scripts
def test_two_processes_share_the_work_and_the_result(script, tiny_model, image_folder, tmp_path):
    """Two processes fill one cache, which is the one that a single process makes."""
    argv = make_args(tiny_model, image_folder, tmp_path / "pair", encoded_dir=tmp_path / "encoded", **EXACT,
                     random_flip=True, train_batch_size=1, max_train_steps=2)
    run_pair(script, argv, tmp_path / "log")
    run(script, make_args(tiny_model, image_folder, tmp_path / "one", encoded_dir=tmp_path / "single", **EXACT,
                          random_flip=True, train_batch_size=1, max_train_steps=1))
    assert list_caches(tmp_path) == sorted(list_names(tmp_path / "single", "*-*"))
    for kind in ("images", "captions"):
        found, expected = read_cache(tmp_path / "encoded", kind), read_cache(tmp_path / "single", kind)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_broken_images_bring_the_caption_of_what_replaces_them(script, tiny_model, tmp_path):
    """With --skip_broken_images a neighbour takes the place, with its own caption."""
    data = make_image_folder(tmp_path / "data", count=4)
    (data / "001.png").write_bytes(b"no picture")
    _, _, samples = prepare(script, make_args(
        tiny_model, data, tmp_path / "out", encoded_dir=tmp_path / "encoded", cache_latents=True,
        no_cache_text_embeddings=True, skip_broken_images=True))
    sample = samples[script.SampleUse(0, 1)]
    assert sample["caption"] == "picture number 2" and sample["sources"] == 2
    assert samples[script.SampleUse(0, 3)]["sources"] == 3


@in_first_script
def test_a_full_disk_is_told(script, tiny_model, image_folder, tmp_path):
    """Where the cache has no room the error names the folder and the flags, and keeps what is there."""
    argv = make_args(tiny_model, image_folder, tmp_path / "out", encoded_dir=tmp_path / "encoded", **CACHED)
    with Run(script, argv, tmp_path / "log", limit=10_000) as child:
        assert child.end() != 0
    log = (tmp_path / "log").read_text()
    assert "cannot be written" in log and "--encoded_dir" in log and "--cache_crops" in log


@in_two_scripts
def test_the_vae_encodes_a_few_images_at_a_time(script, tiny_model, monkeypatch):
    """Of any batch, cached or not: its memory would grow with the batch size."""
    vae, calls = script.AutoencoderKL.from_pretrained(tiny_model, subfolder="vae"), []
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    whole, encode = script.encode_images(vae, images), vae.encode
    monkeypatch.setattr(script, "ENCODED_PIXELS", 2 * 16 * 16)
    monkeypatch.setattr(vae, "encode", lambda values: calls.append(len(values)) or encode(values))
    torch.testing.assert_close(script.encode_images(vae, images), whole, rtol=1e-4, atol=1e-4)
    assert calls == [2, 2, 1]


def test_a_latent_that_is_not_finite_stops_the_run(script, train, monkeypatch):
    """Values beyond fp16 stop the run, with the images, the number format and what to try."""
    original = script.encode_images

    def encode_images(vae, images):
        return 1e6 * original(vae, images)

    monkeypatch.setattr(script, "encode_images", encode_images)
    with pytest.raises(ValueError, match="items 0 to 0 of the samples are not finite as float16.*cache_dtype"):
        train(cache_latents=True)


@in_two_scripts
def test_both_caches_read_no_image(script, train, monkeypatch):
    """Once encoded, no visit decodes a picture or runs VAE or text encoder."""
    train("first", **CACHED)
    cache_encodings = script.cache_encodings

    def fail(*given):
        raise AssertionError("read or encoded again")

    def then_fail(*given):  # a few images and the empty caption are looked at, to know the caches by
        cache_encodings(*given)
        for name in ("decode_image", "encode_images", "encode_captions"):
            monkeypatch.setattr(script, name, fail)

    monkeypatch.setattr(script, "encode_images", fail)
    monkeypatch.setattr(script, "cache_encodings", then_fail)
    train("second", **CACHED)


@pytest.mark.parametrize(("flags", "message"), [
    ({"cache_text_embeddings": True, "train_text_encoder": True}, "--train_text_encoder.*--no_cache_text_embeddings"),
    ({"cache_latents": True, "cache_crops": 0}, r"--cache_crops: must be from 1 to 1e\+15"),
])
def test_impossible_caches_are_refused(script, tiny_model, image_folder, tmp_path, capsys, flags, message):
    """Flags that cannot be combined end the command in one line."""
    with pytest.raises(SystemExit):
        script.parse_args(make_args(tiny_model, image_folder, tmp_path / "out", **flags))
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_caches_can_be_switched_off(script, tiny_model, image_folder, tmp_path):
    """--no_cache_latents and --no_cache_text_embeddings undo what stands before them."""
    args = script.parse_args(make_args(tiny_model, image_folder, tmp_path / "out", **CACHED, no_cache_latents=True,
                                       no_cache_text_embeddings=True))
    assert (args.cache_latents, args.cache_text_embeddings) == (False, False)


def test_every_option_trains_with_caches(script, train):
    """DREAM, perturbation's opposite, offsets, averages, accumulation, subsets and validation go with the caches."""
    out = train(**CACHED, random_flip=True, max_train_samples=5, dream_training=True, noise_offset=0.1, snr_gamma=5,
                use_ema=True, gradient_accumulation_steps=2, validation_prompts=["a picture"],
                validation_inference_steps=2, **list_adapter_flags(script, rank=2))
    assert (out / "validation" / "step-2" / "00.png").is_file()


@in_first_script
def test_threads_open_files_at_once(script, tmp_path):
    """Before Python 3.11.8 and 3.12.2, `ast` fails in a thread that collects garbage while another one uses it."""
    np.save(tmp_path / "rows.npy", np.zeros(3, [("moments", "<f2", 8), ("time_ids", "<f4", 6), ("sources", "<i8")]))
    threshold = gc.get_threshold()
    gc.callbacks.append(lambda *_: time.sleep(1e-5))  # long enough for another thread to go on
    gc.set_threshold(50)
    try:
        script.map_in_threads(lambda _: script.open_rows.__wrapped__(tmp_path / "rows.npy").shape, range(5000))
    finally:
        gc.callbacks.pop()
        gc.set_threshold(*threshold)
