"""The objective against closed forms, and what an update makes of it."""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    in_first_script,
    in_two_scripts,
    list_adapter_flags,
    list_fast_flags,
    make_args,
    make_image_folder,
    read_scalars,
)
from runs import read_trained, run
from safetensors.torch import load_file

from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.training_utils import compute_snr

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEPS = torch.tensor([0, 1, 500, 999])


class LinearUnet(torch.nn.Module):
    """A UNet whose answer is known: a linear function of all that it is given. Keeps its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))
        self.calls = []

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True, **conditions):
        self.calls.append({"sample": sample.detach().clone(), "timestep": timestep.clone(),
                           "encoder_hidden_states": encoder_hidden_states.clone(),
                           "with gradient": torch.is_grad_enabled()})
        return (self.answer(sample, timestep, encoder_hidden_states),)

    def answer(self, sample, timestep, encoder_hidden_states):
        """Return the network's output."""
        text = encoder_hidden_states.float().mean(dim=(1, 2))
        return self.weight * sample + (timestep / 1000 + text).view(-1, 1, 1, 1)


@pytest.fixture
def assemble(script, tiny_model, image_folder, tmp_path):
    """Return a function that makes the parts of a run from flags, by the script's own functions, and one batch."""

    def make(timesteps=None, **flags):
        args = script.parse_args(make_args(tiny_model, image_folder, tmp_path / "parts", **flags))
        accelerator, configs = script.make_accelerator(args), script.load_model_configs(args)
        images = script.make_captioned_images(args, args.train_data_dir)
        data = script.make_data(args, images, None, 0, configs)
        torch.manual_seed(0)
        models = script.load_models(args, accelerator, configs)
        for name, parameter in models.unet.named_parameters():
            if "lora_B" in name:  # at 0, where it starts, an adapter does nothing and only B has a gradient
                torch.nn.init.normal_(parameter, std=0.1)
        samples = [data.train[script.SampleUse(0, index)] for index in range(4)]
        batch = script.collate(samples, script.list_tokenizers(models))
        if timesteps is not None:
            batch["timesteps"] = timesteps.clone()
        return SimpleNamespace(
            args=args, accelerator=accelerator, models=models, batch=batch, data=data, unet=LinearUnet(),
            objective=script.make_objective(args, models.scheduler_config, accelerator.device),
            noise_scheduler=DDPMScheduler.from_config(models.scheduler_config))

    return make


@pytest.fixture
def compute(script):
    """Return a function that gives the loss of the linear network on the batch of a run."""

    def of(parts):
        return compute_loss(script, parts, unet=parts.unet)

    return of


def compute_loss(script, parts, batch=None, unet=None) -> torch.Tensor:
    """Return the loss of each sample of a batch, encoded by the script, with the run's UNet or another."""
    batch = parts.batch if batch is None else batch
    latents, conditions = script.encode_batch(parts.models, batch)
    return script.compute_loss(unet or parts.models.unet, parts.objective, latents, conditions, batch)


def get_latents(parts) -> torch.Tensor:
    """Return the latents of a batch as AutoencoderKL defines them, without the script."""
    posterior = parts.models.vae.encode(2 * (parts.batch["images"] / 255) - 1).latent_dist
    return (posterior.mean + (posterior.logvar / 2).exp() * parts.batch["posterior_noise"]) * parts.models.vae.config[
        "scaling_factor"]


def compute_expected(parts, noise, input_noise=None, weights=None) -> torch.Tensor:
    """Return the loss of each sample by the scheduler of diffusers, for the noise of the target and of the input."""
    latents, timesteps, call = get_latents(parts), parts.batch["timesteps"], parts.unet.calls[-1]
    input_noise = noise if input_noise is None else input_noise
    noisy = parts.noise_scheduler.add_noise(latents, input_noise, timesteps)
    torch.testing.assert_close(call["sample"], noisy, rtol=1e-5, atol=1e-5)
    target = {"epsilon": noise, "sample": latents, "v_prediction": parts.noise_scheduler.get_velocity(
        latents, noise, timesteps)}[parts.objective.prediction_type]
    error = parts.unet.answer(noisy, timesteps, call["encoder_hidden_states"]) - target
    loss = (error**2).mean(dim=(1, 2, 3))
    return loss if weights is None else loss * torch.as_tensor(weights)


