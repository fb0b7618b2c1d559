"""What the built-in model makes of damaged images, beside methods that know no garments.

    python tests/benchmarks/restoration.py --picture docs/restoration.png      # all three tables
    python tests/benchmarks/restoration.py --only inpaint --sampler ddim --steps 100
    python tests/benchmarks/restoration.py --only invert -n 10

Of the first n test images of Fashion-MNIST, without labels:

- inpainting: a hole of 10 x 10 pixels at a random place, 4 or more from the border; PSNR in it;
- upscaling: from 14 x 14, the means of 2 x 2 blocks; PSNR of the whole image;
- inversion: to latents and back by DDIM, of 50 images at most.

PSNR is 10 log10(4 / mse) of values in [-1, 1]: "by image" is the mean over images, each 60 dB at
most (an exact one would be infinite), "of all" that of the mse over all images.
Single draws: the mean over draws (the least to the most). The Frechet distance compares the n
restored images with the same n originals, and with all 10,000 test images; n > 96 is needed. It
depends on n.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from ddpm_edge import Generator, save_grid
from ddpm_edge.data import load
from ddpm_edge.features import FeatureNetwork
from ddpm_edge.images import to_images
from ddpm_edge.metrics import Moments, frechet_distance

HOLE, MARGIN = 10, 4  # pixels
FACTOR = 2
MOST = 60.0  # dB; rounding to 256 grey levels alone gives 59
FEATURES = 96
INVERTED = 50  # images
INVERSION_STEPS = (20, 50, 100, 200)
COLUMNS = 8  # of the picture
PSNR = ("PSNR by image", "PSNR of all")
DISTANCES = ("Frechet distance to the originals", "to all test images")

Images = np.ndarray  # float32 (n, 28, 28, 1) in [-1, 1]
Score = Callable[[Images], list[float]]


def test_images() -> Images:
    """All 10,000."""
    pixels = load("fashion-mnist", "test").images.transpose(0, 2, 3, 1)
    return (pixels / 127.5 - 1).astype(np.float32)


def psnr(mse: np.ndarray) -> np.ndarray:
    return 10 * np.log10(4 / np.maximum(mse, 4 / 10 ** (MOST / 10)))


def squared_errors(restored: Images, truth: Images, where: np.ndarray | bool = True) -> np.ndarray:
    """Mean squared error of every image, where the masks say so; (n,)."""
    return np.square(restored.astype(np.float64) - truth).mean(axis=(1, 2, 3), where=where)


def psnr_pair(restored: Images, truth: Images, where: np.ndarray | bool = True) -> list[float]:
    """The mean over images, and that of all images' mean squared error."""
    errors = squared_errors(restored, truth, where)
    return [psnr(errors).mean(), psnr(errors.mean())]


def draws(a: argparse.Namespace, restore: Callable[..., Images], *given: object) -> list[Images]:
    """What the model makes of the same with seeds 0, 1, ..."""
    arguments = {"batch": a.batch, "sampler": a.sampler, "steps": a.steps, "dtype": "float32"}
    return [restore(*given, seed=seed, **arguments) for seed in range(a.draws)]


def cell(values: np.ndarray) -> str:
    """Of one restoration, or of several: the mean (the least to the most)."""
    spread = f" ({values.min():#.4g} to {values.max():#.4g})" if len(values) > 1 else ""
    return f"{values.mean():#.4g}{spread}"


def header(*titles: str) -> None:
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")


def table(methods: dict[str, list[Images]], score: Score, *columns: str) -> None:
    """A line a method, which gives one restoration of all images or several."""
    header("", *columns)
    for title, restorations in methods.items():
        scores = np.array([score(restored) for restored in restorations])
        print(f"| {title} | {' | '.join(cell(column) for column in scores.T)} |", flush=True)


def with_draws(methods: dict[str, Images], made: list[Images]) -> dict[str, list[Images]]:
    """The methods, then the mean of the draws, and the draws."""
    methods = {**methods, f"mean of {len(made)} draws": np.mean(made, axis=0)}
    return {**{title: [x] for title, x in methods.items()}, "single draws": made}


def holes(n: int) -> np.ndarray:
    """One square hole an image, bool (n, 28, 28, 1), True in it."""
    rng = np.random.default_rng(0)
    masks = np.zeros((n, 28, 28, 1), bool)
    for mask in masks:
        top, left = rng.integers(MARGIN, 28 - HOLE - MARGIN + 1, size=2)
        mask[top : top + HOLE, left : left + HOLE] = True
    return masks


def mean_filled(images: Images, masks: np.ndarray) -> Images:
    """With the mean of each image's known pixels."""
    means = images.mean(axis=(1, 2, 3), where=~masks, keepdims=True)
    return np.where(masks, means, images)


