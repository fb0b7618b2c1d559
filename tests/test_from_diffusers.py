"""Folders that diffusers saved: the same images as its own pipelines, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
diffusers = pytest.importorskip("diffusers")

import safetensors.torch

from ddpm_edge import Bundle, Generator
from ddpm_edge.cli import main
from ddpm_edge.errors import ConfigError, ExportError, RuntimeUnavailableError
from ddpm_edge.export import export_diffusers, from_diffusers
from ddpm_edge.export.from_diffusers import float32_rounding, read_diffusers
from ddpm_edge.manifest import Manifest
from ddpm_edge.plan import Plan, run_plan
from ddpm_edge.runtimes.onnx_runtime import OnnxRuntimeEngine
from ddpm_edge.sampling import Network
from ddpm_edge.schedule import Schedule
from ddpm_edge.train.torch_engine import TorchEngine

WEIGHTS = "diffusion_pytorch_model"
T = 50
N = 2  # images
# Float32 rounding through T evaluations on two runtimes, images in [-1, 1]: the gate's tolerance.
IMAGE_TOLERANCE = 1e-3
PROCESS = {
    "num_train_timesteps": T,
    "beta_end": 0.35,  # so that alpha_bar_T is nearly 0 after so few steps
    "timestep_spacing": "trailing",  # as ours
}


def unet(size: int = 32, classes: int | None = None, **config: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        **{
            "sample_size": size, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
            "block_out_channels": (32, 32), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "num_class_embeds": classes,
            "norm_num_groups": 8,  # of one channel each would remove what depends on t and label
        }
        | config
    )  # fmt: skip


def cli(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"{result.output}{result.exception!r}"
    return " ".join(result.output.split())


# The same images as diffusers


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, str]:
    """A DDPMPipeline, its bundle, and what the export printed."""
    folder = tmp_path_factory.mktemp("plain")
    scheduler = diffusers.DDPMScheduler(**PROCESS, variance_type="fixed_large")
    pipeline = diffusers.DDPMPipeline(unet(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "my-ddpm")
    return pipeline, folder / "b", cli("export", folder / "my-ddpm", "-o", folder / "b")


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, str]:
    """The same with three class embeddings, the last of them for no label."""
    folder = tmp_path_factory.mktemp("conditional")
    scheduler = diffusers.DDPMScheduler(**PROCESS, variance_type="fixed_small")
    pipeline = diffusers.DDPMPipeline(unet(classes=3), scheduler)
    pipeline.save_pretrained(folder / "p")
    printed = cli("export", folder / "p", "-o", folder / "b", "--classes", "cat,dog")
    return pipeline, folder / "b", printed


def draws(count: int) -> tuple[torch.Generator, list[np.ndarray]]:
    """A generator for diffusers, and what it will draw: x_T, then the noise of each step."""
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    noises = [torch.randn(N, 3, 32, 32, generator=generators[0]) for _ in range(count)]
    return generators[1], [noise.numpy() for noise in noises]


def ours(
    path: Path,
    plan: Plan,
    noises: list[np.ndarray],
    label: np.ndarray | None = None,
    offset: int = -1,
) -> np.ndarray:
    """What our loop on ONNX Runtime makes of x_T and the noises of the steps."""
    bundle = Bundle.open(path)
    with OnnxRuntimeEngine(bundle.model()[1], device="cpu") as engine:
        network = Network(engine, replace(bundle.manifest, timestep_offset=offset))
        x, *steps = noises
        *_, last = run_plan(
            plan,
            x.copy(),
            lambda x, t: network(x, t, label),
            lambda stream, row: steps[row],
            bundle.manifest.prediction,
        )
    return last.x


def theirs(
    unet: Any, scheduler: Any, steps: int, label: np.ndarray | None = None, **options: Any
) -> np.ndarray:
    """A pipeline's loop by hand: with a label, and without the final clamp to [0, 1]."""
    generator, (x, *_) = draws(1)
    image = torch.from_numpy(x)
    torch.randn(image.shape, generator=generator)
    scheduler.set_timesteps(steps)
    labels = () if label is None else (torch.from_numpy(label),)
    with torch.no_grad():
        for t in scheduler.timesteps:
            answer = unet.eval()(image, t, *labels).sample
            image = scheduler.step(answer, t, image, generator=generator, **options).prev_sample
    return image.numpy()


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of images in [-1, 1]; some of their pixels must be inside."""
    ours, theirs = (np.clip(images, -1, 1) for images in (ours, theirs))
    assert (np.abs(theirs) < 0.99).mean() > 0.05
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize(
    ("variance", "kind"), [(None, "fixed_large"), ("beta-tilde", "fixed_small")]
)
def test_ddpm_pipeline(plain: tuple[Any, Path, str], variance: str | None, kind: str) -> None:
    pipeline, path, _ = plain
    scheduler = diffusers.DDPMScheduler(**PROCESS, variance_type=kind)
    pipeline = diffusers.DDPMPipeline(pipeline.unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator, noises = draws(1 + T)
    images = pipeline(N, generator, T, output_type="np").images.transpose(0, 3, 1, 2) * 2 - 1
    options = {} if variance is None else {"variance": variance}  # None: what was imported
    plan = Bundle.open(path).manifest.make_plan(sampler="ddpm", **options)
    assert len(plan) == T
    assert difference(ours(path, plan, noises), images) <= IMAGE_TOLERANCE
    assert difference(ours(path, plan, noises, offset=0), images) > 10 * IMAGE_TOLERANCE


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_pipeline(plain: tuple[Any, Path, str], eta: float) -> None:
    pipeline, path, _ = plain
    pipeline = diffusers.DDIMPipeline(pipeline.unet, pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator, noises = draws(1 + 10)
    images = pipeline(
        N, generator, eta, 10, use_clipped_model_output=True, output_type="np"
    ).images.transpose(0, 3, 1, 2) * 2 - 1  # fmt: skip
    plan = Bundle.open(path).manifest.make_plan(sampler="ddim", steps=10, eta=eta)
    assert difference(ours(path, plan, noises), images) <= IMAGE_TOLERANCE


@pytest.mark.parametrize("label", [[0, 1], [2, 1]], ids=["labels", "null label"])
def test_class_conditional(conditional: tuple[Any, Path, str], label: list[int]) -> None:
    pipeline, path, _ = conditional
    labels, manifest = np.array(label), Bundle.open(path).manifest
    _, noises = draws(1 + T)
    scheduler = pipeline.scheduler
    images = theirs(pipeline.unet, scheduler, T, labels)
    assert (
        difference(ours(path, manifest.make_plan(sampler="ddpm"), noises, labels), images) <= 1e-3
    )
    others = ours(path, manifest.make_plan(sampler="ddpm"), noises, labels[::-1].copy())
    assert difference(others, images) > 0.01  # labels matter
    ddim = diffusers.DDIMScheduler.from_config(scheduler.config)
    images = theirs(pipeline.unet, ddim, 10, labels, eta=0.5, use_clipped_model_output=True)
    plan = manifest.make_plan(sampler="ddim", steps=10, eta=0.5)
    assert difference(ours(path, plan, noises, labels), images) <= IMAGE_TOLERANCE


def test_where_diffusers_ddim_differs(plain: tuple[Any, Path, str]) -> None:
    """By default it mixes a clipped x0 with the eps before clipping; ours recomputes eps."""
    pipeline, path, _ = plain
    _, noises = draws(1)
    make_plan = Bundle.open(path).manifest.make_plan
    clipped = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    plan = make_plan(sampler="ddim", steps=10)
    mixed = theirs(pipeline.unet, clipped, 10)
    assert difference(ours(path, plan, noises), mixed) > 0.1
    recomputed = theirs(pipeline.unet, clipped, 10, use_clipped_model_output=True)
    assert difference(ours(path, plan, noises), recomputed) <= IMAGE_TOLERANCE
    free = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    unclipped = theirs(pipeline.unet, free, 10)
    got = ours(path, make_plan(sampler="ddim", steps=10, clip=None), noises)
    # x_T is divided by sqrt(alpha_bar_T) = 0.007: values of a hundred, float32 rounding of those
    assert np.abs(unclipped).max() > 10
    assert np.abs(got - unclipped).max() <= 1e-4 * np.abs(unclipped).max()


# What a bundle says of it


def test_what_is_said_of_a_pipeline(plain: tuple[Any, Path, str]) -> None:
    _, path, printed = plain
    assert (
        "DDPMScheduler: Schedule.linear(T=50, beta_1=0.0001, beta_T=0.35), prediction eps, "
        "variance beta, clip 1 -[v] answers at batch 1"
    ) in printed
    assert f"Next: ddpm-edge sample {path} -n 16 -o samples.png" in printed
    manifest = Bundle.open(path).manifest
    assert (manifest.name, manifest.class_names) == ("my-ddpm", ())
    assert (manifest.prediction, manifest.timestep_offset) == ("eps", -1)
    assert manifest.plan["clip"] == 1.0
    assert manifest.training == {
        "source": f"DDPMPipeline of diffusers {diffusers.__version__}",
        "scheduler": "DDPMScheduler",
    }


def test_names_but_for_the_last_class_make_it_the_null_label(
    conditional: tuple[Any, Path, str], tmp_path: Path
) -> None:
    _, path, printed = conditional
    assert "variance beta-tilde" in printed
    assert Bundle.open(path).manifest.null_label == 2
    cli("sample", path, "-n", 2, "--label", "dog", "--guidance", 2, "--steps", 2,
        "-o", tmp_path / "a.png")  # fmt: skip
    cli("sample", path, "-n", 1, "--steps", 2, "-o", tmp_path / "b.png")


def test_labels_without_a_null_label(tmp_path: Path) -> None:
    folder, path = tmp_path / "bare", tmp_path / "b"
    half = unet(8, classes=2, norm_num_groups=4, block_out_channels=(8, 16)).half()
    half.save_pretrained(folder, variant="fp16")  # is exported in float32
    printed = cli("export", folder, "-o", path, "--schedule", "cosine", "-T", 20)
    assert "No scheduler_config.json: taken Schedule.cosine(T=20" in printed
    assert "prediction eps; --schedule, -T and --prediction say otherwise" in printed
    following = f"Next: ddpm-edge sample {path} --label 0 -n 16 -o samples.png"
    assert following in printed
    manifest = Bundle.open(path).manifest
    assert (manifest.class_names, manifest.null_label) == (("0", "1"), None)
    assert "null label none: every image needs a label" in cli("info", path)
    assert following in cli("verify", path)
    assert following in cli("bench", path, "--batch", 1, "--runs", 1, "--steps", 2)
    cli("sample", path, "--label", 0, "-n", 2, "--steps", 2, "-o", tmp_path / "a.png")
    refused = cli("sample", path, "-n", 2, "-o", tmp_path / "a.png", code=2)
    assert "knows no images without a label, and got none; give one of its labels, 0 0, 1 1" in (
        refused
    )
    with Generator.load(path) as generator:
        generator.warmup(2)
        assert all(comparison.passed for comparison in generator.verify())


# Schedules

RULES = {
    "linear": "linear", "scaled_linear": "betas", "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid", "laplace": "betas", "exp": "constant",
}  # fmt: skip
MAKERS = {"sigmoid": "DDPMScheduler", "laplace": "DDPMScheduler", "exp": "HeunDiscreteScheduler"}
SCHEDULERS = [
    "DDIMInverseScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler",
    "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler",
    "UniPCMultistepScheduler",
]  # fmt: skip


def process(folder: Path, scheduler: str, **config: Any) -> tuple[Any, from_diffusers.Process]:
    """A scheduler of diffusers, and what is read of the file that it saves."""
    getattr(diffusers, scheduler)().save_pretrained(folder)
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    made = from_diffusers._scheduler(path, None)
    return made, from_diffusers._process(path, made)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [1000, 100])
@pytest.mark.filterwarnings("ignore::ddpm_edge.schedule.ScheduleWarning")  # as diffusers has it
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, for diffusers
def test_every_beta_schedule(tmp_path: Path, rule: str, steps: int) -> None:
    made, read = process(
        tmp_path, MAKERS.get(rule, "DDIMScheduler"), beta_schedule=rule, num_train_timesteps=steps
    )
    schedule = read.schedule
    assert schedule.to_dict()["rule"] == RULES[rule]
    assert len(schedule.alpha_bar) == steps + 1
    error = np.abs(schedule.alpha_bar[1:] - made.alphas_cumprod.double().numpy())
    assert (error <= float32_rounding(schedule)).all()
    assert (error <= 2e-5).all()  # 1000 roundings of 6e-8 do not all go one way


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.filterwarnings("ignore::ddpm_edge.schedule.ScheduleWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, for diffusers
def test_every_scheduler(tmp_path: Path, scheduler: str) -> None:
    for rule in ("scaled_linear", "squaredcos_cap_v2", "linear"):
        config = {"beta_schedule": rule, "beta_start": 0.001, "beta_end": 0.02}
        config["num_train_timesteps"] = 200
        made, read = process(tmp_path, scheduler, **config)
        schedule, prediction, clip, variance, _ = read
        error = np.abs(schedule.alpha_bar[1:] - made.alphas_cumprod.double().numpy())
        assert (error <= float32_rounding(schedule)).all()
    assert schedule.to_dict() == Schedule.linear(200, 0.001, 0.02).to_dict()
    assert prediction == "eps"
    assert variance == ("beta-tilde" if scheduler.startswith("DDPM") else "beta")
    assert clip == (None if made.config.get("clip_sample", True) is False else 1.0)


def test_trained_betas(tmp_path: Path) -> None:
    betas = np.linspace(0.001, 0.35, T).tolist()
    made, read = process(tmp_path, "DDPMScheduler", trained_betas=betas, num_train_timesteps=T)
    schedule = read.schedule
    assert schedule.to_dict() == {"rule": "betas", "betas": betas}
    error = np.abs(schedule.alpha_bar[1:] - made.alphas_cumprod.double().numpy())
    assert (error <= float32_rounding(schedule)).all()


@pytest.mark.parametrize(
    ("config", "prediction", "clip", "variance"),
    [
        ({"prediction_type": "sample"}, "x0", 1.0, "beta-tilde"),
        ({"prediction_type": "v_prediction"}, "v", 1.0, "beta-tilde"),
        ({"clip_sample": False}, "eps", None, "beta-tilde"),
        ({"clip_sample_range": 2.5}, "eps", 2.5, "beta-tilde"),
        ({"thresholding": True, "clip_sample": False}, "eps", 1.0, "beta-tilde"),
        ({"variance_type": "fixed_small_log"}, "eps", 1.0, "beta-tilde"),
        ({"variance_type": "fixed_large"}, "eps", 1.0, "beta"),
        ({"timestep_spacing": "linspace", "steps_offset": 1}, "eps", 1.0, "beta-tilde"),
    ],
)
def test_scheduler_settings(
    tmp_path: Path, config: dict[str, Any], prediction: str, clip: float | None, variance: str
) -> None:
    _, read = process(tmp_path, "DDPMScheduler", **config)
    assert read[1:] == (prediction, clip, variance, -1)


def test_flow_matching(tmp_path: Path) -> None:
    """Euler at the same timesteps: with 10 of them, evenly from 1000 to 1, all are whole."""
    shape, steps = (3, 8, 8), 10
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000)
    network = unet(8, norm_num_groups=4, block_out_channels=(8, 16)).eval()
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(tmp_path)
    imported = read_diffusers(tmp_path)
    process = imported.process
    assert (process.prediction, process.timestep_offset, process.clip) == ("velocity", 0, 1.0)
    assert process.schedule.to_dict() == {"rule": "rectified-flow", "T": 1000}
    scheduler.set_timesteps(steps)
    x0 = np.random.default_rng(0).standard_normal((N, *shape)).astype(np.float32)
    image = torch.from_numpy(x0)
    with torch.no_grad():
        for t in scheduler.timesteps:
            image = scheduler.step(network(image, t).sample, t, image).prev_sample
    manifest = Manifest(
        "flow", shape, process.schedule, "velocity", 0, (), {"sampler": "euler"}, {}
    )
    ours = Network(TorchEngine(imported.network, shape, False), manifest)
    plan = manifest.make_plan(steps=steps, spacing="linspace")
    *_, last = run_plan(plan, x0.copy(), lambda x, t: ours(x, t, None), None, "velocity")
    assert np.abs(last.x - image.numpy()).max() <= 1e-4  # float32 rounding through ten evaluations


@pytest.mark.parametrize(
    ("scheduler", "config", "message"),
    [
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type 'learned', which is not"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "expected fixed_small, fixed_small"),
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}, "variance_type 'fixed_large_log'"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True.*alpha_b"),
        ("DDPMScheduler", {"predict_epsilon": False}, "predict_epsilon False.*'sample' instead"),
        ("DDPMScheduler", {"prediction_type": "score"}, "'score'.*epsilon, sample, v_prediction"),
        ("DDPMScheduler", {"thresholding": True, "sample_max_value": 1.5}, "sample_max_value 1.5"),
        ("DDPMScheduler", {"thresholding": True, "sample_max_value": None}, "max_value None"),
        ("DDPMScheduler", {"variance_type": ["x"]}, r"variance_type \['x'\], which is not"),
        ("DDPMScheduler", {"prediction_type": ["x"]}, r"prediction_type \['x'\], which is not"),
        ("DDPMScheduler", {"clip_sample": "false"}, "clip_sample .false., .*true or false"),
        ("DDPMScheduler", {"clip_sample_range": float("nan")}, "clip_sample_range nan"),
        ("DDPMScheduler", {"clip_sample_range": 0}, "clip_sample_range 0.*a number above 0"),
        ("DDPMScheduler", {"clip_sample_range": "1"}, "clip_sample_range '1'"),
        ("DDPMScheduler", {"beta_schedule": "mine"}, "cannot make its DDPMScheduler.*mine is not"),
        ("DDPMScheduler", {"beta_end": 1.5}, "schedule that is not supported: beta_T must be fini"),
        ("DDPMScheduler", {"beta_end": "x"}, "cannot make its DDPMScheduler.*: TypeError"),
        ("DDPMScheduler", {"trained_betas": [0.1, 2]}, "schedule that is not supported.*beta_2"),
        ("DDPMScheduler", {"trained_betas": [0.1] * 9}, "alphas_cumprod of DDPMScheduler are not"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type 'continuous'"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas True"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "'flow_prediction'"),
        ("CogVideoXDDIMScheduler", {}, "alphas_cumprod of CogVideoXDDIMScheduler are not those"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas True"),
        ("ScoreSdeVeScheduler", {}, "ScoreSdeVeScheduler, whose forward process has no betas"),
        ("DDPMScheduler", {"_class_name": "MyScheduler"}, "of MyScheduler, which is no scheduler"),
        ("DDPMScheduler", {"_class_name": "UNet2DModel"}, "of UNet2DModel, which is no scheduler"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::ddpm_edge.schedule.ScheduleWarning")
def test_schedulers_that_are_refused(
    tmp_path: Path, scheduler: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        process(tmp_path, scheduler, **config)


# Layouts and files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline, to copy and to damage."""
    folder = tmp_path_factory.mktemp("saved") / "p"
    model = unet(8, norm_num_groups=4, block_out_channels=(8, 16))
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "p"))


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(folder: Path) -> dict[str, Any]:
    return dict(read_diffusers(folder).network.state_dict())


