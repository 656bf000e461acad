"""Data as people have it, and the draws of each visit: pure functions of seed, purpose, epoch and sample."""

import collections
import io
import itertools
import json
import math
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import UNCACHED, make_args, make_image, make_image_folder, make_namespace
from PIL import Image, ImageCms, PngImagePlugin, features
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

CAPTIONS = [f"picture number {index}" for index in range(5)]


@pytest.fixture
def script(first_script):
    """One script alone, to save time: what is tested here has the same text in each (tests/check_copies.py)."""
    return first_script


def load_images(script, folder, **flags):
    """Return the captioned images that a command line with this folder, or with --dataset_name, stands for."""
    args = make_namespace(script, make_args("model", folder, "no-such-output", **flags))
    PartialState(cpu=True)  # for the logger
    return script.make_captioned_images(args, None if args.dataset_name else args.train_data_dir)


def make_samples(script, images, *, seed=0, latent_shape=(4, 4, 4), num_timesteps=1000, **flags):
    """Return samples of a list of items with flags that are not about where the images come from."""
    args = make_namespace(script, make_args("model", ".", "no-such-output", **flags))
    if isinstance(images, list):
        images = script.CaptionedImages(*([item[name] for item in images] for name in ("image", "captions")))
    halvings = int(math.log2(script.parse_size(args.resolution)[0] / latent_shape[1]))
    configs = {"vae": {"latent_channels": latent_shape[0], "block_out_channels": [1] * (halvings + 1)},
               "scheduler": {"num_train_timesteps": num_timesteps}}
    return script.make_data(args, images, None, seed, configs).train


def make_item(index: int = 0, size: tuple[int, int] = (40, 36), captions=("a", "b", "c")) -> dict:
    """Return what item `index` of a data set may look like."""
    return {"image": make_image(index, size), "captions": list(captions)}


def write_images(folder: Path, count: int = 5) -> list[str]:
    """Write pictures, every other one in a subfolder, and return their names relative to the folder."""
    names = [f"{'sub/' * (index % 2)}{index}.png" for index in range(count)]
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(index).save(folder / name)
    return names


def write_metadata(folder: Path, kind: str, rows: list[dict]) -> None:
    """Write metadata.jsonl, .csv or .parquet."""
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table = datasets.Dataset.from_list(rows)
        getattr(table, f"to_{kind}")(str(folder / f"metadata.{kind}"))


def make_table(count: int = 5, image_column: str = "image", caption_column: str = "text") -> datasets.Dataset:
    """Return a data set that holds its pictures."""
    rows = {image_column: [make_image(index) for index in range(count)], caption_column: CAPTIONS[:count]}
    return datasets.Dataset.from_dict(rows).cast_column(image_column, datasets.Image())


def encode(image: Image.Image, kind: str = "png", **options) -> dict:
    """Return an image as a row of a data set stores it."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return {"bytes": stream.getvalue(), "path": None}


def read_image(script, images, index: int = 0) -> Image.Image:
    """Return an item's picture, or raise the error that names it."""
    return make_samples(script, images).read(index)[0]


def assert_same_data(script, images, indices=range(5)) -> None:
    """Check that the images are those of make_image in any order, each with its own caption."""
    order = sorted(range(len(images.captions)), key=images.captions.__getitem__)
    assert [images.captions[place] for place in order] == [[CAPTIONS[index]] for index in indices]
    for index, place in zip(indices, order, strict=True):
        image = read_image(script, images, place)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(make_image(index)))


def equal(first: dict, second: dict) -> bool:
    """Return whether two samples or batches are the same to the last bit."""
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


# ---- Where images and captions come from ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["text", "a story"])
def test_folder_with_metadata(script, tmp_path, kind, column):
    """A folder with metadata in any of the three formats and under any column name gives each image its caption."""
    names = write_images(tmp_path / "images")
    rows = [{"file_name": name, column: text} for name, text in zip(names, CAPTIONS, strict=True)]
    write_metadata(tmp_path / "images", kind, rows)
    assert_same_data(script, load_images(script, f"{tmp_path}/images/", caption_column=column))


@pytest.mark.parametrize("name", ["with space", "[brackets] and *", "ünïcode", "a.b.c"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_folders_of_any_name(script, tmp_path, kind, name):
    """The folder's name is a name, not a pattern."""
    folder = tmp_path / name
    names = write_images(folder, 2)
    if kind == "jsonl":
        write_metadata(folder, kind, [{"file_name": file, "text": CAPTIONS[i]} for i, file in enumerate(names)])
    else:
        for file, caption in zip(names, CAPTIONS, strict=False):
            (folder / file).with_suffix(".txt").write_text(caption)
    assert_same_data(script, load_images(script, folder), range(2))


def test_text_files_beside_images(script, tmp_path):
    """Without metadata the caption is the text of the .txt beside the image, whatever the column names are."""
    for name, caption in zip(write_images(tmp_path), CAPTIONS, strict=True):
        (tmp_path / name).with_suffix(".txt").write_text(f"  {caption}\n")
    make_image(4).save(tmp_path / "4.JPEG")  # beside 4.png and 4.txt: an image of its own
    (tmp_path / "notes.md").write_text("no image")
    assert len(load_images(script, tmp_path).captions) == 6
    (tmp_path / "4.JPEG").unlink()
    assert_same_data(script, load_images(script, tmp_path))
    assert_same_data(script, load_images(script, tmp_path, image_column="picture", caption_column="story"))


def test_text_files_are_utf8(script, tmp_path):
    """Captions keep their accents, and a byte order mark is none of them."""
    make_image(0).save(tmp_path / "a.png")
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "a.txt").write_text("ein Käse, 一杯茶", encoding=encoding)
        assert load_images(script, tmp_path).captions[0] == ["ein Käse, 一杯茶"]


def test_missing_text_files_are_counted(script, tmp_path):
    """The error says how many images have no caption, names the first, and both ways to give it one."""
    names = write_images(tmp_path)
    for name in names[:2]:
        (tmp_path / name).with_suffix(".txt").write_text("text")
    first = sorted(tmp_path / name for name in names[2:])[0]
    with pytest.raises(ValueError, match=r"3 of 5 images in .* have no caption") as refusal:
        load_images(script, tmp_path)
    for part in (str(first), ".txt beside", "metadata.jsonl", str(tmp_path)):
        assert part in str(refusal.value)


@pytest.mark.parametrize("kind", ["a folder with metadata", "saved", "saved with splits", "parquet"])
def test_dataset_name_is_a_local_folder(script, tmp_path, kind):
    """--dataset_name takes an image folder, what `save_to_disk` has written, and a folder of tables."""
    if kind == "a folder with metadata":
        names = write_images(tmp_path)
        write_metadata(tmp_path, "jsonl", [{"file_name": name, "text": CAPTIONS[i]} for i, name in enumerate(names)])
    elif kind == "saved":
        make_table().save_to_disk(tmp_path)
    elif kind == "saved with splits":
        datasets.DatasetDict(train=make_table(), test=make_table(1)).save_to_disk(tmp_path)
    else:
        make_table().to_parquet(tmp_path / "train-00000-of-00001.parquet")
    assert_same_data(script, load_images(script, None, dataset_name=tmp_path))


def test_train_data_dir_is_the_data_dir_of_a_dataset(script, tmp_path):
    """With --dataset_name, --train_data_dir goes to its builder: here that of image folders."""
    names = write_images(tmp_path)
    write_metadata(tmp_path, "jsonl", [{"file_name": name, "text": CAPTIONS[i]} for i, name in enumerate(names)])
    assert_same_data(script, load_images(script, tmp_path, dataset_name="imagefolder"))


def test_columns_of_a_table_may_have_any_name(script, tmp_path):
    """--image_column and --caption_column choose among the columns of a data set."""
    make_table(image_column="picture", caption_column="story").to_parquet(tmp_path / "train.parquet")
    images = load_images(script, None, dataset_name=tmp_path, image_column="picture", caption_column="story")
    assert_same_data(script, images)


def test_paths_and_bytes_are_images(script, tmp_path):
    """A column of paths, and one of encoded bytes, are columns of images."""
    paths = [str(tmp_path / name) for name in write_images(tmp_path)]
    for images in (paths, [Path(path).read_bytes() for path in paths]):
        folder = tmp_path / type(images[0]).__name__
        datasets.Dataset.from_dict({"image": images, "text": CAPTIONS}).save_to_disk(folder)
        assert_same_data(script, load_images(script, None, dataset_name=folder))


def test_data_set_without_a_train_split_is_refused(script, tmp_path):
    """Only the split `train` is used."""
    datasets.DatasetDict(test=make_table(1), held_out=make_table(1)).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=f"--dataset_name {tmp_path} cannot be loaded: .*train"):
        load_images(script, None, dataset_name=tmp_path)


