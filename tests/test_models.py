"""What a run starts from: text states before the last, and models as other tools save them."""

import numpy as np
import pytest
import torch
from conftest import UNCACHED, list_adapter_flags, make_args
from PIL import Image
from runs import prepare, run

from diffusers import DiffusionPipeline

CAPTIONS = ["a cat", "picture number 1"]


def encode_as_the_pipeline(model, captions: list[str], clip_skip: int) -> torch.Tensor:
    """Return the text states that the model's own pipeline makes of captions."""
    pipeline = DiffusionPipeline.from_pretrained(model)
    if not hasattr(pipeline.text_encoder, "text_model"):  # where StableDiffusionPipeline looks for the final norm
        vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    return pipeline.encode_prompt(captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False,
                                  clip_skip=clip_skip)[0]


@pytest.mark.parametrize("cached", [False, True])
def test_clip_skip_gives_the_states_of_the_pipeline(script, tiny_model, image_folder, tmp_path, cached):
    """They are what encode_prompt returns, and a cache of them is not that of a run without the flag."""
    flags = {"cache_text_embeddings": True, "cache_dtype": "fp32", "no_cache_latents": True} if cached else UNCACHED
    found = []
    for clip_skip in (1, None):
        _, models, samples = prepare(script, make_args(
            tiny_model, image_folder, tmp_path / "out", encoded_dir=tmp_path / "encoded" if cached else None,
            clip_skip=clip_skip, **flags))
        batch = script.collate([samples[script.Visit(0, index)] for index in range(2)], script.list_tokenizers(models))
        found.append(script.encode_batch(models, batch)[1]["encoder_hidden_states"])
    captions = [f"picture number {index}" for index in range(2)]
    torch.testing.assert_close(found[0], encode_as_the_pipeline(tiny_model, captions, 1), rtol=1e-5, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_clip_skip_is_drawn_with_and_stands_on_the_card(script, tiny_model, image_folder, tmp_path):
    """The picture at the end is that of a pipeline with `clip_skip`; the card's code says so."""
    out, flags = tmp_path / "out", {"validation_prompt": "a cat", "num_validation_images": 1,
                                    "validation_inference_steps": 2, "validation_guidance_scale": 5,
                                    "learning_rate": 0, "max_train_steps": 1}
    run(script, make_args(tiny_model, image_folder, out, clip_skip=1, **flags))
    pipeline = DiffusionPipeline.from_pretrained(tiny_model)
    if not hasattr(pipeline.text_encoder, "text_model"):
        vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    seed = int(script.make_rng(0, "validation", 0).integers(2**31))
    with torch.no_grad():
        pictures = [np.asarray(pipeline(
            "a cat", height=32, width=32, num_inference_steps=2, guidance_scale=5, clip_skip=clip_skip,
            generator=torch.Generator().manual_seed(seed)).images[0]).astype(int) for clip_skip in (1, None)]
    drawn = np.asarray(Image.open(out / "validation" / "step-1" / "00.png")).astype(int)
    assert np.abs(drawn - pictures[0]).max() <= 1 < np.abs(drawn - pictures[1]).max()
    card = (out / "README.md").read_text()
    assert "clip_skip=1)" in card and "- clip_skip: 1" in card


def test_layers_that_are_skipped_are_not_trained(script, tiny_model, image_folder, tmp_path):
    """A text encoder is trained up to the states that are used: what comes after would get no gradient."""
    flags = {**UNCACHED, "train_text_encoder": True, **list_adapter_flags(script, rank=2)}
    _, models, samples = prepare(script, make_args(
        tiny_model, image_folder, tmp_path / "out", clip_skip=1, **flags))
    models.text_encoder.train()
    batch = script.collate([samples[script.Visit(0, 0)]], script.list_tokenizers(models))
    states = script.encode_captions(models, batch)
    sum(tensor.square().sum() for tensor in states.values()).backward()
    parameters = [(name, parameter) for name, parameter in models.text_encoder.named_parameters()
                  if parameter.requires_grad]
    assert parameters and [name for name, parameter in parameters if parameter.grad is None] == []
    count = models.text_encoder.config.num_hidden_layers - (2 if "sdxl" in script.__name__ else 1)
    assert {int(name.split("layers.")[1].split(".")[0]) for name, _ in parameters if "layers." in name} == set(
        range(count))


def test_clip_skip_beyond_the_layers_is_refused(script, tiny_model, image_folder, tmp_path):
    with pytest.raises(ValueError, match=r"--clip_skip 3 must be below \d, the layers of the text_encoder"):
        run(script, make_args(tiny_model, image_folder, tmp_path / "out", clip_skip=3))