def same(a: dict[str, Any], b: dict[str, Any], tolerance: float = 0.0) -> bool:
    return a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= tolerance for k in a)


def flat(folder: Path) -> None:
    for part in ("unet", "scheduler"):
        for path in (folder / part).iterdir():
            path.rename(folder / path.name)
        (folder / part).rmdir()


def as_bin(folder: Path) -> None:
    path = folder / "unet" / f"{WEIGHTS}.safetensors"
    torch.save(safetensors.torch.load_file(path), path.with_name(f"{WEIGHTS}.bin"))
    path.unlink()


def saved_anew(**options: Any) -> Any:
    def change(folder: Path) -> None:
        model = read_diffusers(folder).network
        (folder / "unet" / f"{WEIGHTS}.safetensors").unlink()
        model.save_pretrained(folder / "unet", **options)

    return change


def old_names(folder: Path) -> None:
    """The attention's names of the time of google/ddpm-cifar10-32."""
    path = folder / "unet" / f"{WEIGHTS}.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = safetensors.torch.load_file(path)
    for new, name in old.items():
        weights = {k.replace(new, name): v for k, v in weights.items()}
    assert any("proj_attn" in k for k in weights)
    safetensors.torch.save_file(weights, path)


@pytest.mark.parametrize(
    ("change", "files"),
    [
        (flat, [f"{WEIGHTS}.safetensors"]),
        (as_bin, [f"{WEIGHTS}.bin"]),
        (
            saved_anew(max_shard_size="100KB"),
            [f"{WEIGHTS}-00001-of-00002.safetensors", f"{WEIGHTS}.safetensors.index.json"],
        ),
        (
            saved_anew(max_shard_size="100KB", variant="fp16"),
            [f"{WEIGHTS}.fp16-00001-of-00002.safetensors"],
        ),
        (
            saved_anew(max_shard_size="100KB", safe_serialization=False),
            [f"{WEIGHTS}.bin.index.json"],
        ),
        (saved_anew(variant="fp16"), [f"{WEIGHTS}.fp16.safetensors"]),
        (saved_anew(variant="ema", safe_serialization=False), [f"{WEIGHTS}.ema.bin"]),
        (old_names, [f"{WEIGHTS}.safetensors"]),
    ],
    ids=["flat", "bin", "shards", "shards fp16", "shards bin", "fp16", "ema bin", "old names"],
)  # fmt: skip
def test_layouts(
    folder: Path, saved: Path, change: Any, files: list[str],
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    change(folder)
    assert set(files) <= {path.name for path in folder.rglob("*")}
    capfd.readouterr()
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("network"))
    assert same(tensors(folder), tensors(saved))
    assert capfd.readouterr() == ("", "")