def get_steps(module: torch.nn.Module) -> torch.Tensor:
    """Return all gradients of a network as one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])


# ---- Latents, noise, targets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling_factor", [0.18215, 0.7])
def test_latents_are_scaled_samples_of_the_posterior(script, assemble, scaling_factor):
    """latents = scaling_factor (mean + std noise) of what AutoencoderKL makes of pixels from -1 to 1."""
    parts = assemble()
    parts.models.vae.register_to_config(scaling_factor=scaling_factor)
    found = script.encode_batch(parts.models, parts.batch)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, get_latents(parts), rtol=1e-5, atol=1e-6)
    still = script.encode_batch(parts.models, {**parts.batch, "posterior_noise": torch.zeros(4, 4, 16, 16)})[0]
    mode = parts.models.vae.encode(parts.batch["images"] / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(still, scaling_factor * mode, rtol=1e-5, atol=1e-6)


@in_first_script
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_loss_is_that_of_the_scheduler(assemble, compute, prediction_type):
    """Noisy latents are those of add_noise, targets the noise, get_velocity or the latents; one loss per sample."""
    parts = assemble(TIMESTEPS, prediction_type=prediction_type)
    loss = compute(parts)
    assert (loss.shape, loss.dtype) == ((4,), torch.float32)
    torch.testing.assert_close(loss, compute_expected(parts, parts.batch["noise"]), rtol=1e-4, atol=1e-6)


@in_first_script
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_targets_in_double_precision(script, prediction_type):
    """epsilon: e; v_prediction: alpha e - sigma z, get_velocity in diffusers; sample: z."""
    latents, noise = torch.randn(2, 4, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alpha = scheduler.alphas_cumprod[TIMESTEPS].double().sqrt().view(4, 1, 1, 1)
    target = script.compute_target(latents, noise, alpha, (1 - alpha**2).sqrt(), prediction_type)
    velocity = scheduler.get_velocity(latents, noise, TIMESTEPS)
    expected = {"epsilon": noise, "sample": latents, "v_prediction": velocity}[prediction_type]
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-6)


def test_the_text_is_the_last_hidden_state(assemble, compute):
    """The UNet is given what the text encoder's final layer norm makes of the captions, but for SDXL."""
    parts = assemble(TIMESTEPS)
    if "text_encoder_2" in vars(parts.models):
        pytest.skip("test_sdxl.py has what SDXL is given")
    compute(parts)
    states = parts.models.text_encoder(parts.batch["input_ids"]).last_hidden_state
    torch.testing.assert_close(parts.unet.calls[0]["encoder_hidden_states"], states)
    assert parts.unet.calls[0]["timestep"].tolist() == TIMESTEPS.tolist()
    assert len(states.flatten(1).unique(dim=0)) == 4


@in_two_scripts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_is_added_in_float32(script, assemble, compute, dtype):
    """With frozen parts in half precision the noisy latents keep the small sigma of the first timesteps."""
    parts = assemble(torch.tensor([0, 1, 2, 999]))
    parts.models.vae.to(dtype)
    for text_encoder in [getattr(parts.models, part) for part in script.TEXT_ENCODERS]:
        text_encoder.to(dtype)
    loss = compute(parts)
    sample = parts.unet.calls[0]["sample"]
    assert (sample.dtype, loss.dtype) == (torch.float32, torch.float32)
    alphas = parts.noise_scheduler.alphas_cumprod[parts.batch["timesteps"]].double().view(-1, 1, 1, 1)
    clean = (sample.double() - (1 - alphas).sqrt() * parts.batch["noise"].double()) / alphas.sqrt()
    parts.batch["timesteps"] = torch.full((4,), 500)
    compute(parts)  # the same latents under much noise
    alphas = parts.noise_scheduler.alphas_cumprod[500].double()
    again = parts.unet.calls[1]["sample"].double()
    again = (again - (1 - alphas).sqrt() * parts.batch["noise"].double()) / alphas.sqrt()
    torch.testing.assert_close(clean[:3], again[:3], rtol=0, atol=2e-6)
    torch.testing.assert_close(clean[3:], again[3:], rtol=0, atol=2e-5)


