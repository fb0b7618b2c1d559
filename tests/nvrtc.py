"""NVIDIA's runtime compiler, which needs no GPU: `python tests/nvrtc.py step.cu > step.ptx`.

CUDA 12.2, the oldest that is supported: drivers read the PTX of their own CUDA and of older ones.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

VERSION = "12.2.140"
OPTIONS = (b"--gpu-architecture=compute_75", b"--fmad=false")


def compile_ptx(source: str, options: tuple[bytes, ...] = OPTIONS) -> str:
    """The PTX of a CUDA C++ source.

    Raises:
        ImportError: nvidia-cuda-nvrtc-cu12 is not installed.
        RuntimeError: it does not compile; with the compiler's words.
    """
    import nvidia.cuda_nvrtc as package

    lib = ctypes.CDLL(str(Path(package.__path__[0], "lib", "libnvrtc.so.12")))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"step.cu", 0, None, None)
    failed = lib.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*options)
    )
    answer = "nvrtcGetProgramLog" if failed else "nvrtcGetPTX"
    getattr(lib, f"{answer}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(lib, answer)(program, text)
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(text.value.decode())
    return text.value.decode()


if __name__ == "__main__":
    print(compile_ptx(Path(sys.argv[1]).read_text()), end="")  # noqa: T201
