"""Evaluation: figures that tell models apart, reports, and what a caller meets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ddpm_edge import Bundle, Generator
from ddpm_edge.cli import main
from ddpm_edge.cli.evaluate import feature_network
from ddpm_edge.data import FASHION_MNIST_CLASSES, FASHION_MNIST_PATH, Dataset, load
from ddpm_edge.errors import ConfigError
from ddpm_edge.evaluate import (
    Evaluation,
    _in_turn,
    compare,
    evaluate,
    mixed_images,
    read_report,
)
from ddpm_edge.features import FeatureNetwork
from ddpm_edge.report import write_report

pytest.importorskip("scipy")


def data(n: int = 40, seed: int = 0, shape: tuple[int, int, int] = (1, 28, 28)) -> Dataset:
    images = np.random.default_rng(seed).integers(0, 256, (n, *shape)).astype(np.uint8)
    return Dataset("random", images)


@pytest.fixture
def found(toy: Generator) -> Evaluation:
    return evaluate(toy, data(), data(60, 1), n=20, likelihood_images=10, timesteps=5, steps=2)


def test_what_is_found_without_features(found: Evaluation) -> None:
    assert list(found.figures) == ["bits/dim", "nearest training image"]
    assert list(found.floor) == list(found.ceiling) == ["bits/dim"]
    assert found.samples.shape == (20, 28, 28, 1)
    assert found.nearest_training.shape == (8, 28, 28, 1)
    assert found.settings["plan"].startswith("dpmpp(steps=2")
    assert np.isfinite(found.x0_mse).sum() > 5


def test_labels_are_dealt_in_turn(toy: Generator) -> None:
    evaluate(toy, data(), n=12, likelihood_images=0, steps=1)
    asked = np.concatenate([call["label"] for call in toy._network.engine.calls])  # type: ignore
    assert asked.tolist() == [i % 10 for i in range(12)]


def test_the_floor_has_labels_as_the_samples_have(toy: Generator) -> None:
    names = toy.class_names
    train = Dataset("sorted", data(100).images, np.repeat(np.arange(10), 10), names)
    chosen = _in_turn(mixed_images(train, toy, "training", 25), names, 25)
    assert chosen.labels is not None
    assert chosen.labels.tolist() == [i % 10 for i in range(25)]
    assert len({image.tobytes() for image in chosen.images}) == 25
    mixed = mixed_images(train, toy, "test", 100)
    assert mixed.labels is not None
    assert mixed.labels.tolist() != sorted(mixed.labels.tolist())


def test_copies_are_found(toy: Generator) -> None:
    samples = toy.sample(20, label=[i % 10 for i in range(20)], seed=0, steps=2)
    copied = np.concatenate([data(30, 1).images, samples.transpose(0, 3, 1, 2)])
    found = evaluate(toy, data(), Dataset("copied", copied), n=20, likelihood_images=0, steps=2)
    assert found.figures["nearest training image"].value == pytest.approx(0, abs=1e-6)
    np.testing.assert_array_equal(found.nearest_training, found.samples[found.alike])


def test_report(found: Evaluation, tmp_path: Path) -> None:
    write_report(found, tmp_path / "a")
    document = read_report((tmp_path / "a" / "report.json").read_text())
    figure = found.figures["bits/dim"]
    assert document["figures"]["bits/dim"]["value"] == figure.value
    assert document["figures"]["bits/dim"]["standard_error"] == figure.standard_error
    page = (tmp_path / "a" / "report.html").read_text()
    for text in ("bits/dim", f"{figure.value:.4g}", "<svg", "data:image/png;base64,"):
        assert text in page
    assert "http" not in page  # it needs nothing else
    compared = compare(document, found.to_dict())
    assert [row.name for row in compared] == list(found.figures)
    assert not any(row.difference.significant for row in compared)
    write_report(found, tmp_path / "b", compared, "a <other>")
    assert "a &lt;other&gt;" in (tmp_path / "b" / "report.html").read_text()
    assert json.loads((tmp_path / "b" / "report.json").read_text())["compared"]


@pytest.mark.parametrize(
    "name", ["n", "images", "training images", "features", "likelihood images", "timesteps"]
)
def test_what_cannot_be_compared(found: Evaluation, name: str) -> None:
    one, other = found.to_dict(), found.to_dict()
    other["settings"] = other["settings"] | {name: "something else"}
    with pytest.raises(ConfigError, match=f"{name} is .* in one and something else"):
        compare(one, other)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"figures": {"a": 3}}', '{"figures": {}}'])
def test_no_report(text: str) -> None:
    with pytest.raises(ConfigError, match="no report of `ddpm-edge evaluate`"):
        read_report(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 9}, "n must be a whole number >= 10; got 9"),
        ({"n": 41}, "41 test images are needed, random has 40; give a smaller n"),
        ({"n": 20, "likelihood_images": 5}, "likelihood_images must be 0, or 10 or more; got 5"),
        ({"n": 20, "timesteps": 3}, r"timesteps must be 4\.\.1000"),
        ({"n": 20, "sampler": "dimm"}, "did you mean 'ddim'"),
        ({"n": 20, "seed": -1}, "seed"),
        ({"n": 20, "guidance": 2e9}, "guidance"),
    ],
)
def test_bad_arguments(toy: Generator, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(toy, data(), **{"likelihood_images": 10} | arguments)
    assert not toy._network.engine.calls  # type: ignore[union-attr,attr-defined]


def test_images_of_another_shape(toy: Generator) -> None:
    with pytest.raises(ConfigError, match=r"test images are .* \(3, 32, 32\), the model's \(1, 28"):
        evaluate(toy, data(shape=(3, 32, 32)), n=20)
    with pytest.raises(ConfigError, match="training images are"):
        evaluate(toy, data(), data(shape=(1, 14, 14)), n=20)


def test_too_few_for_the_covariance(toy: Generator) -> None:
    pytest.importorskip("onnxruntime")
    with (
        FeatureNetwork.fashion_mnist() as network,
        pytest.raises(ConfigError, match="100 images are too few .* 96 features; give n >= 108"),
    ):
        evaluate(toy, data(100), n=100, features=network)


# The built-in model


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST_PATH.is_dir(), reason="needs the images of Fashion-MNIST")
def test_it_tells_models_apart(generator: Generator) -> None:
    onnx = pytest.importorskip("onnx")
    from ddpm_edge.runtimes.onnx_runtime import OnnxRuntimeEngine

    test = load("fashion-mnist", "test")
    coarse = onnx.load_from_string(Bundle.open().model()[1])
    for constant in coarse.graph.initializer:
        values = onnx.numpy_helper.to_array(constant)
        if constant.name.endswith(".weight"):
            step = np.abs(values).max() / 31  # 6 bits: -31..31
            rounded = (np.rint(values / step) * step).astype(np.float32)
            constant.CopyFrom(onnx.numpy_helper.from_array(rounded, constant.name))

    def judged(g: Generator, **arguments: Any) -> dict[str, Any]:
        return evaluate(
            g, test, n=300, features=network, likelihood_images=0, **arguments
        ).to_dict()

    def significant(a: dict[str, Any], b: dict[str, Any]) -> dict[str, bool]:
        return {row.name: row.difference.significant for row in compare(a, b)}

    with (
        FeatureNetwork.fashion_mnist() as network,
        OnnxRuntimeEngine(coarse.SerializeToString(), "cpu") as engine,
    ):
        base = judged(generator)
        assert significant(base, judged(Generator(Bundle.open(), engine, "fp32")))[
            "Frechet distance"
        ]
        assert significant(base, judged(generator, steps=5))["Frechet distance"]
        assert not significant(base, judged(generator, seed=1))["Frechet distance"]


# The command


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    np.savez(tmp_path / "images.npz", images=data(200).images.transpose(0, 2, 3, 1))
    return tmp_path / "images.npz"


def test_command(arrays: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    words = ["evaluate", "--data", str(arrays), "-n", "12", "--val", "0.3", "--likelihood", "10",
             "--timesteps", "4", "--steps"]  # fmt: skip
    first = CliRunner().invoke(main, [*words, "2", "-o", str(tmp_path / "a")])
    assert first.exit_code == 0, first.output
    for text in ("bits/dim", "nearest training image", "give --features", "report.html"):
        assert text in first.output
    other = CliRunner().invoke(
        main, [*words, "3", "--compare", str(tmp_path / "a" / "report.json")]
    )
    assert other.exit_code == 0, other.output
    assert "significant" in other.output
    as_json = CliRunner().invoke(main, [*words, "2", "--json"])
    assert json.loads(as_json.stdout)["figures"]["bits/dim"]["value"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --val"),
        (["--val", "2"], "share"),
        (["--val", "0.3", "-n", "5"], "n must be"),
        (["--size", "x"], "a size"),
        (["--compare", __file__], "no report of"),
    ],
)
def test_command_refuses(arrays: Path, words: list[str], message: str) -> None:
    pytest.importorskip("onnxruntime")
    done = CliRunner().invoke(main, ["evaluate", "--data", str(arrays), *words])
    assert done.exit_code in (1, 2)
    assert message in done.output


def test_the_built_in_features_know_fashion_mnist_by_its_classes() -> None:
    pytest.importorskip("onnxruntime")
    images = np.zeros((20, 1, 28, 28), np.uint8)
    theirs = Dataset("a folder", images, np.arange(20) % 10, tuple("abcdefghij"))
    assert feature_network(None, theirs) is None
    known = feature_network(None, replace(theirs, class_names=FASHION_MNIST_CLASSES))
    assert known is not None
    with known:
        pass
