"""How good the built-in model's samples are, by the feature network's classifier.

    python tests/benchmarks/quality.py                                  # 50 a label, 100-step DDIM
    python tests/benchmarks/quality.py --unlabelled --sampler ddpm --steps 1000     # Algorithm 2

Prints, for labelled samples, the share that is recognised as its label and, for unlabelled ones,
the share of every class; `--grid FILE.png` keeps the first 64 to look at.
"""

import argparse
import time

import numpy as np

from ddpm_edge import Generator, save_grid
from ddpm_edge.features import FeatureNetwork


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=500, help="images")
    parser.add_argument("--bundle", help="default: the built-in one")
    parser.add_argument("--unlabelled", action="store_true")
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--grid")
    a = parser.parse_args()

    with Generator.load(a.bundle) as generator:
        names = generator.class_names
        wanted = np.arange(a.n) % len(names)
        plan = {"sampler": a.sampler, "steps": a.steps}
        start, images = time.perf_counter(), []
        for first in range(0, a.n, a.batch):
            label = None if a.unlabelled else wanted[first : first + a.batch].tolist()
            n = min(a.batch, a.n - first)
            images.append(
                generator.sample(
                    n, seed=a.seed, first=first, label=label, guidance=a.guidance, **plan
                )
            )
            print(f"{first + n} of {a.n}, {time.perf_counter() - start:.0f} s", flush=True)
        print(generator.plan(**plan).name, "seed", a.seed, "guidance", a.guidance)
    images = np.concatenate(images)
    if a.grid:
        save_grid(images[:64], a.grid)
    found = FeatureNetwork.fashion_mnist()(images).logits.argmax(axis=1)
    if a.unlabelled:
        for i, name in enumerate(names):
            print(f"{name:12} {100 * (found == i).mean():5.1f} %")
        print(f"{'least':12} {100 * np.bincount(found, minlength=len(names)).min() / a.n:5.1f} %")
    else:
        for i, name in enumerate(names):
            print(f"{name:12} {100 * (found == i)[wanted == i].mean():5.1f} % recognised")
        print(f"{'all':12} {100 * (found == wanted).mean():5.1f} % recognised")


if __name__ == "__main__":
    main()
