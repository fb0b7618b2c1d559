"""ddpm-edge beside its peers on one CPU: the same weights, the same plan, one run.

    python tests/benchmarks/compare_peers.py                   measure; writes compare_peers.json
    python tests/benchmarks/compare_peers.py --checkpoint DIR  any folder that diffusers saved
    python tests/benchmarks/compare_peers.py --table           Markdown from the JSON
    python tests/benchmarks/compare_peers.py --plot peers.png  a picture from the JSON

Each contender (`peers/contenders.py`) is a process of its own. They take turns, and whoever has no
turn is stopped (SIGSTOP): the threads of a runtime spin on after a call and would slow the next.
A turn is a DDIM run of `--steps` steps; before the first, the float32 images of all are compared
with diffusers'. The int8 of `cifar10` has random weights and has passed no gate: it is only timed.
Medians over the rounds; the ratio to diffusers is that of each round, its 95 % interval
by bootstrap. Linux only. Needs the extras [bench].
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "compare_peers.json"
sys.path.insert(0, str(HERE / "peers"))

BASE = "diffusers"
NAIVE = "naive ONNX, ONNX Runtime"
PACKAGES = ("ddpm-edge", "torch", "diffusers", "onnxruntime", "openvino", "numpy")
VARIANTS = ("fp32", "bf16", "int8")
MATRIX = 2048  # side of the dense product that gives the machine's peak
FIRST = 16  # images of a fresh process
FIRST_STEPS = 20
# Of float32 images in 0..1. At t = T, where the signal is 0.006, x0 is off by 160 times what the
# answer is off by, some 1e-5. Other precisions are held to account by their gates.
TOLERANCE = 0.01


class Contender:
    """A process of `contenders.py`, stopped but for its turns."""

    def __init__(self, name: str, folder: Path, batch: int) -> None:
        self.name = name
        command = [sys.executable, str(HERE / "peers/contenders.py"), name, str(folder), str(batch)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, start_new_session=True,
        )  # fmt: skip

    def turn(self, steps: int, images: Path | None = None) -> dict[str, float]:
        """Sample; what it took. RuntimeError if the process has died."""
        os.killpg(self.process.pid, signal.SIGCONT)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{steps} {images or ''}\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} cannot run here")
        os.killpg(self.process.pid, signal.SIGSTOP)
        found: dict[str, float] = json.loads(line)
        return found

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def prepare(folder: Path, checkpoint: Path | None, model: str, batches: Sequence[int]) -> float:
    """Write the weights in every form; GFLOP of one evaluation of one image."""
    import models
    import torch
    from diffusers import UNet2DModel
    from torch.utils.flop_counter import FlopCounterMode

    from ddpm_edge import Bundle
    from ddpm_edge.export import export_bundle, export_diffusers

    if checkpoint is None:
        models.write(model, folder / "checkpoint")
    else:
        shutil.copytree(checkpoint, folder / "checkpoint")
    unet = UNet2DModel.from_pretrained(folder / "checkpoint", subfolder="unet").eval()
    size, channels = unet.config.sample_size, unet.config.in_channels

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.unet(x, t, return_dict=False)[0]

    example = torch.randn(2, channels, size, size), torch.tensor([10, 10])
    torch.onnx.export(
        Plain().eval(), example, folder / "naive.onnx", dynamo=True, input_names=["x", "t"],
        output_names=["prediction"], dynamic_shapes=[{0: "batch"}] * 2, external_data=False,
        verbose=False,
    )  # fmt: skip
    if model == models.BUILT_IN and checkpoint is None:  # as it is shipped, with labels
        export_bundle(Bundle.open().path, folder / "bundle", variants=VARIANTS)
    else:
        export_diffusers(folder / "checkpoint", folder / "bundle", variants=("fp32", "bf16"))
        add_int8(folder / "bundle")
    for batch in {*batches, FIRST}:
        noise = torch.randn(
            (batch, channels, size, size), generator=torch.Generator().manual_seed(0)
        )
        np.save(folder / f"noise{batch}.npy", noise.numpy())
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        unet(example[0][:1], 10)
    return float(counter.get_total_flops()) / 1e9


def add_int8(path: Path) -> None:
    """The bundle with int8 that no gate has seen: its 1,500 images would take half an hour."""
    import onnx

    from ddpm_edge import Bundle
    from ddpm_edge.bundle import REFERENCE, write_bundle
    from ddpm_edge.export import quantize
    from ddpm_edge.export.to_onnx import onnx_bytes
    from ddpm_edge.manifest import Manifest
    from ddpm_edge.runtimes.onnx_runtime import OnnxRuntimeEngine
    from ddpm_edge.sampling import Network

    bundle = Bundle.open(path)
    manifest, data = bundle.manifest, {n: bundle.model(n)[1] for n in bundle.manifest.variants}
    quantize.QUESTIONS = FIRST_STEPS  # one sample of each plan: it is only timed
    with OnnxRuntimeEngine(data["fp32"], "cpu") as engine:
        model, _ = quantize.to_int8(onnx.load_from_string(data["fp32"]), Network(engine, manifest))
    files = {entry["file"]: data[name] for name, entry in manifest.variants.items()}
    files |= {"unet.int8.onnx": onnx_bytes(model, manifest.properties())}
    entries = {**manifest.variants, "int8": {"file": "unet.int8.onnx"}}
    whole = Manifest(**{**vars(manifest), "variants": entries})
    write_bundle(path, whole, {**files, REFERENCE: bundle.read(REFERENCE)})


def measure(
    folder: Path, names: Sequence[str], batch: int, steps: int, rounds: int, gflop: float
) -> list[dict[str, Any]]:
    """One row a contender, of interleaved turns."""
    with contextlib.ExitStack() as stack:
        running = []
        for name in names:
            contender = Contender(name, folder, batch)
            stack.callback(contender.close)
            try:
                contender.turn(steps, folder / "images.npy" if name == BASE else folder / "o.npy")
            except RuntimeError as error:
                print(error, file=sys.stderr)
                continue
            running.append((contender, difference(folder, name)))
            contender.turn(steps)
        seconds: dict[str, list[float]] = {c.name: [] for c, _ in running}
        memory = {}
        for done in range(rounds):
            for contender, _ in running:
                found = contender.turn(steps)
                seconds[contender.name].append(found["seconds"])
                memory[contender.name] = found["peak_memory_mb"]
            print(f"\r  batch {batch}: {done + 1}/{rounds}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        rows = []
        for contender, off in running:
            ms = [s / steps * 1e3 for s in seconds[contender.name]]
            rows.append({
                "contender": contender.name,
                "batch": batch,
                "ms_a_step": statistics.median(ms),
                "ms_a_step_quartiles": [float(q) for q in np.quantile(ms, [0.25, 0.75])],
                "times_diffusers": ratio(seconds[BASE], seconds[contender.name]),
                "times_naive": ratio(seconds[NAIVE], seconds[contender.name]),
                "gflop_s": gflop * batch / statistics.median(ms) * 1e3,
                "images_s_of_20_steps": batch / statistics.median(ms) * 1e3 / 20,
                "peak_memory_mb": memory[contender.name],
                "max_abs_difference": off,
            })  # fmt: skip
        return rows


def difference(folder: Path, name: str) -> float | None:
    """The largest difference of the last images to diffusers'; None = it gives none."""
    theirs, file = np.load(folder / "images.npy"), folder / "o.npy"
    if name == BASE or not file.exists():
        return 0.0 if name == BASE else None
    off = float(np.abs(np.load(file) - theirs).max())
    file.unlink()
    if off > TOLERANCE and not any(lower in name for lower in ("int8", "bf16")):
        raise SystemExit(f"{name} makes other images than diffusers: {off} apart")
    return off


