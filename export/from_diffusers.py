"""A folder that diffusers saved, as what `export` takes: network, schedule, and how to sample it.

Read are a pipeline (`model_index.json`, with `unet/` and `scheduler/` or with all files beside it)
and a bare `UNet2DModel`, whose forward process the caller must know. Only what defines the model is
taken; keys that say how diffusers samples (`timestep_spacing`, `steps_offset`, `solver_order`, ...)
are not. Nothing is downloaded, and no pickled code runs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ddpm_edge import checks
from ddpm_edge.arrays import Float64
from ddpm_edge.bundle import Bundle
from ddpm_edge.errors import ConfigError, ExportError, RuntimeUnavailableError, ScheduleError
from ddpm_edge.export.pipeline import export
from ddpm_edge.export.to_onnx import quiet
from ddpm_edge.plan import Clip
from ddpm_edge.schedule import Schedule

if TYPE_CHECKING:
    from torch import nn

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER = "scheduler_config.json"
NETWORK = "UNet2DModel"
WEIGHTS = "diffusion_pytorch_model"
WEIGHTS_FILE = re.compile(
    rf"{WEIGHTS}(?:\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)"
    r"(?:\.index(?:\.(?P<of_shards>\w+))?\.json)?"
)
PREDICTION_TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCE_TYPES = {
    "fixed_small": "beta-tilde", "fixed_small_log": "beta-tilde", "fixed_large": "beta",
    None: "beta",
}  # fmt: skip
# Settings that change what the network is asked or trained for: the values that can be taken over.
# (A scheduler without the key is fine.)
NEEDED: dict[str, tuple[Any, str]] = {
    "rescale_betas_zero_snr": (False, "it makes alpha_bar_T 0, where eps tells nothing of x0"),
    "predict_epsilon": (True, "an old spelling; write prediction_type 'sample' instead"),
    "use_flow_sigmas": (False, "flow matching"),
    "timestep_type": ("discrete", "the network would be fed another number than t - 1"),
}


class Process(NamedTuple):
    """What a scheduler says of the model, not of how diffusers samples it.

    Attributes:
        schedule: the forward process.
        prediction: what the network answers, one of `ddpm_edge.plan.PREDICTIONS`.
        clip: limit of x0 in the default plan; None = off.
        variance: of sampler "ddpm", "beta" or "beta-tilde".
        timestep_offset: the network is fed t + offset, t in 1..T.
    """

    schedule: Schedule
    prediction: str
    clip: float | None = 1.0
    variance: str = "beta"
    timestep_offset: int = -1  # diffusers counts from 0


@dataclass(frozen=True)
class Imported:
    """What a folder of diffusers holds.

    Attributes:
        network: the UNet2DModel, on the CPU, in evaluation mode.
        process: what its scheduler says, or what was given or assumed.
        sample_shape: (C, H, W).
        class_names: one a label; empty = no labels.
        has_null_label: whether the last embedding stands for "no label".
        name: of the folder.
        scheduler: its class; None = the folder has none.
        provenance: how the weights came to be, for the bundle.
    """

    network: nn.Module
    process: Process
    sample_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    has_null_label: bool
    name: str
    scheduler: str | None
    provenance: Mapping[str, Any]

    def export(
        self, path: str | Path, *, plan: Mapping[str, Any] | None = None, **arguments: Any
    ) -> Bundle:
        """Export it as a bundle; arguments and errors as for `ddpm_edge.export.export`."""
        process = self.process
        return export(
            self.network,
            process.schedule,
            path,
            sample_shape=self.sample_shape,
            prediction=process.prediction,
            timestep_offset=process.timestep_offset,
            class_names=self.class_names,
            has_null_label=self.has_null_label,
            variance=process.variance,
            plan={"clip": process.clip, **(plan or {})},
            training=self.provenance,
            **{"name": self.name, **arguments},
        )


def export_diffusers(
    folder: str | Path,
    path: str | Path,
    *,
    schedule: Schedule | None = None,
    prediction: str | None = None,
    sample_shape: tuple[int, int, int] | None = None,
    class_names: Sequence[str] = (),
    **arguments: Any,
) -> Bundle:
    """Export a folder that diffusers saved; see `read_diffusers` and `export` for the arguments.

    Raises:
        ExportError: the folder, its network or its scheduler cannot be taken over as it is.
        ConfigError: an argument that does not go with the folder.
        RuntimeUnavailableError: diffusers, or another package that export needs, is missing.
    """
    read = read_diffusers(
        folder,
        schedule=schedule,
        prediction=prediction,
        sample_shape=sample_shape,
        class_names=class_names,
    )
    return read.export(path, **arguments)


def read_diffusers(
    folder: str | Path,
    *,
    schedule: Schedule | None = None,
    prediction: str | None = None,
    sample_shape: tuple[int, int, int] | None = None,
    class_names: Sequence[str] = (),
) -> Imported:
    """Read a folder that diffusers saved.

    Args:
        folder: a pipeline, or a bare UNet2DModel.
        schedule: a bare network's forward process; None = `Schedule.linear()`.
        prediction: what a bare network answers; None = "eps".
        sample_shape: (C, H, W), for a network whose config has no sample_size, or another size.
        class_names: a name for each of the N class embeddings; N - 1 names say that the last one
            stands for "no label". Empty = "0".."N-1".

    Raises:
        ExportError, ConfigError, RuntimeUnavailableError: as `export_diffusers`.
    """
    folder = Path(folder)
    if not is_diffusers(folder):
        raise ExportError(f"{folder} is a training run of ddpm-edge: use export_run")
    index = _index(folder)
    unet, beside = _part(folder, "unet"), _part(folder, "scheduler") / SCHEDULER
    network = _network(unet)
    config = network.config
    names, has_null_label = _labels(unet, config, class_names)
    shape = _sample_shape(unet, config, sample_shape)
    if "scheduler" in index or beside.is_file():
        if schedule is not None or prediction is not None:
            raise ConfigError(
                f"{folder} has a scheduler that says schedule and prediction; leave yours out, or "
                f"give the bare network, {unet}"
            )
        scheduler = _scheduler(beside, index.get("scheduler", [None, None])[1])
        process = _process(beside, scheduler)
        scheduler_name = type(scheduler).__name__
    else:
        process = Process(schedule or Schedule.linear(), prediction or "eps")
        scheduler_name = None
    _check_time_embedding(unet, config, process)
    saved_by = index.get("_diffusers_version", config.get("_diffusers_version", "?"))
    return Imported(
        network=network,
        process=process,
        sample_shape=shape,
        class_names=names,
        has_null_label=has_null_label,
        name=folder.resolve().name,
        scheduler=scheduler_name,
        provenance={
            "source": f"{index.get('_class_name', NETWORK)} of diffusers {saved_by}",
            "scheduler": scheduler_name or "none in the folder",
        },
    )


def is_diffusers(folder: Path) -> bool:
    """Whether a folder is one of diffusers rather than a training run of ddpm-edge.

    Raises:
        ExportError: it is neither.
    """
    if (folder / INDEX).is_file():
        return True
    config = _json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "_class_name" in config:
        return True
    if "format" in config or "network" in config:
        return False
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        raise ExportError(
            f"there is no folder {folder}; if it is a model of the Hugging Face Hub, download it "
            f"first: hf download {folder} --local-dir {folder.name}"
        )
    raise ExportError(
        f"{folder} is not a training run, which has a {CONFIG} with 'format' (what `ddpm-edge "
        f"train -o` writes), nor a folder of diffusers, which has a {INDEX} or a {CONFIG} with "
        "'_class_name' (what `save_pretrained` writes); give one of these, or --model"
    )


# The folder


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ExportError(f"{path} is missing; save or download the whole folder") from error
    except (ValueError, RecursionError) as error:
        raise ExportError(
            f"{path} is not valid JSON: {error}; save or download it again"
        ) from error
    if not isinstance(document, dict):
        raise ExportError(f"{path} must hold a JSON object; got {type(document).__name__}")
    return document


def _part(folder: Path, name: str) -> Path:
    """Where a part of the pipeline is: its own folder, or the same in the flat layout."""
    return folder / name if (folder / name).is_dir() else folder


def _index(folder: Path) -> dict[str, Any]:
    """The index of a pipeline of a UNet2DModel and a scheduler; empty for a bare network."""
    if not (folder / INDEX).is_file():
        return {}
    index = _json(folder / INDEX)
    parts = {
        name: value
        for name, value in index.items()
        if isinstance(value, list) and any(item is not None for item in value)
    }
    expected = f"expected a pipeline of 'unet' ({NETWORK}) and 'scheduler', as DDPMPipeline is"
    for name in parts.keys() - {"unet", "scheduler"}:
        raise ExportError(f"{folder / INDEX} has a {name!r}, {parts[name]}; {expected}")
    for name in ("unet", "scheduler"):
        value = parts.get(name, [])
        if len(value) != 2 or value[0] != "diffusers":
            raise ExportError(f"{folder / INDEX} says {name} = {value}; {expected}")
    if parts["unet"][1] != NETWORK:
        raise ExportError(
            f"{folder / INDEX} has a {parts['unet'][1]}, which is not supported; {expected}"
        )
    return index


# The network


def _diffusers() -> Any:
    try:
        with quiet("diffusers"):
            import diffusers
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"reading a folder of diffusers needs diffusers ({error}); "
            "pip install 'ddpm-edge[diffusers]'"
        ) from error
    return diffusers


def _network(folder: Path) -> Any:
    """The UNet2DModel in `folder`, every tensor of it from the weights file."""
    name = _json(folder / CONFIG).get("_class_name")
    if name != NETWORK:
        raise ExportError(
            f"{folder / CONFIG} is of a {name}, which is not supported; expected a {NETWORK}"
        )
    kind, variant = _weights(folder)
    diffusers = _diffusers()
    try:
        with quiet("diffusers", "accelerate"):
            network, info = diffusers.UNet2DModel.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=kind == "safetensors",
                variant=variant,
                low_cpu_mem_usage=True,  # what no file gives stays "meta", not random
                output_loading_info=True,
            )
    except Exception as error:  # whatever diffusers, safetensors and torch raise
        remedy = "save or download the folder again"
        if kind == "bin":  # diffusers reads it with torch.load(weights_only=True)
            remedy += (
                "; of a .bin file, which is a pickle, only plain tensors are read, because the "
                "rest could run any code: get the model as .safetensors"
            )
        raise ExportError(
            f"diffusers cannot load the {NETWORK} in {folder} ({kind}): {type(error).__name__}: "
            f"{error}; {remedy}"
        ) from error
    missing = [name for name, tensor in network.named_parameters() if tensor.is_meta]
    if missing or info["unexpected_keys"]:
        wrong = [f"{name} is missing" for name in missing]
        wrong += [f"{name} is not in the network" for name in sorted(info["unexpected_keys"])]
        raise ExportError(
            f"the weights in {folder} do not fit its {CONFIG}: {wrong[0]} ({len(wrong)} in all); "
            "save or download the folder again"
        )
    return network


def _weights(folder: Path) -> tuple[str, str | None]:
    """Which weights to read: "safetensors" or "bin", and the variant, such as "fp16", or None."""
    found = [match for path in folder.iterdir() if (match := WEIGHTS_FILE.fullmatch(path.name))]
    kinds: dict[str | None, set[str]] = {}
    for match in found:
        kinds.setdefault(match["variant"] or match["of_shards"], set()).add(match["kind"])
    if not kinds:
        raise ExportError(
            f"{folder} has no weights: {WEIGHTS}.safetensors is missing; save or download the "
            "whole folder"
        )
    if None not in kinds and len(kinds) > 1:
        raise ExportError(
            f"{folder} has only variants of the weights, {', '.join(sorted(map(str, kinds)))}; "
            "leave one of them there, or add the full weights"
        )
    variant = None if None in kinds else next(iter(kinds))
    return max(kinds[variant]), variant  # "safetensors" > "bin"


def _sample_shape(
    folder: Path, config: Mapping[str, Any], given: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    channels, size = config["in_channels"], config["sample_size"]
    if given is not None:
        if given[0] != channels:
            raise ConfigError(
                f"the shape {'x'.join(map(str, given))} has {given[0]} channels; {folder / CONFIG} "
                f"says in_channels {channels}"
            )
        return given
    pair = [size, size] if isinstance(size, int) else size
    if not (
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and all(isinstance(n, int) and n > 0 for n in pair)
    ):
        raise ConfigError(
            f"{folder / CONFIG} has sample_size {size!r}, expected one number or two; say the "
            f"shape: --shape {channels}xHxW"
        )
    return channels, pair[0], pair[1]


def _labels(
    folder: Path, config: Mapping[str, Any], given: Sequence[str]
) -> tuple[tuple[str, ...], bool]:
    """The names of the labels, and whether there is a null label beside them."""
    kind, count = config["class_embed_type"], config["num_class_embeds"]
    if kind is not None:
        raise ExportError(
            f"{folder / CONFIG} has class_embed_type {kind!r}, which takes something else than a "
            "label's number; expected null with num_class_embeds"
        )
    if count is None:
        if given:
            raise ConfigError(f"{folder} takes no label, got {len(given)} class names; leave them")
        return (), True
    if given and len(given) not in (count, count - 1):
        raise ConfigError(
            f"got {len(given)} class names for the {count} class embeddings of {folder}; give "
            f"{count}, or {count - 1} where the last one stands for no label"
        )
    names = tuple(given) or tuple(str(i) for i in range(count))
    return names, len(names) < count


def _check_time_embedding(folder: Path, config: Mapping[str, Any], process: Process) -> None:
    kind, rows = config["time_embedding_type"], config["num_train_timesteps"]
    if kind == "fourier":
        raise ExportError(
            f"{folder / CONFIG} has time_embedding_type 'fourier', which divides by a noise level "
            "instead of taking a timestep; expected 'positional' or 'learned'"
        )
    if kind == "learned" and rows != process.schedule.T + process.timestep_offset + 1:
        raise ExportError(
            f"{folder / CONFIG} has embeddings of {rows} timesteps (num_train_timesteps), but is "
            f"fed 0..{process.schedule.T + process.timestep_offset}; expected as many"
        )


# The scheduler


def _scheduler(path: Path, name: str | None) -> Any:
    """The scheduler that diffusers makes of its config: keys left out get its class's defaults."""
    document = _json(path)
    name = str(name or document.get("_class_name"))
    diffusers = _diffusers()
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ExportError(
            f"{path} is of {name}, which is no scheduler of diffusers {diffusers.__version__} as "
            "it is installed here; expected one such as DDPMScheduler"
        )
    try:
        with quiet("diffusers"):
            return kind.from_config(document)  # type: ignore[attr-defined]  # from ConfigMixin
    except Exception as error:  # whatever it raises for a value that it does not take
        raise ExportError(
            f"diffusers cannot make its {name} from {path}: {type(error).__name__}: {error}"
        ) from error


