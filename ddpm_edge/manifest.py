"""What a bundle says of its model: the content of `bundle.json`, and how strictly it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ddpm_edge import checks, noise
from ddpm_edge.arrays import Int64
from ddpm_edge.errors import BundleError, ConfigError
from ddpm_edge.plan import Plan, check_prediction
from ddpm_edge.samplers import DEFAULT_SPACING, VARIANCES, make_plan, override, timesteps
from ddpm_edge.schedule import Schedule
from ddpm_edge.tuned import Tuned

FORMAT = 1
MANIFEST = "bundle.json"
MEASURES = ("max_abs_error", "relative_error", "ratio")  # what a figure of the gate may be
MAX_TIMESTEPS = 10_000  # a longer schedule is refused before its arrays are made


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of its model.

    Attributes:
        name: of the model.
        sample_shape: (C, H, W) of one sample; values in [-1, 1].
        schedule: the forward process it was trained with.
        prediction: what the network answers, one of PREDICTIONS.
        timestep_offset: the network is fed t + offset, t in 1..T, as int64.
        class_names: one a label; empty = the model takes no label.
        plan: arguments of the default plan: "sampler", "steps" and the sampler's options.
        variants: precision -> {"file": name, "parity": figures of its gate, "kept_in_fp32":
            of half precision more layers, of int8 all convolutions in float32, "ladder": why these
            or another precision}.
        training: how the weights came to be.
        licence: SPDX name for the weights.
        variance: what sampler "ddpm" takes unless told otherwise, "beta" or "beta-tilde".
        has_null_label: whether a model with labels also knows "no label": their number.
        tuned: how good plans are, where that was measured.
    """

    name: str
    sample_shape: tuple[int, int, int]
    schedule: Schedule
    prediction: str
    timestep_offset: int
    class_names: tuple[str, ...]
    plan: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    training: Mapping[str, Any] = field(default_factory=dict)
    licence: str = ""
    variance: str = "beta"
    has_null_label: bool = True
    tuned: Tuned | None = None

    @property
    def null_label(self) -> int | None:
        """The label that means "none", where the model has one."""
        return (len(self.class_names) or None) if self.has_null_label else None

    @property
    def labels(self) -> int:
        """How many labels the network takes, 0, 1, ... with the null label; 0 = it takes none."""
        return len(self.class_names) + (self.null_label is not None)

    @property
    def inputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What the network takes: dtype and shape, without the batch, by name."""
        number: tuple[str, tuple[int, ...]] = ("int64", ())
        labels = {"label": number} if self.class_names else {}
        return {"x": ("float32", self.sample_shape), "t": number} | labels

    def label_number(self, label: int | str | None) -> int:
        """A label, by number or name, as the network takes it; None is the null label.

        Raises:
            ConfigError: the model has no such label.
        """
        names = self.class_names
        if label is None and self.null_label is not None:
            return self.null_label
        if isinstance(label, str) and label in names:
            return names.index(label)
        if (
            isinstance(label, (int, np.integer))
            and not isinstance(label, bool)
            and 0 <= label < len(names)
        ):
            return int(label)
        listing = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        if label is None:
            raise ConfigError(
                f"the model {self.name!r} knows no images without a label, and got none; give one "
                f"of its labels, {listing}"
            )
        raise ConfigError(f"no label {checks.shown(label)}; labels are {listing}")

    def no_label(self, count: int) -> Int64 | None:
        """The null label for `count` samples, int64 (count,); None where there are no labels.

        Raises:
            ConfigError: there are labels, but none of them is the null label.
        """
        if not self.class_names:
            return None
        return np.full(count, self.label_number(None), np.int64)

    def properties(self) -> dict[str, str]:
        """What an ONNX file repeats in its `metadata_props`, so that it explains itself alone."""
        return {
            "sample_shape": json.dumps(self.sample_shape),
            "schedule": json.dumps(self.schedule.to_dict()),
            "prediction": self.prediction,
            "timestep_offset": str(self.timestep_offset),
        }

    def make_plan(self, start: int | None = None, /, **given: Any) -> Plan:
        """The default plan, or what the arguments make of it (see `Generator.plan`).

        Args:
            start: the timestep to begin at, 1..T; None = T. Listed timesteps above it, and steps
                that are more than there are timesteps, fall away.
            **given: sampler, steps and the sampler's options; a sampler or steps of None are not
                given.
        """
        given = {k: v for k, v in given.items() if v is not None or k not in ("sampler", "steps")}
        arguments = override(self.plan, given)
        if arguments.get("sampler") == "ddpm":
            arguments.setdefault("variance", self.variance)
        chosen = arguments.pop("sampler", None)
        if start is None or start == self.schedule.T:
            return make_plan(self.schedule, chosen, **arguments)
        steps, spacing = arguments.get("steps"), arguments.get("spacing", DEFAULT_SPACING)
        timesteps(self.schedule, steps, spacing)  # they must be those of a whole plan
        if not isinstance(spacing, str):
            below = [start, *(t for t in spacing if t < start)]
            arguments = arguments | {"spacing": below, "steps": None}
        elif steps is not None:
            arguments["steps"] = min(steps, start)
        return make_plan(self.schedule.until(start), chosen, **arguments)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of bundle.json, without files and digest."""
        return {
            "format": FORMAT,
            "name": self.name,
            "sample_shape": list(self.sample_shape),
            "value_range": [-1.0, 1.0],
            "schedule": self.schedule.to_dict(),
            "prediction": self.prediction,
            "timestep": {"offset": self.timestep_offset, "dtype": "int64"},
            "class_names": list(self.class_names),
            "null_label": self.null_label,
            "noise_version": noise.VERSION,
            "plan": dict(self.plan),
            "variance": self.variance,
            "variants": {name: dict(variant) for name, variant in self.variants.items()},
            "training": dict(self.training),
            "licence": self.licence,
            **({} if self.tuned is None else {"tuned": self.tuned.to_dict()}),
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Manifest:
        """The inverse of `to_dict`.

        Raises:
            BundleError: a field is missing, of another type, or not understood.
        """
        try:
            definition = typed(document["schedule"], dict)
            T = max(
                typed(definition.get("T", 0), int), len(typed(definition.get("betas", []), list))
            )
            if T > MAX_TIMESTEPS:
                raise BundleError(
                    f"{MANIFEST} says T = {T}; expected at most {MAX_TIMESTEPS} timesteps: export "
                    "the model again"
                )
            shape: Any = tuple(typed(size, int) for size in typed(document["sample_shape"], list))
            manifest = cls(
                name=typed(document["name"], str),
                sample_shape=shape,
                schedule=Schedule.from_dict(definition),
                prediction=typed(document["prediction"], str),
                timestep_offset=typed(document["timestep"]["offset"], int),
                class_names=tuple(
                    typed(name, str) for name in typed(document["class_names"], list)
                ),
                plan=typed(document["plan"], dict),
                variants={
                    name: _variant(f"variants.{name}", variant)
                    for name, variant in typed(document["variants"], dict).items()
                },
                training=typed(document["training"], dict),
                licence=typed(document["licence"], str),
                variance=typed(document.get("variance", "beta"), str),  # older bundles: none
                has_null_label=document["null_label"] is not None or not document["class_names"],
                tuned=Tuned.from_dict(typed(document["tuned"], dict))
                if "tuned" in document
                else None,
            )
            expected = {
                "value_range": (document["value_range"], [-1.0, 1.0]),
                "timestep.dtype": (document["timestep"]["dtype"], "int64"),
                "null_label": (document["null_label"], manifest.null_label),
                "noise_version": (document["noise_version"], noise.VERSION),
            }
            understood = manifest.to_dict()
            known_keys("", document, [*understood, "files", "digest"])
            known_keys("timestep.", document["timestep"], understood["timestep"])
            check_prediction(manifest.prediction, manifest.schedule)
            manifest.make_plan()  # found now, not at the first image
        except KeyError as error:
            raise BundleError(f"{MANIFEST} has no field {error}; export the model again") from error
        except (TypeError, ConfigError) as error:
            raise BundleError(f"{MANIFEST} is not valid: {error}; export it again") from error
        for name, (got, want) in expected.items():
            if got != want:
                raise BundleError(f"{MANIFEST} says {name} = {got!r}; this version knows {want!r}")
        if len(shape) != 3 or min(shape) < 1:
            raise BundleError(f"{MANIFEST}: sample_shape {shape} is not valid; expected (C, H, W)")
        if manifest.variance not in VARIANCES:
            raise BundleError(
                f"{MANIFEST} says variance {manifest.variance!r}; expected one of "
                f"{', '.join(VARIANCES)}: export the model again"
            )
        if not manifest.variants:
            raise BundleError(f"{MANIFEST} lists no variants; export the model again")
        return manifest


def _variant(where: str, variant: dict[str, Any]) -> dict[str, Any]:
    """A checked entry of `variants`: file, figures of the gate, what was done to pass it."""
    known_keys(f"{where}.", variant, ["file", "parity", "kept_in_fp32", "ladder"])
    typed(variant["file"], str)
    for key in ("kept_in_fp32", "ladder"):
        for line in typed(variant.get(key, []), list):
            typed(line, str)
    for what, figure in typed(variant.get("parity", {}), dict).items():
        known_keys(f"{where}.parity.{what}.", figure, [*MEASURES, "tolerance"])
        measures = figure.keys() & set(MEASURES)
        if len(measures) != 1:
            raise TypeError(f"{where}.parity.{what} must have one of {', '.join(MEASURES)}")
        for key in (*measures, "tolerance"):
            checks.number(f"{where}.parity.{what}.{key}", figure[key])
    return dict(variant)


def strict_json(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, without what Python's reader lets pass: NaN, 1e999, keys twice.

    Raises:
        BundleError: anything else; `path` is for the message.
    """

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    def number(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise ValueError(f"{text} is out of range")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
        return result

    try:
        document = json.loads(
            data, parse_constant=constant, parse_float=number, object_pairs_hook=unique
        )
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON: {error}; copy the bundle again") from error
    if not isinstance(document, dict):
        raise BundleError(f"{path} must hold a JSON object; got {type(document).__name__}")
    return document


def known_keys(where: str, entry: Any, names: Collection[str]) -> None:
    """Refuse a field of the manifest that this version does not understand."""
    for key in typed(entry, dict):
        if key not in names:
            raise BundleError(
                f"{MANIFEST} has an unknown field {where + key!r}, expected {', '.join(names)}; "
                "pip install --upgrade ddpm-edge, or export the model again"
            )


def digest_of(document: dict[str, Any]) -> str:
    """SHA-256 of a bundle.json but for its own field "digest"."""
    content = {key: value for key, value in document.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def typed(value: Any, kind: type) -> Any:
    """`value`, if it is a `kind`; True and False are no int.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value
