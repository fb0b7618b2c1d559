"""ddpm-edge beside torch on one GPU: the same weights, the same DDIM steps, one run.

    python tests/benchmarks/gpu.py             # both models, batches of 1, 16 and 64
    python tests/benchmarks/gpu.py --json found.json --profile traces   # and what the GPU did
    python tests/benchmarks/gpu.py --device cpu --model built-in --batch 1 --steps 2  # a trial

Contenders: torch as one writes it (eager), and `torch.compile(mode="reduce-overhead")`, each in
float32, in TF32 and in autocast to float16, with the state on the GPU; ddpm-edge on ONNX Runtime's
CUDA provider and on the TensorRT that is there, in float32 and float16, with the loop on the device
and on the host. They take turns in one process; a turn is a DDIM run of `--steps`, and the first
round of turns is not timed. A ratio is of two turns of one round; printed is the geometric mean.
The images of all contenders are compared with those of eager float32 first.

It needs the extras [export] and [gpu] or [tensorrt], for torch a build with CUDA. What cannot run
here is listed with the reason. It has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_edge import Bundle, Generator, noise, samplers
from ddpm_edge.bench import bench
from ddpm_edge.build import BuildOptions, build
from ddpm_edge.errors import DdpmEdgeError
from ddpm_edge.export import export
from ddpm_edge.schedule import Schedule
from ddpm_edge.train.unet import UNet, UNetConfig

SEED = 0
MODELS = {"built-in": ("small", (1, 28, 28), 10), "cifar10": ("cifar10", (3, 32, 32), 0)}
BATCHES = (1, 16, 64)
EAGER = "torch eager fp32"
# Of float images in [-1, 1]. float32: sums in another order, on random weights worth some 1e-3;
# half precision and TF32 have no bound of their own here: their gates do (`ddpm-edge verify`).
TOLERANCE = {"fp32": 1e-2}
MATRIX = 8192  # side of the dense product that gives the card's peak

Run = Callable[[int], np.ndarray]


class Model:
    """A network in torch and as a bundle, and what all are asked: DDIM from the same noise."""

    def __init__(self, name: str, folder: Path, device: str) -> None:
        preset, shape, classes = MODELS[name]
        torch.manual_seed(SEED)
        network = UNet(UNetConfig.preset(preset, shape, classes)).eval()
        if name == "built-in":
            fill(network)
            self.schedule = Bundle.open().manifest.schedule
        else:  # no weights of it are packaged: random ones, also where training begins with zeros
            for parameter in network.parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
            self.schedule = Schedule.linear()
        self.shape, self.classes, self.device = shape, classes, device
        self.path = folder / name
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            network(*self.inputs(1, "cpu"))
        self.gflop = float(counter.get_total_flops()) / 1e9
        names = Bundle.open().manifest.class_names if classes else ()
        export(network, self.schedule, self.path, sample_shape=shape, class_names=names,
               variants=("fp32", "fp16"))  # fmt: skip
        self.network = network.to(device)

    def inputs(self, batch: int, device: str) -> tuple[Tensor, ...]:
        """x, t and, where there are classes, the label that stands for none."""
        x = torch.zeros((batch, *self.shape), device=device)
        numbers = torch.zeros(batch, dtype=torch.int64, device=device)
        return (x, numbers, numbers + self.classes) if self.classes else (x, numbers)


def fill(network: UNet) -> None:
    """Put the built-in bundle's weights into our network; the normalisations' are renamed there."""
    graph = onnx.load_from_string(Bundle.open().model("fp32")[1]).graph
    of = {c.name: torch.tensor(np.array(onnx.numpy_helper.to_array(c))) for c in graph.initializer}
    scales = [node for node in graph.node if node.op_type == "BatchNormalization"]
    state = {name: of.get(f"network.{name}") for name in network.state_dict()}
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.GroupNorm)]
    for name, node in zip(norms, scales, strict=True):
        state[f"{name}.weight"], state[f"{name}.bias"] = of[node.input[1]], of[node.input[2]]
    network.load_state_dict(state)


def torchs(model: Model, batch: int, precision: str, compiled: bool) -> Run:
    """The loop as one writes it in torch, its state on the GPU; images in [-1, 1]."""
    network: Any = model.network
    if compiled:
        network = torch.compile(network, mode="reduce-overhead")
    start = torch.from_numpy(noise.Draws(SEED, 0, (batch, *model.shape)).prior())
    _, t, *label = model.inputs(batch, model.device)

    def run(steps: int) -> np.ndarray:
        tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        half = torch.autocast(model.device, torch.float16, enabled=precision == "fp16")
        x = start.to(model.device)
        with torch.inference_mode(), half:
            for row in samplers.ddim(model.schedule, steps).rows("eps"):
                if compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                m = row.from_x * x + row.from_answer * network(x, t.fill_(row.t - 1), *label)
                x = row.a * x + row.b[0] * m
        return x.float().clamp(-1, 1).permute(0, 2, 3, 1).cpu().numpy()

    return run


def where(model: Model, batch: int, runtime: str, variant: str) -> dict[str, Any]:
    """How ddpm-edge is loaded; TensorRT's engine is built for this batch, as torch compiles."""
    found: dict[str, Any] = {"variant": variant, "device": model.device}
    if runtime == "tensorrt":
        found["cache_dir"] = model.path.with_name(f"{model.path.name} {batch} {variant}")
        build(model.path, options=BuildOptions(max_batch=batch, best_batch=batch), **found)
    return found | {"runtime": runtime}


