"""The feature network: the built-in file, its NumPy side, and how it is trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("onnxruntime")

from ddpm_edge import bundle, features
from ddpm_edge.errors import ClosedError, ConfigError, EngineError
from ddpm_edge.features import FeatureNetwork

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return FeatureNetwork.fashion_mnist(device="cpu")


def images(count: int) -> np.ndarray:
    """Blurred noise, so that features differ from image to image."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 7, 7, 1), dtype=np.uint8)
    return noise.repeat(4, axis=1).repeat(4, axis=2)


def write_idx(folder: Path, part: str, images: np.ndarray, labels: np.ndarray) -> None:
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (folder / f"{part}-{name}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())


def test_built_in_is_small(network: FeatureNetwork) -> None:
    assert features.BUILT_IN.stat().st_size < 1_000_000
    assert str(network.engine.inputs["x"]) == "float32 (any, 1, 28, 28)"
    assert {k: str(v) for k, v in network.engine.outputs.items()} == {
        "features": "float32 (any, 96)",
        "logits": "float32 (any, 10)",
    }


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Fashion-MNIST is not installed")
def test_built_in_knows_fashion_mnist(network: FeatureNetwork) -> None:
    pytest.importorskip("torch")  # ddpm_edge.train needs it
    from ddpm_edge.data import load

    test = load("fashion-mnist", "test")
    found = network(test.images.transpose(0, 2, 3, 1)).logits.argmax(axis=1)
    accuracy = float(np.mean(found == test.labels))
    assert accuracy >= 0.92
    onnx = pytest.importorskip("onnx")
    model = onnx.load(features.BUILT_IN)
    said = {p.key: p.value for p in model.metadata_props}
    # Another CPU may round a tie between two classes the other way, in a few of 10,000 images.
    assert float(said["test_accuracy"]) == pytest.approx(accuracy, abs=0.0005)
    assert said["data"] == "fashion-mnist"
    assert json.loads(said["class_names"]) == list(test.class_names)
    assert said["command"].startswith("python -m ddpm_edge.train.features --data fashion-mnist")
    assert {"seed", "epochs", "torch"} <= said.keys()


def test_batches_do_not_change_answers(network: FeatureNetwork) -> None:
    x = images(7)
    together = network(x)
    assert together.features.dtype == together.logits.dtype == np.float32
    assert together.features.shape == (7, 96)
    assert together.logits.shape == (7, 10)
    assert np.ptp(together.features, axis=0).max() > 0.1
    for batch in (1, 3, 7):
        for one, all_ in zip(network(x, batch), together, strict=True):
            # Another batch size may be summed in another order: a few roundings of float32.
            assert np.abs(one - all_).max() <= 1e-5 * np.abs(all_).max()


def test_uint8_is_float32_scaled(network: FeatureNetwork) -> None:
    x = images(3)
    scaled = x.astype(np.float32) / np.float32(127.5) - 1
    for a, b in zip(network(x), network(scaled), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((2, 28, 28, 1)), r"got float64 \(2, 28, 28, 1\)"),
        (np.zeros((2, 28, 28, 1), np.int64), "got int64"),
        (np.zeros((28, 28, 1), np.uint8), r"got uint8 \(28, 28, 1\)"),
        (np.zeros((0, 28, 28, 1), np.uint8), "with N >= 1; got"),
        (np.full((1, 28, 28, 1), 255, np.float32), "outside or NaN"),
        (np.full((1, 28, 28, 1), np.nan, np.float32), "outside or NaN"),
    ],
)
def test_wrong_images(network: FeatureNetwork, bad: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        network(bad)


@pytest.mark.parametrize("shape", [(2, 32, 32, 1), (2, 28, 28, 3), (2, 1, 28, 28)])
def test_wrong_size(network: FeatureNetwork, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"takes images \(C, H, W\) = \(1, 28, 28\), these are"):
        network(np.zeros(shape, np.uint8))


def test_another_model_is_refused(tmp_path: Path) -> None:
    unet = bundle.Bundle.open().model()[1]
    with pytest.raises(EngineError, match=r"one input of images .* got x .*, t "):
        FeatureNetwork(unet)
    (tmp_path / "damaged.onnx").write_bytes(features.BUILT_IN.read_bytes()[:1000])
    with pytest.raises(EngineError, match="cannot load the model"):
        FeatureNetwork(tmp_path / "damaged.onnx")


def test_closes() -> None:
    with FeatureNetwork.fashion_mnist() as network:
        network(images(1))
    with pytest.raises(ClosedError, match="closed"):
        network(images(1))


def test_training_writes_a_network(tmp_path: Path) -> None:
    """Eight steps on dark and bright images."""
    pytest.importorskip("torch")
    onnx = pytest.importorskip("onnx")
    from ddpm_edge.train.features import main

    rng = np.random.default_rng(0)
    for part, count in (("train", 256), ("t10k", 64)):
        labels = np.arange(count) % 2
        noise = rng.integers(0, 100, (count, 12, 12))
        write_idx(tmp_path, part, noise + 150 * labels[:, None, None], labels)
    target = tmp_path / "out.onnx"
    arguments = ["--data", str(tmp_path), "--epochs", "4", "--seed", "1", "-o", str(target)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "epoch 4 of 4: mean loss" in result.output
    assert f"{target}: test accuracy" in result.output

    model = onnx.load(target)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert not {n.op_type for n in model.graph.node} & {"BatchNormalization", "Shape", "Pad"}
    assert not any(t.data_location for t in model.graph.initializer)
    said = {p.key: p.value for p in model.metadata_props}
    assert said["class_names"] == '["0", "1"]'
    assert said["epochs"] == "4"
    with FeatureNetwork(target) as network:
        assert network(np.zeros((3, 12, 12, 1), np.uint8)).logits.shape == (3, 2)


def test_training_refuses_what_it_cannot_measure(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from ddpm_edge.train.features import main

    source, target = tmp_path / "set.npz", tmp_path / "out.onnx"
    result = CliRunner().invoke(main, ["--data", str(source), "-o", str(target)])
    assert result.exit_code == 1
    assert "no data at" in result.output
    np.savez(source, images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4))
    result = CliRunner().invoke(main, ["--data", str(source), "-o", str(target)])
    assert result.exit_code == 1
    assert "has no test images; give a folder of IDX files" in result.output
    assert not target.exists()


def test_augmentation_moves_and_mirrors() -> None:
    torch = pytest.importorskip("torch")
    from ddpm_edge.train.features import SHIFT, augmented

    torch.manual_seed(0)
    dot = torch.zeros(500, 1, 9, 9, dtype=torch.uint8)
    dot[:, :, 4, 3] = 255
    moved = augmented(dot)
    assert moved.shape == dot.shape
    assert (moved.flatten(1).sum(1) == 255).all()  # the dot stays whole
    rows, columns = moved[:, 0].nonzero()[:, 1:].T
    assert set(rows.tolist()) == set(range(4 - SHIFT, 5 + SHIFT))
    assert set(columns.tolist()) == set(range(3 - SHIFT, 6 + SHIFT))  # 3 and, mirrored, 5
