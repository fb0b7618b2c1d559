"""How long `import ddpm_edge` takes, beside what NumPy alone takes.

    python tests/benchmarks/import_time.py [--runs 15]

Fresh processes, the two in turn; medians of the time that the interpreter spends in the import.
"""

import argparse
import statistics
import subprocess
import sys

CODE = "import time; s = time.perf_counter(); import {}; print(time.perf_counter() - s)"


def seconds(module: str) -> float:
    out = subprocess.run(
        [sys.executable, "-c", CODE.format(module)], capture_output=True, check=True
    )
    return float(out.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    seconds("ddpm_edge")  # bytecode is written, files are in memory
    pairs = [(seconds("ddpm_edge"), seconds("numpy")) for _ in range(runs)]
    ours, numpys = (statistics.median(column) for column in zip(*pairs, strict=True))
    extra = statistics.median(a - b for a, b in pairs)
    print(f"import ddpm_edge {ours:.3f} s, import numpy {numpys:.3f} s, beside it {extra:.3f} s")


if __name__ == "__main__":
    main()