def test_the_plain_weights_come_before_variants_and_pickles(folder: Path, saved: Path) -> None:
    for name in (f"{WEIGHTS}.fp16.safetensors", f"{WEIGHTS}.bin"):
        (folder / "unet" / name).write_bytes(b"not read")
    assert same(tensors(folder), tensors(saved))


def test_export_diffusers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(folder / "scheduler" / "scheduler_config.json", clip_sample=False)
    got: dict[str, Any] = {}
    monkeypatch.setattr(from_diffusers, "export", lambda *_, **arguments: got.update(arguments))
    export_diffusers(folder, "b", plan={"steps": 3}, licence="MIT")
    assert (got["name"], got["licence"]) == ("p", "MIT")
    assert (got["plan"], got["variance"]) == ({"clip": None, "steps": 3}, "beta-tilde")
    export_diffusers(folder, "b", plan={"clip": 2.0}, name="mine")
    assert (got["name"], got["plan"]) == ("mine", {"clip": 2.0})


def test_a_bare_network_and_its_arguments(folder: Path) -> None:
    read = read_diffusers(folder / "unet")
    assert read.process.schedule.to_dict() == Schedule.linear().to_dict()
    assert read.process[1:] == ("eps", 1.0, "beta", -1)
    assert (read.scheduler, read.name) == (None, "unet")
    assert read.sample_shape == (3, 8, 8)
    read = read_diffusers(folder / "unet", schedule=Schedule.cosine(10), prediction="v")
    assert (read.process.schedule.T, read.process.prediction) == (10, "v")
    for given in ({"schedule": Schedule.linear()}, {"prediction": "eps"}):
        with pytest.raises(ConfigError, match="has a scheduler that says schedule and prediction"):
            read_diffusers(folder, **given)
    message = cli("export", folder, "-o", folder / "b", "--weights", "w", code=2)
    assert "--weights go with --model" in message
    message = cli("export", folder, "-o", folder / "b", "-T", 1000, code=2)
    assert "has a scheduler that says schedule and prediction" in message