def test_only_the_unet_gets_gradients(script, assemble):
    """Frozen parts need none, and every weight of the UNet, or of its adapter, has one."""
    parts = assemble(TIMESTEPS)
    script.set_up_networks(parts.args, parts.models)
    compute_loss(script, parts).mean().backward()
    for frozen in (parts.models.vae, *(getattr(parts.models, part) for part in script.TEXT_ENCODERS)):
        assert not frozen.training
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen.parameters())
    trained = script.name_trained_parameters(parts.models)
    weights = dict(parts.models.unet.named_parameters())
    expected = [name for name in weights if "lora_" in name] or list(weights)
    assert set(trained) == {f"unet.{name}" for name in expected}
    assert all(weight.grad is None for name, weight in weights.items() if f"unet.{name}" not in trained)
    assert parts.models.unet.training
    assert [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()] == []
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


# ---- Options --------------------------------------------------------------------------------------------------------


@in_first_script
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_offset_noise_moves_input_and_target(assemble, compute, prediction_type):
    """--noise_offset k: the noise is e + k o with one number o per channel of an image, for input and target alike."""
    parts = assemble(TIMESTEPS, noise_offset=0.25, prediction_type=prediction_type)
    loss = compute(parts)
    assert parts.batch["offset_noise"].shape == (4, 4, 1, 1)
    noise = parts.batch["noise"] + 0.25 * parts.batch["offset_noise"]
    torch.testing.assert_close(loss, compute_expected(parts, noise), rtol=1e-4, atol=1e-6)


@in_first_script
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_perturbation_moves_the_input_only(assemble, compute, prediction_type):
    """--input_perturbation k: the input has e + k p, the target the clean e, with its offset if there is one."""
    parts = assemble(TIMESTEPS, input_perturbation=0.5, noise_offset=0.25, prediction_type=prediction_type)
    loss = compute(parts)
    noise = parts.batch["noise"] + 0.25 * parts.batch["offset_noise"]
    input_noise = noise + 0.5 * parts.batch["perturbation_noise"]
    torch.testing.assert_close(loss, compute_expected(parts, noise, input_noise), rtol=1e-4, atol=1e-6)


@in_first_script
@pytest.mark.parametrize("exponent", [0, 0.5, 1, 3])
def test_dream_corrects_by_the_networks_own_estimate(assemble, compute, exponent):
    """With D = (1 - alphas_cumprod)^(p/2) (e - UNet(z_t)): input z_t + sigma D, target e + D; Min-SNR on top."""
    parts = assemble(TIMESTEPS, dream_training=True, dream_detail_preservation=exponent, snr_gamma=5)
    loss = compute(parts)
    first, second = parts.unet.calls
    assert (first["with gradient"], second["with gradient"]) == (False, True)
    latents, noise, timesteps = get_latents(parts), parts.batch["noise"], parts.batch["timesteps"]
    alphas_cumprod = parts.noise_scheduler.alphas_cumprod[timesteps].double().view(-1, 1, 1, 1)
    noisy = parts.noise_scheduler.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(first["sample"], noisy, rtol=1e-5, atol=1e-5)
    states = first["encoder_hidden_states"]
    delta = (1 - alphas_cumprod) ** (exponent / 2) * (noise - parts.unet.answer(noisy, timesteps, states))
    moved = noisy + (1 - alphas_cumprod).sqrt() * delta
    torch.testing.assert_close(second["sample"].double(), moved, rtol=1e-5, atol=1e-5)
    error = parts.unet.answer(moved, timesteps, states) - (noise + delta)
    snr = (alphas_cumprod / (1 - alphas_cumprod)).flatten()
    expected = (error**2).mean(dim=(1, 2, 3)) * snr.clamp(max=5) / snr
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


@in_first_script
def test_dream_gives_no_gradient_through_the_estimate(assemble, compute):
    """The derivative is that of a fixed input and target."""
    parts = assemble(TIMESTEPS, dream_training=True)
    compute(parts).sum().backward()
    found, parts.unet.weight.grad = parts.unet.weight.grad, None
    latents, noise, timesteps = get_latents(parts), parts.batch["noise"], parts.batch["timesteps"]
    sigma = (1 - parts.noise_scheduler.alphas_cumprod[timesteps]).sqrt().view(-1, 1, 1, 1)
    noisy = parts.noise_scheduler.add_noise(latents, noise, timesteps)
    states = parts.unet.calls[0]["encoder_hidden_states"]
    delta = (sigma * (noise - parts.unet.answer(noisy, timesteps, states))).detach()
    error = parts.unet.answer(noisy + sigma * delta, timesteps, states) - (noise + delta)
    (error**2).mean(dim=(1, 2, 3)).sum().backward()
    torch.testing.assert_close(found, parts.unet.weight.grad, rtol=1e-3, atol=1e-4)


