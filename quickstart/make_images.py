#!/usr/bin/env python
"""Make the quickstart's captioned pictures: Fluent 3D emoji of animals, food, places, activities and objects.

    python quickstart/make_images.py
    python quickstart/make_images.py --fluent fluent.tgz --names names.tgz

It leaves, beside this file:

    images/              what the quickstart trains on: NAME.webp (128 px, transparent) and metadata.jsonl
    validation_images/   pictures of other things, never trained on, in the same form

The pictures come from the npm package @lobehub/fluent-emoji-3d (Fluent Emoji by Microsoft, MIT), their names from
unicode-emoji-json (MIT). A package that is not given as a file is fetched by `npm pack`.
"""

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from pathlib import Path
from typing import NamedTuple

from PIL import Image

HERE = Path(__file__).resolve().parent
FLUENT_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES_PACKAGE = "unicode-emoji-json@0.9.0"
WHOLE_GROUPS = ("Animals & Nature", "Food & Drink")
# Of places, activities and objects those that 64 pixels show plainly, so that a tiny model can tell them apart.
OTHER_NAMES = set(
    "snow-capped mountain, volcano, desert island, house, castle, tent, ferris wheel, locomotive, bus, ambulance, "
    "fire engine, police car, taxi, automobile, tractor, racing car, motorcycle, bicycle, sailboat, canoe, ship, "
    "airplane, helicopter, rocket, flying saucer, hourglass done, alarm clock, sun, full moon, crescent moon, "
    "star, cloud, rainbow, umbrella, snowflake, snowman, fire, droplet, tornado, ringed planet, stop sign, "
    "anchor, jack-o-lantern, christmas tree, balloon, wrapped gift, trophy, soccer ball, baseball, basketball, "
    "tennis, bullseye, kite, teddy bear, game die, artist palette, yarn, glasses, t-shirt, jeans, scarf, socks, "
    "dress, backpack, running shoe, crown, top hat, ring, gem stone, bell, microphone, radio, trumpet, guitar, "
    "violin, drum, telephone, battery, laptop, computer mouse, floppy disk, television, camera, candle, "
    "light bulb, closed book, green book, blue book, coin, money bag, envelope, package, pencil, paintbrush, "
    "calendar, scissors, key, hammer, axe, dagger, bomb, shield, gear, magnet, ladder, microscope, telescope, "
    "syringe, pill, door, chair, bed, bucket, soap, toothbrush, shopping cart".split(", ")
)
# Every 12th thing is held out, and these besides: distinct things for prompts that the quickstart never trains on.
HOLD_OUT_EVERY = 12
HELD_OUT_NAMES = {
    "penguin", "frog", "pig face", "octopus", "cactus", "pineapple", "strawberry", "hamburger", "fire engine",
    "rocket", "sailboat", "umbrella", "guitar", "soccer ball", "wrapped gift", "key", "sunflower", "doughnut",
}  # fmt: skip
# English nouns that take no article: things without a singular, and materials.
NO_ARTICLE = set(
    "bacon beans blueberries bread broccoli butter candy cherries chopsticks cooking coral food fries garlic glasses "
    "grapes ice jeans liquid milk mugs oden pancakes peanuts popcorn prints rice sake salt scissors soap socks "
    "spaghetti sushi tennis yarn".split()
)
SIZE = 128
WEBP_QUALITY = 80


class Emoji(NamedTuple):
    """A thing that an emoji shows: its code points in hexadecimal, joined by hyphens, its plain name, its caption."""

    code: str
    name: str
    caption: str


def make_plain_name(name: str) -> str:
    """Return the name in lower-case ASCII letters."""
    name = name.replace("’", "'").replace("“", "").replace("”", "")
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()


def make_caption(name: str) -> str:
    """Return the caption of a plain name: "a red apple", "an ox", "grapes"."""
    head = re.split(r" (?:with|of|on|in|and|over|at|behind|without|showing|facing|done|not) ", name)[0].split()[-1]
    if head in NO_ARTICLE or " and " in name:
        return name
    article = "an" if name.startswith(("a", "e", "i", "o", "umb", "hour")) and name != "ewe" else "a"
    return f"{article} {name}"