def test_data_set_that_does_not_exist_is_refused(script, tmp_path):
    """Neither a folder nor, as far as can be seen, a name on the hub."""
    with pytest.raises(ValueError, match=f"--dataset_name {tmp_path}/none cannot be loaded: .*find any data"):
        load_images(script, None, dataset_name=tmp_path / "none")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image_column": "picture"}, "--image_column picture is not in {}.*: its columns are image, text"),
        ({"caption_column": "story"}, "--caption_column story is not in {}.*: its columns are image, text"),
    ],
)
def test_missing_columns_are_refused(script, image_folder, flags, message):
    """The error names the flag, its value, the data, and the columns that it has."""
    for source in ({}, {"dataset_name": image_folder}):
        with pytest.raises(ValueError, match=message.format(image_folder)):
            load_images(script, None if source else image_folder, **source, **flags)


@pytest.mark.parametrize("content", ["nothing", "text only", "metadata of nothing", "an empty table"])
def test_data_without_images_is_refused(script, tmp_path, content):
    """An empty data set is refused by name."""
    flags = {}
    if content == "text only":
        (tmp_path / "a.txt").write_text("a")
    elif content == "metadata of nothing":
        (tmp_path / "metadata.csv").write_text("file_name,text\n")
    elif content == "an empty table":
        make_table(1).select([]).to_parquet(tmp_path / "train.parquet")
        flags = {"dataset_name": tmp_path}
    with pytest.raises(ValueError, match=f"{tmp_path} (has no images|cannot be loaded: .* no data)"):
        load_images(script, None if flags else tmp_path, **flags)


@pytest.mark.parametrize("caption", [None, 3.5, [], ["good", None], [["nested"]], {"en": "text"}])
def test_captions_that_are_no_text_are_refused(script, tmp_path, caption):
    """Before training the error names the row, what it holds, and what a caption is."""
    good = {float: 1.0, list: ["good"], dict: {"en": "good"}}.get(type(caption), "good")
    good = [["good"]] if caption == [["nested"]] else good
    captions = [good, good, caption, good]
    rows = {"image": [make_image(index) for index in range(4)], "text": captions}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    row = 2 if good in ("good", ["good"]) else 0
    with pytest.raises(ValueError, match=f"data have no caption: row {row} .* in --caption_column text.* list of at"):
        load_images(script, None, dataset_name=tmp_path / "data")


# ---- Reading images -------------------------------------------------------------------------------------------------


TRANSPARENT = {  # mode of a picture: its opaque left, its transparent right, what says so in the file, the left in RGB
    "RGBA": ((255, 0, 0, 255), (0, 0, 0, 0), {}, (255, 0, 0)),
    "LA": ((9, 255), (0, 0), {}, (9, 9, 9)),
    "P": (0, 1, {"transparency": 1}, (255, 0, 0)),
    "P with alpha": (0, 1, {"transparency": bytes([255, 0])}, (255, 0, 0)),
    "RGB": ((255, 0, 0), (0, 255, 0), {"transparency": (0, 255, 0)}, (255, 0, 0)),
    "L": (9, 77, {"transparency": 77}, (9, 9, 9)),
    "1": (0, 1, {"transparency": 255}, (0, 0, 0)),
}


@pytest.mark.parametrize("mode", TRANSPARENT)
def test_transparency_lies_on_white(script, mode):
    """What is transparent becomes white, not the black or green that lies below it in the file."""
    left, right, options, expected = TRANSPARENT[mode]
    picture = Image.new(mode.split()[0], (8, 4), right)
    if picture.mode == "P":
        picture.putpalette([255, 0, 0, 0, 0, 0])
    picture.paste(left, (0, 0, 4, 4))
    image = script.decode_image(encode(picture, **options))
    assert image.mode == "RGB"
    assert [image.getpixel((column, 2)) for column in (0, 3, 4, 7)] == [expected] * 2 + [(255, 255, 255)] * 2