@in_first_script
@pytest.mark.parametrize(
    ("prediction_type", "gamma", "weights"),  # at SNR 4, 1, 1/4 and 0
    [
        ("epsilon", 5, [1, 1, 1, 1]),
        ("epsilon", 2, [1 / 2, 1, 1, 1]),
        ("epsilon", 0.125, [1 / 32, 1 / 8, 1 / 2, 1]),
        ("v_prediction", 5, [4 / 5, 1 / 2, 1 / 5, 1]),
        ("v_prediction", 2, [2 / 5, 1 / 2, 1 / 5, 1]),
        ("sample", 5, [4, 1, 1 / 4, 1]),
        ("sample", 0.5, [1 / 2, 1 / 2, 1 / 4, 1]),
    ],
)
def test_min_snr_weights_by_hand(script, prediction_type, gamma, weights):
    """min(SNR, gamma) over SNR, SNR + 1 or 1 for epsilon, v_prediction and sample; 1 where there is no signal."""
    share = torch.tensor([4 / 5, 1 / 2, 1 / 5, 0])
    found = script.compute_snr_weights(share.sqrt(), (1 - share).sqrt(), gamma, prediction_type)
    torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float32))


@in_first_script
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weighs_each_sample(assemble, compute, prediction_type):
    """--snr_gamma multiplies each sample's loss by the weight of its timestep, by the SNR of diffusers."""
    parts = assemble(TIMESTEPS, prediction_type=prediction_type, snr_gamma=5)
    loss = compute(parts)
    snr = compute_snr(parts.noise_scheduler, TIMESTEPS).double()
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
    expected = compute_expected(parts, parts.batch["noise"], weights=snr.clamp(max=5) / divisor)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-7)


@in_first_script
@pytest.mark.parametrize("gamma", [None, 5])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_pure_noise_is_trained(assemble, compute, prediction_type, gamma):
    """A schedule that ends in pure noise has finite losses, and its last timestep is trained."""
    parts = assemble(TIMESTEPS, prediction_type=prediction_type, rescale_betas_zero_snr=True, snr_gamma=gamma)
    assert (parts.objective.alpha[-1], parts.objective.sigma[-1]) == (0, 1)
    loss = compute(parts)
    assert torch.isfinite(loss).all()
    torch.testing.assert_close(parts.unet.calls[0]["sample"][3], parts.batch["noise"][3])
    assert loss[3] > 0.1
    loss[3].backward()
    assert parts.unet.weight.grad.abs() > 1e-3


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_the_pipeline_knows_what_was_trained(full_script, tiny_model, image_folder, tmp_path, prediction_type):
    """The exported scheduler predicts what was trained, and starts from pure noise if the schedule ends there.

    An adapter's user chooses the scheduler.
    """
    out = tmp_path / "out"
    run(full_script, make_args(tiny_model, image_folder, out, prediction_type=prediction_type, snr_gamma=5,
                               rescale_betas_zero_snr=True, report_to="tensorboard", max_train_steps=3))
    losses = read_scalars(out, "train_loss")
    assert sorted(losses) == [1, 2, 3]
    assert all(math.isfinite(loss) for loss in losses.values())
    noise_scheduler = DiffusionPipeline.from_pretrained(out, safety_checker=None).scheduler
    assert noise_scheduler.config.prediction_type == prediction_type
    assert noise_scheduler.config.rescale_betas_zero_snr
    noise_scheduler.set_timesteps(4)
    assert noise_scheduler.timesteps[0] == 999
    assert noise_scheduler.alphas_cumprod[999] < 1e-7


# ---- Gradients ------------------------------------------------------------------------------------------------------


