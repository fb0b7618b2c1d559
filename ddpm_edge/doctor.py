"""What works on this machine, what does not, and the remedy of each fault: `ddpm-edge doctor`.

Nothing is changed. Whatever may crash or hang in native code runs in a process of its own, so that
a crash is a finding too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ddpm_edge import __version__
from ddpm_edge.errors import DdpmEdgeError
from ddpm_edge.runtimes.cuda import REMEDY
from ddpm_edge.runtimes.flavour import MODULES, TITLES

PROBE_SECONDS = 60.0
FREE_BYTES = 1e9
OLDEST_PYTHON, OLDEST_NUMPY, NEWEST_NUMPY = (3, 10), (1, 26), (3, 0)
DEV = Path("/dev")
DEVICE_NODES = ("nvidia[0-9]*", "nvhost-gpu", "nvhost-ctrl-gpu", "nvgpu/*/ctrl", "nvmap")
# What a driver leaves where no device node need be: a container, WSL, Windows.
DRIVERS = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1",
           "C:/Windows/System32/nvcuda.dll")  # fmt: skip
CONTAINERS = ("/.dockerenv", "/run/.containerenv")
ETC_RELEASE = Path("/etc/nv_tegra_release")
USR_LIB = Path("/usr/lib")  # JetPack's Python packages are below
NVPMODEL, NVPMODEL_CONF = "nvpmodel", Path("/etc/nvpmodel.conf")
# L4T from this release on: JetPack, its TensorRT and its Python.
JETPACKS = (
    ((39, 0), "7.2", (10, 16), (3, 12)),
    ((38, 0), "7.0 or 7.1", (10, 13), (3, 12)),
    ((36, 4), "6.1 or 6.2", (10, 3), (3, 10)),
    ((36, 0), "6.0", (8, 6), (3, 10)),
    ((0, 0), "5 or older", (8, 5), (3, 8)),
)
OLDEST_L4T = (36, 4)
BUILT_FOR_NUMPY_1 = re.compile(r"compiled using NumPy 1|_ARRAY_API|numpy\.core\.multiarray failed")
LOADER_REASON = re.compile(r"(?<=with error: ).*|CUDA failure .*")
JETSON_WHEELS = "https://pypi.jetson-ai-lab.io/jp6/cu126"
# This package's own words that would lead the reader in a circle.
CIRCLE = re.compile(r"CUDA does not work here \((.*)\); `ddpm-edge doctor` says what is missing")

Status = Literal["ok", "info", "warning", "fault"]


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        what: its name, such as "cuda"; several findings may share it.
        status: "fault" = installed or asked for, and does not work.
        text: for people.
        remedy: a command to type, or "".
    """

    what: str
    status: Status
    text: str
    remedy: str = ""


class Answer(NamedTuple):
    """What a probe found out, why it went no further, and what native code wrote to stderr."""

    facts: dict[str, Any]
    error: str = ""
    said: str = ""


def examine(cache_dir: str | Path | None = None) -> Iterator[Finding]:
    """Look at everything, one finding after the other; takes some seconds.

    Args:
        cache_dir: where engines are; see `Generator.load`.
    """
    machine = Machine(cache_dir)
    for check in CHECKS:
        name = check.__name__
        try:
            yield from check(machine)
        except Exception as error:
            text = f"the check {name!r} itself failed: {_text(error)}"
            yield Finding(name, "fault", text, "report it with the output of: ddpm-edge doctor")


def probe(name: str, *arguments: str | bool | None) -> Answer:
    """Run one of `PROBES` in a process of its own that imports what this one would."""
    source = f"import sys; sys.path[:] = {sys.path!r}; from ddpm_edge import doctor; doctor.answer"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{source}{(name, *arguments)!r}"], text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, said = process.communicate(timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return Answer({}, f"no answer within {PROBE_SECONDS:g} s")
    finally:
        process.kill()  # not waited for: one that hangs in the driver stays
    code = process.returncode
    if code < 0:
        return Answer({}, f"the process died of signal {-code}, {signal.strsignal(-code)}", said)
    with contextlib.suppress(ValueError):
        facts = json.loads(out.strip().rpartition("\n")[2])
        if code == 0 and isinstance(facts, dict):
            return Answer(facts, facts.pop("error", ""), said)
    return Answer({}, f"the process ended with exit code {code:#x}: {said.strip()[-300:]}", said)


