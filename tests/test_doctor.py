"""doctor: what it says of this machine, and of broken ones that files and modules play."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from ddpm_edge import doctor as module
from ddpm_edge.cli.doctor import doctor as command
from ddpm_edge.doctor import Answer, Finding, Machine, examine, probe

BROKEN = Answer({}, "cudaGetDeviceCount: cudaErrorNoDevice")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """A machine without a GPU, whatever this one has."""
    monkeypatch.setattr(module, "DEV", tmp_path / "dev")
    monkeypatch.setattr(module, "DRIVERS", ())
    monkeypatch.setattr(module, "CONTAINERS", ())
    monkeypatch.setattr(module, "ETC_RELEASE", tmp_path / "nv_tegra_release")
    monkeypatch.setattr(module, "USR_LIB", tmp_path / "lib")
    monkeypatch.setattr(module, "NVPMODEL", str(tmp_path / "nvpmodel"))
    monkeypatch.setattr(module, "NVPMODEL_CONF", tmp_path / "nvpmodel.conf")
    monkeypatch.setattr("platform.release", lambda: "6.8.0-generic")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Machine(tmp_path / "cache")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """Make a module that this process and its probes import before any other."""
    monkeypatch.syspath_prepend(tmp_path / "modules")

    def make(name: str, code: str) -> None:
        path = tmp_path / "modules" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)

    return make


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say which installed packages provide the module onnxruntime."""

    def make(*names: str) -> None:
        found = {"onnxruntime": list(names)}
        monkeypatch.setattr(module.metadata, "packages_distributions", lambda: found)

    return make


def jetson(machine: Machine, release: str, version: str = "", error: str = "") -> list[Finding]:
    """What is said of a Jetson whose Python finds this TensorRT."""
    module.ETC_RELEASE.write_text(f"# {release}, GCID: 1, BOARD: generic, EABI: aarch64\n")
    machine.tensorrt = {"tensorrt": Answer({"version": version}, error)} if version else {}
    return list(module.jetpack(machine))


def node(machine: Machine, mode: int = 0o666) -> None:
    module.DEV.mkdir()
    (module.DEV / "nvidia0").touch()
    (module.DEV / "nvidia0").chmod(mode)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(command, arguments)


# --- the whole


def test_this_machine() -> None:
    pytest.importorskip("onnxruntime")
    findings = list(examine())
    if not Machine().nvidia:  # nothing is wrong with that
        assert [f for f in findings if f.status == "fault"] == []
    assert findings[0].text.startswith(f"Python {sys.version.split()[0]} on ")
    assert findings[-1].what == "auto"
    assert "Generator.load() would run on " in findings[-1].text
    assert {"numpy", "bundle", "onnxruntime", "cuda", "cache"} <= {f.what for f in findings}


def test_tensorrt_without_a_gpu_is_said_clearly(machine: Machine) -> None:
    pytest.importorskip("tensorrt_rtx")
    if not machine.cuda.error:
        pytest.skip("CUDA works here")
    [said] = [f for f in module.tensorrt(machine) if f.what == "tensorrt_rtx"]
    assert said.status == "warning"
    assert said.text.startswith("TensorRT for RTX ")
    assert "is installed, but CUDA does not work here: " in said.text
    [said] = module.cuda(machine)
    assert said.status == "info"
    assert said.text.startswith("no NVIDIA GPU: ")
    assert "doctor" not in said.text  # the error's own hint would send the reader in a circle


def test_importing_it_imports_no_runtime() -> None:
    code = (
        "import sys; before = set(sys.modules); import ddpm_edge.doctor\n"
        "print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert not {"onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "click"} & imported


def test_command_prints_text(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("cuda", "info", "no GPU"), Finding("auto", "ok", "it would run on x, cpu")]
    # by sys.modules: the package has the command under the module's name
    monkeypatch.setattr(sys.modules["ddpm_edge.cli.doctor"], "examine", lambda _: iter(findings))
    result = run()
    assert result.exit_code == 0
    assert result.output == (
        "-[i] no GPU\n-[v] it would run on x, cpu\nNext: ddpm-edge sample -n 16 -o samples.png\n"
    )
    findings.insert(0, Finding("tensorrt", "ok", "TensorRT 10.3 works"))
    assert run().output.endswith("Next: ddpm-edge build\n")
    findings[-1] = Finding("auto", "ok", "it would run on tensorrt, cuda:0")
    assert run().output.endswith("Next: ddpm-edge sample -n 16 -o samples.png\n")
    findings.append(Finding("cache", "fault", "it is broken", "mend it"))
    result = run()
    assert result.exit_code == 1
    assert "-[x] it is broken\n     mend it\nNext: the remedies of 1 -[x], then" in result.output


