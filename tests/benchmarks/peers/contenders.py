"""One contender in a process of its own, which `compare_peers.py` asks to sample.

    python contenders.py {step,chain} NAME FOLDER BATCH

FOLDER holds the same weights three times: `checkpoint/` of diffusers, `naive.onnx` and `bundle/`. A
line on stdin, JSON, is answered with the seconds that so many "steps" took; with "warm" after one
step that is not timed. The "images" are kept in the file of that name, float32 (B, H, W, C) in
0..1, or null.

Nothing that a contender does not need is imported, so that its start and memory are its own.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SEED = 0
Run = Callable[[int], np.ndarray | None]


def diffusers(folder: Path, batch: int, how: str = "eager") -> Run:
    """Its pipeline; how: "eager", "compile" (torch.compile) or "autocast" (to bfloat16)."""
    import torch
    from diffusers import DDIMPipeline

    pipeline = DDIMPipeline.from_pretrained(folder / "checkpoint")
    pipeline.scheduler = scheduler(folder)
    pipeline.set_progress_bar_config(disable=True)
    if how == "compile":
        pipeline.unet = torch.compile(pipeline.unet)

    def run(steps: int) -> np.ndarray:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")
        generator = torch.Generator().manual_seed(SEED)
        with autocast:
            return pipeline(batch, generator, num_inference_steps=steps, output_type="np").images

    return run


def naive(folder: Path, batch: int) -> Run:
    """The plain ONNX export in ONNX Runtime, diffusers' scheduler around it."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(
        folder / "naive.onnx", providers=["CPUExecutionProvider"]
    )
    ddim = scheduler(folder)
    shape = (batch, *session.get_inputs()[0].shape[1:])

    def run(steps: int) -> np.ndarray:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
        ddim.set_timesteps(steps)
        for t in ddim.timesteps:
            feed = {"x": x.numpy(), "t": np.full(batch, t, np.int64)}
            x = ddim.step(torch.from_numpy(session.run(None, feed)[0]), t, x).prev_sample
        return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    return run


def openvino(folder: Path, batch: int, precision: str) -> Run:
    """The plain ONNX export in OpenVINO, its evaluations alone: no sampling, hence no images."""
    sys.modules["openvino_telemetry"] = None  # it would report to its makers
    import openvino as ov

    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    request = ov.compile_model(folder / "naive.onnx", "CPU", hints).create_infer_request()
    shape = (batch, *(size.get_length() for size in request.model_inputs[0].partial_shape[1:]))
    feed = {"x": np.zeros(shape, np.float32), "t": np.full(batch, 500, np.int64)}

    def run(steps: int) -> None:
        for _ in range(steps):
            request.infer(feed)

    return run


def ours(folder: Path, batch: int, runtime: str, variant: str) -> Run:
    """ddpm-edge on a runtime of its own."""
    from ddpm_edge import Generator

    generator = Generator.load(folder / "bundle", runtime=runtime, variant=variant, device="cpu")
    noise = folder / f"noise{batch}.npy"  # what the others draw with torch
    latents = np.load(noise) if noise.exists() else None

    def run(steps: int) -> np.ndarray:
        images = generator.sample(
            batch, sampler="ddim", steps=steps, clip=None, latents=latents, batch=batch,
            dtype="float32", seed=SEED,
        )  # fmt: skip
        return images / 2 + 0.5

    return run


def whole_chain(folder: Path, batch: int) -> Run:
    """diffusers' DDPM, as its users call it."""
    import torch
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(folder / "checkpoint")
    pipeline.set_progress_bar_config(disable=True)

    def run(steps: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(SEED)
        return pipeline(batch, generator, num_inference_steps=steps, output_type="np").images

    return run


def default_plan(folder: Path, batch: int) -> Run:
    """ddpm-edge as its users call it, in ONNX Runtime, float32."""
    from ddpm_edge import Generator

    generator = Generator.load(folder / "bundle", runtime="onnxruntime", device="cpu")
    return lambda steps: generator.sample(batch, steps=steps, seed=SEED)


# A run of DDIM.
CONTENDERS: dict[str, Callable[[Path, int], Run]] = {
    "diffusers": diffusers,
    "diffusers, torch.compile": lambda f, b: diffusers(f, b, "compile"),
    "diffusers, bf16 autocast": lambda f, b: diffusers(f, b, "autocast"),
    "naive ONNX, ONNX Runtime": naive,
    "naive ONNX, OpenVINO fp32 (network alone)": lambda f, b: openvino(f, b, "f32"),
    "naive ONNX, OpenVINO bf16 (network alone)": lambda f, b: openvino(f, b, "bf16"),
    "ddpm-edge, ONNX Runtime fp32": lambda f, b: ours(f, b, "onnxruntime", "fp32"),
    "ddpm-edge, OpenVINO fp32": lambda f, b: ours(f, b, "openvino", "fp32"),
    "ddpm-edge, OpenVINO bf16": lambda f, b: ours(f, b, "openvino", "bf16"),
    "ddpm-edge, ONNX Runtime int8": lambda f, b: ours(f, b, "onnxruntime", "int8"),
    "ddpm-edge, OpenVINO int8": lambda f, b: ours(f, b, "openvino", "int8"),
}
# What gives images of equal quality, each with the steps that takes.
CHAINS: dict[str, Callable[[Path, int], Run]] = {
    "diffusers": whole_chain,
    "ddpm-edge": default_plan,
}


def scheduler(folder: Path) -> object:
    """diffusers' DDIM with the settings of `ours`."""
    from diffusers import DDIMScheduler

    config = DDIMScheduler.load_config(folder / "checkpoint", subfolder="scheduler")
    settings = {"clip_sample": False, "timestep_spacing": "trailing"}
    return DDIMScheduler.from_config({**config, **settings})


def peak_memory_mb() -> float:
    """The most memory that this process has held, resident, in units of 10**6 bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) * 1024 / 1e6


def main() -> None:
    kind, name, folder, batch = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    with contextlib.redirect_stdout(sys.stderr):
        run = {"step": CONTENDERS, "chain": CHAINS}[kind][name](folder, batch)
    for line in sys.stdin:
        order = json.loads(line)
        if order["warm"]:
            run(1)
        start = time.perf_counter()
        images = run(order["steps"])
        seconds = time.perf_counter() - start
        if order["images"] and images is not None:
            np.save(order["images"], images)
        print(json.dumps({"seconds": seconds, "peak_memory_mb": peak_memory_mb()}), flush=True)


if __name__ == "__main__":
    main()
