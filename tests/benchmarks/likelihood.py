"""Bits/dim of the built-in model: all terms of the bound, and how near K = 50 timesteps come.

    python tests/benchmarks/likelihood.py              # what is not measured yet
    python tests/benchmarks/likelihood.py --table

The first 500 test images of Fashion-MNIST, without labels. All 1000 terms of each (seed 0), then 20
seeds of 50 timesteps. It takes some 40 minutes on two cores; what is done is kept.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np

from ddpm_edge import Generator
from ddpm_edge.data import load

RESULTS = Path(__file__).parent / "likelihood.json"
IMAGES, CHUNK, TIMESTEPS, SEEDS = 500, 25, 50, 20


def measure(timesteps: int | None, seed: int) -> dict:
    """The parts of the bound of all images, in nats, and the seconds they took."""
    images = load("fashion-mnist", "test").images[:IMAGES].transpose(0, 2, 3, 1)
    parts, start = [], time.perf_counter()
    with Generator.load(device="cpu") as generator:
        for first in range(0, IMAGES, CHUNK):
            part = generator.bound(images[first : first + CHUNK], timesteps, seed, first=first)
            parts.append(part)
            seconds = time.perf_counter() - start
            print(
                f"{timesteps or 'all'}, seed {seed}: {first + CHUNK}, {seconds:.0f} s", flush=True
            )
    found: dict = {
        name: np.round(np.concatenate([getattr(p, name) for p in parts]), 3).tolist()
        for name in ("nats", "standard_error")
    }
    if timesteps is None:
        for name in ("prior", "diffusion", "reconstruction"):
            found[name] = float(np.mean(np.concatenate([getattr(p, name) for p in parts])))
    return {"seed": seed, "seconds": seconds, **found}


def table(results: dict) -> None:
    """Print the figures."""
    whole, scale = results["all"], 784 * math.log(2)
    bits = np.array(whole["nats"]) / scale
    print(f"all terms: {bits.mean():.4f} bits/dim, standard error {spread(bits):.4f}")
    for name in ("prior", "diffusion", "reconstruction"):
        print(f"  {name}: {whole[name] / scale:.4f}")
    inside = []
    for part in results["some"]:
        nats, errors = np.array(part["nats"]), np.array(part["standard_error"])
        error = math.sqrt(np.square(errors).sum()) / IMAGES / scale
        off = nats.mean() / scale - bits.mean()
        inside.append(abs(off) <= 2 * error)
        print(
            f"seed {part['seed']}: {off:+.4f} off, standard error {error:.4f} of all images, "
            f"{100 * np.mean(errors / nats):.1f} % of an image's value; {part['seconds']:.0f} s, "
            f"all {whole['seconds']:.0f} s"
        )
    print(f"{sum(inside)} of {len(inside)} within two standard errors")


def spread(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return values.std(ddof=1) / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"some": []}
    if not options.table:
        if "all" not in results:
            results["all"] = measure(None, 0)
            RESULTS.write_text(json.dumps(results) + "\n")
        for seed in range(1 + len(results["some"]), SEEDS + 1):
            results["some"].append(measure(TIMESTEPS, seed))
            RESULTS.write_text(json.dumps(results) + "\n")
    table(results)


if __name__ == "__main__":
    main()