def _process(path: Path, scheduler: Any) -> Process:
    """What a scheduler says of the model."""
    config, name = scheduler.config, type(scheduler).__name__
    if name == "FlowMatchEulerDiscreteScheduler":
        if config.get("invert_sigmas"):
            raise _refusal(path, "invert_sigmas", True, "False")
        flow = Schedule.rectified_flow(config["num_train_timesteps"])
        return Process(flow, "velocity", timestep_offset=0)  # it is fed T sigma
    if "beta_schedule" not in config:
        raise ExportError(
            f"{path} is of {name}, whose forward process has no betas; expected a scheduler with a "
            "beta_schedule, such as DDPMScheduler, or FlowMatchEulerDiscreteScheduler"
        )
    for key, (needed, why) in NEEDED.items():
        value = config.get(key)
        if value is not None and value != needed:
            raise _refusal(path, key, value, f"{needed!r} ({why})")
    prediction, variance = config.get("prediction_type", "epsilon"), config.get("variance_type")
    if not isinstance(prediction, str) or prediction not in PREDICTION_TYPES:
        raise _refusal(path, "prediction_type", prediction, ", ".join(PREDICTION_TYPES))
    if not isinstance(variance, (str, type(None))) or variance not in VARIANCE_TYPES:
        usual = ", ".join(str(name) for name in VARIANCE_TYPES if name)
        raise _refusal(path, "variance_type", variance, usual)
    schedule = _schedule(path, config)
    _check_table(path, schedule, scheduler)
    clip = _clip(path, config)
    return Process(schedule, PREDICTION_TYPES[prediction], clip, VARIANCE_TYPES[variance])


