"""The VAE: one named apart from the model, and in tiles."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import UNCACHED, make_args, make_vae
from runs import prepare, run
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    """Folder of a VAE of its own, which no model has."""
    torch.manual_seed(77)
    folder = tmp_path_factory.mktemp("vae")
    make_vae(scaling_factor=0.9).save_pretrained(folder)
    return folder


@pytest.fixture
def hub_cache(tiny_model, vae_folder, tmp_path) -> Path:
    """A cache of the hub with team/model, of which there is only the revision `raw`, and team/vae, only in `main`."""
    for name, revision, folder in (("model", "raw", tiny_model), ("vae", "main", vae_folder)):
        repository = tmp_path / "cache" / f"models--team--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / revision).write_text("a" * 40)
        shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    return tmp_path / "cache"


def load_parts(script, model, data: Path, out: Path, **flags):
    """Return the models of a run that caches nothing, and a batch of four samples."""
    _, models, samples = prepare(script, make_args(model, data, out, **UNCACHED, **flags))
    batch = script.collate([samples[script.SampleUse(0, index)] for index in range(4)], script.list_tokenizers(models))
    return models, batch


def test_a_named_vae_takes_the_place_of_the_models_own(script, image_folder, hub_cache, vae_folder, tmp_path):
    """Its latents are trained on and it is exported; it has no subfolder, and --revision is not its own."""
    flags = {"pretrained_vae_model_name_or_path": "team/vae", "revision": "raw", "cache_dir": hub_cache}
    models, batch = load_parts(script, "team/model", image_folder, tmp_path / "out", **flags)
    weights = load_file(vae_folder / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in models.vae.state_dict().items())
    torch.manual_seed(77)
    posterior = make_vae().eval().encode(batch["images"] / 127.5 - 1).latent_dist
    expected = 0.9 * (posterior.mean + posterior.std * batch["posterior_noise"])
    torch.testing.assert_close(script.encode_batch(models, batch)[0], expected, rtol=1e-4, atol=1e-5)
    if "lora" not in script.__name__:  # which exports no VAE
        run(script, make_args("team/model", image_folder, tmp_path / "out", **flags, max_train_steps=1))
        exported = load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
        assert exported.keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in exported.items())


@pytest.mark.parametrize("missing", ["folder", "configuration", "weights"])
def test_a_named_vae_that_is_none_is_refused_by_its_flag(
        script, tiny_model, image_folder, vae_folder, tmp_path, missing):
    """The message names --pretrained_vae_model_name_or_path and the folder, not the model's."""
    folder = tmp_path / "named"
    if missing != "folder":
        shutil.copytree(vae_folder, folder)
        (folder / {"configuration": "config.json", "weights": "diffusion_pytorch_model.safetensors"}[missing]).unlink()
    with pytest.raises(ValueError, match=f"--pretrained_vae_model_name_or_path {folder} "):
        run(script, make_args(tiny_model, image_folder, tmp_path / "out", pretrained_vae_model_name_or_path=folder))


def test_another_network_is_no_vae(script, tiny_model, image_folder, tmp_path):
    """The folder of a UNet is refused by the flag."""
    with pytest.raises(ValueError, match="--pretrained_vae_model_name_or_path .*unet cannot be loaded: "):
        run(script, make_args(tiny_model, image_folder, tmp_path / "out",
                              pretrained_vae_model_name_or_path=tiny_model / "unet"))


def test_a_vae_of_other_channels_is_refused(script, tiny_model, image_folder, tmp_path):
    """A VAE whose latents the UNet cannot take is refused before weights are read: here it has none."""
    make_vae().save_config(tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(path.read_text().replace('"latent_channels": 4', '"latent_channels": 8'))
    with pytest.raises(ValueError, match=r"takes 4 channels and the VAE makes 8"):
        run(script, make_args(tiny_model, image_folder, tmp_path / "out",
                              pretrained_vae_model_name_or_path=tmp_path / "vae"))


def test_tiles_change_little(first_script, tiny_models, image_folder, tmp_path):
    """--vae_tiling gives near latents where images exceed what the VAE was made for, and else the same."""
    script, model = first_script, tiny_models["sd"]
    found = {}
    for size in (32, 64):  # 32 is what it was made for
        for tiling in (False, True):
            models, batch = load_parts(script, model, image_folder, tmp_path / "out", resolution=size,
                                       vae_tiling=tiling)
            assert models.vae.use_tiling == tiling
            found[size, tiling] = script.encode_batch(models, batch)[0]
    torch.testing.assert_close(found[32, True], found[32, False], rtol=1e-4, atol=1e-5)
    difference = (found[64, True] - found[64, False]).abs()
    assert difference.max() > 1e-3 and difference.mean() < 0.3 * found[64, False].std()


def test_latents_are_scaled(script, tiny_model, image_folder, tmp_path):
    """They are what the VAE encodes, times its scaling factor."""
    models, batch = load_parts(script, tiny_model, image_folder, tmp_path / "out")
    batch["posterior_noise"].zero_()
    with torch.no_grad():
        mean = models.vae.encode(batch["images"] / 127.5 - 1).latent_dist.mean
    latents = script.encode_batch(models, batch)[0]
    assert torch.allclose(latents, mean * models.vae.config.scaling_factor, atol=1e-2)
