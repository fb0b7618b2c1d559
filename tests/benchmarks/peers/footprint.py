"""What it takes to have a library at all: the size of an environment, the time of an import."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
STATEMENTS = {
    "diffusers": "from diffusers import DDPMPipeline",
    "ddpm-edge": "import ddpm_edge",
    "ddpm-edge and ONNX Runtime": "import ddpm_edge, onnxruntime",
}
ENVIRONMENTS = {
    "ddpm-edge[cpu]": [f"{ROOT}[cpu]"],
    "ddpm-edge[openvino]": [f"{ROOT}[openvino]"],
    "diffusers": ["torch", "diffusers"],
}


def imports(rounds: int = 7) -> dict[str, Any]:
    """Seconds of the import that a user of each writes, less the interpreter's own start."""
    statements = {"nothing": "pass", **STATEMENTS}
    seconds: dict[str, list[float]] = {name: [] for name in statements}
    for _ in range(rounds):
        for name, statement in statements.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    beside = {name: median[name] - median["nothing"] for name in STATEMENTS}
    return {"rounds": rounds, "seconds": beside}


def environments() -> dict[str, Any]:
    """Sizes of fresh environments in units of 10**6 bytes; diffusers' is with torch for CPUs."""
    sizes = {}
    for name, packages in ENVIRONMENTS.items():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            pip = [f"{folder}/bin/pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
            subprocess.run([*pip, *packages], check=True, stderr=subprocess.DEVNULL)
            files = [p for p in Path(folder).rglob("*") if p.is_file() and not p.is_symlink()]
            if any("nvidia" in p.parts for p in files):
                raise SystemExit(
                    f"{name}: pip took a torch with CUDA, which is several times as large; let pip "
                    "find torch's builds for CPUs (PIP_EXTRA_INDEX_URL)"
                )
            sizes[name] = sum(p.stat().st_size for p in files) / 1e6
    return {"mb": sizes}
