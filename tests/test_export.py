"""torch -> ONNX -> gate -> bundle."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from ddpm_edge import Bundle, Generator
from ddpm_edge.cli import main
from ddpm_edge.errors import BundleError, ConfigError, ParityError
from ddpm_edge.export import export, export_run, to_onnx
from ddpm_edge.schedule import Schedule
from ddpm_edge.train.unet import UNet, UNetConfig

SHAPE = (1, 8, 8)


def network(classes: int = 2, shape: tuple[int, int, int] = SHAPE) -> UNet:
    """A tiny U-Net whose every weight matters."""
    torch.manual_seed(0)
    model = UNet(UNetConfig(shape, (8, 16), 1, attention=(1,), groups=4, classes=classes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "tiny"
    export(network(), Schedule.linear(), path, sample_shape=SHAPE, class_names=["a", "b"])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run of three steps."""
    folder = tmp_path_factory.mktemp("train")
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)
    np.savez(folder / "set.npz", images=images, labels=np.arange(8) % 2)
    arguments = ["train", "--data", f"{folder}/set.npz", "--preset", "tiny", "--steps", "3"]
    result = CliRunner().invoke(main, [*arguments, "--batch", "4", "-o", f"{folder}/run"])
    assert result.exit_code == 0, result.output
    assert "done after 3 steps" in result.output
    assert f"Next: ddpm-edge export {folder}/run -o run-bundle" in result.output
    return folder / "run"


def test_graph_is_static_but_for_the_batch(exported: Path) -> None:
    model = onnx.load_from_string(Bundle.open(exported).model()[1])
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert not {n.op_type for n in model.graph.node} & {"Shape", "Loop", "If", "Pad"}
    assert not any(t.HasField("data_location") and t.data_location for t in model.graph.initializer)
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "x": ["batch", 1, 8, 8], "t": ["batch"], "label": ["batch"],
        "prediction": ["batch", 1, 8, 8],
    }  # fmt: skip
    assert {p.key for p in model.metadata_props} == {
        "sample_shape", "schedule", "prediction", "timestep_offset",
    }  # fmt: skip
    assert str(Path.cwd()).encode() not in model.SerializeToString()  # no paths of the exporter


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_batch_equals_torch(exported: Path, batch: int) -> None:
    x = np.random.default_rng(0).standard_normal((batch, *SHAPE)).astype(np.float32)
    t, label = np.arange(batch) * 100, np.arange(batch) % 3
    with torch.no_grad():
        expected = network()(*(torch.from_numpy(a) for a in (x, t, label))).numpy()
    with Generator.load(exported) as generator:
        got = generator._open().engine({"x": x, "t": t, "label": label})["prediction"]
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()  # float32 rounding


def test_bundle_says_what_was_exported(exported: Path) -> None:
    manifest = Bundle.open(exported).manifest
    assert manifest.name == "tiny"
    assert manifest.class_names == ("a", "b")
    assert manifest.make_plan().name == "ddim(steps=50, eta=0)"
    parity = manifest.variants["fp32"]["parity"]
    assert list(parity) == [
        "answers at batch 1", "answers at batch 5", "20-step DDIM", "Algorithm 2, last 50 steps",
    ]  # fmt: skip
    assert all(0 <= f["max_abs_error"] <= f["tolerance"] for f in parity.values())


def test_reference_can_be_recomputed_on_the_device(exported: Path) -> None:
    opened = Bundle.open(exported)
    with np.load(exported / "reference.npz") as reference, Generator.load(exported) as generator:
        images = generator.sample(
            len(reference["images"]),
            seed=int(reference["seed"]),
            label=[None if i == 2 else int(i) for i in reference["images_label"]],
            sampler="ddim",
            steps=int(reference["steps"]),
            dtype="float32",
        )
        expected = reference["images"].transpose(0, 2, 3, 1)
    assert np.abs(images - expected).max() <= 1e-3  # the gate's tolerance
    assert opened.read("reference.npz")


@pytest.mark.parametrize(
    ("classes", "shape", "schedule"),
    [
        (0, (3, 8, 4), Schedule.cosine(10)),  # fewer steps than the gate's usual chains
        (2, SHAPE, Schedule.linear(100, 1e-4, 0.2)),
    ],
)
def test_other_networks(
    tmp_path: Path, classes: int, shape: tuple[int, int, int], schedule: Schedule
) -> None:
    names = [str(i) for i in range(classes)]
    model = network(classes, shape)
    export(model, schedule, tmp_path / "b", sample_shape=shape, class_names=names, gate="full")
    with Generator.load(tmp_path / "b") as generator:
        assert generator.sample(2, seed=0).shape == (2, *shape[1:], shape[0])


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_other_predictions(tmp_path: Path, prediction: str) -> None:
    export(network(0), Schedule.cosine(10), tmp_path / "b", sample_shape=SHAPE,
           prediction=prediction)  # fmt: skip
    assert Bundle.open(tmp_path / "b").manifest.prediction == prediction


@pytest.mark.parametrize("change", [5e-4, np.nan])
def test_the_gate_can_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: float, run: Path
) -> None:
    right, what = to_onnx.to_onnx, "answers at batch 1"

    def wrong(*arguments: object) -> bytes:
        proto = onnx.load_from_string(right(*arguments))
        bias = next(t for t in proto.graph.initializer if t.name == "head.bias")
        changed = onnx.numpy_helper.to_array(bias) + np.float32(change)
        bias.CopyFrom(onnx.numpy_helper.from_array(changed, bias.name))
        return bytes(proto.SerializeToString())

    monkeypatch.setattr(to_onnx, "to_onnx", wrong)
    with pytest.raises(ParityError, match=f"{what}: .* differs from torch by .* tolerance 1e-04"):
        export(network(0), Schedule.linear(), tmp_path / "b", sample_shape=SHAPE)
    assert os.listdir(tmp_path) == []
    result = CliRunner().invoke(main, ["export", str(run), "-o", str(tmp_path / "b")])
    assert result.exit_code == 1
    assert f"-[x] {what}: max abs error" in result.output
    assert "nothing was written" in result.output
    assert os.listdir(tmp_path) == []


def test_export_command(tmp_path: Path, run: Path) -> None:
    target = tmp_path / "b"
    arguments = ["export", str(run), "-o", str(target), "--name", "mine", "--licence", "CC0-1.0"]
    for extra in ([], ["--sampler", "ddpm", "--steps", "100", "--variance", "beta-tilde"]):
        result = CliRunner().invoke(main, [*arguments, *extra])
        assert result.exit_code == 0, result.output
    assert "-[v] 20-step DDIM: max abs error" in result.output
    assert f"Next: ddpm-edge sample {target} -n 16 -o samples.png" in result.output
    manifest = Bundle.open(target).manifest
    assert manifest.name == "mine"
    assert manifest.licence == "CC0-1.0"
    assert manifest.make_plan().name == "ddpm(steps=100, variance=beta-tilde)"
    assert manifest.training["steps"] == 3
    assert os.listdir(tmp_path) == ["b"]


def test_what_cannot_be_exported(tmp_path: Path, run: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        export_run(run, tmp_path / "notes")
    with pytest.raises(ConfigError, match="gate one of quick, full"):
        export_run(run, tmp_path / "b", gate="none")
    with pytest.raises(ConfigError, match="steps must be in 1..1000"):
        export_run(run, tmp_path / "b", plan={"steps": 2000})
    result = CliRunner().invoke(main, ["export", str(tmp_path), "-o", str(tmp_path / "b")])
    assert result.exit_code == 1
    assert "is not a training run" in result.output