def test_shape(folder: Path) -> None:
    config = folder / "unet" / "config.json"
    rewrite(config, sample_size=[8, 16])
    assert read_diffusers(folder).sample_shape == (3, 8, 16)
    assert read_diffusers(folder, sample_shape=(3, 24, 16)).sample_shape == (3, 24, 16)
    with pytest.raises(ConfigError, match="shape 1x8x8 has 1 channels; .*says in_channels 3"):
        read_diffusers(folder, sample_shape=(1, 8, 8))
    for size in (None, [8], "8", [8, 0]):
        rewrite(config, sample_size=size)
        with pytest.raises(ConfigError, match="expected one number or two; say the shape: --sha"):
            read_diffusers(folder)


def test_class_names(tmp_path: Path) -> None:
    model = unet(8, classes=3, norm_num_groups=4, block_out_channels=(8, 16))
    model.save_pretrained(tmp_path)
    for names, has in ((["a", "b", "c"], False), (["a", "b"], True)):
        read = read_diffusers(tmp_path, class_names=names)
        assert (read.class_names, read.has_null_label) == (tuple(names), has)
    assert read_diffusers(tmp_path).class_names == ("0", "1", "2")
    with pytest.raises(ConfigError, match="got 1 class names for the 3 class embeddings of .*or 2"):
        read_diffusers(tmp_path, class_names=["a"])