def test_half_transparency_is_mixed_with_white(script):
    """Alpha is a share: 51 of 255 is a fifth."""
    image = script.decode_image(encode(Image.new("RGBA", (2, 2), (0, 100, 255, 51))))
    np.testing.assert_allclose(image.getpixel((0, 0)), (204, 224, 255), atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(script, orientation):
    """Each of the eight orientations of EXIF is undone."""
    upright = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20  # 4 wide, 3 high
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
              6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = script.decode_image(encode(Image.fromarray(np.ascontiguousarray(stored)), exif=exif))
    np.testing.assert_array_equal(np.asarray(image), np.repeat(upright[:, :, None], 3, axis=2))


def test_sixteen_bits_are_scaled(script):
    """16-bit greyscale keeps its range: PIL alone would make nearly all of it white."""
    values = np.array([[0, 255, 256, 128 * 256, 65535]], dtype=np.uint16)
    for kind in ("png", "tiff"):
        image = script.decode_image(encode(Image.fromarray(values), kind))
        np.testing.assert_array_equal(np.asarray(image)[0, :, 0], [0, 0, 1, 128, 255])
        assert image.mode == "RGB"


def test_other_modes_become_rgb(script):
    """Ink, black and white, greyscale and palettes are read as colours."""
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    np.testing.assert_allclose(script.decode_image(encode(cmyk, "jpeg")).getpixel((1, 1)), (255, 0, 0), atol=3)
    bits = Image.new("1", (4, 4), 1)
    bits.putpixel((0, 0), 0)
    image = script.decode_image(encode(bits))
    assert (image.mode, image.getpixel((0, 0)), image.getpixel((1, 0))) == ("RGB", (0, 0, 0), (255, 255, 255))
    assert script.decode_image(encode(Image.new("L", (4, 4), 9))).getpixel((0, 0)) == (9, 9, 9)
    palette = make_image(3).quantize(8)
    np.testing.assert_array_equal(np.asarray(script.decode_image(encode(palette, "gif"))),
                                  np.asarray(palette.convert("RGB")))


def break_file(path: Path) -> None:
    """Cut a file in half, as a download that was interrupted."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.fixture
def broken_folder(tmp_path) -> Path:
    """Four captioned JPEGs of which the third, picture 2, is cut off."""
    rows = []
    for index in range(4):
        rows.append({"file_name": f"{index}.jpg", "text": CAPTIONS[index]})
        (tmp_path / "broken").mkdir(exist_ok=True)
        make_image(index, (64, 64)).save(tmp_path / "broken" / f"{index}.jpg")
    write_metadata(tmp_path / "broken", "jsonl", rows)
    break_file(tmp_path / "broken" / "2.jpg")
    return tmp_path / "broken"


def find_item(images, caption: str) -> int:
    """Return the position of an image by its caption: the order of a folder is the file system's."""
    return list(images.captions).index([caption])


@pytest.fixture
def no_children():
    """End the processes that a test may leave behind: they would keep the tests from ending."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(script, tiny_model, broken_folder, tmp_path, no_children, workers):
    """A run that meets such an image ends with its row, file and the flag to skip it, and leaves no process behind."""
    message = r"(?is)row \d of the data \(.*2\.jpg\) cannot be read.*truncated.*--skip_broken_images"
    with pytest.raises(ValueError, match=message):
        script.main(make_args(tiny_model, broken_folder, tmp_path / "out", dataloader_num_workers=workers))
    assert list((tmp_path / "out").glob("checkpoint-*")) == []
    assert multiprocessing.active_children() == []  # else the process would wait for them for ever


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 64])
def test_files_that_are_no_images_are_named(script, tmp_path, content):
    """Whatever PIL makes of such a file, the error names it."""
    make_image_folder(tmp_path, 1)
    (tmp_path / "000.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"row 0 of the data \(.*000\.png\) cannot be read as an image"):
        read_image(script, load_images(script, tmp_path))


def test_the_row_is_that_of_the_data_not_of_the_subset(script, tiny_model, tmp_path):
    """--max_train_samples draws some rows: the error names the broken one by its place among all."""
    folder = make_image_folder(tmp_path / "data", 5)
    for index in range(5):
        (folder / f"{index:03d}.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"row (\d) of the data \(.*00\1\.png\)"):
        script.main(make_args(tiny_model, folder, tmp_path / "out", max_train_samples=3, seed=5))


def test_a_missing_image_is_named(script, tmp_path):
    """A row without an image is named as one that cannot be read."""
    rows = {"image": [make_image(0), None], "text": ["a", "b"]}
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="row 1 of the data"):
        read_image(script, load_images(script, None, dataset_name=tmp_path / "data"), 1)


def test_a_broken_image_is_replaced_by_its_neighbour(script, broken_folder):
    """With --skip_broken_images the next readable item stands in; the draws stay those of the visit."""
    images = load_images(script, broken_folder)
    broken, whole = find_item(images, CAPTIONS[2]), [0, 1, 3]
    samples = make_samples(script, images, skip_broken_images=True)
    sample, neighbour = samples[script.SampleUse(0, broken)], samples[script.SampleUse(0, (broken + 1) % 4)]
    assert sample["sources"] == neighbour["sources"] == (broken + 1) % 4
    assert sample["caption"] == neighbour["caption"] in [CAPTIONS[index] for index in whole]
    assert not np.array_equal(sample["noise"], neighbour["noise"])
    plain = make_samples(script, [make_item(index, (64, 64), [CAPTIONS[index]]) for index in range(4)])
    assert np.array_equal(sample["noise"], plain[script.SampleUse(0, broken)]["noise"])


def test_several_broken_images_are_skipped_around_the_end(script):
    """The search goes on past broken neighbours and from the last image to the first."""
    broken = {"image": None, "captions": ["a"]}
    samples = make_samples(script, [broken, make_item(1), broken, broken], skip_broken_images=True)
    assert [samples[script.SampleUse(0, index)]["sources"] for index in range(4)] == [1] * 4


def test_skipped_images_are_named_in_the_log(script, tiny_model, broken_folder, tmp_path, caplog):
    """A run over four images of which one is broken names the one that it skips in each epoch."""
    script.main(make_args(tiny_model, broken_folder, tmp_path / "out", skip_broken_images=True, **UNCACHED,
                               train_batch_size=4, max_train_steps=3))
    assert len([line for line in caplog.messages if "skipped: row" in line and "2.jpg" in line]) >= 3


# ---- Crops, flips, resizing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [mode.value.replace("-", "_") for mode in InterpolationMode])
@pytest.mark.parametrize("size", [(40, 36), (36, 41), (32, 32), (100, 33), (20, 17), (64, 32)])
def test_resizing_agrees_with_torchvision(script, mode, size):
    """Resize of the shorter side, then the centre: as torchvision's transforms of these names, in every mode."""
    image = make_image(7, size)
    expected = CenterCrop(32)(Resize(32, InterpolationMode(mode.replace("_", "-")))(image))
    args = SimpleNamespace(resolution=32, image_interpolation_mode=mode, center_crop=True)
    result = script.transform_image(image, args, (32, 32), None, False)
    found, (top, left) = result["images"], result["time_ids"][2:4]
    assert (top == 0 or left == 0) and top + left >= 0
    assert (found.dtype, found.shape, found.flags.c_contiguous) == (np.uint8, (3, 32, 32), True)
    np.testing.assert_array_equal(found, np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", [mode.value.replace("-", "_") for mode in InterpolationMode])
def test_interpolation_modes_are_used(script, mode):
    """--image_interpolation_mode reaches the resizing, and gives no two modes the same name."""
    item = make_item(3, (90, 70))
    samples = make_samples(script, [item], image_interpolation_mode=mode, center_crop=True)
    found = samples[script.SampleUse(0, 0)]["images"]
    expected = CenterCrop(32)(Resize(32, InterpolationMode(mode.replace("_", "-")))(item["image"]))
    np.testing.assert_array_equal(found, np.asarray(expected).transpose(2, 0, 1))


def make_ruler(width: int, height: int) -> dict:
    """Return an item whose pixels tell where they were: red the column, green the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width)[None, :], np.arange(height)[:, None]
    return {"image": Image.fromarray(pixels), "captions": ["ruler"]}


def assert_frequencies(values, expected: dict) -> None:
    """Check draws against their probabilities by chi-square; a fair draw fails once in about 10,000 seeds."""
    count, counts = len(values), collections.Counter(values)
    assert set(counts) <= set(expected)
    chi_square = sum((counts[value] - count * share) ** 2 / (count * share) for value, share in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 8


@pytest.mark.parametrize(("width", "height"), [(40, 32), (32, 40)])
def test_crops_and_flips_are_uniform(script, width, height):
    """Every place of the crop is as likely as every other, half of the images are mirrored, independently."""
    samples = make_samples(script, [make_ruler(width, height)], random_flip=True, latent_shape=(1, 1, 1))
    places = []
    for epoch in range(1000):
        red, green, _ = samples[script.SampleUse(epoch, 0)]["images"].astype(int)
        assert abs(red[0, 0] - red[0, -1]) == green[-1, 0] - green[0, 0] == 31
        places.append((int(max(red.min(), green.min())), bool(red[0, 0] > red[0, -1])))
        left = width - 1 - red[0, 0] if places[-1][1] else red[0, 0]  # in the mirrored image
        assert samples[script.SampleUse(epoch, 0)]["time_ids"].tolist() == [height, width, green[0, 0], left, 32, 32]
    assert_frequencies(places, dict.fromkeys(itertools.product(range(9), (False, True)), 1 / 18))


def test_without_the_flags_nothing_is_drawn(script):
    """No mirroring without --random_flip, and with --center_crop always the centre."""
    plain = make_samples(script, [make_ruler(40, 32)])
    centred = make_samples(script, [make_ruler(40, 32)], center_crop=True)
    for epoch in range(40):
        assert (np.diff(plain[script.SampleUse(epoch, 0)]["images"][0].astype(int)) == 1).all()
        assert centred[script.SampleUse(epoch, 0)]["images"][0, 0, 0] == 4


# ---- Captions -------------------------------------------------------------------------------------------------------


def test_one_caption_of_a_list_is_drawn_at_each_visit(script, tmp_path):
    """Over the epochs every caption of a list comes as often as the others; one string is always itself."""
    make_image(0).save(tmp_path / "0.png")
    write_metadata(tmp_path, "jsonl", [{"file_name": "0.png", "text": ["one", "two", "three"]}])
    samples = make_samples(script, load_images(script, tmp_path), latent_shape=(1, 1, 1))
    drawn = [samples[script.SampleUse(epoch, 0)]["caption"] for epoch in range(600)]
    assert_frequencies(drawn, dict.fromkeys(("one", "two", "three"), 1 / 3))
    single = make_samples(script, [make_item(captions=["one"])])
    assert {single[script.SampleUse(epoch, 0)]["caption"] for epoch in range(9)} == {"one"}


@pytest.mark.parametrize("proportion", [0, 0.2, 1])
def test_captions_are_left_out_in_proportion(script, proportion):
    """--proportion_empty_prompts is the share of visits without a caption, drawn anew each time."""
    samples = make_samples(script, [make_item(captions=["a"])], proportion_empty_prompts=proportion,
                           latent_shape=(1, 1, 1))
    drawn = [samples[script.SampleUse(epoch, 0)]["caption"] for epoch in range(500)]
    assert_frequencies(drawn, {text: share for text, share in (("", proportion), ("a", 1 - proportion)) if share})


# ---- Noise and timesteps --------------------------------------------------------------------------------------------


def test_noises_are_standard_normal_and_independent(script):
    """Mean 0, variance 1, fourth moment 3, and no correlation between purposes, samples or epochs."""
    samples = make_samples(script, [make_item(0), make_item(1)], latent_shape=(4, 16, 16), input_perturbation=0.1,
                           noise_offset=0.1, center_crop=True)
    visits = [samples[script.SampleUse(epoch, index)] for epoch in range(40) for index in range(2)]
    purposes = ("posterior_noise", "noise", "perturbation_noise")
    rows = np.stack([visit[purpose].ravel() for visit in visits for purpose in purposes])  # 240 of 1024 values
    assert rows.dtype == np.float32
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((rows.astype(float) ** power).mean() - moment) < 4 * math.sqrt(variance / rows.size)
    correlations = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlations).max() < 5.5 / math.sqrt(rows.shape[1])
    offsets = np.stack([visit["offset_noise"] for visit in visits])
    assert offsets.shape[1:] == (4, 1, 1)
    assert abs(offsets.mean()) < 4 / math.sqrt(offsets.size)
    assert abs(offsets.var() - 1) < 4 * math.sqrt(2 / offsets.size)


TIMESTEP_BIASES = {  # flags, and which of 100 timesteps are drawn how many times as often
    "none": ({}, range(0), 1),
    "a multiplier without a strategy": ({"timestep_bias_multiplier": 9}, range(0), 1),
    "earlier": ({"timestep_bias_strategy": "earlier", "timestep_bias_multiplier": 3}, range(25), 3),
    "later": ({"timestep_bias_strategy": "later", "timestep_bias_multiplier": 4, "timestep_bias_portion": 0.1},
              range(90, 100), 4),
    "later, rounded down": ({"timestep_bias_strategy": "later", "timestep_bias_multiplier": 4,
                             "timestep_bias_portion": 0.129}, range(88, 100), 4),
    "later, all": ({"timestep_bias_strategy": "later", "timestep_bias_multiplier": 4, "timestep_bias_portion": 1},
                   range(100), 4),
    "later, hardly any": ({"timestep_bias_strategy": "later", "timestep_bias_multiplier": 40,
                           "timestep_bias_portion": 0.001}, range(99, 100), 40),
    "range": ({"timestep_bias_strategy": "range", "timestep_bias_multiplier": 0.1, "timestep_bias_begin": 20,
               "timestep_bias_end": 40}, range(20, 40), 0.1),
}


@pytest.mark.parametrize("case", TIMESTEP_BIASES)
def test_timesteps_are_drawn_with_their_probabilities(script, case):
    """Uniformly, or the chosen ones `multiplier` times as often as the others."""
    flags, chosen, multiplier = TIMESTEP_BIASES[case]
    weights = [multiplier if timestep in chosen else 1 for timestep in range(100)]
    probabilities = np.array(weights) / sum(weights)
    samples = make_samples(script, [make_item(size=(32, 32))], num_timesteps=100, latent_shape=(1, 1, 1), **flags)
    np.testing.assert_allclose(np.diff(samples.timestep_cdf, prepend=0), probabilities, rtol=1e-9)
    drawn = [samples[script.SampleUse(epoch, 0)]["timesteps"] for epoch in range(800)]
    assert {timestep.dtype for timestep in drawn} == {np.dtype(np.int64)}
    parts = [sorted(set(part)) for part in np.array_split(np.arange(100), 10)]
    groups = [set(part) & set(chosen) for part in parts] + [set(part) - set(chosen) for part in parts]
    names = {timestep: number for number, group in enumerate(groups) for timestep in group}
    expected = {number: sum(probabilities[list(group)]) for number, group in enumerate(groups) if group}
    assert_frequencies([names[int(timestep)] for timestep in drawn], expected)


def test_the_first_and_the_last_timestep_are_drawn(script):
    """No timestep is left out at either end."""
    samples = make_samples(script, [make_item(size=(32, 32))], num_timesteps=4, latent_shape=(1, 1, 1))
    assert {int(samples[script.SampleUse(epoch, 0)]["timesteps"]) for epoch in range(60)} == {0, 1, 2, 3}


# ---- Draws are pure functions ---------------------------------------------------------------------------------------


def test_a_draw_depends_on_its_key_only(script):
    """The same seed, purpose and place give the same stream; what differs in any of them another one."""
    places = ((), (0,), (1,), (0, 1), (1, 0), (11,))
    keys = list(itertools.product((0, 1, 2**32 - 1), ("noise", "flip", "order"), places))
    first = [script.make_rng(seed, purpose, *where).random(4).tolist() for seed, purpose, where in keys]
    np.random.default_rng(5).random(3)
    again = [script.make_rng(seed, purpose, *where).random(4).tolist() for seed, purpose, where in reversed(keys)]
    assert again[::-1] == first
    numbers = list(itertools.chain(*first))
    assert len(set(numbers)) == len(numbers)


def test_draws_stay_what_they_are(script):
    """A version that draws other numbers could not resume older checkpoints exactly: these are the first ones."""
    samples = make_samples(script, [make_item(index) for index in range(4)], seed=7, random_flip=True)
    sample = samples[script.SampleUse(2, 3)]
    assert sample["noise"].ravel()[:3].tolist() == pytest.approx([1.0017352, 0.2434869, -1.2548937], rel=1e-5)
    assert int(sample["timesteps"]) == 95
    assert script.make_rng(7, "order", 2).permutation(8).tolist() == [1, 2, 7, 6, 3, 5, 4, 0]


def test_a_sample_does_not_depend_on_what_was_drawn_before(script):
    """Neither the order of visits, nor their grouping, nor global generators, nor the process change a sample."""
    items = [make_item(index) for index in range(6)]
    visits = [script.SampleUse(epoch, index) for epoch in range(2) for index in range(6)]
    expected = {visit: make_samples(script, items, random_flip=True)[visit] for visit in visits}
    samples = make_samples(script, items, random_flip=True)
    torch.manual_seed(9)
    np.random.seed(9)  # noqa: NPY002 (the generator that must not matter)
    for visit in reversed(visits):
        assert equal(samples[visit], expected[visit])
    for group in ([0], [5, 3, 3], range(12)):
        found = samples.__getitems__([visits[index] for index in group])
        assert all(equal(sample, expected[visits[index]]) for sample, index in zip(found, group, strict=True))


def test_seed_epoch_and_sample_change_every_draw(script):
    """Another seed, epoch or sample means other noise, another timestep and so on."""
    items = [make_item(0, (64, 40)) for _ in range(2)]
    base = make_samples(script, items, num_timesteps=10**6)[script.SampleUse(0, 0)]
    for seed, epoch, index in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        other = make_samples(script, items, seed=seed, num_timesteps=10**6)[script.SampleUse(epoch, index)]
        for key in ("images", "noise", "posterior_noise", "timesteps"):
            assert not np.array_equal(base[key], other[key])


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ({"random_flip": True}, {"images"}),
        ({"center_crop": True}, {"images", "time_ids"}),
        ({"image_interpolation_mode": "nearest"}, {"images"}),
        ({"proportion_empty_prompts": 1}, {"caption"}),
        ({"noise_offset": 0.1}, {"offset_noise"}),
        ({"input_perturbation": 0.1}, {"perturbation_noise"}),
        ({"timestep_bias_strategy": "later", "timestep_bias_multiplier": 1e9}, {"timesteps"}),
        ({"train_batch_size": 7, "gradient_accumulation_steps": 3, "dataloader_num_workers": 2}, set()),
        ({"snr_gamma": 5, "learning_rate": 1, "max_train_steps": 9, "mixed_precision": "bf16"}, set()),
    ],
)
def test_an_option_changes_its_own_draw_only(script, flags, changed):
    """Switching one option on leaves every other draw as it was."""
    items = [make_item(index, (50, 41)) for index in range(3)]
    found = set()
    for visit in itertools.starmap(script.SampleUse, itertools.product(range(5), range(3))):
        plain, other = make_samples(script, items)[visit], make_samples(script, items, **flags)[visit]
        assert set(plain) <= set(other)
        found |= {key for key in other if key not in plain or not np.array_equal(plain[key], other[key])}
    assert found == changed


@pytest.fixture
def make_loader(script, tiny_model, image_folder):
    """Return a function that makes the loader that a command line asks for, of a number of updates."""

    def make(num_updates, seed=0, **flags):
        args = make_namespace(script, make_args(tiny_model, image_folder, "no-such-output", **flags))
        accelerator = script.make_accelerator(args)
        images, configs = script.make_captioned_images(args, args.train_data_dir), script.load_model_configs(args)
        samples = script.make_data(args, images, None, seed, configs).train
        steps = script.plan_micro_steps(samples, script.Progress(), num_updates, args.train_batch_size,
                                        args.gradient_accumulation_steps)
        models = SimpleNamespace(tokenizer=script.CLIPTokenizer.from_pretrained(tiny_model, subfolder="tokenizer"))
        batches = script.make_dataloader(samples, steps, models, args.dataloader_num_workers, accelerator)
        return (batch for _, batch in batches)

    return make


def test_workers_and_batches_change_nothing(make_loader):
    """The stream of samples is the same for any number of loader processes, batch size and accumulation."""
    expected = list(make_loader(20, train_batch_size=1, random_flip=True))  # two epochs of ten
    stream = {key: torch.cat([batch[key] for batch in expected]) for key in expected[0]}
    assert len(stream["images"]) == 20
    for updates, flags in ((10, {"train_batch_size": 2, "dataloader_num_workers": 2}),
                           (4, {"train_batch_size": 3, "gradient_accumulation_steps": 2, "dataloader_num_workers": 1}),
                           (6, {"train_batch_size": 4})):
        found = list(make_loader(updates, random_flip=True, **flags))
        assert equal({key: torch.cat([batch[key] for batch in found]) for key in found[0]}, stream)


def test_batches_hold_what_the_objective_reads(make_loader):
    """Shapes and types of a batch: bytes for images, int64 ids padded to the tokenizer's length, float32 noise."""
    batch = next(make_loader(1, train_batch_size=3))
    shapes = {"images": (3, 3, 32, 32), "input_ids": (3, 24), "noise": (3, 4, 16, 16),
              "posterior_noise": (3, 4, 16, 16), "timesteps": (3,), "weights": (3,), "sources": (3,)}
    types = {"images": torch.uint8, "input_ids": torch.int64, "noise": torch.float32,
             "posterior_noise": torch.float32, "timesteps": torch.int64, "weights": torch.float32,
             "sources": torch.int64}
    assert {key: tuple(batch[key].shape) for key in shapes} == shapes
    assert {key: batch[key].dtype for key in types} == types
    assert (batch["weights"] == 1).all()


def test_captions_stay_with_their_images(script, make_loader, tiny_model):
    """A batch's token ids are those of the captions of its images, cut at the tokenizer's length."""
    tokenizer = script.CLIPTokenizer.from_pretrained(tiny_model, subfolder="tokenizer")
    args = SimpleNamespace(resolution=32, image_interpolation_mode="lanczos", center_crop=True)
    expected = {script.transform_image(make_image(index), args, (32, 32), None, False)["images"].tobytes():
                f"picture number {index}" for index in range(10)}
    for batch in make_loader(5, center_crop=True):
        for pixels, ids in zip(batch["images"], batch["input_ids"], strict=True):
            caption = expected[pixels.numpy().tobytes()]
            assert ids.tolist() == tokenizer(caption, padding="max_length", max_length=24).input_ids
    long = [{"caption": "x" * 200, "noise": np.zeros(1)}]
    assert script.collate(long, [tokenizer])["input_ids"].shape == (1, 24)


def test_reading_ahead_changes_nothing(script):
    """Batches come in order, one ahead of use at most, and an error comes where its batch would have."""
    made = []

    def produce():
        for number in range(4):
            made.append(number)
            yield number
        raise ValueError("the fifth")

    ahead, found = script.iterate_ahead(produce()), []
    with pytest.raises(ValueError, match="the fifth"):
        for number in ahead:
            found.append(number)
            assert len(made) <= len(found) + 1
    assert found == [0, 1, 2, 3]


# ---- Which samples make an update -----------------------------------------------------------------------------------

# samples, samples in a micro batch, micro batches in an update
PLANS = list(itertools.product((1, 2, 5, 10, 17), (1, 2, 3, 8, 32), (1, 2, 4, 7)))


def make_many_samples(script, count: int, seed: int = 0, **flags):
    """Return `count` samples of one image."""
    return make_samples(script, [make_item()] * count, seed=seed, **flags)


def list_updates(script, num_samples, batch, accumulation, num_updates, progress=None) -> list[list]:
    """Return the micro steps of each update."""
    samples, updates = make_many_samples(script, num_samples), [[]]
    for step in script.plan_micro_steps(samples, progress or script.Progress(), num_updates, batch, accumulation):
        updates[-1].append(step)
        if step.ends_update:
            updates.append([])
    assert updates.pop() == []
    return updates


@pytest.mark.parametrize(("num_samples", "batch", "accumulation"), PLANS)
def test_each_epoch_visits_each_sample_once(script, num_samples, batch, accumulation):
    """Updates are full but for the last of an epoch, and nothing is repeated, left out or padded."""
    flags = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "num_train_epochs": 3}
    args = make_namespace(script, make_args("model", ".", "no-such-output", **flags, max_train_steps=None))
    num_updates = script.compute_last_step(args, make_many_samples(script, num_samples), 1)
    updates = list_updates(script, num_samples, batch, accumulation, num_updates)
    assert len(updates) == num_updates
    visited = collections.defaultdict(list)
    for update in updates:
        assert len({step.epoch for step in update}) == 1
        assert len(update) <= accumulation
        assert {step.window_size for step in update} == {sum(len(step.indices) for step in update)}
        assert [step.ends_update for step in update] == [False] * (len(update) - 1) + [True]
        for step in update:
            assert 0 < len(step.indices) <= batch
            visited[step.epoch] += range(step.last - len(step.indices), step.last)
        assert update[-1].last == num_samples or update[-1].window_size == batch * accumulation
    assert visited == {epoch: list(range(num_samples)) for epoch in range(3)}


@pytest.mark.parametrize(("num_samples", "batch", "accumulation"), PLANS[::3])
def test_a_plan_goes_on_from_anywhere(script, num_samples, batch, accumulation):
    """From the progress after any update the plan continues as it would have."""
    whole = list_updates(script, num_samples, batch, accumulation, 9)
    progress = script.Progress()
    for done, update in enumerate(whole):
        assert list_updates(script, num_samples, batch, accumulation, 9 - done, progress) == whole[done:]
        progress.epoch, progress.samples_seen = update[-1].epoch, update[-1].last


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 1), (2, 4), (3, 2), (32, 1)])
@pytest.mark.parametrize("seen", [0, 1, 7, 16, 17])
def test_another_batch_size_finishes_the_epoch(script, seen, batch, accumulation):
    """Resumed in the middle of an epoch with another batch, a run visits exactly the samples that are left."""
    updates = list_updates(script, 17, batch, accumulation, 40, script.Progress(5, 3, seen))
    visited = collections.defaultdict(list)
    for step in itertools.chain(*updates):
        visited[step.epoch] += range(step.last - len(step.indices), step.last)
    assert visited[3] == list(range(seen, 17))
    assert visited[4] == list(range(17))[: len(visited[4])] != []


