"""step.cu compiled for the CPU: the kernels that a GPU runs, one thread after the other."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import ddpm_edge.device_loop

SOURCE = Path(ddpm_edge.device_loop.__file__).with_name("step.cu")
# CUDA's words, and a grid of blocks of threads as two loops.
AROUND = """
#include <math.h>
#define __global__ static
#define __device__
struct Index { unsigned int x; };
static thread_local Index blockIdx, blockDim, threadIdx;
static unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned __int128)a * b >> 64;
}
%s
extern "C" void launch(int which, unsigned int blocks, unsigned int threads, const Run *run) {
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            which ? advance(run) : begin(run);
}
extern "C" float draw(unsigned long long *n) { return normal(n[0], n[1], n[2], n[3], n[4]); }
extern "C" int size_of(int which) { return which ? sizeof(Run) : sizeof(Row); }
"""


def compiler() -> list[str]:
    """A C++ compiler; the system's, or the one of the package ziglang."""
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    try:
        import ziglang  # noqa: F401
    except ImportError:
        pytest.skip("no C++ compiler; pip install ziglang")
    return [sys.executable, "-m", "ziglang", "c++"]


@functools.cache
def step() -> ctypes.CDLL:
    """`launch(kernel, blocks, threads, run)`, kernel 0 = begin, 1 = advance."""
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory, "step.cpp"), Path(directory, "step.so")
        text = SOURCE.read_text().replace('extern "C" __global__', "__global__")
        source.write_text(AROUND % text)
        options = ["-O2", "-ffp-contract=off", "-shared", "-fPIC", "-o", str(library), str(source)]
        subprocess.run([*compiler(), *options, "-lm"], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.launch.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p)
    loaded.draw.restype = ctypes.c_float
    return loaded