# Refusals


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def damage(name: str, text: str = "{") -> Any:
    return lambda folder: (folder / name).write_text(text)


def network(**changes: Any) -> Any:
    return lambda folder: rewrite(folder / "unet" / "config.json", **changes)


def index(**changes: Any) -> Any:
    return lambda folder: rewrite(folder / "model_index.json", **changes)


def replaced(**config: Any) -> Any:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / "unet")
        unet(8, norm_num_groups=4, block_out_channels=(8, 16), **config).save_pretrained(
            folder / "unet"
        )

    return change


def variants(folder: Path) -> None:
    path = folder / "unet" / f"{WEIGHTS}.safetensors"
    for name in ("fp16", "bf16"):
        shutil.copy(path, path.with_name(f"{WEIGHTS}.{name}.safetensors"))
    path.unlink()


def lost_tensor(folder: Path) -> None:
    path = folder / "unet" / f"{WEIGHTS}.safetensors"
    weights = safetensors.torch.load_file(path)
    del weights["conv_in.weight"]
    safetensors.torch.save_file(weights, path)


def lost_shard(folder: Path) -> None:
    saved_anew(max_shard_size="100KB")(folder)
    (folder / "unet" / f"{WEIGHTS}-00002-of-00002.safetensors").unlink()


def lost_in_a_shard(folder: Path) -> None:
    """The index lists what its shard does not hold."""
    saved_anew(max_shard_size="100KB")(folder)
    path = folder / "unet" / f"{WEIGHTS}-00002-of-00002.safetensors"
    weights = safetensors.torch.load_file(path)
    weights.popitem()
    safetensors.torch.save_file(weights, path)


