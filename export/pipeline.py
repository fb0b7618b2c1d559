"""Export from end to end: torch network -> ONNX -> parity gate -> bundle."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_edge.bundle import REFERENCE, Bundle, check_target, write_bundle
from ddpm_edge.errors import BundleError, ConfigError, ExportError
from ddpm_edge.export.gate import Report, check
from ddpm_edge.manifest import Manifest
from ddpm_edge.onnx_check import check_model
from ddpm_edge.samplers import default_plan, override
from ddpm_edge.sampling import Network
from ddpm_edge.schedule import Schedule

if TYPE_CHECKING:
    from torch import nn

MODEL_FILE = "unet.onnx"
GATES = ("quick", "full")


def export(
    model: nn.Module,
    schedule: Schedule,
    path: str | Path,
    *,
    sample_shape: tuple[int, int, int],
    prediction: str = "eps",
    timestep_offset: int = -1,
    class_names: Sequence[str] = (),
    has_null_label: bool = True,
    variance: str = "beta",
    name: str | None = None,
    plan: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    licence: str = "",
    gate: str = "quick",
    report: Report | None = None,
) -> Bundle:
    """Export a torch network as a bundle, once it has passed the parity gate.

    Args:
        model: `forward(x, t)` or, with class_names, `forward(x, t, label)`; x float32
            (B, *sample_shape), t and label int64 (B,), the result of x's shape (or an object with
            it as `.sample`, as diffusers' models return).
        schedule: the forward process it was trained with.
        path: directory to write; an existing bundle there is replaced at once and whole.
        sample_shape: (C, H, W).
        prediction: what it answers, one of `ddpm_edge.plan.PREDICTIONS`.
        timestep_offset: it is fed t + offset, t in 1..T.
        class_names: one name a label, or none.
        has_null_label: whether a network with labels takes len(class_names) as "no label" too.
        variance: what sampler "ddpm" takes unless told otherwise, "beta" or "beta-tilde".
        name: of the model; None = the directory's name.
        plan: arguments of the default plan, as `Generator.plan` takes them; None =
            `samplers.default_plan`.
        training: how the weights came to be.
        licence: SPDX name for the weights.
        gate: "quick", or "full" to compare all T steps of Algorithm 2.
        report: called with each Comparison of the gate.

    Raises:
        ExportError: the network cannot be exported as it is; the message names what in it.
        ParityError: the exported network answers differently; nothing is written then.
        RuntimeUnavailableError: a package that export needs is missing.
    """
    from ddpm_edge.export.to_onnx import to_onnx
    from ddpm_edge.runtimes.onnx_runtime import OnnxRuntimeEngine
    from ddpm_edge.train.network import Prediction, check_network
    from ddpm_edge.train.torch_engine import TorchEngine

    path = Path(path)
    check_target(path)
    if gate not in GATES:
        raise ConfigError(f"gate must be one of {', '.join(GATES)}; got {gate!r}")
    channels, height, width = sample_shape
    manifest = Manifest(
        name=name or path.name,
        sample_shape=(channels, height, width),
        schedule=schedule,
        prediction=prediction,
        timestep_offset=timestep_offset,
        class_names=tuple(class_names),
        plan=override(default_plan(schedule), plan or {}),
        variants={"fp32": {"file": MODEL_FILE}},
        training=dict(training or {}),
        licence=licence,
        variance=variance,
        has_null_label=has_null_label,
    )
    manifest = read_back(manifest)
    model = _copy_on_cpu(model)
    check_network(model, manifest.sample_shape, bool(class_names))
    data = to_onnx(Prediction(model), manifest)
    check_exported(data, manifest)
    torchs = Network(TorchEngine(model, sample_shape, bool(class_names)), manifest)
    with OnnxRuntimeEngine(data, device="cpu") as engine:
        comparisons, reference = check(
            Network(engine, manifest), torchs, full=gate == "full", report=report
        )
    parity = {
        c.what: {"max_abs_error": c.max_abs_error, "tolerance": c.tolerance} for c in comparisons
    }
    variants = {"fp32": {"file": MODEL_FILE, "parity": parity}}
    files = {MODEL_FILE: data, REFERENCE: reference.to_bytes()}
    return write_bundle(path, Manifest(**{**vars(manifest), "variants": variants}), files)


def export_run(run: str | Path, path: str | Path, **arguments: Any) -> Bundle:
    """Export the averaged weights of a training run; keyword arguments as for `export`.

    Raises:
        RunError: `run` is not a training run, or has no checkpoint.
    """
    from ddpm_edge.train.run import load_run

    trained = load_run(Path(run))
    return export(
        trained.model,
        trained.schedule,
        path,
        sample_shape=tuple(trained.config["sample_shape"]),
        prediction=trained.config["prediction"],
        timestep_offset=trained.config["timestep_offset"],
        class_names=trained.config["class_names"],
        training=trained.provenance,
        **{"name": trained.config["name"], **arguments},
    )


def _copy_on_cpu(model: nn.Module) -> nn.Module:
    """The network in float32 and evaluation mode, whatever the caller still does with his."""
    try:
        return copy.deepcopy(model).cpu().float().eval()
    except RuntimeError as error:
        raise ExportError(
            f"the network cannot be copied: {error}; parametrisations such as "
            "torch.nn.utils.weight_norm must be removed first (remove_weight_norm)"
        ) from error


def read_back(manifest: Manifest) -> Manifest:
    """The manifest as whoever opens the bundle will see it, checked before any work is done.

    Raises:
        ConfigError: something in it is not what a bundle.json can hold.
    """
    try:
        return Manifest.from_dict(json.loads(json.dumps(manifest.to_dict(), allow_nan=False)))
    except (TypeError, ValueError) as error:  # BundleError is a ValueError
        raise ConfigError(f"the bundle could not be read back: {error}") from error


def check_exported(data: bytes, manifest: Manifest) -> None:
    """Refuse now what `Generator.load` would refuse on the device (see `ddpm_edge.onnx_check`).

    Raises:
        ExportError: an operator that bundles may not hold, a size that is computed while running.
    """
    try:
        check_model(data, manifest)
    except BundleError as error:
        raise ExportError(f"no device would load the exported network: {error}") from error
