"""How good the built-in model's samples are, by the feature network's classifier.

    python tests/benchmarks/quality.py                              # 50 a label, the default plan
    python tests/benchmarks/quality.py --unlabelled --sampler ddpm --steps 1000     # Algorithm 2
    python tests/benchmarks/quality.py --real           # what the classifier makes of real images

Prints, for labelled samples, the share that is recognised as its label and, for unlabelled ones,
the share of every class; `--grid FILE.png` keeps the first 64 to look at.
"""

import argparse
import time

import numpy as np

from ddpm_edge import Generator, save_grid
from ddpm_edge.features import FeatureNetwork


def generate(a: argparse.Namespace) -> tuple[np.ndarray, np.ndarray | None]:
    """Images (n, 28, 28, 1) and the labels that were asked for."""
    with Generator.load(a.bundle) as generator:
        wanted = None if a.unlabelled else np.arange(a.n) % len(generator.class_names)
        plan = {"sampler": a.sampler, "steps": a.steps}
        start, images = time.perf_counter(), []
        for first in range(0, a.n, a.batch):
            n = min(a.batch, a.n - first)
            label = None if wanted is None else wanted[first : first + n].tolist()
            images.append(
                generator.sample(
                    n, seed=a.seed, first=first, label=label, guidance=a.guidance, **plan
                )
            )
            print(f"{first + n} of {a.n}, {time.perf_counter() - start:.0f} s", flush=True)
        print(generator.plan(**plan).name, "seed", a.seed, "guidance", a.guidance)
    return np.concatenate(images), wanted


def real() -> tuple[np.ndarray, np.ndarray]:
    """The 10,000 test images and their labels."""
    from ddpm_edge.data import load

    data = load("fashion-mnist", "test")
    return data.images.transpose(0, 2, 3, 1), data.labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=500, help="images")
    parser.add_argument("--bundle", help="default: the built-in one")
    parser.add_argument("--real", action="store_true", help="judge the real test images instead")
    parser.add_argument("--unlabelled", action="store_true")
    parser.add_argument("--sampler", help="default: the bundle's plan")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--grid")
    a = parser.parse_args()

    images, wanted = real() if a.real else generate(a)
    if a.grid:
        save_grid(images[:64], a.grid)
    with FeatureNetwork.fashion_mnist() as network:
        found = network(images).logits.argmax(axis=1)
    names = Generator.load(a.bundle).class_names
    if wanted is None:
        shares = np.bincount(found, minlength=len(names)) / len(images)
        for name, share in zip((*names, "least"), (*shares, shares.min()), strict=True):
            print(f"{name:12} {100 * share:5.1f} %")
    else:
        right = found == wanted
        rows = [*((name, right[wanted == i]) for i, name in enumerate(names)), ("all", right)]
        for name, part in rows:
            print(f"{name:12} {100 * part.mean():5.1f} % recognised")


if __name__ == "__main__":
    main()