def _refusal(path: Path, key: str, value: Any, expected: str) -> ExportError:
    return ExportError(
        f"{path} has {key} {value!r}, which is not supported; expected {expected}. If the network "
        "was not trained with it, edit the file"
    )


def _clip(path: Path, config: Mapping[str, Any]) -> float | None:
    """The limit of x0 in the default plan; None = off."""
    if config.get("thresholding"):
        # Cut at a percentile, but never above sample_max_value: with 1, its default, cut at 1.
        if config["sample_max_value"] != 1.0:
            expected = "1 (export with --clip 99.5% for a percentile)"
            raise _refusal(path, "sample_max_value", config["sample_max_value"], expected)
        return 1.0
    clips = config.get("clip_sample", True)
    if not isinstance(clips, bool):
        raise _refusal(path, "clip_sample", clips, "true or false")
    limit = config.get("clip_sample_range", 1.0)
    if not clips:
        return None
    try:
        Clip.parse(checks.number("clip_sample_range", limit))
    except ConfigError as error:
        raise _refusal(path, "clip_sample_range", limit, "a number above 0") from error
    return float(limit)


def _schedule(path: Path, config: Mapping[str, Any]) -> Schedule:
    """The forward process: a rule of ours where there is the same, else its betas in float64."""
    rule, trained = config["beta_schedule"], config.get("trained_betas")
    if trained is None and rule not in BETA_SCHEDULES:
        raise _refusal(path, "beta_schedule", rule, ", ".join(BETA_SCHEDULES))
    try:
        if trained is not None:
            return Schedule.from_betas(trained)
        return BETA_SCHEDULES[rule](
            config["num_train_timesteps"], config["beta_start"], config["beta_end"]
        )
    except ScheduleError as error:
        raise ExportError(f"{path} has a schedule that is not supported: {error}") from error


