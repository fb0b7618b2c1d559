"""Export from end to end: torch network -> ONNX -> parity gate -> bundle."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_edge.bundle import REFERENCE, Bundle, check_target, write_bundle
from ddpm_edge.errors import BundleError, ConfigError, ExportError, RuntimeUnavailableError
from ddpm_edge.export.gate import Report, VariantGate, check
from ddpm_edge.export.variants import FILES, VARIANTS, Variant, make_variant
from ddpm_edge.manifest import Manifest
from ddpm_edge.onnx_check import check_model
from ddpm_edge.reference import Reference
from ddpm_edge.samplers import default_plan, override
from ddpm_edge.sampling import Network
from ddpm_edge.schedule import Schedule

if TYPE_CHECKING:
    from torch import nn

GATES = ("quick", "full")

log = logging.getLogger("ddpm_edge")


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
    variants: Sequence[str] = ("fp32",),
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
        variants: precisions, of VARIANTS. One that does not pass its gate gives way to a higher
            one, logged and recorded (see `variants.make_variant`).
        gate: "quick", or "full" to compare all T steps of Algorithm 2, and of half precision the
            Frechet distance of 500 samples, as of int8 always.
        report: called with each Comparison of the gate.

    Raises:
        ConfigError: an argument that cannot be; nothing was done then.
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
    check_choices(variants, gate)
    channels, height, width = sample_shape
    manifest = Manifest(
        name=name or path.name,
        sample_shape=(channels, height, width),
        schedule=schedule,
        prediction=prediction,
        timestep_offset=timestep_offset,
        class_names=tuple(class_names),
        plan=override(default_plan(schedule), plan or {}),
        variants={"fp32": {"file": FILES["fp32"]}},
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
    entry = {"file": FILES["fp32"], "parity": {c.what: c.figure() for c in comparisons}}
    single = Variant("fp32", data, entry)
    kept = {"fp32": single} if "fp32" in variants else {}
    return write_variants(path, manifest, single, kept, reference, variants, gate, report)


def export_bundle(
    bundle: str | Path,
    path: str | Path,
    *,
    variants: Sequence[str] = ("fp32",),
    gate: str = "quick",
    report: Report | None = None,
) -> Bundle:
    """A bundle again, with more precisions; those it has stay. Needs onnx, but no torch.

    Args:
        bundle: its directory.
        path: see `export`; the bundle itself is fine.
        variants: precisions that are made anew.
        gate: see `export`.
        report: see `export`.

    Raises:
        BundleError: not a bundle, or one without fp32 or without reference.npz.
        ConfigError: an argument that cannot be.
    """
    path = Path(path)
    check_target(path)
    check_choices(variants, gate)
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    if "fp32" not in manifest.variants or REFERENCE not in opened.files:
        raise BundleError(
            f"{opened.path} has no fp32, or no {REFERENCE}: other precisions are made of the one "
            "and held against the other; export the model again"
        )
    have = {
        name: Variant(name, opened.model(name)[1], dict(entry))
        for name, entry in manifest.variants.items()
    }
    have["fp32"].entry.pop("ladder", None)  # why an earlier export has nothing else
    reference = Reference.from_bytes(opened.read(REFERENCE), manifest)
    single = have["fp32"]
    return write_variants(path, manifest, single, have, reference, variants, gate, report)


def write_variants(
    path: Path,
    manifest: Manifest,
    single: Variant,
    kept: Mapping[str, Variant],
    reference: Reference,
    wanted: Sequence[str],
    gate: str,
    report: Report | None,
) -> Bundle:
    """Write a bundle with the precisions that are wanted, or those that passed instead.

    Args:
        path: where.
        manifest: what it says, but for the variants.
        single: the float32 model, which others are made of.
        kept: variants that there are already, and stay.
        reference: torch's answers.
        wanted: precisions that are made.
        gate: see `export`.
        report: see `export`.
    """
    from ddpm_edge.runtimes.onnx_runtime import OnnxRuntimeEngine

    made, ladders = dict(kept), dict[str, list[str]]()
    lower = [name for name in VARIANTS if name in wanted and name != "fp32"]
    if lower:
        try:
            import onnx
        except ImportError as error:
            raise RuntimeUnavailableError(
                f"other precisions need onnx ({error}); pip install 'ddpm-edge[export]'"
            ) from error
        model = onnx.load_from_string(single.data)
        with OnnxRuntimeEngine(single.data, device="cpu") as engine:
            variant_gate = VariantGate(Network(engine, manifest), reference, gate == "full")
            for name in lower:
                variant, failed = make_variant(model, name, variant_gate, report)
                for line in failed:
                    log.warning("not taken: %s", line)
                if variant is None or variant.name != name:
                    variant = variant or single
                    log.warning("%s is written instead of %s", variant.name, name)
                    made.pop(name, None)  # of an earlier export, by another gate
                made[variant.name] = variant
                ladders.setdefault(variant.name, []).extend(failed)
    for name, ladder in ladders.items():
        if ladder:
            made[name] = made[name]._replace(entry=made[name].entry | {"ladder": ladder})
    files = {variant.entry["file"]: variant.data for variant in made.values()}
    entries = {name: made[name].entry for name in VARIANTS if name in made}
    whole = Manifest(**{**vars(manifest), "variants": entries})
    return write_bundle(path, whole, {**files, REFERENCE: reference.to_bytes()})


def check_choices(variants: Sequence[str], gate: str) -> None:
    """Refuse precisions and gates that are none.

    Raises:
        ConfigError: with what there is.
    """
    if gate not in GATES:
        raise ConfigError(f"gate must be one of {', '.join(GATES)}; got {gate!r}")
    names = [variants] if isinstance(variants, str) else list(variants)
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(f"variants are {', '.join(VARIANTS)}; got {name!r}")
    if not names:
        raise ConfigError(f"no variant is wanted; give some of {', '.join(VARIANTS)}")


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