def ratio(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """How many times quicker, round by round: the median and its 95 % interval by bootstrap."""
    ratios = np.array(base) / np.array(other)
    draws = np.random.default_rng(0).integers(0, len(ratios), (10_000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return [float(np.median(ratios)), float(low), float(high)]


def fresh(folder: Path, names: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """From the start of a process to its first 16 images of 20 steps, and its peak memory."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            start = time.perf_counter()
            contender = Contender(name, folder, FIRST)
            try:
                memory = contender.turn(FIRST_STEPS)["peak_memory_mb"]
                found[name].append((time.perf_counter() - start, memory))
            except RuntimeError:
                continue
            finally:
                contender.close()
    return [
        {
            "contender": name,
            "first_images_s": statistics.median(s for s, _ in runs),
            "peak_memory_mb": statistics.median(m for _, m in runs),
        }
        for name, runs in found.items()
        if runs
    ]


def imports(rounds: int) -> dict[str, float]:
    """Seconds of the imports that a user of each writes, without the interpreter's own start."""
    statements = {
        "nothing": "pass",
        "diffusers": "from diffusers import DDPMPipeline",
        "ddpm-edge": "import ddpm_edge",
        "ddpm-edge and ONNX Runtime": "import ddpm_edge, onnxruntime",
    }
    seconds: dict[str, list[float]] = {name: [] for name in statements}
    for _ in range(rounds):
        for name, statement in statements.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: median[name] - median["nothing"] for name in statements if name != "nothing"}


def full_chains(folder: Path) -> dict[str, float]:
    """Seconds of what gives images of equal quality: diffusers' 1000 DDPM steps, our default."""
    import torch
    from diffusers import DDPMPipeline

    from ddpm_edge import Generator

    pipeline = DDPMPipeline.from_pretrained(folder / "checkpoint")
    pipeline.set_progress_bar_config(disable=True)
    pipeline(1, num_inference_steps=10)
    start = time.perf_counter()
    pipeline(1, torch.Generator().manual_seed(0), num_inference_steps=1000)
    theirs = time.perf_counter() - start
    with Generator.load(device="cpu", runtime="onnxruntime") as generator:
        generator.sample(1, seed=0)
        times = []
        for seed in range(11):
            start = time.perf_counter()
            generator.sample(1, seed=seed)
            times.append(time.perf_counter() - start)
    return {
        "diffusers_1000_steps_s": theirs,
        "ours_20_steps_s": statistics.median(times),
        "times": theirs / statistics.median(times),
        "fewer_steps": 1000 / 20,
        "times_a_step": theirs / 1000 / (statistics.median(times) / 20),
    }


def loop_share(folder: Path) -> dict[str, float]:
    """Time outside engine calls, batch 1, ONNX Runtime, float32: percent of a step, by plan."""
    from ddpm_edge.bench import bench

    plans = {"ddim": {"sampler": "ddim"}, "default": {}}
    return {
        name: bench(
            folder / "bundle", batches=[1], runs=11, runtime="onnxruntime", device="cpu", **plan
        ).batches[0].loop_percent
        for name, plan in plans.items()
    }  # fmt: skip


def installs() -> dict[str, float]:
    """Sizes of fresh environments, 10**6 bytes: `.[cpu]`, and torch (CPU) with diffusers."""
    constraints = ["-c", str(ROOT / "constraints.txt")]
    wanted = {
        "ddpm-edge[cpu]": [f"{ROOT}[cpu]"],
        "ddpm-edge[openvino]": [f"{ROOT}[openvino]"],
        "diffusers": [*constraints, "torch", "diffusers"],
    }
    sizes = {}
    for name, arguments in wanted.items():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            pip = [f"{folder}/bin/pip", "install", "--quiet", *arguments]
            subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
            files = [p for p in Path(folder).rglob("*") if p.is_file() and not p.is_symlink()]
            sizes[name] = sum(p.stat().st_size for p in files) / 1e6
    return sizes


def machine() -> dict[str, Any]:
    """What the figures are of: processor, its measured peaks (GFLOP/s), versions, date."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    of = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    flags = of.get("flags", "").split()

    def peak(kind: torch.dtype) -> float:
        a = torch.rand(MATRIX, MATRIX).to(kind)
        seconds = []
        for _ in range(12):
            start = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - start)
        return 2 * MATRIX**3 / min(seconds) / 1e9

    def installed() -> Iterator[tuple[str, str]]:
        for package in PACKAGES:
            with contextlib.suppress(PackageNotFoundError):
                yield package, version(package)

    return {
        "processor": of.get("model name", platform.processor()),
        "cpus": len(os.sched_getaffinity(0)),
        "instructions": [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16",
                                     "amx_int8") if f in flags],
        "peak_fp32_gflop_s": peak(torch.float32),
        "peak_bf16_gflop_s": peak(torch.bfloat16),
        "python": platform.python_version(),
        "versions": dict(installed()),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }  # fmt: skip


def main() -> None:
    import contenders
    from growth import growth
    from report import plot, table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["built-in", "cifar10"], action="append")
    parser.add_argument("--checkpoint", type=Path, help="a folder that diffusers saved, instead")
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and 8")
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", action="append", help="part of a contender's name")
    parser.add_argument("--parts", default="peers,fresh,chains,growth,installs")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.table or options.plot:
        results = json.loads(options.json.read_text())
        if options.table:
            print(table(results))
        if options.plot:
            plot(results, options.plot)
        return
    batches, parts = options.batch or [1, 8], options.parts.split(",")
    models = [str(options.checkpoint)] if options.checkpoint else options.model
    wanted = [
        name
        for name in contenders.CONTENDERS
        if not options.only or name in (BASE, NAIVE) or any(o in name for o in options.only)
    ]
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    results["machine"] = machine()
    for model in models or ["built-in", "cifar10"]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            print(model, file=sys.stderr)
            gflop = prepare(folder, options.checkpoint, model, batches)
            found = results.setdefault("models", {}).setdefault(model, {})
            found |= {"gflop": gflop, "rounds": options.rounds, "steps": options.steps}
            if "peers" in parts:
                found["peers"] = [
                    row
                    for batch in batches
                    for row in measure(folder, wanted, batch, options.steps, options.rounds, gflop)
                ]
            if "fresh" in parts:
                names = [n for n in wanted if "compile" not in n and "alone" not in n]
                found["fresh"] = fresh(folder, names, rounds=5)
            if "chains" in parts and model == "built-in":
                results["equal_quality"] = full_chains(folder)
            found["loop"] = loop_share(folder)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if "fresh" in parts:
        results["imports_s"] = imports(rounds=7)
    if "growth" in parts:
        results["growth"] = growth()
    if "installs" in parts:
        results["installs_mb"] = installs()
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