def test_command_prints_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "CHECKS", (module.python, module.cache))
    result = run("--json", "--cache-dir", str(tmp_path / "mine"))
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["ok"] is True
    assert {f["what"] for f in report["findings"]} == {"python", "ddpm-edge", "numpy", "cache"}
    assert str(tmp_path / "mine") in report["findings"][-1]["text"]
    assert not (tmp_path / "mine").exists()  # it never changes anything
    monkeypatch.setattr(module, "OLDEST_PYTHON", (4, 0))
    result = run("--json")
    assert result.exit_code == 1
    assert json.loads(result.output)["ok"] is False


def test_a_check_that_raises_is_a_finding_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def odd(_: Machine) -> Any:
        yield Finding("odd", "ok", "so far")
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(module, "CHECKS", (odd, module.python))
    findings = list(examine())
    assert [f.what for f in findings] == ["odd", "odd", "python", "ddpm-edge", "numpy"]
    assert findings[1].status == "fault"
    assert findings[1].text == "the check 'odd' itself failed: ZeroDivisionError: by zero"


def test_every_fault_has_a_remedy() -> None:
    """By the source: a Finding of status fault is never made with two or three arguments."""
    import ast

    for call in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Finding":
            status = call.args[1]
            if isinstance(status, ast.Constant) and status.value == "fault":
                assert len(call.args) == 4, ast.unparse(call)


# --- probes