@pytest.mark.parametrize(
    ("num_samples", "batch", "num_processes"), itertools.product((1, 5, 12, 17), (1, 2, 3), (2, 3)))
def test_processes_share_one_large_batch(script, num_samples, batch, num_processes):
    """P processes with batch b see, side by side, what one process with batch P b sees."""
    samples = make_many_samples(script, num_samples)
    steps = list(script.plan_micro_steps(samples, script.Progress(), 9, batch * num_processes, 2))
    whole = list(script.share_samples(steps, 0, 1))
    shares = zip(*(script.share_samples(steps, rank, num_processes) for rank in range(num_processes)), strict=True)
    for step, expected, share in zip(steps, whole, shares, strict=True):
        assert all(1 <= len(part) <= batch for part in share)  # each takes part in each collective
        visits = [visit for part in share for visit in part]
        assert [visit for visit in visits if visit.weight] == expected
        assert sum(visit.weight for visit in visits) == len(step.indices)
        sizes = [sum(visit.weight for visit in part) for part in share]
        assert max(sizes) - min(sizes) <= 1


def test_orders_differ_between_epochs_and_seeds(script):
    """Each epoch has its own order, given by the seed and the epoch alone."""
    def list_orders(seed, batch):
        samples = make_many_samples(script, 30, seed)
        steps = script.plan_micro_steps(samples, script.Progress(), 3 * math.ceil(30 / batch), batch, 1)
        visits = [visit for part in script.share_samples(steps, 0, 1) for visit in part]
        return [[visit.index for visit in visits if visit.epoch == epoch] for epoch in range(3)]

    orders = list_orders(0, 4)
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in [*orders, *list_orders(1, 4)]}) == 6
    assert list_orders(0, 7) == orders