def answer(name: str, *arguments: Any) -> None:
    """Write the facts of a probe to stdout: what the process of `probe` does."""
    facts: dict[str, Any] = {}
    try:
        PROBES[name](facts, *arguments)
    except Exception as error:
        facts["error"] = _text(error)
    sys.stdout.write(f"\n{json.dumps(facts)}\n")


def _ask_onnxruntime(facts: dict[str, Any], device: str) -> None:
    import onnxruntime

    from ddpm_edge.generator import Generator

    facts["version"] = onnxruntime.__version__
    facts["providers"] = onnxruntime.get_available_providers()
    with Generator.load(runtime="onnxruntime", device=device) as generator:
        generator.warmup()


def _ask_openvino(facts: dict[str, Any]) -> None:
    from ddpm_edge.generator import Generator

    facts["version"] = importlib.metadata.version("openvino")
    with Generator.load(runtime="openvino") as generator:
        generator.warmup()


def _ask_cuda(facts: dict[str, Any]) -> None:
    from ddpm_edge.runtimes import cuda

    facts["driver"] = cuda.call("cudaDriverGetVersion")
    facts["runtime"] = cuda.call("cudaRuntimeGetVersion")
    facts["gpus"] = [
        f"{gpu}, {gpu.memory / 1e9:.1f} GB{' shared with the CPU' if gpu.integrated else ''}"
        for gpu in cuda.gpus()
    ]


def _ask_tensorrt(facts: dict[str, Any], name: str, has_cuda: bool) -> None:
    from ddpm_edge.runtimes.flavour import flavour

    found = flavour(name)
    facts["version"] = found.version
    if has_cuda and not found.trt.Runtime(found.trt.Logger(found.trt.Logger.ERROR)):
        raise RuntimeError("it cannot create a Runtime")


def _ask_auto(facts: dict[str, Any], cache_dir: str | None) -> None:
    from ddpm_edge.generator import Generator

    with Generator.load(cache_dir=cache_dir) as generator:
        result = generator.run(1, seed=0, steps=1)
        facts["runtime"], facts["loop"] = result.runtime, result.loop


PROBES: dict[str, Callable[..., None]] = {
    "onnxruntime": _ask_onnxruntime,
    "openvino": _ask_openvino,
    "cuda": _ask_cuda,
    "tensorrt": _ask_tensorrt,
    "auto": _ask_auto,
}


class Machine:
    """What several checks ask about; each probe runs once."""

    def __init__(self, cache_dir: str | Path | None = None) -> None:
        self.cache_dir = None if cache_dir is None else str(cache_dir)

    @functools.cached_property
    def onnxruntime(self) -> Answer:
        """ONNX Runtime on the CPU."""
        return probe("onnxruntime", "cpu")

    @functools.cached_property
    def openvino(self) -> Answer | None:
        """OpenVINO, where it is installed."""
        return probe("openvino") if _is_there("openvino") else None

    @functools.cached_property
    def cuda(self) -> Answer:
        """CUDA by cuda-bindings."""
        return probe("cuda")

    @functools.cached_property
    def tensorrt(self) -> dict[str, Answer]:
        """Every TensorRT that is installed; only imported where CUDA does not work."""
        has_cuda = not self.cuda.error
        return {name: probe("tensorrt", name, has_cuda) for name in MODULES if _is_there(name)}

    @property
    def has_tensorrt(self) -> bool:
        """Whether one of them works."""
        return not self.cuda.error and any(not found.error for found in self.tensorrt.values())

    @functools.cached_property
    def l4t(self) -> tuple[int, int] | None:
        """Release of a Jetson's Linux, such as (36, 4)."""
        with contextlib.suppress(OSError):
            head = ETC_RELEASE.read_text(encoding="utf-8", errors="replace")
            found = re.search(r"R(\d+) \(release\), REVISION: (\d+)", head)
            return (int(found[1]), int(found[2])) if found else None
        return None

    @functools.cached_property
    def nodes(self) -> list[Path]:
        """Device nodes of NVIDIA GPUs."""
        return [node for pattern in DEVICE_NODES for node in sorted(DEV.glob(pattern))]

    @functools.cached_property
    def jetson(self) -> bool:
        """Whether this is a Jetson, or a container on one."""
        return ETC_RELEASE.exists() or "tegra" in platform.release()

    @property
    def nvidia(self) -> bool:
        """Whether there seems to be an NVIDIA GPU, usable or not."""
        return bool(self.nodes) or self.jetson or any(Path(path).exists() for path in DRIVERS)


