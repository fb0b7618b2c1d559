"""Bits/dim of the built-in model: all terms of the bound, and how near 50 evaluations come.

    python tests/benchmarks/likelihood.py              # what is not measured yet
    python tests/benchmarks/likelihood.py --table

The first 500 test images of Fashion-MNIST, without labels. All 1000 terms of each, then 20 seeds of
50 evaluations. All terms have noise of their own, one x_t each: their mean over three seeds is what
the estimates are held against, and its standard error is counted. It takes some 70 minutes on two
cores; what is done is kept.
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
IMAGES, CHUNK, TIMESTEPS = 500, 25, 50
SEEDS = {"all": range(3), "some": range(1, 21)}


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
    of_images = np.array([part["nats"] for part in whole]) / scale  # (seeds, images)
    bits = of_images.mean(axis=0)
    print(f"all terms: {bits.mean():.4f} bits/dim, standard error {spread(bits):.4f}")
    for name in ("prior", "diffusion", "reconstruction"):
        print(f"  {name}: {np.mean([part[name] for part in whole]) / scale:.4f}")
    seconds = np.median([part["seconds"] for part in whole])
    known_to = math.sqrt((of_images.var(axis=0, ddof=1) / len(whole)).sum()) / IMAGES
    means = ", ".join(f"{mean:.4f}" for mean in of_images.mean(axis=1))
    print(f"  seeds {means}; known to {known_to:.5f}")
    inside = []
    for part in results["some"]:
        nats, errors = np.array(part["nats"]), np.array(part["standard_error"])
        error = math.hypot(math.sqrt(np.square(errors).sum()) / IMAGES / scale, known_to)
        off = nats.mean() / scale - bits.mean()
        inside.append(abs(off) <= 2 * error)
        print(
            f"seed {part['seed']}: {off:+.5f} off, {off / error:+.2f} standard errors; an image's "
            f"is {100 * np.sqrt(np.mean(np.square(errors))) / nats.mean():.2f} % of the value; "
            f"{part['seconds']:.0f} s, all terms {seconds:.0f} s"
        )
    print(f"{sum(inside)} of {len(inside)} within two standard errors")


def spread(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return values.std(ddof=1) / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"all": [], "some": []}
    if not options.table:
        for name, timesteps in (("all", None), ("some", TIMESTEPS)):
            for seed in SEEDS[name][len(results[name]) :]:
                results[name].append(measure(timesteps, seed))
                RESULTS.write_text(json.dumps(results) + "\n")
    table(results)


if __name__ == "__main__":
    main()