def _scaled_linear(T: int, first: float, last: float) -> Schedule:
    """sqrt(beta) rises linearly."""
    return Schedule.from_betas(np.linspace(first**0.5, last**0.5, T) ** 2)


def _laplace(T: int, *_: float) -> Schedule:
    """alpha_bar follows sqrt(snr / (1 + snr)) with log(snr) from Laplace's distribution."""
    u = np.arange(T + 1) / T
    snr = np.exp(-0.5 * np.where(u > 0.5, -1.0, 1.0) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6))
    f = np.sqrt(snr / (1 + snr))
    return Schedule.from_betas(np.minimum(1 - f[1:] / f[:-1], 0.999))


def _exp(T: int, *_: float) -> Schedule:
    """alpha_bar = e^(-12 t / T): every beta is the same."""
    return Schedule.constant(T, min(1 - math.exp(-12.0 / T), 0.999))


BETA_SCHEDULES: dict[str, Callable[[int, float, float], Schedule]] = {
    "linear": Schedule.linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": lambda T, *_: Schedule.cosine(T),
    "sigmoid": Schedule.sigmoid,
    "laplace": _laplace,
    "exp": _exp,
}


def _check_table(path: Path, schedule: Schedule, scheduler: Any) -> None:
    """Hold our alpha_bar against the scheduler's own float32 table."""
    theirs: Float64 = scheduler.alphas_cumprod.double().numpy()
    ours, steps = schedule.alpha_bar[1:], scheduler.config["num_train_timesteps"]
    if (
        not schedule.T == len(theirs) == steps
        or (np.abs(theirs - ours) > float32_rounding(schedule)).any()
    ):
        raise ExportError(
            f"{path}: the alphas_cumprod of {type(scheduler).__name__} are not those of its betas "
            "and num_train_timesteps; expected a scheduler that does not change them, such as "
            "DDPMScheduler"
        )


def float32_rounding(schedule: Schedule) -> Float64:
    """How far alpha_bar_1..T computed in float32 may be from float64's; (T,).

    A float32 beta is a few roundings off (8 taken), which is beta / alpha times as much of alpha;
    1 - beta and the product add one rounding each. A rounding is 2^-24 of the value; what is below
    float32's normal numbers is lost.
    """
    beta, alpha = schedule.beta[1:], schedule.alpha[1:]
    relative = np.cumsum(8 * beta / alpha + 2) * 2.0**-24
    bound: Float64 = relative * schedule.alpha_bar[1:] + np.finfo(np.float32).tiny
    return bound