def biharmonic(images: Images, masks: np.ndarray) -> Images:
    from skimage.restoration import inpaint_biharmonic

    pairs = zip(images[..., 0], masks[..., 0], strict=True)
    return np.stack([inpaint_biharmonic(*pair) for pair in pairs])[..., None].clip(-1, 1)


def inpaint(a: argparse.Namespace, generator: Generator, images: Images) -> list[Images]:
    """Print the table; what the picture shows: the damaged images and a draw."""
    masks = holes(len(images))
    damaged = np.where(masks, np.float32(0), images)
    made = draws(a, generator.inpaint, damaged, masks)
    methods = {
        "mean of the known pixels": mean_filled(images, masks),
        "biharmonic": biharmonic(damaged, masks),
    }
    print(f"\nInpainting, {len(images)} images, hole of {HOLE} x {HOLE}\n")
    table(with_draws(methods, made), lambda x: psnr_pair(x, images, masks), *PSNR)
    return [damaged, made[0]]


def block_means(images: Images) -> Images:
    n, height, width, channels = images.shape
    blocks = images.reshape(n, height // FACTOR, FACTOR, width // FACTOR, FACTOR, channels)
    return blocks.mean(axis=(2, 4))


def bicubic(small: Images) -> Images:
    size = small.shape[2] * FACTOR, small.shape[1] * FACTOR
    large = [Image.fromarray(x).resize(size, Image.Resampling.BICUBIC) for x in small[..., 0]]
    return np.stack(large)[..., None].clip(-1, 1)


def upscale(
    a: argparse.Namespace, generator: Generator, images: Images, everything: Images
) -> list[Images]:
    """Print the table; what the picture shows: the small images, bicubic and a draw."""
    small = block_means(images)
    made = draws(a, generator.upscale, small, FACTOR)
    methods = {"bicubic": bicubic(small)}
    rows = with_draws(methods, made)
    size = f"{small.shape[1]} x {small.shape[2]}"
    print(f"\nUpscaling, {len(images)} images, {FACTOR} x from {size}\n")
    if len(images) > FEATURES:
        frechet_table(a.threads, rows, images, everything)
    else:
        table(rows, lambda x: psnr_pair(x, images), *PSNR)
    return [small.repeat(FACTOR, 1).repeat(FACTOR, 2), methods["bicubic"], made[0]]


def frechet_table(
    threads: int | None, rows: dict[str, list[Images]], images: Images, everything: Images
) -> None:
    """PSNR and both distances."""
    with FeatureNetwork.fashion_mnist(threads=threads) as network:

        def moments(x: Images) -> Moments:
            return Moments.of(network(x.astype(np.float32)).features)

        originals, all_of_them = moments(images), moments(everything)

        def score(x: Images) -> list[float]:
            made = moments(x)
            distances = [frechet_distance(made, real) for real in (originals, all_of_them)]
            return psnr_pair(x, images) + distances

        table(rows, score, *PSNR, *DISTANCES)
        distance = frechet_distance(originals, all_of_them)
        print(f"\nThe {len(images)} originals' distance to all test images: {distance:#.4g}")


def invert(a: argparse.Namespace, generator: Generator, images: Images) -> None:
    """Print the table."""
    images = images[:INVERTED]
    print(f"\nInversion and back by DDIM, {len(images)} images\n")
    header("steps each way", "PSNR by image", "least PSNR")
    for steps in INVERSION_STEPS:
        shared = {"steps": steps, "batch": a.batch}
        latents = generator.invert(images, **shared)
        back = generator.sample(
            latents=latents, sampler="ddim", clip=None, dtype="float32", **shared
        )
        values = psnr(squared_errors(back, images))
        print(f"| {steps} | {values.mean():.1f} | {values.min():.1f} |", flush=True)


def picture(rows: list[Images], path: str) -> None:
    """The first images, a row for each state that they are in."""
    shown = np.concatenate([row[:COLUMNS] for row in rows])
    save_grid(to_images(shown.transpose(0, 3, 1, 2)), path, columns=len(rows[0][:COLUMNS]))


def main() -> None:
    tasks = ("inpaint", "upscale", "invert")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=200, help="images")
    parser.add_argument("--draws", type=int, default=8, help="seeds, for inpaint and upscale")
    parser.add_argument("--only", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--picture", help="the first eight originals, damaged and restored, a PNG")
    parser.add_argument("--sampler", help="default: the bundle's plan")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--threads", type=int, help="default: the runtime's choice")
    a = parser.parse_args()

    start, everything = time.perf_counter(), test_images()
    images = everything[: a.n]
    rows = [images]
    with Generator.load(threads=a.threads) as generator:
        print(generator.plan(a.sampler, a.steps).name, "seeds 0 to", a.draws - 1, flush=True)
        if "inpaint" in a.only:
            rows += inpaint(a, generator, images)
        if "upscale" in a.only:
            rows += upscale(a, generator, images, everything)
        if "invert" in a.only:
            invert(a, generator, images)
    if a.picture:
        picture(rows, a.picture)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