def test_max_train_samples_draws_a_subset(script, tiny_model, image_folder):
    """A subset of that size, given by the seed alone; a number beyond the data takes all of it."""

    def list_captions(seed, count, **flags):
        args = make_namespace(script, make_args(tiny_model, image_folder, "no-such-output", max_train_samples=count,
                                                **flags))
        images = script.make_captioned_images(args, args.train_data_dir)
        samples = script.make_data(args, images, None, seed, script.load_model_configs(args)).train
        captions = [samples[script.SampleUse(0, index)]["caption"] for index in range(len(samples))]
        assert len(set(captions)) == len(captions)
        return captions

    chosen = list_captions(0, 4)
    assert len(chosen) == 4
    assert list_captions(0, 4, train_batch_size=5, random_flip=True) == chosen
    assert set(list_captions(0, 6)) > set(chosen)
    assert any(list_captions(seed, 4) != chosen for seed in (1, 2, 3))
    assert len(list_captions(0, 10)) == len(list_captions(0, 11)) == len(list_captions(0, None)) == 10


def test_a_data_set_of_ones_own(script, tiny_model, image_folder, tmp_path, monkeypatch):
    """`make_captioned_images` is there to be edited: any sequences of images and captions are enough."""

    class Stripes:
        def __getitem__(self, index):
            return make_image(index, (32, 48))

    images = script.CaptionedImages(Stripes(), [[f"stripe {index}", "a stripe"] for index in range(3)])
    monkeypatch.setattr(script, "make_captioned_images", lambda args, folder: images)
    script.main(make_args(tiny_model, image_folder, tmp_path / "out", num_train_epochs=1, max_train_steps=None,
                               **UNCACHED))
    progress = json.loads((tmp_path / "out" / "checkpoint-2" / "run_record.json").read_text())["progress"]
    assert progress == {"global_step": 2, "epoch": 0, "samples_seen": 3}