def truncated(folder: Path) -> None:
    os.truncate(folder / "unet" / f"{WEIGHTS}.safetensors", 5000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("unet/config.json"), r"unet.config.json is missing; save or download the whole"),
        (remove("scheduler/scheduler_config.json"), r"scheduler.scheduler_config.json is missing"),
        (remove(f"unet/{WEIGHTS}.safetensors"), f"no weights: {WEIGHTS}.safetensors is missing"),
        (damage("unet/config.json"), r"unet.config.json is not valid JSON: .*download it again"),
        (damage("scheduler/scheduler_config.json", "[]"), "must hold a JSON object; got list"),
        (damage("model_index.json", "unet"), "model_index.json is not valid JSON: Expecting value"),
        (damage("model_index.json", "{}"), r"says unet = \[\]; expected a pipeline of 'unet'"),
        (truncated, "cannot load the UNet2DModel in .*download the folder again"),
        (damage(f"unet/{WEIGHTS}.safetensors", "version https://git-lfs"), "git-lfs installed"),
        (lost_tensor, "do not fit its config.json: conv_in.weight is missing .1 in all"),
        (lost_shard, "cannot load .*00002-of-00002.safetensors"),
        (lost_in_a_shard, "do not fit its config.json: .* is missing .1 in all"),
        (variants, "only variants of the weights, bf16, fp16; leave one of them there"),
        (network(layers_per_block=2), "cannot load the UNet2DModel.*expected shape"),
        (network(num_class_embeds=3), "do not fit its config.json: class_embedding.weight is mi"),
        (network(add_attention=False), "do not fit its config.json: .* is not in the network"),
        (network(block_out_channels=[8, 8]), "cannot load the UNet2DModel.*expected shape"),
        (network(_class_name="UNet2DConditionModel"), "of a UNet2DConditionModel, which is not su"),
        (network(_class_name=None), "of a None, which is not supported; expected a UNet2DModel"),
        (index(unet=["diffusers", "UNet1DModel"]), "has a UNet1DModel, which is not supported"),
        (index(unet=["mine", "UNet2DModel"]), r"says unet = \['mine', 'UNet2DModel'\]; expected"),
        (index(scheduler=[None, None]), r"says scheduler = \[\]; expected a pipeline of 'unet'"),
        (index(vqvae=["diffusers", "VQModel"]), "has a 'vqvae', .*expected a pipeline of 'unet'"),
        (replaced(class_embed_type="timestep"), "class_embed_type 'timestep'"),
        (replaced(class_embed_type="identity"), "class_embed_type 'identity'"),
        (replaced(time_embedding_type="fourier"), "time_embedding_type 'fourier', which divides"),
        (replaced(time_embedding_type="learned", num_train_timesteps=9), "of 9 ti.*fed 0..999"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(folder: Path, change: Any, message: str) -> None:
    change(folder)
    with pytest.raises(ExportError, match=message):
        read_diffusers(folder)


def test_flow_matching_needs_an_embedding_of_t_too(tmp_path: Path) -> None:
    network = unet(8, norm_num_groups=4, block_out_channels=(8, 16),
                   time_embedding_type="learned", num_train_timesteps=50)  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(50)
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=r"embeddings of 50 timesteps .* is fed 0\.\.50"):
        read_diffusers(tmp_path)