@in_two_scripts
def test_gradient_checkpointing_gives_the_same_gradients(script, assemble):
    """Computing activations again changes neither loss nor gradients."""
    results = []
    for flag in (False, True):
        parts = assemble(TIMESTEPS, gradient_checkpointing=flag)
        script.set_up_networks(parts.args, parts.models)
        assert parts.models.unet.is_gradient_checkpointing == flag
        loss = compute_loss(script, parts)
        loss.mean().backward()
        results.append((loss.detach(), get_steps(parts.models.unet)))
    torch.testing.assert_close(*(loss for loss, _ in results), rtol=0, atol=0)
    torch.testing.assert_close(*(steps for _, steps in results), rtol=1e-5, atol=1e-8)


@in_two_scripts
def test_channels_last_gives_the_same_loss(script, assemble):
    """Another layout of the weights is no other network."""
    losses = []
    for flag in (False, True):
        parts = assemble(TIMESTEPS, channels_last=flag)
        script.set_up_networks(parts.args, parts.models)
        weight = parts.models.unet.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last if flag else torch.contiguous_format)
        losses.append(compute_loss(script, parts).detach())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def take(batch: dict, begin: int, end: int) -> dict:
    """Return some samples of a batch."""
    return {key: value[begin:end] for key, value in batch.items()}


@in_two_scripts
@pytest.mark.parametrize("cuts", [[(0, 2), (2, 4)], [(0, 3), (3, 4)], [(0, 1), (1, 2), (2, 4)]])
def test_accumulated_gradients_are_those_of_the_whole_batch(script, assemble, cuts):
    """Every sample of an update counts the same, however its micro steps are cut, and the parts of the loss add up."""
    parts = assemble(TIMESTEPS, gradient_accumulation_steps=3)
    expected = compute_loss(script, parts).mean()
    expected.backward()
    whole = get_steps(parts.models.unet)
    parts.models.unet.zero_grad()
    parts.models.unet = parts.accelerator.prepare(parts.models.unet)
    total = 0
    for begin, end in cuts:
        step = script.MicroStep(0, end, 4, ends_update=end == 4, indices=[])
        batch = take(parts.batch, begin, end)
        total += script.train_step(parts.accelerator, parts.models, parts.objective, batch, step)["train_loss"]
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(get_steps(parts.models.unet), whole, rtol=1e-3, atol=1e-6)


@in_two_scripts
def test_a_sample_of_weight_0_does_not_count(script, assemble):
    """What only keeps a process busy changes neither loss nor gradients."""
    parts = assemble(TIMESTEPS)
    parts.batch["weights"][1:] = 0
    step = script.MicroStep(0, 1, 1, ends_update=True, indices=[])
    found = script.train_step(parts.accelerator, parts.models, parts.objective, parts.batch, step)["train_loss"]
    steps = get_steps(parts.models.unet)
    parts.models.unet.zero_grad()
    expected = compute_loss(script, parts, take(parts.batch, 0, 1))[0]
    expected.backward()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(steps, get_steps(parts.models.unet), rtol=1e-3, atol=1e-6)


# ---- Updates --------------------------------------------------------------------------------------------------------


@in_two_scripts
def test_the_optimizer_has_its_flags(script, assemble):
    """AdamW with the rate, betas, epsilon and weight decay of the command line, over every trained weight once."""
    parts = assemble(learning_rate=0.01, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, adam_weight_decay=0.1)
    script.prepare_training(parts.args, parts.accelerator, parts.models, SimpleNamespace(buckets=np.zeros(10, int)))
    (group,) = parts.models.optimizer.param_groups
    assert isinstance(parts.models.optimizer.optimizer, torch.optim.AdamW)
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.01, (0.8, 0.95), 1e-6, 0.1)
    trained = [parameter for parameter in parts.models.unet.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in trained}
    assert len(group["params"]) == len(trained)


def compute_step_sizes(tiny_model: Path, out: Path, step: int) -> float:
    """Return the mean absolute change up to a checkpoint, of an adapter's B: it starts at 0, A without a gradient."""
    before, after = read_trained(tiny_model), read_trained(out / f"checkpoint-{step}")
    before = {name: torch.zeros_like(tensor) for name, tensor in after.items() if ".up." in name} or before
    return float(torch.cat([(after[name] - before[name]).abs().flatten() for name in before]).mean())


