"""Broken and hostile pictures, captions, metadata, models and checkpoints: what is given, and what must happen.

Either all goes well, or an error of one line says which file or row is at fault. Nothing else is read or run.
"""

import contextlib
import io
import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_script, make_args, make_image
from PIL import Image
from runs import run
from safetensors.torch import load_file
from test_data import load_images, read_image


def encode(image: Image.Image, kind: str = "png", **options) -> bytes:
    """Return a picture as the bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def make_bomb(side: int) -> bytes:
    """Return a PNG that claims to be `side` pixels high and wide and holds none of them."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


WHOLE = encode(make_image(0))
NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
FRAMES = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
PICTURES = {  # name: file name, content, size of the picture that is read or what the error says
    "cut short": ("a.png", WHOLE[: len(WHOLE) // 2], "a.png.* cannot be read as an image: .*truncated"),
    "empty": ("a.png", b"", "a.png.* cannot be read as an image"),
    "zeros": ("a.jpg", bytes(5000), "a.jpg.* cannot be read as an image"),
    "a text": ("a.webp", b"<html>404 not found</html>", "a.webp.* cannot be read as an image"),
    "a bomb": ("a.png", make_bomb(60_000), "a.png.* cannot be read as an image: .*exceeds limit"),
    "a strip": ("a.png", encode(Image.new("RGB", (2000, 2))), "a.png.* it is a strip"),
    "1 pixel": ("a.png", encode(Image.new("RGB", (1, 1))), (1, 1)),
    "another suffix": ("a.jpg", WHOLE, make_image(0).size),
    "suffix in capitals": ("A.PNG", WHOLE, make_image(0).size),
    "CMYK": ("a.jpg", encode(Image.fromarray(NOISE, "CMYK"), "jpeg"), (16, 16)),
    "16 bits": ("a.png", encode(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)), (16, 16)),
    "palette with transparency": ("a.png", encode(Image.fromarray(NOISE).quantize(), transparency=0), (16, 16)),
    "animated GIF": ("a.gif", encode(FRAMES[0], "gif", save_all=True, append_images=FRAMES[1:]), (16, 16)),
    "animated WebP": ("a.webp", encode(FRAMES[0], "webp", save_all=True, append_images=FRAMES[1:]), (16, 16)),
    "float": ("a.tiff", encode(Image.fromarray(NOISE[..., 0].astype(np.float32)), "tiff"), (16, 16)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(first_script, tmp_path, name):
    file_name, content, expected = PICTURES[name]
    (tmp_path / file_name).write_bytes(content)
    (tmp_path / file_name).with_suffix(".txt").write_text("a caption")
    images = load_images(first_script, tmp_path)
    if isinstance(expected, tuple):
        image = read_image(first_script, images)
        assert (image.mode, image.size) == ("RGB", expected)
    else:
        with pytest.raises(first_script.UserError, match=expected) as error:
            read_image(first_script, images)
        assert "--skip_broken_images" in str(error.value)


CAPTIONS = {  # name: JSON of the caption, the caption that is used or what the error says
    "null": ("null", "row 0 .* has None in --caption_column"),
    "a number": ("7", "has 7 in --caption_column"),
    "not a number": ("NaN", "has nan in --caption_column"),
    "a truth value": ("true", "has True in --caption_column"),
    "an object": ('{"en": "a"}', "in --caption_column"),
    "an empty list": ("[]", r"has \[\] in --caption_column"),
    "a list with null": ('["a", null]', "in --caption_column"),
    "empty": ('""', [""]),
    "10,000 characters": (json.dumps("x" * 10_000), ["x" * 10_000]),
    "emoji": (json.dumps("\U0001f469\u200d\U0001f680 in space"), ["\U0001f469\u200d\U0001f680 in space"]),
    "from right to left": (json.dumps("\u062a\u0641\u0627\u062d\u0629"), ["\u062a\u0641\u0627\u062d\u0629"]),
    "control characters": (json.dumps("a\0b\x1b[31mc\r\n"), ["a\0b\x1b[31mc\r\n"]),
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions(first_script, tmp_path, name):
    caption, expected = CAPTIONS[name]
    make_image(0).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": {caption}}}\n')
    if isinstance(expected, list):
        assert load_images(first_script, tmp_path).captions[0] == expected
    else:
        with pytest.raises(first_script.UserError, match=expected):
            load_images(first_script, tmp_path)


ROW = '{"file_name": "a.png", "text": "a"}\n'
METADATA = {  # name: lines of metadata.jsonl, number of rows or what the error says
    "the same row twice": (ROW * 2, 2),
    "a path that leads out": (ROW + ROW.replace("a.png", "../secret.png"), "1 of 2 .* not in it.*secret.png"),
    "a path that leads out, to a name that is inside too": (ROW.replace("a.png", "../a.png"), "1 of 1 .* not in it"),
    "a path that leads out and in": (ROW.replace("a.png", "sub/../a.png"), 1),
    "an absolute path": (ROW.replace("a.png", "{folder}/secret.png"), "1 of 1 .* not in it.*secret.png"),
    "an absolute path into the folder": (ROW.replace("a.png", "{folder}/data/a.png"), 1),
    "two slashes": (ROW.replace("a.png", "/{folder}/secret.png"), "1 of 1 .* not in it"),
    "a folder above, by way of one below": (ROW.replace("a.png", "sub/../../secret.png"), "1 of 1 .* not in it"),
    "a folder": (ROW.replace("a.png", "sub"), "1 of 1 .* not in it"),
    "no name": ('{"file_name": null, "text": "a"}\n', "1 of 1 .* not in it"),
    "a number": ('{"file_name": 7, "text": "a"}\n', r"1 of 1 .* not in it, .* the first is .*/7\. Fix"),
    "a list": ('["a.png", "a"]\n', "metadata.jsonl cannot be read after row 0"),
    "half a line": (ROW + ROW[:20], "metadata.jsonl cannot be read after row 1"),
    "zeros": ("\0" * 100, "metadata.jsonl cannot be read after row 0"),
    "a huge line": (ROW.replace('"a"', json.dumps("x" * 10_000_000)), 1),
    "columns that nobody uses": (ROW.replace("}", ', "__class__": "os.system", "": 1}'), 1),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata(first_script, tmp_path, name):
    lines, expected = METADATA[name]
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    for path in (data / "a.png", tmp_path / "secret.png"):
        make_image(0).save(path)
    (data / "metadata.jsonl").write_text(lines.replace("{folder}", str(tmp_path)))
    if isinstance(expected, int):
        assert len(load_images(first_script, data).captions) == expected
    else:
        if "not in it" in expected:  # nor does this flag lead to it
            with contextlib.suppress(ValueError):
                images = load_images(first_script, data, skip_broken_images=True)
                assert not any(Path(image["path"]).resolve() == tmp_path / "secret.png" for image in images.images)
        with pytest.raises(first_script.UserError, match=re.compile(expected, re.DOTALL)):
            load_images(first_script, data)


def test_a_folder_with_the_name_of_a_picture(first_script, tmp_path):
    """It is a folder: what lies in it counts."""
    (tmp_path / "folder.png").mkdir()
    make_image(0).save(tmp_path / "folder.png/a.png")
    Path(tmp_path, "folder.png/a.txt").write_text("a")
    assert list(load_images(first_script, tmp_path).captions) == [["a"]]


def test_metadata_of_a_subfolder(first_script, tmp_path, caplog):
    """It may name pictures beside the subfolder, by `../` or in full, but none outside of the data."""
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    for path in (data / "a.png", data / "b.png", tmp_path / "secret.png"):
        make_image(0).save(path)
    rows = [ROW.replace("a.png", name) for name in ("../a.png", str(data / "b.png"))]
    (data / "sub" / "metadata.jsonl").write_text("".join(rows))
    paths = [image["path"] for image in load_images(first_script, data).images]
    assert paths == [str(data / "a.png"), str(data / "b.png")] and "not used" not in caplog.text
    (data / "sub" / "metadata.jsonl").write_text("".join(rows) + ROW.replace("a.png", "../../secret.png"))
    with pytest.raises(first_script.UserError, match=r"1 of 3 .* not in it.*\.\./secret.png"):
        load_images(first_script, data, skip_broken_images=True)


# ---- Models and checkpoints of strangers ----------------------------------------------------------------------------


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


def pickle_weights(folder: Path, **more) -> None:
    """Give a network pickled weights in place of its .safetensors, with `more` in them."""
    (file,) = folder.glob("*.safetensors")
    name = "pytorch_model.bin" if "text" in folder.name else "diffusion_pytorch_model.bin"
    torch.save({**load_file(file), **more}, folder / name)
    file.unlink()


def add_code(model: Path, ran: Path) -> None:
    """Put a module beside each part of a model that makes a folder, and have all configurations ask for it."""
    for folder in (model, *filter(Path.is_dir, model.iterdir())):
        (folder / "evil.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Evil:\n    pass\n")
    auto_map = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "evil.Evil")}
    parts = {part: ["evil", "Evil"] for part in ("unet", "vae", "safety_checker")}
    for path in (*model.glob("*/*config.json"), model / "model_index.json"):
        more = {"_class_name": ["evil", "Evil"], **parts} if path.parent == model else auto_map
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


MODELS = {  # name: what is done to a model, given a folder for code to make; what the error says
    "weights as pickles": (
        lambda model, ran: [pickle_weights(model / part) for part in ("unet", "vae", "text_encoder")], None),
    **{f"a pickle with code as {part}": (
        lambda model, ran, part=part: pickle_weights(model / part, code=Payload(ran)), f"cannot be loaded: its {part}")
       for part in ("unet", "vae", "text_encoder")},
    "code that is asked for": (add_code, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(first_script, tiny_model, image_folder, tmp_path, name):
    """They are loaded, or refused in one line; no code of theirs runs."""
    change, expected = MODELS[name]
    model, ran = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "ran"
    change(model, ran)
    refusal = contextlib.nullcontext() if expected is None else pytest.raises(first_script.UserError, match=expected)
    with refusal:
        run(first_script, make_args(model, image_folder, tmp_path / "out", max_train_steps=1))
    assert not ran.exists()


def test_adapters_and_single_files_with_code(tiny_model, image_folder, tmp_path):
    """Pickles are refused, or read without running what is in them."""
    ran, files = tmp_path / "ran", [tmp_path / "pytorch_lora_weights.bin", tmp_path / "model.ckpt"]
    for file in files:
        torch.save({"state_dict": {"code": Payload(ran)}}, file)
    script = load_script("train_text_to_image_lora.py")
    for model, adapter, expected in ((tiny_model, files[0], "--pretrained_lora_model_name_or_path .* cannot be read"),
                                     (files[1], None, "Only .safetensors are read")):
        with pytest.raises(script.UserError, match=expected):
            run(script, make_args(model, image_folder, tmp_path / "out", pretrained_lora_model_name_or_path=adapter))
    assert not ran.exists()


def test_checkpoints_with_code(first_script, tiny_model, image_folder, tmp_path):
    """A pickle in it with code in it is refused; of random states it is left out, as accelerate does."""
    ran, out = tmp_path / "ran", tmp_path / "out"
    run(first_script, make_args(tiny_model, image_folder, out, max_train_steps=1))
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        checkpoint = shutil.copytree(out / "checkpoint-1", tmp_path / name / "checkpoint-1")
        record = json.loads((checkpoint / "run_record.json").read_text())
        (checkpoint / "run_record.json").write_text(json.dumps({**record, "files": {}}))
        torch.save(Payload(ran), checkpoint / name)
        argv = make_args(tiny_model, image_folder, tmp_path / f"{name}-out", resume_from_checkpoint=checkpoint)
        refusal = pytest.raises(ValueError, match="checkpoint-1 cannot be loaded")
        with contextlib.nullcontext() if "random" in name else refusal:
            run(first_script, argv)
    assert not ran.exists()