def test_output_folder_inside_the_data_is_no_data(script, tiny_model, tmp_path):
    """A run may write into its data folder and be resumed: its own pictures are not trained on."""
    data = tmp_path / "data"
    for index in range(3):
        data.mkdir(exist_ok=True)
        make_image(index).save(data / f"{index}.png")
        (data / f"{index}.txt").write_text(f"picture {index}")
    flags = {"validation_prompts": ["a"], "validation_inference_steps": 1, "max_train_steps": 3}
    script.main(make_args(tiny_model, data, data / "out", **flags))
    assert (data / "out" / "val_imgs_grid.png").is_file()
    argv = make_args(tiny_model, data, data / "out", resume_from_checkpoint="latest", **flags)
    assert len(script.make_captioned_images(script.parse_args(argv), str(data)).captions) == 3


def test_held_out_images_inside_the_data_are_not_trained_on(script, tmp_path):
    """Nor the training images held out, where they lie in the other folder; each finds its own."""
    for place in (tmp_path, tmp_path / "held-out"):
        place.mkdir(exist_ok=True)
        make_image(0).save(place / "a.png")
        (place / "a.txt").write_text(place.name)
    outer, inner = str(tmp_path), str(tmp_path / "held-out")
    for folders in ((outer, inner), (inner, outer), (inner, inner + "/."), (inner, inner)):
        args = script.parse_args(make_args("model", folders[0], tmp_path / "out", validation_data_dir=folders[1]))
        for folder in folders:
            images = script.make_captioned_images(args, folder)
            assert list(images.captions) == [[Path(folder).name]]