@in_two_scripts
def test_gradients_are_clipped(script, tiny_model, image_folder, tmp_path):
    """--max_grad_norm bounds the gradient: far below Adam's epsilon nothing moves. `grad_norm` is logged before it."""
    changes, norms = {}, {}
    for norm in (1.0, 1e-12):
        out = tmp_path / str(norm)
        run(script, make_args(tiny_model, image_folder, out, max_grad_norm=norm, adam_weight_decay=0,
                              max_train_steps=1, report_to="tensorboard"))
        changes[norm], norms[norm] = compute_step_sizes(tiny_model, out, 1), read_scalars(out, "grad_norm")[1]
    assert changes[1.0] == pytest.approx(1e-3, rel=0.1)  # the learning rate
    assert changes[1e-12] < 1e-7
    assert norms[1.0] == pytest.approx(norms[1e-12], rel=1e-5)
    assert norms[1.0] > 0.01


@pytest.mark.parametrize(("script", "prediction_type", "num_updates", "factor"), [
    ("train_text_to_image.py", "epsilon", 30, 2.5), ("train_text_to_image.py", "sample", 15, 2),
    ("train_text_to_image_lora_sdxl.py", "v_prediction", 30, 1.3)], indirect=["script"])
def test_overfitting_lowers_the_loss(script, tiny_model, tmp_path, prediction_type, num_updates, factor):
    """Few updates on two images divide the loss on them, under noise not seen in training, by a stated factor."""
    data, losses = make_image_folder(tmp_path / "data", 2), {}
    for steps in (1, num_updates):
        out = tmp_path / str(steps)
        run(script, make_args(tiny_model, data, out, max_train_steps=steps, center_crop=True, report_to="tensorboard",
                              prediction_type=prediction_type, validation_data_dir=data, validation_epochs=1000,
                              **list_fast_flags(script)))
        losses[steps] = read_scalars(out, "validation_loss")[steps]
    assert losses[1] / losses[num_updates] > factor
    trained = list(read_scalars(tmp_path / str(num_updates), "train_loss").values())
    assert len(trained) == num_updates
    assert np.mean(trained[:5]) / np.mean(trained[-5:]) > factor


@in_two_scripts
def test_bf16_keeps_what_is_trained_in_float32(script, assemble, tiny_model, image_folder, tmp_path):
    """Under --mixed_precision bf16 what is trained, its averages and moments are float32; frozen parts are bf16."""
    out = tmp_path / "out"
    run(script, make_args(tiny_model, image_folder, out, mixed_precision="bf16", use_ema=True, report_to="tensorboard",
                          gradient_accumulation_steps=2))
    assert all(math.isfinite(loss) for loss in read_scalars(out, "train_loss").values())
    found = read_trained(out), read_trained(out / "checkpoint-2"), read_trained(out / "checkpoint-2", averaged=True)
    assert {weight.dtype for weights in found for weight in weights.values()} == {torch.float32}
    state = torch.load(out / "checkpoint-2" / "optimizer.bin", weights_only=True)["state"]
    moments = [moment for entry in state.values() for name, moment in entry.items() if name != "step"]
    assert {moment.dtype for moment in moments} == {torch.float32}
    assert len(moments) == 2 * len(read_trained(out))
    models = assemble(mixed_precision="bf16").models
    vae_dtype = torch.float32 if "sdxl" in script.__name__ else torch.bfloat16  # where it may overflow
    for network in (models.unet, *(getattr(models, part) for part in script.TEXT_ENCODERS), models.vae):
        for parameter in network.parameters():
            frozen_dtype = vae_dtype if network is models.vae else torch.bfloat16
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else frozen_dtype)
    if "lora" not in script.__name__:
        for file, dtype in (("vae/diffusion_pytorch_model.safetensors", vae_dtype),
                            ("text_encoder/model.safetensors", torch.bfloat16)):
            assert {weight.dtype for weight in load_file(out / file).values()} == {dtype}


@in_two_scripts
def test_bf16_is_used(script, tiny_model, image_folder, tmp_path):
    """--mixed_precision bf16 computes in other numbers than float32, close to them."""
    losses = {}
    for precision in ("no", "bf16"):
        run(script, make_args(tiny_model, image_folder, tmp_path / precision, mixed_precision=precision,
                              max_train_steps=1, report_to="tensorboard"))
        losses[precision] = read_scalars(tmp_path / precision, "train_loss")[1]
    assert losses["bf16"] != losses["no"]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.02)