def make_file_stem(name: str) -> str:
    """Return the name as a part of a file name: "jack-o-lantern"."""
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def fetch_package(package: str, folder: Path) -> Path:
    """Return the file in which `npm pack` leaves the package; RuntimeError when it cannot."""
    if shutil.which("npm") is None:
        raise RuntimeError(f"npm is not installed: install Node.js, or give {package} as a file by its flag.")
    command = ["npm", "pack", package, "--silent", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"npm pack {package} failed: {done.stderr.strip()[-300:]}; give the file by flag instead.")
    return folder / done.stdout.strip().splitlines()[-1]


def load_members(package: Path, prefix: str) -> dict[str, bytes]:
    """Return the content of the package's files whose path begins with the prefix, by the rest of their path."""
    if not package.is_file():
        raise FileNotFoundError(f"{package} is not there; leave the flag out to have it fetched by npm.")
    with tarfile.open(package) as archive:
        members = (member for member in archive if member.isfile() and member.name.startswith(prefix))
        return {member.name.removeprefix(prefix): archive.extractfile(member).read() for member in members}


def load_emoji(names_package: Path) -> list[Emoji]:
    """Return the emoji that the quickstart is about, in the order of Unicode."""
    content = load_members(names_package, "package/data-by-emoji.json")[""]
    emoji = []
    for characters, facts in json.loads(content).items():
        name = make_plain_name(facts["name"])
        if facts["group"] in WHOLE_GROUPS or name in OTHER_NAMES:
            emoji.append(Emoji("-".join(f"{ord(c):04x}" for c in characters), name, make_caption(name)))
    return emoji


def get_picture(pictures: dict[str, bytes], code: str, suffix: str) -> bytes | None:
    """Return the picture of a code, with or without variation selectors; None when the package lacks it."""
    bare = code.replace("-fe0f", "")
    for candidate in (code, bare, f"{code}-fe0f"):
        if candidate + suffix in pictures:
            return pictures[candidate + suffix]
    return None


def save_image_folder(folder: Path, pictures: list[tuple[str, str, Image.Image]], suffix: str) -> None:
    """Save (name, caption, picture) triples as a new image folder with metadata.jsonl."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = []
    for name, caption, picture in pictures:
        file_name = make_file_stem(name) + suffix
        picture.save(folder / file_name, **({"quality": WEBP_QUALITY, "method": 6} if suffix == ".webp" else {}))
        lines.append(json.dumps({"file_name": file_name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def make_images(fluent_package: Path, names_package: Path, folder: Path) -> tuple[int, int]:
    """Write images/ and validation_images/ into the folder and return how many pictures each holds."""
    files = load_members(fluent_package, "package/assets/")
    train, held_out = [], []
    for index, emoji in enumerate(load_emoji(names_package)):
        content = get_picture(files, emoji.code, ".webp")
        if content is None:
            continue
        picture = Image.open(io.BytesIO(content)).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        is_held_out = emoji.name in HELD_OUT_NAMES or index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        (held_out if is_held_out else train).append((emoji.name, emoji.caption, picture))
    save_image_folder(folder / "images", train, ".webp")
    save_image_folder(folder / "validation_images", held_out, ".webp")
    return len(train), len(held_out)


def main() -> None:
    """Make the two folders."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--fluent", type=Path, help=f"The npm package {FLUENT_PACKAGE} as a .tgz file.")
    parser.add_argument("--names", type=Path, help=f"The npm package {NAMES_PACKAGE} as a .tgz file.")
    parser.add_argument("--output_dir", type=Path, default=HERE, help="Where images/ and validation_images/ go.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            fluent = args.fluent or fetch_package(FLUENT_PACKAGE, Path(folder))
            names = args.names or fetch_package(NAMES_PACKAGE, Path(folder))
            train, held_out = make_images(fluent, names, args.output_dir)
        except (RuntimeError, FileNotFoundError) as error:
            sys.exit(f"make_images.py: {error}")
    print(f"{train} pictures in {args.output_dir / 'images'}, {held_out} in {args.output_dir / 'validation_images'}")


if __name__ == "__main__":
    main()
