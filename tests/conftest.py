"""Fixtures: the built-in bundle, copies of it to damage, and a network that needs no runtime."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_gpu import FakeTensorRT, install
from helpers import ToyEngine

from ddpm_edge import Generator, bundle
from ddpm_edge.runtimes.engine_cache import ENVIRONMENT


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="takes minutes; run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or changes what was built and measured on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def toy() -> Generator:
    """The built-in bundle's manifest around a toy network: microseconds a step."""
    return Generator(bundle.Bundle.open(), ToyEngine(), "fp32")


@pytest.fixture(scope="session")
def generator() -> Iterator[Generator]:
    """The built-in model on ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    with Generator.load(runtime="onnxruntime", device="cpu") as loaded:
        yield loaded


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the built-in bundle."""
    return Path(shutil.copytree(bundle.BUILT_IN, tmp_path / "bundle"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """A machine with a GPU of NumPy arrays (see fake_gpu)."""
    return install(monkeypatch)
