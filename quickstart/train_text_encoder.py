"""Train the tiny tokenizer and text encoder of quickstart/base: captions and pictures of a thing should agree.

    python quickstart/train_text_encoder.py --names names.txt --images FOLDER [FOLDER ...] --output_dir BASE

The tokenizer is byte-level BPE as CLIP has it, learned from a file of names, one a line. The text encoder is a small
CLIPTextModel trained from scratch by the symmetric contrastive loss of CLIP (Radford et al. 2021, arXiv:2103.00020)
against a small convolutional picture encoder, which is thrown away. --output_dir gets tokenizer/ and text_encoder/.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE = 32  # pixels that the picture encoder sees
MAX_TOKENS = 16
VOCABULARY = 1500
WIDTH = 128
START, END = "<|startoftext|>", "<|endoftext|>"
# How CLIP cuts a caption into words: https://github.com/openai/CLIP, simple_tokenizer.py
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
TEMPERATURE = 0.07


def make_tokenizer(texts: list[str], folder: Path) -> CLIPTokenizer:
    """Learn the merges from the texts, save vocab.json and merges.txt in the folder and return what loads from it."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=END))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    # Each byte alone and each byte as the end of a word, so that no text is unknown.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(alphabet) - 2, min_frequency=2, initial_alphabet=alphabet,
        end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    tokens = list(dict.fromkeys([*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(merge) for merge in merges)]))
    vocabulary = {token: index for index, token in enumerate([*tokens, START, END])}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=merges, unk_token=END, bos_token=START, eos_token=END, pad_token=END,
        model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return the network with random weights."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=MAX_TOKENS, projection_dim=WIDTH, hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def make_picture_encoder() -> nn.Module:
    """Return a small convolutional network from [b, 3, 32, 32] to [b, WIDTH]."""
    layers, channels = [], 3
    for width in (24, 48, 96, WIDTH):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * WIDTH, WIDTH))


def load_pairs(folders: list[str]) -> tuple[Tensor, list[str]]:
    """Return the pictures of the image folders, over white, as [n, 3, 32, 32] in [-1, 1], and their captions."""
    pictures, captions = [], []
    for folder in map(Path, folders):
        for row in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines()):
            picture = Image.open(folder / row["file_name"]).convert("RGBA").resize((SIZE, SIZE), Image.LANCZOS)
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
            pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1)
            captions.append(row["text"])
    return torch.stack(pictures), captions


def change_article(caption: str, generator: torch.Generator) -> str:
    """Return the caption as it is (half of the time), without its article, or with "the"."""
    draw = torch.rand((), generator=generator).item()
    if draw < 0.5:
        return caption
    bare = caption.removeprefix("a ").removeprefix("an ")
    return bare if draw < 0.75 else f"the {bare}"


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Return the pictures, half of them mirrored, all moved by up to 3 pixels over white."""
    top, left = torch.randint(0, 7, (2,), generator=generator).tolist()
    pictures = F.pad(pictures, (3, 3, 3, 3), value=1.0)[:, :, top : top + SIZE, left : left + SIZE]
    mirrored = torch.rand(len(pictures), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), pictures.flip(3), pictures)


def compute_loss(text: Tensor, picture: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Return the contrastive loss and the share of pictures [b, d] nearest to a caption [b, d] of their own."""
    logits = F.normalize(picture, dim=1) @ F.normalize(text, dim=1).T / TEMPERATURE
    target = same.float() / same.sum(1, keepdim=True)
    loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
    return loss / 2, same.gather(1, logits.argmax(1, keepdim=True)).float().mean()


def train(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, args: argparse.Namespace) -> None:
    """Train the text encoder in place for args.num_train_steps updates."""
    generator = torch.Generator().manual_seed(0)
    pictures, captions = load_pairs(args.images)
    kinds = torch.tensor([sorted(set(captions)).index(caption) for caption in captions])
    picture_encoder = make_picture_encoder()
    parameters = [*text_encoder.parameters(), *picture_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.num_train_steps, pct_start=0.1)
    print(f"{len(pictures)} pairs, {sum(p.numel() for p in text_encoder.parameters()):,} parameters", flush=True)
    started = time.monotonic()
    for step in range(1, args.num_train_steps + 1):
        chosen = torch.randperm(len(pictures), generator=generator)[: args.batch_size]
        texts = [change_article(captions[index], generator) for index in chosen]
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        text = text_encoder(tokens.input_ids).pooler_output
        picture = picture_encoder(augment(pictures[chosen], generator))
        loss, accuracy = compute_loss(text, picture, kinds[chosen][:, None] == kinds[chosen][None])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == args.num_train_steps:
            passed = time.monotonic() - started
            print(f"step {step}: {passed:.0f} s, loss {loss.item():.3f}, accuracy {accuracy.item():.2f}", flush=True)


def main() -> None:
    """Learn the tokenizer, train the text encoder, save both."""
    parser = argparse.ArgumentParser(description="Train the tokenizer and the text encoder of the quickstart's base.")
    parser.add_argument("--names", required=True, help="Text file from which the tokenizer learns.")
    parser.add_argument("--images", nargs="+", required=True, help="Image folders with metadata.jsonl.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_train_steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    folder = Path(args.output_dir)
    texts = [line for line in Path(args.names).read_text().splitlines() if line]
    tokenizer = make_tokenizer(texts, folder / "tokenizer")
    text_encoder = make_text_encoder(tokenizer)
    train(tokenizer, text_encoder, args)
    text_encoder.half().save_pretrained(folder / "text_encoder")


if __name__ == "__main__":
    main()
