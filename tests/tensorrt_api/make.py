"""Writes what TensorRT's own Python bindings contain, one JSON file a version.

    python3 tests/tensorrt_api/make.py                  # all versions, or name some: 11.4 rtx-1.7

Needs Linux on x86-64, gcc, nm and readelf (binutils), and a Python with pip that the wheels below
are built for; no GPU and no TensorRT. The bindings are pybind11 modules, linked with libraries of
hundreds of megabytes. Here they get empty libraries of the same names, enough to import them:
nothing is called. Every name and signature is read from the imported module.

In a file, "classes" maps each class of CLASSES to its members: "value" (of an enumeration),
"property", "property, read-only", "class", "method" (of no known signature), or the signature as
pybind11 words it, a list where there are several. No "__init__" = it cannot be constructed.
"functions" does so for functions, and "names" lists all public names.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

WHEELS = {
    "10.3": "tensorrt_cu12_bindings==10.3.0",
    "10.16": "tensorrt_cu12_bindings==10.16.1.11",
    "11.4": "tensorrt_cu13_bindings==11.4.0.106",
    "rtx-1.7": "tensorrt_rtx_cu13_bindings==1.7.1.116",
}
CLASSES = (
    "Builder", "BuilderFlag", "ComputeCapability", "DataType", "Dims", "EngineCapability",
    "ErrorCode", "ErrorCodeTRT", "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel", "IBuilderConfig", "ICudaEngine", "IErrorRecorder",
    "IExecutionContext", "IHostMemory", "ILogger", "ILogger.Severity",
    "INetworkDefinition", "IOptimizationProfile", "IProgressMonitor", "IRuntimeConfig",
    "ISerializationConfig", "ITensor", "ITimingCache", "Logger", "Logger.Severity",
    "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError",
    "ProfilingVerbosity", "Runtime", "TensorIOMode",
)  # fmt: skip
STUBBED = re.compile(r"lib(nv|tensorrt).*\.so\.")
HIDDEN = {
    "__buffer__", "__del__", "__doc__", "__entries", "__getstate__", "__module__",
    "__release_buffer__", "__setstate__",
}  # fmt: skip
# The package, addresses, and what depends on Python's version.
LEFT_OUT = re.compile(r"\w+_bindings\.\w+\.| at 0x[0-9a-f]+|[\w.]+\.(?=Buffer\b)")


def undefined(library: Path) -> list[str]:
    """Symbols that it wants from TensorRT: unversioned, and not of Python or the C library."""
    lines = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
    here = ctypes.CDLL(None)
    wanted = re.findall(r"^ +U (\w+)$", lines, re.MULTILINE)
    return [name for name in wanted if not hasattr(here, name)]


def write_stubs(bindings: Path, folder: Path) -> None:
    """Libraries of the names that the bindings are linked with, without content."""
    dynamic = subprocess.check_output(["readelf", "-d", bindings], text=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in undefined(bindings))
    for name in filter(STUBBED.match, needed):
        subprocess.run(
            ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c", "-", "-o", folder / name],
            input=source, text=True, check=True,
        )  # fmt: skip


def signatures(what: Any, name: str) -> str | list[str]:
    """Signatures of a function: pybind11 writes them into its docstring."""
    if inspect.isfunction(what):
        return name + str(inspect.signature(what))
    doc = (what.__doc__ or "").strip()
    numbered = doc.startswith(f"{name}(*args, **kwargs)\nOverloaded")
    found = re.findall(rf"^{r'[0-9]+[.] ' if numbered else ''}({name}\(.*)$", doc, re.MULTILINE)
    if not found:
        return "method"
    short = [LEFT_OUT.sub("", text) for text in (found if numbered else found[:1])]
    return short if len(short) > 1 else short[0]


def members(cls: type) -> dict[str, str | list[str]]:
    """What a class has, the inherited included."""
    found: dict[str, str | list[str]] = {}
    for name in sorted(set(dir(cls)) - set(dir(object)) - HIDDEN | {"__init__"}):
        what = inspect.getattr_static(cls, name)
        if "pybind11" in name:
            continue
        if isinstance(what, property):
            found[name] = "property" if what.fset else "property, read-only"
        elif isinstance(what, type):
            found[name] = "class"
        elif "__members__" in dir(type(what)):
            found[name] = "value"
        elif callable(getattr(cls, name)):
            found[name] = signatures(getattr(cls, name), name)
    if found["__init__"] == "method":  # pybind11's own, which raises
        del found["__init__"]
    return found


def api(module: ModuleType) -> dict[str, Any]:
    """Names, classes and functions of an imported TensorRT."""
    public = {k: v for k, v in vars(module).items() if not k.startswith("_")}
    public = {k: v for k, v in public.items() if not inspect.ismodule(v)}
    classes = {}
    for name in CLASSES:
        outer, _, inner = name.partition(".")
        cls = public.get(outer)
        cls = getattr(cls, inner, None) if inner else cls
        if isinstance(cls, type):
            classes[name] = members(cls)
    return {
        "classes": classes,
        "functions": {
            name: signatures(what, name)
            for name, what in sorted(public.items())
            if inspect.isroutine(what)
        },
        "names": sorted([*public, *(["__version__"] if hasattr(module, "__version__") else [])]),
    }


def make(requirement: str) -> dict[str, Any]:
    """Download bindings, and import them in a process of their own."""
    package, _, version = requirement.partition("==")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        subprocess.run([*command, requirement], check=True)
        (wheel,) = folder.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(folder)
        (bindings,) = folder.glob("*_bindings/*.so")
        write_stubs(bindings, folder)
        # -S: no libraries of TensorRT that may be installed here
        code = (
            f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {name!r}]\n"
            f"import json, make, {bindings.parent.name} as bindings\n"
            "print(json.dumps([bindings.__version__, make.api(bindings)]))"
        )
        answer = subprocess.check_output(
            [sys.executable, "-S", "-B", "-c", code],
            env={**os.environ, "LD_LIBRARY_PATH": name}, cwd=name, text=True,
        )  # fmt: skip
    said, content = json.loads(answer)
    if said != version:
        raise SystemExit(f"{requirement} says that it is {said}")
    how = "imported with stub libraries"
    return {"package": package, "version": version, "how": how, **content}


def main() -> None:
    """Write the files of the versions named, or of all."""
    for name in sys.argv[1:] or WHEELS:
        text = json.dumps(make(WHEELS[name]), indent=1, sort_keys=True)
        Path(__file__).with_name(f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
