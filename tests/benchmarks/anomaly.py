"""How well bits/dim tells foreign images from garments, with the built-in model.

    python tests/benchmarks/anomaly.py                              # 500 images of each kind
    python tests/benchmarks/anomaly.py --table --plot docs/anomaly.png

The threshold is that of samples/anomaly.py; the area under the ROC curve (AUC) is the chance that a
foreign image has more bits/dim than a garment: 1 = always, 0.5 = no better than a coin, below = the
model finds foreign images the likelier ones. Beside it the AUC of how far bits/dim is from the
known images' median, either way. Digits are scikit-learn's, 8 x 8, enlarged; known and garments are
disjoint halves of Fashion-MNIST's test images.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from ddpm_edge import Generator
from ddpm_edge.data import load

RESULTS = Path(__file__).parent / "anomaly.json"
TIMESTEPS = 20


def kinds(n: int) -> dict[str, np.ndarray]:
    """Images uint8 (n, 28, 28, 1) of each kind."""
    from PIL import Image
    from sklearn.datasets import load_digits

    test = load("fashion-mnist", "test").images.transpose(0, 2, 3, 1)
    known, garments = test[:n], test[5000 : 5000 + n]
    rng = np.random.default_rng(0)
    order = rng.permutation(784)
    digits = [
        np.asarray(Image.fromarray((d / 16 * 255).astype(np.uint8)).resize((28, 28)))
        for d in load_digits().images[:n]
    ]
    return {
        "known": known,
        "garments": garments,
        "digits": np.stack(digits)[..., None],
        "inverted garments": 255 - garments,
        "shuffled garments": garments.reshape(n, -1)[:, order].reshape(garments.shape),
        "noise": rng.integers(0, 256, garments.shape).astype(np.uint8),
    }


def area(foreign: np.ndarray, own: np.ndarray) -> float:
    """AUC, ties half (Mann and Whitney)."""
    more = foreign[:, None] > own
    return float((more + 0.5 * (foreign[:, None] == own)).mean())


def measure(n: int) -> None:
    """Bits/dim of all images, into anomaly.json."""
    with Generator.load(device="cpu") as generator:
        bits = {
            name: generator.bits_per_dim(images, TIMESTEPS, 0).tolist()
            for name, images in kinds(n).items()
        }
    RESULTS.write_text(json.dumps({"timesteps": TIMESTEPS, "bits_per_dim": bits}) + "\n")


def table(bits: dict[str, np.ndarray]) -> None:
    """Print Markdown."""
    limit, middle = np.quantile(bits["known"], 0.95), np.median(bits["known"])
    print("| images | bits/dim | flagged | AUC | AUC of the distance to the median |")
    print("|---|---|---|---|---|")
    for name, values in bits.items():
        if name == "known":
            continue
        far = area(np.abs(values - middle), np.abs(bits["garments"] - middle))
        own = name == "garments"
        areas = ("", "") if own else (f"{area(values, bits['garments']):.3f}", f"{far:.3f}")
        flagged = 100 * (values > limit).mean()
        print(f"| {name} | {values.mean():.2f} | {flagged:.0f} % | {areas[0]} | {areas[1]} |")


def plot(bits: dict[str, np.ndarray], path: Path) -> None:
    """The ROC curves."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    limits = np.sort(np.concatenate([*bits.values()]))[::-1]
    for name, values in bits.items():
        if name not in ("known", "garments"):
            false, true = ((bits[k][:, None] > limits).mean(axis=0) for k in ("garments", name))
            axis.plot(false, true, label=f"{name}: {area(values, bits['garments']):.3f}")
    axis.plot([0, 1], [0, 1], color="0.8")
    axis.set(xlabel="garments flagged", ylabel="foreign images flagged")
    axis.legend(title="AUC", loc="lower right")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=500)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if not options.table and options.plot is None:
        measure(options.n)
    found = json.loads(RESULTS.read_text())["bits_per_dim"]
    bits = {name: np.array(values) for name, values in found.items()}
    table(bits)
    if options.plot is not None:
        plot(bits, options.plot)


if __name__ == "__main__":
    main()