def test_a_probe_that_crashes_is_a_finding(fake: Callable[[str, str], None]) -> None:
    fake("onnxruntime", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    findings = list(module.onnxruntime(Machine()))
    assert findings[-1].status == "fault"
    assert "ONNX Runtime does not run: the process died of signal 11" in findings[-1].text


def test_a_probe_that_hangs_is_a_finding(
    fake: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROBE_SECONDS", 2.0)
    fake("onnxruntime", "import time; time.sleep(60)")
    assert probe("onnxruntime", "cpu") == Answer({}, "no answer within 2 s")


def test_a_probe_that_ends_the_process_is_a_finding(fake: Callable[[str, str], None]) -> None:
    fake("onnxruntime", "import os; os.write(2, b'bad luck'); os._exit(3)")
    assert probe("onnxruntime", "cpu").error == "the process ended with exit code 0x3: bad luck"
    fake("onnxruntime", "import os; os._exit(0)")
    assert "the process ended with exit code 0x0" in probe("onnxruntime", "cpu").error


def test_words_of_native_code_on_stdout_do_not_matter(fake: Callable[[str, str], None]) -> None:
    fake("tensorrt", "import os; os.write(1, b'Hello'); __version__ = '10.3.0'")
    assert probe("tensorrt", "tensorrt", False) == Answer({"version": "10.3.0"})


def test_an_error_keeps_the_facts(fake: Callable[[str, str], None]) -> None:
    code = "__version__ = '1.23.0'\ndef get_available_providers(): return ['X']\n"
    fake("onnxruntime", code)
    found = probe("onnxruntime", "cpu")
    assert found.facts == {"version": "1.23.0", "providers": ["X"]}
    assert found.error.startswith("AttributeError: ")


# --- Python, the bundle, ONNX Runtime


def test_versions_that_are_not_supported(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.metadata, "version", lambda _: "1.24.3")
    monkeypatch.setattr(module, "OLDEST_PYTHON", (4, 0))
    old, _, numpy = module.python(machine)
    assert (old.status, numpy.status) == ("fault", "fault")
    assert numpy.text == "NumPy 1.24.3 is not supported"
    assert numpy.remedy == "pip install 'numpy>=1.26,<3'"


def test_a_damaged_built_in_model(
    machine: Machine, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpm_edge.bundle.BUILT_IN", copy)
    assert [f.status for f in module.bundle(machine)] == ["ok"]
    data = bytearray((copy / "unet.onnx").read_bytes())
    data[1000] ^= 1
    (copy / "unet.onnx").write_bytes(data)
    [said] = module.bundle(machine)
    assert said.status == "fault"
    assert "the built-in model is damaged: " in said.text


def test_two_packages_of_onnxruntime(machine: Machine, packages: Callable[..., None]) -> None:
    machine.onnxruntime = Answer({"version": "1.23.0", "providers": ["CPUExecutionProvider"]})
    packages("onnxruntime", "onnxruntime-gpu")
    said, works = module.onnxruntime(machine)
    assert said.status == "fault"
    assert "onnxruntime and onnxruntime-gpu overwrite each other" in said.text
    assert said.remedy == (
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'ddpm-edge[cpu]'"
    )
    assert works.status == "ok"
    packages("onnxruntime", "onnxruntime")  # metadata that an old version left behind
    assert len(list(module.onnxruntime(machine))) == 1


def test_packages_are_found_by_their_metadata(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine.onnxruntime = Answer({"version": "1.23.0", "providers": []})
    for name in ("onnxruntime_gpu", "onnxruntime_openvino"):
        (tmp_path / f"{name}-1.23.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.23.0.dist-info/METADATA").write_text(f"Name: {name}\n")
        (tmp_path / f"{name}-1.23.0.dist-info/top_level.txt").write_text("onnxruntime\n")
    monkeypatch.syspath_prepend(tmp_path)
    said = next(module.onnxruntime(machine))
    assert said.status == "fault"
    assert "onnxruntime_gpu" in said.text
    assert "onnxruntime_openvino" in said.remedy


@pytest.mark.parametrize(("arch", "extra"), [("x86_64", "gpu"), ("aarch64", "cpu")])
def test_the_remedy_is_for_the_gpu_where_there_is_one(
    machine: Machine, packages: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
    arch: str, extra: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("platform.machine", lambda: arch)
    machine.onnxruntime = Answer({"version": "1.23.0", "providers": []})
    packages("onnxruntime", "onnxruntime-gpu")
    node(machine)
    assert next(module.onnxruntime(machine)).remedy.endswith(f"'ddpm-edge[{extra}]'")


def test_no_onnxruntime(
    machine: Machine, packages: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    packages()
    monkeypatch.setattr(module, "_is_there", lambda _: False)
    machine.cuda, machine.tensorrt = BROKEN, {}
    [said] = module.onnxruntime(machine)
    assert (said.status, said.remedy) == ("fault", "pip install 'ddpm-edge[cpu]'")
    machine.cuda, machine.tensorrt = Answer({}), {"tensorrt": Answer({"version": "10.3"})}
    assert [f.status for f in module.onnxruntime(machine)] == ["info"]


def test_onnxruntime_that_cannot_be_imported(
    machine: Machine, packages: Callable[..., None], fake: Callable[[str, str], None]
) -> None:
    packages("onnxruntime")
    fake("onnxruntime", "raise ImportError('libfoo.so.1: cannot open shared object file')")
    [said] = module.onnxruntime(machine)
    assert said.status == "fault"
    assert "libfoo.so.1: cannot open shared object file" in said.text
    assert said.remedy == "pip uninstall -y onnxruntime && pip install 'ddpm-edge[cpu]'"


def test_numpy_2_beside_a_package_built_for_numpy_1(
    machine: Machine, packages: Callable[..., None], fake: Callable[[str, str], None]
) -> None:
    packages("onnxruntime-gpu")
    fake("onnxruntime", "import sys\nsys.stderr.write('A module that was compiled using NumPy 1.x "
         "cannot be run in NumPy 2.2.6')\nraise ImportError('it failed')")  # fmt: skip
    [said] = module.onnxruntime(machine)
    assert (said.status, said.remedy) == ("fault", "pip install 'numpy<2'")
    assert "was built for NumPy 1" in said.text
    machine.onnxruntime = Answer({"version": "1.23.0", "providers": []}, "", "_ARRAY_API not found")
    assert [f.status for f in module.onnxruntime(machine)] == ["warning"]  # it runs for now


LISTED = {"version": "1.26.0", "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
FELL_BACK = Answer(
    LISTED,
    "device 'cuda' was asked for, but ONNX Runtime runs on CPUExecutionProvider: ...",
    "[E:onnxruntime:Default, x.cc:1] Failed to load library libonnxruntime_providers_cuda.so with "
    "error: libcublasLt.so.12: cannot open shared object file: No such file or directory\n\n",
)


@pytest.mark.parametrize(
    ("version", "release", "driver", "needs", "remedy"),
    [
        ("1.26.0", "6.8.0-generic", 13000, 12, "cuda-libraries-12-9 cudnn9-cuda-12"),
        ("1.27.0", "6.8.0-generic", 12080, 13, "pip install 'onnxruntime-gpu<1.27'"),
        ("1.27.0", "6.8.0-generic", 13000, 13, "cuda-libraries-13-0 cudnn9-cuda-13"),
        ("1.23.0", "5.15.148-tegra", 12060, 12, "ddpm-edge build"),
    ],
)
def test_cuda_that_is_listed_and_does_not_run(
    machine: Machine, monkeypatch: pytest.MonkeyPatch,
    version: str, release: str, driver: int, needs: int, remedy: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "probe", lambda *_: FELL_BACK)
    monkeypatch.setattr("platform.release", lambda: release)
    machine.onnxruntime = Answer(LISTED | {"version": version})
    machine.cuda = Answer({"driver": driver})
    node(machine)
    [said] = module.onnxruntime_cuda(machine)
    assert said.status == "fault"
    assert "CUDAExecutionProvider is listed, but the session runs on the CPU: libcub" in said.text
    assert f"needs CUDA {needs}, cuDNN 9" in said.text
    assert remedy in said.remedy


def test_onnxruntime_gpu_where_there_is_no_gpu(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "probe", lambda *_: FELL_BACK)
    machine.onnxruntime, machine.cuda = Answer(LISTED), BROKEN
    [said] = module.onnxruntime_cuda(machine)
    assert said.status == "warning"
    assert said.remedy == "pip uninstall -y onnxruntime-gpu && pip install 'ddpm-edge[cpu]'"


def test_where_cuda_is_broken_its_own_remedy_comes_first(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "probe", lambda *_: FELL_BACK)
    monkeypatch.setattr(os, "access", lambda *_: False)
    machine.onnxruntime, machine.cuda = Answer(LISTED), Answer({"driver": 13000}, "?")
    node(machine)
    [said] = module.onnxruntime_cuda(machine)
    assert said.status == "fault"
    assert "usermod" in said.remedy


def test_cuda_that_runs_and_one_that_fails(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.onnxruntime, machine.cuda = Answer(LISTED), Answer({"driver": 13000})
    monkeypatch.setattr(module, "probe", lambda *_: Answer({}))
    assert [f.status for f in module.onnxruntime_cuda(machine)] == ["ok"]
    monkeypatch.setattr(module, "probe", lambda *_: Answer({}, "no kernel image is available"))
    [said] = module.onnxruntime_cuda(machine)
    assert "is listed, but it fails: no kernel image is available" in said.text


# --- CUDA and TensorRT

CUDART = """
from types import SimpleNamespace as Namespace
OK = type("Error", (), {"name": "cudaSuccess", "__int__": lambda self: 0})()
GPU = Namespace(name=b"Orin", major=8, minor=7, totalGlobalMem=8_000_000_000, integrated=1,
                multiProcessorCount=16)
def cudaDriverGetVersion(): return OK, 12060
def cudaRuntimeGetVersion(): return OK, 12090
def cudaGetDeviceCount(): return OK, 1
def cudaGetDeviceProperties(number): return OK, GPU
"""


def test_a_gpu_and_its_tensorrt(machine: Machine, fake: Callable[[str, str], None]) -> None:
    fake("cuda.bindings.__init__", "")
    fake("cuda.bindings.runtime", CUDART)
    fake("tensorrt", """
__version__ = "10.3.0"
class Logger:
    ERROR = 1
    def __init__(self, severity): pass
class Runtime:
    def __init__(self, logger): pass
""")  # fmt: skip
    assert [f.text for f in module.cuda(machine)] == [
        "CUDA 12.6 (driver), 12.9 (cuda-bindings)",
        "Orin (cuda:0, compute capability 8.7), 8.0 GB shared with the CPU",
    ]
    assert Finding("tensorrt", "ok", "TensorRT 10.3.0 works") in list(module.tensorrt(machine))
    assert machine.has_tensorrt
    # It crashes only now that a Runtime is made, and takes nothing else with it.
    fake("tensorrt", "import os\n__version__ = '10.3.0'\nclass Logger: ERROR = 1\n"
         "def Runtime(_): os.abort()\nLogger.__init__ = lambda *_: None")  # fmt: skip
    del machine.tensorrt
    [said] = [f for f in module.tensorrt(machine) if f.what == "tensorrt"]
    assert said.status == "fault"
    assert "died of signal 6" in said.text


def test_a_tensorrt_that_is_too_old(machine: Machine, fake: Callable[[str, str], None]) -> None:
    fake("tensorrt", "__version__ = '8.6.2'")
    machine.cuda = BROKEN
    [said] = [f for f in module.tensorrt(machine) if f.what == "tensorrt"]
    assert said.status == "fault"
    assert "tensorrt 8.6.2 is too old" in said.text


def test_no_tensorrt(machine: Machine) -> None:
    machine.cuda, machine.tensorrt = BROKEN, {}
    assert list(module.tensorrt(machine)) == [
        Finding("tensorrt", "info", "TensorRT is not installed")
    ]
    machine.cuda = Answer({})
    assert "ddpm-edge[tensorrt]" in next(module.tensorrt(machine)).remedy


NO_BINDINGS = "cuda-bindings cannot be imported (No module named 'cuda')"


@pytest.mark.parametrize(
    ("cuda", "files", "variables", "status", "text", "remedy"),
    [
        (BROKEN, [], {}, "info", "no NVIDIA GPU", ""),
        (Answer({}, NO_BINDINGS), ["node"], {}, "warning", "cuda-bindings", "pip install 'ddpm"),
        (Answer({"driver": 12060, "runtime": 13000}, "too old"), ["node"], {}, "fault",
         "the driver is for CUDA 12.6, cuda-bindings for 13.0", "'cuda-bindings==12.*'"),
        (Answer({"driver": 0}, "?"), ["node", "container"], {}, "fault",
         "the container was given no GPU", "docker run --gpus all"),
        (Answer({"driver": 0}, "?"), ["jetson", "container"], {}, "warning",
         "the container was given no GPU", "docker run --runtime nvidia"),
        (Answer({"driver": 0}, "?"), ["driver", "container"], {}, "warning",
         "the container was given no GPU", "docker run --gpus all"),
        (Answer({"driver": 0}, "?"), ["node"], {}, "fault", "library is missing", "ubuntu-drivers"),
        (Answer({"driver": 0}, "?"), ["node", "jetson"], {}, "fault", "missing", "nvidia-jetpack"),
        (Answer({"driver": 13000}, BROKEN.error), ["node"], {"CUDA_VISIBLE_DEVICES": ""}, "warning",
         "CUDA_VISIBLE_DEVICES='' leaves no GPU", "unset CUDA_VISIBLE_DEVICES"),
        (Answer({"driver": 13000}, "?"), ["node"], {}, "fault", "CUDA does not work: ?", "dmesg"),
    ],
)  # fmt: skip
def test_why_cuda_does_not_work(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: Answer,
    files: list[str], variables: dict[str, str], status: str, text: str, remedy: str,
) -> None:  # fmt: skip
    there = (str(tmp_path),)
    machine.cuda = cuda
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if "node" in files:
        node(machine)
    if "container" in files:
        monkeypatch.setattr(module, "CONTAINERS", there)
    if "driver" in files:
        monkeypatch.setattr(module, "DRIVERS", there)
    if "jetson" in files:
        module.ETC_RELEASE.touch()
    [said] = module.cuda(machine)
    assert said.status == status
    assert text in said.text
    assert remedy in said.remedy


def test_a_device_node_without_permission(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.cuda = BROKEN
    node(machine)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may use any
    [said] = module.cuda(machine)
    assert said.status == "fault"
    assert "no permission to use" in said.text
    assert "usermod -aG video,render" in said.remedy


# --- a Jetson


@pytest.mark.parametrize(
    ("release", "status", "text"),
    [
        ("R35 (release), REVISION: 5.0", "fault", "JetPack 5 or older (L4T R35.5, TensorRT 8.5)"),
        ("R36 (release), REVISION: 3.0", "fault", "JetPack 6.0 (L4T R36.3, TensorRT 8.6) is too"),
        ("R36 (release), REVISION: 4.3", "ok", "JetPack 6.1 or 6.2 (L4T R36.4, TensorRT 10.3)"),
        ("R38 (release), REVISION: 2.0", "ok", "JetPack 7.0 or 7.1 (L4T R38.2, TensorRT 10.13)"),
        ("R39 (release), REVISION: 1.0", "ok", "JetPack 7.2 (L4T R39.1, TensorRT 10.16)"),
    ],
)
def test_releases_of_jetpack(machine: Machine, release: str, status: str, text: str) -> None:
    said = jetson(machine, release, "10.3.0")[0]
    assert said.status == status
    assert text in said.text


def test_a_jetson_as_it_should_be(machine: Machine) -> None:
    assert len(jetson(machine, "R36 (release), REVISION: 4.3", "10.3.0")) == 1
    [_, said] = jetson(machine, "R36 (release), REVISION: 4.3", "10.7.0")
    assert (said.status, said.text) == ("info", "TensorRT 10.7.0 is not the one of this JetPack")


def test_an_environment_that_does_not_see_jetpacks_tensorrt(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    release = "R36 (release), REVISION: 4.3"
    [_, said] = jetson(machine, release)
    assert (said.status, said.remedy) == ("warning", "sudo apt install python3-libnvinfer")
    (module.USR_LIB / "python3.10" / "dist-packages" / "tensorrt").mkdir(parents=True)
    [_, said] = jetson(machine, release)
    assert (said.status, said.remedy) == (
        "fault", "python3.10 -m venv --system-site-packages .venv"
    )  # fmt: skip
    monkeypatch.setattr(sys, "version_info", (3, 12, 3))
    for version, error in (("", ""), ("10.3.0", "No module named 'tensorrt.tensorrt'")):
        [_, said] = jetson(machine, release, version, error)
        assert said.status == "fault"
        assert "JetPack's TensorRT is for Python 3.10; this is" in said.text


@pytest.mark.parametrize(
    ("mode", "conf", "status", "text", "remedy"),
    [
        ("NV Power Mode: MAXN", None, "ok", "power mode MAXN", ""),
        ("NV Power Mode: 15W", None, "warning", "power mode 15W", "sudo nvpmodel -m 0"),
        ("NV Power Mode: 15W", "< POWER_MODEL ID=2 NAME=MAXN_SUPER >", "warning",
         "power mode 15W", "sudo nvpmodel -m 2"),
        ("NV Power Mode: 10W", "< POWER_MODEL ID=0 NAME=10W >", "ok", "power mode 10W", ""),
        ("no idea", None, "info", "the power mode is not known", "sudo nvpmodel -q"),
        ("", None, "info", "the power mode is not known", "sudo nvpmodel -q"),
    ],
)  # fmt: skip
def test_power_modes(
    machine: Machine, mode: str, conf: str | None, status: str, text: str, remedy: str
) -> None:
    assert list(module.power(Machine())) == []  # not a Jetson
    jetson(machine, "R36 (release), REVISION: 4.3")
    if mode:
        script = Path(module.NVPMODEL)
        script.write_text(f"#!/bin/sh\necho NVPM WARN: fan mode\necho '{mode}'\necho 0\n")
        script.chmod(0o755)
    if conf:
        module.NVPMODEL_CONF.write_text(conf)
    [said] = module.power(machine)
    assert (said.status, said.remedy) == (status, remedy)
    assert text in said.text


# --- the cache, and what runs


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    [said] = module.cache(Machine(tmp_path / "file" / "cache"))  # root may write anywhere else
    assert said.status == "warning"
    assert "not writable" in said.text
    assert "DDPM_EDGE_CACHE" in said.remedy


def test_a_full_disk(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=5e8))
    [said] = module.cache(machine)
    assert said.status == "warning"
    assert "only 500 MB are free" in said.text


def test_engines_are_counted(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm_edge.runtimes.engine_cache import EngineCache

    entries = [SimpleNamespace(size=1_500_000), SimpleNamespace(size=500_000)]
    monkeypatch.setattr(EngineCache, "entries", lambda _: entries)
    [said] = module.cache(machine)
    assert said.status == "ok"
    assert said.text.endswith("cache: 2 built, 2.0 MB")


@pytest.mark.parametrize(
    ("runtime", "said"),
    [("tensorrt on cuda:0", "tensorrt, cuda:0, its loop on the device"), ("x on cpu", "x, cpu")],
)
def test_what_would_run(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, runtime: str, said: str
) -> None:
    facts = {"runtime": runtime, "loop": "device"}
    monkeypatch.setattr(module, "probe", lambda *_: Answer(facts, ""))
    assert [f.text for f in module.auto(machine)] == [f"Generator.load() would run on {said}"]


def test_nothing_runs(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "probe", lambda *_: Answer({}, "onnxruntime cannot be imported"))
    [said] = module.auto(machine)
    assert said == Finding("auto", "fault", "Generator.load() cannot run here: onnxruntime cannot "
                           "be imported", "pip install 'ddpm-edge[cpu]'")  # fmt: skip