def test_a_learned_variance_is_refused(tmp_path: Path) -> None:
    unet(8, out_channels=6, norm_num_groups=4, block_out_channels=(8, 16)).save_pretrained(tmp_path)
    message = cli("export", tmp_path, "-o", tmp_path / "b", code=1)
    assert "twice the channels means a learned variance, which is not supported" in message


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["DDPM_EDGE_TEST_TARGET"],)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_cannot_run_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_format: bool
) -> None:
    monkeypatch.setenv("DDPM_EDGE_TEST_TARGET", str(tmp_path / "it-ran"))
    as_bin(folder)
    path = folder / "unet" / f"{WEIGHTS}.bin"
    weights = {**torch.load(path, weights_only=True), "more": Malicious()}
    torch.save(weights, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ExportError, match="only plain tensors are read.*get the model as .safeten"):
        read_diffusers(folder)
    assert not (tmp_path / "it-ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "it-ran").exists()  # it would have run


def test_neither_a_run_nor_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = cli("export", "google/ddpm-cifar10-32", "-o", "b", code=1)
    assert (
        "there is no folder google/ddpm-cifar10-32; if it is a model of the Hugging Face Hub, "
        "download it first: hf download google/ddpm-cifar10-32 --local-dir ddpm-cifar10-32"
    ) in message
    (tmp_path / "other").mkdir()
    for text in (None, "{}"):
        if text:
            (tmp_path / "other" / "config.json").write_text(text)
        for name in ("other", "nothing"):
            message = cli("export", name, "-o", "b", code=1)
            assert f"{name} is not a training run, which has a config.json with 'format'" in message
            assert "nor a folder of diffusers, which has a model_index.json" in message
    (tmp_path / "other" / "config.json").write_text('{"format": 1}')
    with pytest.raises(ExportError, match="is a training run of ddpm-edge: use export_run"):
        export_diffusers("other", "b")


def test_without_diffusers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'ddpm-edge\[diffusers\]'"):
        read_diffusers(folder)


# Of real size


CIFAR10 = {
    "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-6, "flip_sin_to_cos": False,
    "freq_shift": 1, "downsample_padding": 0, "attention_head_dim": None,
    "center_input_sample": False, "mid_block_scale_factor": 1,
    "time_embedding_type": "positional",
}  # fmt: skip


@pytest.mark.slow
def test_the_network_of_google_ddpm_cifar10_32(tmp_path: Path) -> None:
    folder = tmp_path / "ddpm-cifar10-32"
    pipeline = diffusers.DDPMPipeline(
        unet(**CIFAR10), diffusers.DDPMScheduler(variance_type="fixed_large")
    )
    pipeline.save_pretrained(folder)
    flat(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", f"{WEIGHTS}.safetensors", "model_index.json", "scheduler_config.json",
    ]  # fmt: skip
    assert "-[v] Algorithm 2, last 50 steps" in cli("export", folder, "-o", tmp_path / "b")
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.schedule.to_dict() == Schedule.linear().to_dict()
    assert (manifest.name, manifest.variance) == ("ddpm-cifar10-32", "beta")
