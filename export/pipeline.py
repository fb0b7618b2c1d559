"""Export from end to end: torch network -> ONNX -> parity gate -> bundle."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpm_edge import bundle
from ddpm_edge.bundle import Bundle, Manifest, check_target, write_bundle
from ddpm_edge.errors import ConfigError
from ddpm_edge.export.gate import Report, check
from ddpm_edge.onnx_check import check_model
from ddpm_edge.plan import PREDICTIONS
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
            (B, *sample_shape), t and label int64 (B,), the result of x's shape. The null label is
            len(class_names).
        schedule: the forward process it was trained with.
        path: directory to write; an existing bundle there is replaced at once and whole.
        sample_shape: (C, H, W).
        prediction: what it answers: "eps", "x0" or "v".
        timestep_offset: it is fed t + offset, t in 1..T.
        class_names: one name a label, or none.
        name: of the model; None = the directory's name.
        plan: arguments of the default plan, as `Generator.plan` takes them; None = 50-step DDIM.
        training: how the weights came to be.
        licence: SPDX name for the weights.
        gate: "quick", or "full" to compare all T steps of Algorithm 2.
        report: called with (what, largest difference, tolerance) for each comparison.

    Raises:
        ParityError: the exported network answers differently; nothing is written then.
        BundleError: the network does what no bundle's may do (see `ddpm_edge.onnx_check`).
        RuntimeUnavailableError: a package that export needs is missing.
    """
    from ddpm_edge.export.to_onnx import to_onnx
    from ddpm_edge.runtimes.onnx_runtime import OnnxRuntimeEngine
    from ddpm_edge.train.torch_engine import TorchEngine

    path = Path(path)
    check_target(path)
    if prediction not in PREDICTIONS or gate not in GATES:
        raise ConfigError(
            f"prediction must be one of {', '.join(PREDICTIONS)} and gate one of "
            f"{', '.join(GATES)}; got {prediction!r} and {gate!r}"
        )
    manifest = Manifest(
        name=name or path.name,
        sample_shape=sample_shape,
        schedule=schedule,
        prediction=prediction,
        timestep_offset=timestep_offset,
        class_names=tuple(class_names),
        plan=default_plan(schedule, plan or {}),
        variants={"fp32": {"file": MODEL_FILE}},
        training=dict(training or {}),
        licence=licence,
    )
    manifest.make_plan()  # a default plan that cannot run is refused now
    data = to_onnx(model, manifest)
    check_model(data, manifest)  # what Generator.load would refuse is refused now
    reference = Network(TorchEngine(model, sample_shape, bool(class_names)), manifest)
    with OnnxRuntimeEngine(data, device="cpu") as engine:
        figures, arrays = check(
            Network(engine, manifest), reference, full=gate == "full", report=report
        )
    variants = {"fp32": {"file": MODEL_FILE, "parity": figures}}
    files = {MODEL_FILE: data, bundle.REFERENCE: _npz(arrays)}
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
        sample_shape=trained.model.config.sample_shape,
        prediction=trained.config["prediction"],
        timestep_offset=trained.config["timestep_offset"],
        class_names=trained.config["class_names"],
        training=trained.provenance,
        **{"name": trained.config["name"], **arguments},
    )


def default_plan(schedule: Schedule, given: Mapping[str, Any]) -> dict[str, Any]:
    """50-step DDIM, clipped to the images' range, unless told otherwise."""
    plan: dict[str, Any] = {"sampler": "ddim", "clip": 1.0} | dict(given)
    if plan["sampler"] == "ddim":
        plan.setdefault("steps", min(50, schedule.T))
    return plan


def _npz(arrays: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()
