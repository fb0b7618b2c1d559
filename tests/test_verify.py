"""Proof that a bundle computes here what torch computed, and proof that the proof can fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers import ToyEngine, rewrite

from ddpm_edge import Bundle, Generator
from ddpm_edge.bundle import REFERENCE
from ddpm_edge.cli import main
from ddpm_edge.errors import BundleError
from ddpm_edge.reference import Comparison, Reference
from ddpm_edge.sampling import Network
from ddpm_edge.schedule import Schedule


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *(str(a) for a in arguments)])


def test_the_built_in_bundle_passes() -> None:
    pytest.importorskip("onnxruntime")
    result = verify("--runtime", "onnxruntime", "--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "2 files, 7.3 MB: SHA-256 as listed" in lines[0]
    assert lines[1] == "fp32 by onnxruntime on cpu, against torch:"
    assert [line[:4] for line in lines[2:5]] == ["-[v]"] * 3
    assert all("(tolerance 1e-0" in line for line in lines[2:5])
    report = json.loads(verify("--json").output)
    assert report["passed"]
    assert report["runtime"] == "onnxruntime on cpu"
    assert [c["what"] for c in report["comparisons"]] == [
        "answers at batch 1", "answers at batch 5", "20-step DDIM",
    ]  # fmt: skip
    assert all(0 < c["max_abs_error"] <= c["tolerance"] for c in report["comparisons"])


def test_weights_changed_by_one_percent_fail(copy: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    model = onnx.load(copy / "unet.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = onnx.numpy_helper.to_array(tensor) * np.float32(1.01)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    (copy / "unet.onnx").write_bytes(model.SerializeToString())
    rewrite(copy, rehash=True)
    result = verify(copy)
    assert result.exit_code == 1
    assert "-[x] answers at batch 1: max abs error" in result.output
    assert "does not compute here what torch computed" in result.output
    report = json.loads(verify(copy, "--json").output.splitlines()[0])
    assert not report["passed"]


@pytest.mark.parametrize(
    "schedule",
    [Schedule.linear(1000, 1e-4, 0.0202), Schedule.linear(1000, 1.5e-4, 0.02), Schedule.cosine()],
    ids=["beta_T by 1 %", "beta_1", "rule"],
)
def test_a_changed_schedule_fails(copy: Path, schedule: Schedule) -> None:
    """Even where the model's own note of its schedule was changed as well."""
    onnx = pytest.importorskip("onnx")
    rewrite(copy, schedule=schedule.to_dict())
    result = verify(copy)
    assert result.exit_code == 1
    assert "schedule" in result.output
    model = onnx.load(copy / "unet.onnx")
    onnx.helper.set_model_props(model, {"schedule": json.dumps(schedule.to_dict())})
    (copy / "unet.onnx").write_bytes(model.SerializeToString())
    rewrite(copy, rehash=True)
    result = verify(copy)
    assert result.exit_code == 1
    assert "-[x] 20-step DDIM: max abs error" in result.output


@pytest.mark.parametrize("name", ["unet.onnx", REFERENCE])
def test_a_flipped_bit_in_any_file_fails(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 16
    (copy / name).write_bytes(data)
    result = verify(copy)
    assert result.exit_code == 1
    assert f"{name} was changed or damaged" in result.output


def test_nan_fails() -> None:
    assert not Comparison("x", float("nan"), 1.0).passed
    assert Comparison("x", 1.0, 1.0).passed
    assert not Comparison("x", 1.1, 1.0).passed


# reference.npz


@pytest.fixture
def reference() -> Reference:
    return Reference.measure(Network(ToyEngine(), Bundle.open().manifest))


def test_round_trip(reference: Reference) -> None:
    again = Reference.from_bytes(reference.to_bytes(), Bundle.open().manifest)
    for name, value in vars(reference).items():
        assert np.array_equal(getattr(again, name), value), name
    network = Network(ToyEngine(), Bundle.open().manifest)
    assert [c.error for c in again.compare(network)] == [0.0, 0.0, 0.0]


def test_it_covers_all_timesteps_and_labels(reference: Reference) -> None:
    assert reference.t[0] == 1
    assert reference.t[-1] == 1000
    assert reference.images_label is not None
    assert len(set(reference.images_label.tolist())) == len(reference.images)


def test_unlabelled(tmp_path: Path) -> None:
    manifest = replace(Bundle.open().manifest, class_names=(), sample_shape=(3, 4, 4))
    network = Network(ToyEngine((3, 4, 4), labelled=False), manifest)
    reference = Reference.measure(network)
    assert reference.label is None
    again = Reference.from_bytes(reference.to_bytes(), manifest)
    assert [c.passed for c in again.compare(network)] == [True] * 3


def test_a_bundle_without_reference(toy: Generator) -> None:
    toy.bundle = replace(toy.bundle, files={"unet.onnx": {}})
    with pytest.raises(BundleError, match=r"has no reference.npz; export the model again"):
        next(toy.verify())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": np.zeros((8, 1, 28, 28))}, "answer is float64"),
        ({"answer": np.zeros((8, 1, 28, 27), np.float32)}, r"answer is float32 \(8, 1, 28, 27\)"),
        ({"images": np.zeros((0, 1, 28, 28), np.float32)}, "images is float32"),
        ({"t": np.zeros((8, 1), np.int64)}, "t is int64"),
        ({"t": np.arange(8)}, "a seed, timesteps or labels that the model does not have"),
        ({"t": np.arange(994, 1002)}, "a seed, timesteps or labels that the model does not have"),
        ({"steps": np.array(0)}, "a seed, timesteps or labels that the model does not have"),
        ({"label": np.full(8, 11)}, "a seed, timesteps or labels that the model does not have"),
        ({"seed": np.array(-1)}, "a seed, timesteps or labels that the model does not have"),
        ({"images": np.zeros((65, 1, 28, 28), np.float32)}, "images is float32"),
        ({"seed": np.array([1, 2])}, r"seed is int64 \(2,\)"),
        ({"more": np.zeros(3)}, "it holds"),
        ({"t": None}, "it holds"),
        ({"t": np.array([None] * 8)}, "t is object"),
    ],
)
def test_a_reference_that_is_not_one(
    tmp_path: Path, reference: Reference, changes: dict[str, object], message: str
) -> None:
    arrays = {k: v for k, v in (vars(reference) | changes).items() if v is not None}
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(BundleError, match=message):
        Reference.from_bytes((tmp_path / "r.npz").read_bytes(), Bundle.open().manifest)


def test_a_reference_of_absurd_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "r.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in {
            "seed": (), "steps": (), "t": (2**40,), "label": (2**40,), "images_label": (4,),
            "answer": (2**40, 1, 28, 28), "images": (4, 1, 28, 28),
        }.items():  # fmt: skip
            with archive.open(f"{name}.npy", "w") as file:
                dtype = "<f4" if name in ("answer", "images") else "<i8"
                header = {"descr": dtype, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(BundleError, match="expected"):
        Reference.from_bytes(path.read_bytes(), Bundle.open().manifest)
    for damaged in (b"", b"PK", path.read_bytes()[:-30]):
        with pytest.raises(BundleError, match="not what an export writes"):
            Reference.from_bytes(damaged, Bundle.open().manifest)