def test_an_empty_held_out_folder_is_none(script, image_folder, tmp_path, monkeypatch):
    """As a shell variable that is not set gives it."""
    monkeypatch.chdir(image_folder)
    args = script.parse_args(make_args("model", ".", tmp_path / "out", validation_data_dir=""))
    assert len(script.make_captioned_images(args, ".").captions) == len(list(image_folder.glob("*.png")))


def test_a_caption_file_that_cannot_be_read_is_named(script, tmp_path):
    """The error says which of thousands of files is of another encoding, or a folder."""
    make_image(0).save(tmp_path / "a.png")
    file = tmp_path / "a.txt"
    file.write_bytes("Käse".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt cannot be read as UTF-8 text: .*0xe4"):
        load_images(script, tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=r"a\.txt cannot be read as UTF-8 text: .*directory"):
        load_images(script, tmp_path)


def test_broken_metadata_names_its_folder(script, tmp_path):
    """A line that is no JSON is an error with the folder and what a row needs."""
    make_image(0).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text"\n')
    with pytest.raises(ValueError, match=f"{tmp_path}/metadata.jsonl cannot be read after row 0"):
        load_images(script, tmp_path)


# ---- Files and folders from the field -------------------------------------------------------------------------------


def write_captioned(folder: Path, *names: str) -> None:
    """Write pictures under any names, with captions beside them."""
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image(index).save(path)
        path.with_suffix(".txt").write_text(CAPTIONS[index])


def test_every_file_that_pillow_opens_is_an_image(script, tmp_path, caplog):
    """Rare and uppercase suffixes count; what is passed over is named in one line, but for hidden folders."""
    write_captioned(tmp_path, *["a.avif"] * features.check("avif"), "b.JPE", "c.tga", "d.jp2", "e.apng")
    for name in ("f.heic", "notes.md", "clip.mp4", ".hidden/g.png", "._b.JPE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    (tmp_path / "folder.png").mkdir()
    images = load_images(script, tmp_path)
    assert len(images.captions) == 4 + features.check("avif")
    assert {read_image(script, images, index).mode for index in range(len(images.captions))} == {"RGB"}
    lines = [line for line in caplog.messages if "not used" in line]
    assert len(lines) == 1 and "3 files" in lines[0] and "f.heic" in lines[0] and "g.png" not in lines[0]


def test_links_to_folders_are_followed(script, tmp_path):
    """A linked folder is part of the data; one that leads around in a circle is read once."""
    write_captioned(tmp_path / "elsewhere", "0.png", "sub/1.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert_same_data(script, load_images(script, tmp_path / "data"), range(2))
    write_metadata(tmp_path / "elsewhere", "jsonl", [
        {"file_name": name, "text": text} for name, text in zip(("0.png", "sub/1.png"), CAPTIONS, strict=False)])
    assert_same_data(script, load_images(script, tmp_path / "data"), range(2))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_files_that_metadata_promises_are_missing(script, tmp_path, kind):
    """One error says how many of how many, the first place that was looked at, and what to do."""
    names = write_images(tmp_path)
    write_metadata(tmp_path, kind, [{"file_name": name, "text": CAPTIONS[i]} for i, name in enumerate(names)])
    for name in names[3:]:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"2 of 5 images that the metadata .*{names[3]}.*unpack archives"):
        load_images(script, tmp_path)
    assert len(load_images(script, tmp_path, skip_broken_images=True).captions) == 5


def test_one_metadata_file_of_a_folder_is_read(script, tmp_path, caplog):
    """Two that say the same do not double the images."""
    rows = [{"file_name": name, "text": CAPTIONS[i]} for i, name in enumerate(write_images(tmp_path))]
    for kind in ("jsonl", "csv"):
        write_metadata(tmp_path, kind, rows)
    assert_same_data(script, load_images(script, tmp_path))
    assert "metadata.csv" in caplog.text


def test_rows_of_metadata_that_differ(script, tmp_path):
    """Strings beside lists are captions, also where the first has none; a row without a file is missing."""
    names = write_images(tmp_path)[:3]
    rows = [{"file_name": names[0], "text": "one"}, {"file_name": names[1], "text": ["two", "three"]}]
    write_metadata(tmp_path, "jsonl", rows)
    images = load_images(script, tmp_path)
    assert [images.captions[index] for index in range(2)] == [["one"], ["two", "three"]]
    for row, message in (({"text": "no file"}, "1 of 3 images that the metadata"),
                         ({"file_name": names[2]}, "1 of 3 images .* have no caption"),
                         ({"file_name": names[2], "text": 3}, "1 of 3 images .* has 3 in --caption_column text")):
        write_metadata(tmp_path, "jsonl", [row, *rows])
        with pytest.raises(ValueError, match=message):
            load_images(script, tmp_path)


def test_an_archive_alone_is_to_be_unpacked(script, tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=f"{tmp_path} has no images.*unpack archives"):
        load_images(script, tmp_path)


def test_several_lines_are_several_captions(script, tmp_path):
    """Each line that is not blank is a caption."""
    write_captioned(tmp_path, "0.png", "1.png", "2.png")
    (tmp_path / "1.txt").write_text(" one \r\n\n two\nthree\n")
    (tmp_path / "2.txt").write_text("")
    images = load_images(script, tmp_path)
    assert [images.captions[index] for index in range(3)] == [[CAPTIONS[0]], ["one", "two", "three"], [""]]


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("metadata.csv", b'\xef\xbb\xbffile_name,text\n0.png,"a, b ""c"""\n', 'a, b "c"'),
    ("metadata.csv", b"file_name,text,n\r\n0.png,007,\r\n", "007"),
    ("metadata.jsonl", b'\xef\xbb\xbf{"file_name": "./0.png", "text": "a", "n": 1}\n\n', "a"),
    ("metadata.jsonl", b'{"file_name": "sub/../0.png", "text": "a"}', "a"),
    ("metadata.jsonl", b'{"file_name": "FOLDER/0.png", "text": "a"}', "a"),
    ("metadata.csv", b"file_name,text\n0.png,a, b\n", ValueError),
    ("metadata.csv", "file_name,text\n0.png,Käse\n".encode("latin-1"), ValueError),
    ("metadata.jsonl", '{"file_name": "0.png", "text": "a"}\n'.encode("utf-16"), ValueError),
    ("metadata.jsonl", b'{"file_name": "0.png", "text": "a"}\n["0.png", "b"]\n', ValueError),
    ("metadata.parquet", b"PAR1", ValueError),
])
def test_metadata_as_tools_write_it(script, tmp_path, name, content, expected):
    """Byte order marks, quotes, spreadsheets and paths; what cannot be read names its folder."""
    write_captioned(tmp_path, "0.png", "sub/1.png")
    (tmp_path / name).write_bytes(content.replace(b"FOLDER", str(tmp_path).encode()))
    if expected is ValueError:
        with pytest.raises(ValueError, match=f"{tmp_path}/{name} (cannot be read after row|has cells beyond)"):
            load_images(script, tmp_path)
    else:
        images = load_images(script, tmp_path)
        assert images.captions[0] == [expected]
        np.testing.assert_array_equal(np.asarray(read_image(script, images)), np.asarray(make_image(0)))