@in_two_scripts
def test_a_variant_is_loaded(script, tiny_model, image_folder, tmp_path):
    """--variant reads the files of that name, of all parts, and what is trained is float32 all the same."""
    model = tmp_path / "model"
    pipeline = DiffusionPipeline.from_pretrained(tiny_model, torch_dtype=torch.float16, safety_checker=None)
    pipeline.save_pretrained(model, variant="fp16")
    assert {path.name.split(".", 1)[1] for path in model.rglob("*.safetensors")} == {"fp16.safetensors"}
    run(script, make_args(model, image_folder, tmp_path / "out", variant="fp16", max_train_steps=1))
    assert {weight.dtype for weight in read_trained(tmp_path / "out").values()} == {torch.float32}
    assert compute_step_sizes(tiny_model, tmp_path / "out", 1) == pytest.approx(1e-3, rel=0.1)


@in_two_scripts
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_8_bit_adam_trains(script, tiny_model, image_folder, tmp_path, monkeypatch):
    """--use_8bit_adam keeps the moments of all large weights in bytes, trains, and goes on from its checkpoint.

    It does not wait for the device, as bitsandbytes would after each tensor.
    """
    waits = []
    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", waits.append)
    argv = {"use_8bit_adam": True, "report_to": "tensorboard", "gradient_accumulation_steps": 2,
            **list_adapter_flags(script, rank=64)}  # so that A and B are large enough
    out = tmp_path / "out"
    run(script, make_args(tiny_model, image_folder, out, **argv))
    state = torch.load(out / "checkpoint-2" / "optimizer.bin", weights_only=True)["state"]
    kept = [entry["__bnb_optimizer_quant_state__"] for entry in state.values()]
    moments = [entry[name] for entry in kept for name in ("state1", "state2")]
    assert {moment.dtype for moment in moments if moment.numel() >= 4096} == {torch.uint8}
    assert compute_step_sizes(tiny_model, out, 2) == pytest.approx(2e-3, rel=0.5)
    assert waits == []
    run(script, make_args(tiny_model, image_folder, out, **argv, max_train_steps=3, resume_from_checkpoint="latest"))
    assert (out / "checkpoint-3").is_dir()
    assert sorted(read_scalars(out, "train_loss")) == [1, 2, 3]


def test_compiling_keeps_names_and_files(script, assemble, tmp_path):
    """--torch_compile, before the first step compiles anything, leaves a UNet that saves under its plain names."""
    for name in ("plain", "compiled"):
        parts = assemble(torch_compile=name == "compiled")
        samples = SimpleNamespace(buckets=np.zeros(10, int))
        script.prepare_training(parts.args, parts.accelerator, parts.models, samples)
        (tmp_path / name).mkdir()
        script.save_trained(parts.accelerator, parts.models, tmp_path / name)
    assert parts.models.unet._compiled_call_impl is not None
    assert read_trained(tmp_path / "compiled").keys() == read_trained(tmp_path / "plain").keys()
    unet = parts.models.unet
    assert unet.state_dict().keys() == assemble().models.unet.state_dict().keys()
    assert not any("_orig_mod" in name for name in unet.state_dict())


@in_two_scripts
def test_a_unet_compiles_into_one_graph(script, assemble):
    """With --torch_compile nothing breaks the graph: neither autocast, checkpointing, the norms nor adapters."""
    parts = assemble(torch_compile=True, mixed_precision="bf16", gradient_checkpointing=True)
    script.prepare_training(parts.args, parts.accelerator, parts.models, SimpleNamespace(buckets=np.zeros(10, int)))
    parts.models.unet.compile(backend="eager", fullgraph=True)  # raises at a break; kernels would take minutes
    batch = script.encode_batch(parts.models, parts.batch)
    script.compute_loss(parts.models.wrapped.unet, parts.objective, *batch, parts.batch).mean().backward()


@in_two_scripts
def test_runs_repeat_themselves(script, tiny_model, image_folder, tmp_path):
    """The same command gives the same weights to the last bit; another seed does not."""
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        out = tmp_path / name
        run(script, make_args(tiny_model, image_folder, out, seed=seed, random_flip=True, noise_offset=0.1))
        weights.append(read_trained(out))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    moved = [key for key in weights[0] if key in ("conv_in.weight", "conv_out.weight") or ".lora." in key]
    assert moved and not any(torch.equal(weights[0][key], weights[2][key]) for key in moved)