def python(_: Machine) -> Iterator[Finding]:
    """Python, the platform, NumPy and this package."""
    libc = " ".join(platform.libc_ver())
    text = f"Python {platform.python_version()} on {platform.system()} {platform.machine()} {libc}"
    old = sys.version_info[:2] < OLDEST_PYTHON
    yield Finding("python", *_verdict(text.strip(), old, "python3.10 -m venv .venv"))
    yield Finding("ddpm-edge", "ok", f"ddpm-edge {__version__}")
    version = metadata.version("numpy")
    wrong = not OLDEST_NUMPY <= _numbers(version) < NEWEST_NUMPY
    yield Finding("numpy", *_verdict(f"NumPy {version}", wrong, "pip install 'numpy>=1.26,<3'"))


def bundle(_: Machine) -> Iterator[Finding]:
    """The built-in model, which the other checks run."""
    from ddpm_edge.bundle import Bundle

    try:
        opened = Bundle.open()
        opened.check()
    except (DdpmEdgeError, OSError) as error:
        remedy = "pip install --force-reinstall --no-deps ddpm-edge"
        yield Finding("bundle", "fault", f"the built-in model is damaged: {error}", remedy)
    else:
        yield Finding("bundle", "ok", f"built-in model {opened.manifest.name}, as it was exported")


def onnxruntime(machine: Machine) -> Iterator[Finding]:
    """ONNX Runtime's packages, and the CPU."""
    wheels = list(dict.fromkeys(metadata.packages_distributions().get("onnxruntime", ())))
    extra = "gpu" if machine.nvidia and platform.machine() in ("x86_64", "AMD64") else "cpu"
    install = f"pip install 'ddpm-edge[{extra}]'"
    again = f"pip uninstall -y {' '.join(wheels) or 'onnxruntime'} && {install}"
    status: Status
    if not wheels and not _is_there("onnxruntime"):
        another = machine.has_tensorrt or (machine.openvino and not machine.openvino.error)
        status = "info" if another else "fault"
        yield Finding("onnxruntime", status, "ONNX Runtime is not installed", install)
        return
    if len(wheels) > 1:
        text = f"{' and '.join(wheels)} overwrite each other: each provides the module onnxruntime"
        yield Finding("onnxruntime", "fault", text, again)
    found = machine.onnxruntime
    if BUILT_FOR_NUMPY_1.search(found.error + found.said):
        text = f"this onnxruntime was built for NumPy 1, and NumPy is {metadata.version('numpy')}"
        status = "fault" if found.error else "warning"
        yield Finding("onnxruntime", status, text, "pip install 'numpy<2'")
    elif found.error:
        yield Finding("onnxruntime", "fault", f"ONNX Runtime does not run: {found.error}", again)
    else:
        listed = ", ".join(found.facts["providers"])
        text = f"ONNX Runtime {found.facts['version']} runs on the CPU (it lists {listed})"
        yield Finding("onnxruntime", "ok", text)


def openvino(machine: Machine) -> Iterator[Finding]:
    """OpenVINO, where it is installed."""
    found = machine.openvino
    if found and found.error:
        text, remedy = (
            f"OpenVINO does not run: {found.error}",
            "pip install -U 'ddpm-edge[openvino]'",
        )
        yield Finding("openvino", "fault", text, remedy)
    elif found:
        yield Finding("openvino", "ok", f"OpenVINO {found.facts['version']} runs on the CPU")


def onnxruntime_cuda(machine: Machine) -> Iterator[Finding]:
    """Whether the CUDA provider, where listed, really runs."""
    facts = machine.onnxruntime.facts
    if "CUDAExecutionProvider" not in facts.get("providers", ()):
        return
    what, found = "onnxruntime_cuda", probe("onnxruntime", "cuda")
    if not found.error:
        yield Finding(what, "ok", "ONNX Runtime runs on the GPU")
        return
    needs = 13 if _numbers(facts["version"]) >= (1, 27) else 12
    loader = LOADER_REASON.search(found.said)
    fell_back = "ONNX Runtime runs on CPU" in found.error
    text = (
        "CUDAExecutionProvider is listed, but "
        f"{'the session runs on the CPU' if fell_back else 'it fails'}: "
        f"{loader[0].strip() if loader else found.error} (this version needs CUDA {needs}, cuDNN 9)"
    )
    driver = machine.cuda.facts.get("driver", 0) // 1000
    broken = _without_cuda(machine) if machine.cuda.error else None
    status: Status = "fault" if machine.nvidia else "warning"
    if not machine.nvidia:
        remedy = "pip uninstall -y onnxruntime-gpu && pip install 'ddpm-edge[cpu]'"
    elif broken and not broken.remedy.startswith("pip"):  # which is about cuda-bindings alone
        status, remedy = broken.status, broken.remedy
    elif machine.jetson:
        remedy = f"ddpm-edge build (TensorRT), or pip install onnxruntime-gpu -i {JETSON_WHEELS}"
    elif 0 < driver < needs:
        remedy = "pip install 'onnxruntime-gpu<1.27'"
    else:
        minor = {12: "12-9", 13: "13-0"}[needs]
        remedy = f"sudo apt install cuda-libraries-{minor} cudnn9-cuda-{needs}"
    yield Finding(what, status, text, remedy)