# ---- Pictures from the field ----------------------------------------------------------------------------------------

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)  # red is green

NEAR = bytearray(SRGB)  # as other programs write sRGB, with other roundings
NEAR[int.from_bytes(SRGB[SRGB.index(b"rXYZ") + 4 :][:4], "big") + 11] ^= 32


def test_colors_become_srgb(script):
    """An ICC profile decides what the numbers mean; alpha stays, and palettes have their colors converted as well."""
    for mode in ("RGB", "P"):
        image = Image.new("RGB", (2, 2), (255, 0, 0)).convert(mode)
        found = script.decode_image(encode(image, icc_profile=SWAPPED)).getpixel((0, 0))
        np.testing.assert_allclose(found, (0, 255, 0), atol=3)
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    found = np.asarray(script.decode_image(encode(image, icc_profile=SWAPPED)))
    np.testing.assert_allclose(found, [[(0, 255, 0), (255, 255, 255)]], atol=3)


@pytest.mark.parametrize("profile", [SRGB, bytes(NEAR), b"broken", SRGB[:200], b"\0" * 500])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "CMYK", "I;16"])
def test_other_profiles_change_nothing(script, mode, profile):
    """A profile that is sRGB, broken or of another mode leaves every value as it is without one."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    image = (Image.fromarray(pixels[..., :2].copy().view(np.uint16)[..., 0]) if mode == "I;16"
             else Image.fromarray(pixels, "RGBA").convert(mode))
    kind = "tiff" if mode == "CMYK" else "png"
    found = script.decode_image(encode(image, kind, icc_profile=profile))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(script.decode_image(encode(image, kind))))


def test_odd_chunks_do_no_harm(script):
    """A text as long as a workflow of ComfyUI, and EXIF data that are broken: the picture is sound."""
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    for options in ({"pnginfo": text}, {"exif": b"Exif\0\0nonsense"}):
        image = script.decode_image(encode(make_image(0), **options))
        np.testing.assert_array_equal(np.asarray(image), np.asarray(make_image(0)))


@pytest.mark.parametrize("case", ["a script", "a cache that is a file", "a config that is not there"])
def test_failures_of_the_library_name_their_cause(script, tmp_path, case):
    """One line names the flag or the folder at fault."""
    make_table().to_parquet(tmp_path / "train.parquet")
    flags, part = {}, f"--dataset_name {tmp_path} cannot be loaded"
    if case == "a script":
        (tmp_path / f"{tmp_path.name}.py").write_text("import datasets")
    elif case == "a cache that is a file":
        (tmp_path / "file").write_text("")
        flags, part = {"cache_dir": tmp_path / "file"}, f"{tmp_path / 'file'}"
    else:
        flags = {"dataset_config_name": "none"}
    with pytest.raises(ValueError, match="cannot be loaded") as refusal:
        load_images(script, None, dataset_name=tmp_path, **flags)
    assert part in str(refusal.value) and "\n" not in str(refusal.value)


def test_pictures_and_files_are_images(script):
    """A data set of one's own gives pictures, or the bytes or path of files."""
    items = [{"image": make_image(0), "captions": ["a"]},
             {"image": {"bytes": encode(make_image(0))["bytes"]}, "captions": ["a"]}]
    assert equal(*(make_samples(script, [item])[script.SampleUse(0, 0)] for item in items))


def test_a_strip_is_refused_or_skipped(first_script):
    """Resized by its shorter side it would take gigabytes."""
    items = [make_item(), {"image": Image.new("RGB", (3500, 20)), "captions": ["strip"]}]
    with pytest.raises(ValueError, match=r"row 1 of the data .*: it is a strip"):
        make_samples(first_script, items).read(1)
    assert make_samples(first_script, items, skip_broken_images=True).read(1)[1] == 0


def test_metadata_that_names_other_formats_is_refused(first_script, tmp_path):
    """A format that Pillow lacks is told before training, as a missing file is; an odd suffix is none."""
    (tmp_path / "a.heic").write_bytes(b"no format of Pillow")
    make_image(0).save(tmp_path / "picture", format="PNG")
    rows = [{"file_name": "a.heic", "text": "a"}, {"file_name": 1, "text": "a"}, {"file_name": "picture", "text": "b"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="2 of 3 images .* are not in it, or of a format .* the first is .*a.heic"):
        load_images(first_script, tmp_path)
