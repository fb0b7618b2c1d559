"""Does memory grow over ten thousand calls? Fails if it does by 1 KB a call or more.

    python tests/benchmarks/soak.py                     # 10,000 calls of the built-in model
    python tests/benchmarks/soak.py --leak 2000         # the same with a leak that must be found
    python tests/benchmarks/soak.py --device cuda --runtime tensorrt    # the GPU's memory as well

Short calls (1 or 2 steps) whose seeds, labels, guidance and batch sizes vary. The process's
resident memory is read after every call; the figure is the least-squares slope of the readings
after the first fifth of the calls, which fills caches and the runtime's arena: fewer than about
2,000 calls still see that settle. On a GPU there are more batch sizes than loops that are kept, so
that some are freed and made anew; its memory is given out in pieces of 2 MiB, and one piece more is
no leak: 1,000 calls tell one of 4 KB a call, 10,000 one of 1 KB.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np

from ddpm_edge import Generator
from ddpm_edge.runtimes import cuda

LIMIT = 1024.0  # bytes a call
PIECE = 2 << 20  # bytes of a GPU's memory
STATM = Path("/proc/self/statm")


def resident() -> int:
    """Bytes of memory that this process holds now; where there is no /proc, at most until now."""
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def on_gpu() -> int:
    """Bytes of the current GPU that are in use, by whomever."""
    _, free, total = cuda.cudart().cudaMemGetInfo()
    return int(total) - int(free)


def slope(readings: np.ndarray) -> float:
    """Least-squares growth from one reading to the next, without the first fifth of them."""
    y = readings[len(readings) // 5 :].astype(np.float64)
    x = np.arange(len(y)) - (len(y) - 1) / 2
    return float(x @ (y - y.mean()) / (x @ x))


def grows(readings: np.ndarray, piece: int) -> bool:
    """Whether it is a leak: by the limit, and by more than a piece in all."""
    return slope(readings) >= LIMIT and readings[-1] - readings[len(readings) // 5] > piece


def sample(generator: Generator, i: int, sizes: int) -> None:
    """Call number i, of a batch of 1 to `sizes`."""
    labels = len(generator.class_names)
    label = None if i % 3 == 0 else i % labels
    generator.sample(
        1 + i % sizes,
        label=label,
        guidance=2.0 if i % 3 == 2 else None,
        sampler=("ddim", None)[i % 2],  # the default draws noise
        steps=1 + i % 2,
        seed=i,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--leak", type=int, default=0, help="bytes to lose at every call")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one evaluation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runtime", default="auto")
    a = parser.parse_args()
    read = {"resident": resident} | ({} if a.device == "cpu" else {"on the GPU": on_gpu})
    # written to: all its memory is there from the start
    readings = {name: np.full(a.calls, -1, np.int64) for name in read}
    lost = []
    start = time.perf_counter()
    where = {"device": a.device, "runtime": a.runtime, "threads": a.threads}
    build = "missing" if a.runtime == "tensorrt" else "never"
    with Generator.load(**where, build=build) as generator:
        for i in range(a.calls):
            sample(generator, i, sizes=3 if a.device == "cpu" else 6)
            if a.leak:
                lost.append(b"x" * a.leak)
            for name, reading in read.items():
                readings[name][i] = reading()
    print(f"{a.calls} calls in {time.perf_counter() - start:.0f} s:", end=" ")
    for name, of in readings.items():
        print(
            f"{slope(of):+.1f} bytes a call, limit {LIMIT:.0f}; {name} {of[0] / 1e6:.1f} MB at "
            f"first, {of[len(of) // 5] / 1e6:.1f} after a fifth, {of[-1] / 1e6:.1f} at last"
        )
    pieces = {"resident": 0, "on the GPU": PIECE}
    return 1 if any(grows(of, pieces[name]) for name, of in readings.items()) else 0


if __name__ == "__main__":
    sys.exit(main())
