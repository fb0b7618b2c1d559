"""The real parser and builder of TensorRT for RTX, which work without a GPU."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx")

from ddpm_edge import Bundle
from ddpm_edge.errors import BuildError
from ddpm_edge.export import quantize
from ddpm_edge.export.precision import HALF, to_half
from ddpm_edge.export.to_onnx import onnx_bytes
from ddpm_edge.export.to_tensorrt import Phases, Profile, build_engine
from ddpm_edge.manifest import Manifest
from ddpm_edge.runtimes.flavour import Flavour, flavour
from ddpm_edge.runtimes.onnx_runtime import OnnxRuntimeEngine
from ddpm_edge.samplers import ddim, default_plan
from ddpm_edge.sampling import Network
from ddpm_edge.schedule import Schedule

DYNAMIC = Profile(1, 2, 32)


@pytest.fixture(scope="module")
def rtx() -> Flavour:
    return flavour("tensorrt_rtx")


@pytest.fixture(scope="module")
def builtin() -> bytes:
    return Bundle.open().model("fp32")[1]


@pytest.mark.parametrize("variant", ["fp32", *HALF])
def test_the_built_in_model(rtx: Flavour, builtin: bytes, variant: str) -> None:
    model = builtin
    if variant != "fp32":
        model = to_half(onnx.load_from_string(builtin), variant).SerializeToString()
    assert len(build_engine(model, rtx, DYNAMIC).engine) > 1e6


def test_a_fixed_batch(rtx: Flavour, builtin: bytes) -> None:
    build_engine(builtin, rtx, Profile(1, 1, 1))


def test_int8(rtx: Flavour, builtin: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser and the builder do not look at scales: those of two steps will do."""
    monkeypatch.setattr(quantize, "plans", lambda net: [ddim(net.manifest.schedule, steps=2)])
    model = onnx.load_from_string(builtin)
    with OnnxRuntimeEngine(builtin, device="cpu") as engine:
        quantised, _ = quantize.to_int8(model, Network(engine, Bundle.open().manifest))
    assert len(build_engine(quantised.SerializeToString(), rtx, DYNAMIC).engine) > 1e6


@pytest.fixture(scope="module")
def cifar10() -> Any:
    """The preset, random weights."""
    torch = pytest.importorskip("torch")
    from ddpm_edge.export.to_onnx import onnx_model
    from ddpm_edge.train.network import Prediction
    from ddpm_edge.train.unet import UNet, UNetConfig

    torch.manual_seed(0)
    network = UNet(UNetConfig.preset("cifar10", (3, 32, 32), 10)).eval()
    manifest = Manifest(
        name="cifar10", sample_shape=(3, 32, 32), schedule=Schedule.linear(), prediction="eps",
        timestep_offset=-1, class_names=tuple("0123456789"),
        plan=default_plan(Schedule.linear()), variants={"fp32": {"file": "unet.onnx"}},
    )  # fmt: skip
    example = {"x": np.zeros((2, 3, 32, 32), np.float32)}
    example |= {name: np.zeros(2, np.int64) for name in ("t", "label")}
    model = onnx_model(Prediction(network), example, ["prediction"])
    onnx_bytes(model, manifest.properties())  # checked
    return model


@pytest.mark.parametrize("variant", ["fp32", *HALF])
def test_the_cifar10_preset(rtx: Flavour, cifar10: Any, variant: str) -> None:
    model = cifar10 if variant == "fp32" else to_half(cifar10, variant)
    assert len(build_engine(model.SerializeToString(), rtx, DYNAMIC).engine) > 3e7


def test_progress_is_shown_from_the_calling_thread(rtx: Flavour, builtin: bytes) -> None:
    seen: list[tuple[float, str]] = []
    threads = set()

    def show(fraction: float, phase: str) -> None:
        seen.append((fraction, phase))
        threads.add(threading.get_ident())

    build_engine(builtin, rtx, DYNAMIC, progress=show)
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert 0 < fractions[-1] <= 1
    assert any(phase for _, phase in seen)
    assert threads == {threading.get_ident()}


def test_ctrl_c_cancels(rtx: Flavour, builtin: bytes) -> None:
    sent: list[float] = []

    def interrupt(fraction: float, phase: str) -> None:
        if not sent:
            sent.append(fraction)
            os.kill(os.getpid(), signal.SIGINT)

    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engine(builtin, rtx, DYNAMIC, progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert len(build_engine(builtin, rtx, Profile(1, 1, 1)).engine) > 1e6  # the next one works


def test_cancelled_phases_stop_the_builder() -> None:
    phases = Phases()
    phases.start("all", None, 2)
    assert phases.step("all", 0)
    phases.cancel()
    assert not phases.step("all", 1)


def test_nested_phases_add_up() -> None:
    phases = Phases()
    phases.start("all", None, 2)
    assert phases.fraction() == 0.0
    phases.start("half", "all", 4)
    phases.step("half", 0)
    assert phases.fraction() == 0.125
    phases.finish("half")
    assert phases.fraction() == 0.125  # never back
    phases.step("all", 0)
    assert phases.fraction() == 0.5
    phases.step("unknown", 3)
    phases.finish("unknown")
    phases.step("all", 1)
    assert phases.fraction() == 1.0
    phases.finish("all")
    assert phases.fraction() == 1.0


def test_an_operator_that_is_not_known_is_named(rtx: Flavour, builtin: bytes) -> None:
    model = onnx.load_from_string(builtin)
    model.graph.node[20].op_type = "Fold"
    name = model.graph.node[20].name
    with pytest.raises(BuildError, match=rf"cannot parse the model: node '{name}' \(Fold\)") as e:
        build_engine(model.SerializeToString(), rtx, DYNAMIC)
    assert "--runtime onnxruntime" in str(e.value)


def test_what_is_no_model(rtx: Flavour) -> None:
    with pytest.raises(BuildError, match="cannot parse the model"):
        build_engine(b"nothing", rtx, DYNAMIC)


def test_a_profile_that_cannot_be(rtx: Flavour, builtin: bytes) -> None:
    with pytest.raises(BuildError, match=r"cannot build the engine: .*MIN<=OPT<=MAX"):
        build_engine(builtin, rtx, Profile(4, 2, 8))