def ours(
    model: Model, batch: int, runtime: str, variant: str, loop: str, stack: contextlib.ExitStack
) -> Run:
    """ddpm-edge; the stack closes it."""
    arguments = where(model, batch, runtime, variant)
    generator = stack.enter_context(Generator.load(model.path, loop=loop, **arguments))

    def run(steps: int) -> np.ndarray:
        return generator.sample(
            batch, batch=batch, sampler="ddim", steps=steps, clip=None, seed=SEED, dtype="float32"
        )

    return run


def contenders(
    model: Model, batch: int, stack: contextlib.ExitStack
) -> Iterator[tuple[str, str, Callable[[], Run]]]:
    """Name, precision and what makes it run."""
    on_gpu = model.device != "cpu"
    for precision in ("fp32", "tf32", "fp16") if on_gpu else ("fp32",):
        for kind, compiled in {"eager": False, "compile": True}.items():
            yield (
                f"torch {kind} {precision}",
                precision,
                lambda p=precision, c=compiled: torchs(model, batch, p, c),
            )
    for runtime in ("onnxruntime", "tensorrt"):
        for variant in ("fp32", "fp16"):
            for loop in ("device", "host") if on_gpu else ("host",):
                yield (
                    f"ddpm-edge {runtime} {variant}, loop on the {loop}",
                    variant,
                    lambda r=runtime, v=variant, w=loop: ours(model, batch, r, v, w, stack),
                )


def compare(
    model: Model, batch: int, options: argparse.Namespace, stack: contextlib.ExitStack
) -> list[dict[str, Any]]:
    """A row for each contender."""
    torch.compiler.reset()  # no shapes of the batch before; afterwards it would compile again
    rows: list[dict[str, Any]] = []
    running: dict[str, Run] = {}
    images: dict[str, np.ndarray] = {}
    for name, precision, make in contenders(model, batch, stack):
        row: dict[str, Any] = {"contender": name, "precision": precision, "batch": batch}
        rows.append(row)
        try:
            running[name] = make()
            running[name](options.steps)  # captures, compiles and fills caches
            images[name] = running[name](options.steps)
        except (DdpmEdgeError, RuntimeError, MemoryError) as error:
            running.pop(name, None)
            row["reason"] = str(error).strip().splitlines()[0]
            continue
        off = float(np.abs(images[name] - images[EAGER]).max())
        row["max_abs_difference"] = off
        if not off <= TOLERANCE.get(precision, np.inf):
            raise SystemExit(f"{name} makes other images than {EAGER}: {off} apart")
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for number in range(options.rounds + 1):
        for name, run in running.items():
            before = time.perf_counter()
            run(options.steps)
            if number:  # the first round finds what making the others has thrown out
                seconds[name].append(time.perf_counter() - before)
    for row in rows:
        name = row["contender"]
        if name not in running:
            continue
        step = statistics.median(seconds[name]) / options.steps
        row["ms_a_step"] = step * 1e3
        row["gflop_s"] = model.gflop * batch / step
        for other in (EAGER, f"torch compile {row['precision']}"):
            if other in running:
                logs = np.log(np.array(seconds[other]) / np.array(seconds[name]))
                row[f"times {other}"] = float(np.exp(logs.mean()))
        if options.profile:
            trace = options.profile / f"{model.path.name} batch {batch} {name}.json"
            row["kernels_percent"] = kernels(running[name], options.steps, trace)
    return rows


def kernels(run: Run, steps: int, trace: Path) -> float:
    """The share of a run, in percent, in which the GPU ran kernels; by CUPTI, also in a graph."""
    from torch.profiler import ProfilerActivity, profile

    trace.parent.mkdir(exist_ok=True)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        before = time.perf_counter()
        run(steps)
        seconds = time.perf_counter() - before
    found.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    busy = sum(event["dur"] for event in events if event.get("cat") == "kernel")
    return 100 * busy / 1e6 / seconds