def cuda(machine: Machine) -> Iterator[Finding]:
    """The driver and the GPUs."""
    facts = machine.cuda.facts
    if machine.cuda.error:
        yield _without_cuda(machine)
        return
    text = f"CUDA {_cuda(facts['driver'])} (driver), {_cuda(facts['runtime'])} (cuda-bindings)"
    yield Finding("cuda", "ok", text)
    for gpu in facts["gpus"]:
        yield Finding("cuda", "ok", gpu)


def _without_cuda(machine: Machine) -> Finding:
    """Why CUDA does not work, by the first thing that explains it."""
    error, facts, nodes = machine.cuda.error, machine.cuda.facts, machine.nodes
    driver, runtime = facts.get("driver", 0), facts.get("runtime", 0)
    if not machine.nvidia:
        return Finding("cuda", "info", f"no NVIDIA GPU: {error}")
    if "No module named 'cuda" in error:
        text = "without cuda-bindings neither TensorRT nor the loop on the GPU can be used"
        return Finding("cuda", "warning", text, REMEDY)
    if "CUDA_VISIBLE_DEVICES" in os.environ and "cudaErrorNoDevice" in error:
        text = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} leaves no GPU: {error}"
        return Finding("cuda", "warning", text, "unset CUDA_VISIBLE_DEVICES")
    text = f"CUDA does not work: {error}"
    closed = [node for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    if closed:
        text = f"no permission to use {', '.join(map(str, closed))}: {error}"
        remedy = "sudo usermod -aG video,render $USER   # then log in again"
    elif 0 < driver // 1000 < runtime // 1000:
        text = f"the driver is for CUDA {_cuda(driver)}, cuda-bindings for {_cuda(runtime)}"
        remedy = f"pip install 'cuda-bindings=={driver // 1000}.*'"
    elif any(Path(path).exists() for path in CONTAINERS):
        flag = "--runtime nvidia" if machine.jetson else "--gpus all"
        text, remedy = f"the container was given no GPU: {error}", f"docker run {flag} ..."
    elif driver == 0:
        package = "apt install nvidia-jetpack" if machine.jetson else "ubuntu-drivers install"
        text, remedy = f"the NVIDIA driver's library is missing: {error}", f"sudo {package}"
    else:
        remedy = "sudo dmesg | grep -iE 'nvrm|nvgpu'   # the driver's own words"
    return Finding("cuda", "fault" if nodes else "warning", text, remedy)


def tensorrt(machine: Machine) -> Iterator[Finding]:
    """Every TensorRT that is installed."""
    for name, found in machine.tensorrt.items():
        title = f"{TITLES[name]} {found.facts.get('version', '')}".strip()
        if found.error:
            yield Finding(name, "fault", f"{title} does not work: {found.error}", REMEDY)
        elif machine.cuda.error:
            text = f"{title} is installed, but CUDA does not work here: {machine.cuda.error}"
            yield Finding(name, "warning", text)
        else:
            yield Finding(name, "ok", f"{title} works")
    if not machine.tensorrt and not machine.jetson:
        remedy = "" if machine.cuda.error else REMEDY
        yield Finding("tensorrt", "info", "TensorRT is not installed", remedy)


def jetpack(machine: Machine) -> Iterator[Finding]:
    """On a Jetson: whether JetPack is new enough, and this Python sees its TensorRT."""
    if machine.l4t is None:
        return
    _, name, shipped, its_python = next(row for row in JETPACKS if machine.l4t >= row[0])
    title = f"JetPack {name} (L4T R{_dotted(machine.l4t)}, TensorRT {_dotted(shipped)})"
    if machine.l4t < OLDEST_L4T:
        remedy = "flash JetPack 6.1 or later with NVIDIA's SDK Manager"
        yield Finding("jetpack", "fault", f"{title} is too old; 10.3 is the oldest", remedy)
        return
    yield Finding("jetpack", "ok", title)
    found = machine.tensorrt.get("tensorrt")
    venv = f"python{_dotted(its_python)} -m venv --system-site-packages .venv"
    if found and not found.error:
        version = found.facts["version"]
        if _numbers(version) != shipped:
            yield Finding("jetpack", "info", f"TensorRT {version} is not the one of this JetPack")
    elif sys.version_info[:2] != its_python:
        text = f"JetPack's TensorRT is for Python {_dotted(its_python)}; this is "
        yield Finding("jetpack", "fault", text + platform.python_version(), venv)
    elif there := sorted(USR_LIB.glob("python3*/dist-packages/tensorrt")):
        text = f"TensorRT is at {there[0]}, where this environment does not look"
        yield Finding("jetpack", "fault", text, venv)
    else:
        text, remedy = "JetPack's TensorRT is not installed", "sudo apt install python3-libnvinfer"
        yield Finding("jetpack", "warning", text, remedy)


def power(machine: Machine) -> Iterator[Finding]:
    """On a Jetson: whether its power mode slows it."""
    if machine.l4t is None:
        return
    try:
        asked = subprocess.run(
            [NVPMODEL, "-q"], capture_output=True, text=True, timeout=10, check=False
        )
        mode = re.search(r"Power Mode: *(\S+)", asked.stdout)
        reason = asked.stderr.strip()[-200:]
    except (OSError, subprocess.TimeoutExpired) as error:
        mode, reason = None, str(error)
    if mode is None:
        text = f"the power mode is not known: {reason}"
        yield Finding("power", "info", text, "sudo nvpmodel -q")
        return
    modes = {"MAXN": "0"}  # the number differs from module to module
    with contextlib.suppress(OSError):
        text = NVPMODEL_CONF.read_text(encoding="utf-8", errors="replace")
        modes = {name: n for n, name in re.findall(r"POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", text)}
    best = modes.get("MAXN_SUPER") or modes.get("MAXN")
    if mode[1].startswith("MAXN") or best is None:
        yield Finding("power", "ok", f"power mode {mode[1]}")
    else:
        text = f"power mode {mode[1]}: figures will be lower than with MAXN"
        yield Finding("power", "warning", text, f"sudo nvpmodel -m {best}")


def cache(machine: Machine) -> Iterator[Finding]:
    """Where built engines are kept."""
    from ddpm_edge.files import check_writable
    from ddpm_edge.runtimes.engine_cache import EngineCache, cache_directory

    directory = cache_directory(machine.cache_dir)
    entries = list(EngineCache(directory).entries())
    size = sum(entry.size for entry in entries) / 1e6
    text = f"engine cache {directory}: {len(entries)} built, {size:.1f} MB"
    remedy = "export DDPM_EDGE_CACHE=DIRECTORY   # or --cache-dir DIRECTORY"
    try:
        check_writable(directory)
    except OSError as error:
        yield Finding("cache", "warning", f"{text}; not writable: {error}", remedy)
        return
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < FREE_BYTES:
        text += f"; only {free / 1e6:.0f} MB are free"
        yield Finding("cache", "warning", text, remedy)
    else:
        yield Finding("cache", "ok", text)


def auto(machine: Machine) -> Iterator[Finding]:
    """What an app gets that asks for nothing."""
    found = probe("auto", machine.cache_dir)
    if found.error:
        text = f"Generator.load() cannot run here: {found.error}"
        yield Finding("auto", "fault", text, "pip install 'ddpm-edge[cpu]'")
    else:
        runtime, device = found.facts["runtime"].split(" on ")
        loop = f", its loop on the {found.facts['loop']}" if device.startswith("cuda") else ""
        yield Finding("auto", "ok", f"Generator.load() would run on {runtime}, {device}{loop}")


CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
    python, bundle, onnxruntime, openvino, cuda, onnxruntime_cuda, tensorrt, jetpack, power, cache,
    auto,
)  # fmt: skip


def _verdict(text: str, wrong: bool, remedy: str) -> tuple[Status, str, str]:
    return ("fault", f"{text} is not supported", remedy) if wrong else ("ok", text, "")


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _cuda(version: int) -> str:
    """13050 as "13.5"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _text(error: Exception) -> str:
    """An error in one line; this package's own say what they are."""
    text = CIRCLE.sub(r"\1", str(error).removesuffix(f"; {REMEDY}"))
    kind = "" if isinstance(error, DdpmEdgeError) else f"{type(error).__name__}: "
    return f"{kind}{text}"
