"""Every call of CUDA is one that cuda-bindings have, with as many arguments."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ddpm_edge.runtimes.cuda

PACKAGE = Path(ddpm_edge.__file__).parent
USED = {"cudaGetErrorString": 1}  # not by `call`


def calls() -> Iterator[tuple[str, int]]:
    """The names of functions that `cuda.call` gets, and the number of their arguments."""
    files = [*PACKAGE.glob("*.py"), *Path(ddpm_edge.runtimes.cuda.__file__).parent.glob("*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0]
            if name == "call" and isinstance(first, ast.Constant):
                yield str(first.value), len(node.args) - 1
    yield from USED.items()


def test_calls_are_found() -> None:
    found = dict(calls())
    assert found["cudaMemcpyAsync"] == 5
    assert found["cuLaunchKernel"] == 11
    assert len(found) > 20


@pytest.mark.parametrize(("name", "arguments"), sorted(set(calls())))
def test_call(name: str, arguments: int) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    driver = pytest.importorskip("cuda.bindings.driver")
    function = getattr(runtime if name.startswith("cuda") else driver, name)
    signature = re.match(rf"{name}\((.*)\)", function.__doc__.splitlines()[0])
    assert signature
    parameters = [p for p in signature[1].split(",") if p.strip()]
    assert len(parameters) == arguments, signature[0]