def loops(model: Model, batch: int) -> dict[str, float | str]:
    """What the loop itself costs of a step, in percent, or why it does not run on the device."""
    found: dict[str, float | str] = {}
    for runtime in ("onnxruntime", "tensorrt"):
        for variant in ("fp32", "fp16"):
            try:
                report = bench(
                    model.path, batches=[batch], runs=5, sampler="ddim", loop="device",
                    **where(model, batch, runtime, variant),
                )  # fmt: skip
                found[f"{runtime} {variant}"] = report.batches[0].loop_percent
            except (DdpmEdgeError, MemoryError) as error:
                found[f"{runtime} {variant}"] = str(error).strip().splitlines()[0]
    return found


def peaks(device: str) -> dict[str, float]:
    """GFLOP/s of a dense product: what the card can do."""
    found = {}
    side = MATRIX if device != "cpu" else 1024
    for precision in ("fp32", "tf32", "fp16") if device != "cpu" else ("fp32",):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        kind = torch.float16 if precision == "fp16" else torch.float32
        a = torch.rand((side, side), device=device, dtype=kind)
        times = []
        for _ in range(10):
            before = time.perf_counter()
            (a @ a)[0, 0].item()
            times.append(time.perf_counter() - before)
        found[precision] = 2 * side**3 / min(times) / 1e9
    return found


def verdicts(results: dict[str, Any]) -> Iterator[str]:
    """What is asked of it: three times eager at batch 1, never behind compile, a loop below 3 %."""
    for name, found in results["models"].items():
        for row in found["rows"]:
            if "loop on the device" not in row["contender"] or "ms_a_step" not in row:
                continue
            compiled = row.get(f"times torch compile {row['precision']}", np.inf)
            fine = compiled >= 1 and (row["batch"] > 1 or row[f"times {EAGER}"] >= 3)
            yield (
                f"{name}, batch {row['batch']}, {row['contender']}: {row[f'times {EAGER}']:.2f} x "
                f"eager, {compiled:.2f} x compile: {'as asked' if fine else 'NOT as asked'}"
            )
        for batch, shares in found["loop_percent"].items():
            for who, share in shares.items():
                if isinstance(share, str):
                    yield f"{name}, batch {batch}, {who}: the loop's share is not known: {share}"
                    continue
                said = "as asked" if share < 3 else "NOT as asked"
                yield f"{name}, batch {batch}, {who}: the loop takes {share:.1f} %: {said}"


def table(results: dict[str, Any]) -> Iterator[str]:
    """Markdown."""
    yield f"{results['device']}; peaks in GFLOP/s: {json.dumps(results['peak_gflop_s'])}"
    for name, found in results["models"].items():
        yield f"\n{name}, {found['gflop']:.2f} GFLOP an evaluation\n"
        yield "| batch | contender | ms a step | x eager | x compile | GFLOP/s | kernels % | off |"
        yield "|---|---|---|---|---|---|---|---|"
        for row in found["rows"]:
            if "reason" in row:
                yield f"| {row['batch']} | {row['contender']} | {row['reason']} | | | | | |"
                continue
            figures = (
                row[f"times {EAGER}"], row.get(f"times torch compile {row['precision']}", np.nan),
                row["gflop_s"], row.get("kernels_percent", np.nan), row["max_abs_difference"],
            )  # fmt: skip
            yield (
                f"| {row['batch']} | {row['contender']} | {row['ms_a_step']:.3f} | "
                + " | ".join(f"{figure:.3g}" for figure in figures)
                + " |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", choices=MODELS, action="append", help="default: both")
    parser.add_argument("--batch", type=int, action="append", help="default: 1, 16 and 64")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path, help="a folder for traces")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU; --device cpu tries the script out")
    device = torch.cuda.get_device_name() if options.device != "cpu" else "CPU"
    results: dict[str, Any] = {"device": device, "torch": torch.__version__, "models": {}}
    results["peak_gflop_s"] = peaks(options.device)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.model or MODELS:
            model = Model(name, Path(folder), options.device)
            found: dict[str, Any] = {"gflop": model.gflop, "rows": [], "loop_percent": {}}
            results["models"][name] = found
            for batch in options.batch or BATCHES:
                with contextlib.ExitStack() as stack:
                    found["rows"] += compare(model, batch, options, stack)
                if options.device != "cpu":
                    found["loop_percent"][batch] = loops(model, batch)
                if options.json:
                    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join([*table(results), "", *verdicts(results)]))


if __name__ == "__main__":
    main()
