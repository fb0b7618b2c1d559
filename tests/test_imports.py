"""What may be imported where: the device needs no torch, no onnx, and no runtime to import."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import tempfile

import pytest

import ddpm_edge
from ddpm_edge import cli, export, runtimes

HEAVY = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx",
         "cuda", "scipy", "diffusers", "safetensors", "accelerate")  # fmt: skip


def python(code: str) -> str:
    """Run code outside the checkout, so that it is the installed package that is imported."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        cwd=tempfile.gettempdir(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_and_sample_without_torch_and_onnx() -> None:
    pytest.importorskip("onnxruntime")
    loaded = python(
        "import sys; from ddpm_edge import Generator\n"
        "Generator.load().sample(1, steps=2, seed=0, label=1, guidance=2.0)\n"
        "print(' '.join({name.partition('.')[0] for name in sys.modules}))"
    ).split()
    assert not {"torch", "onnx", "onnxscript", "scipy", "tqdm", "click"} & set(loaded)
    assert "onnxruntime" in loaded


def modules() -> list[str]:
    names = [m.name for m in pkgutil.iter_modules(ddpm_edge.__path__, "ddpm_edge.")]
    for package in (cli, export, runtimes):
        names += [m.name for m in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    return sorted(set(names) - {"ddpm_edge.train"})


def test_every_module_imports_in_a_bare_environment() -> None:
    names = modules()
    assert {"ddpm_edge.cli.sample", "ddpm_edge.export.gate", "ddpm_edge.runtimes.select"} <= set(
        names
    )
    blocked = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))\n"
    python(blocked + "\n".join(f"import {name}" for name in names))


def test_missing_packages_are_named_with_the_remedy() -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))\n"
    caught = """
from ddpm_edge.errors import RuntimeUnavailableError
try:
    {}
except RuntimeUnavailableError as error:
    print(error)
"""
    assert "ddpm-edge[cpu]" in python(
        blocked + caught.format("import ddpm_edge; ddpm_edge.Generator.load()")
    )
    assert "ddpm-edge[train]" in python(blocked + caught.format("import ddpm_edge.train.unet"))
    assert "ddpm-edge[export]" in python(
        blocked
        + caught.format("from ddpm_edge.export import export_run; export_run('run', 'nothing')")
    )


def test_a_user_s_own_export_and_runtimes_do_not_shadow(tmp_path: object) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from ddpm_edge import export, runtimes
print(export.__name__, runtimes.__name__)
"""
    for name in ("export.py", "runtimes.py"):
        with open(f"{tmp_path}/{name}", "w") as file:
            file.write("raise ImportError('mine')")
    assert python(code).split() == ["ddpm_edge.export", "ddpm_edge.runtimes"]
