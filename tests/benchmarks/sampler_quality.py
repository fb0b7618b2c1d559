"""Which sampler makes the best images in few steps, with the built-in model.

    python tests/benchmarks/sampler_quality.py                # measures what is not measured yet
    python tests/benchmarks/sampler_quality.py --table        # prints the table and draws the plot

For every sampler and number of steps: the Frechet distance of the feature network between generated
images (labels in turn) and the 10,000 test images of Fashion-MNIST, for several draws (seeds), and
its ratio to that of Algorithm 2 with all 1000 steps. Hours of work on a CPU: what is done is kept
in `--cache`, and figures in sampler_quality.json, so that it may be stopped and started again.

The upper bound of a ratio is that of a one-sided 95 % t-interval of the difference of mean log
distances. Their standard deviation between draws is pooled over all plans of 10 steps or more.
"""

import argparse
import json
import multiprocessing
import os
import time
import warnings
from pathlib import Path

import numpy as np

from ddpm_edge import Generator
from ddpm_edge.features import FeatureNetwork
from ddpm_edge.metrics import Moments, frechet_distance
from ddpm_edge.samplers import SamplerWarning

HERE = Path(__file__).parent
RESULTS = HERE / "sampler_quality.json"
CHUNK = 20  # images that are sampled at once, and kept
REFERENCE = {"sampler": "ddpm", "steps": 1000}
STEPS = (5, 10, 15, 20, 50)
SAMPLERS = {
    "DDIM": {"sampler": "ddim"},
    "DDIM, eta 1 (Algorithm 2, beta-tilde)": {"sampler": "ddim", "eta": 1.0},
    "DPM-Solver 2": {"sampler": "dpm", "order": 2},
    "DPM-Solver++ 2M": {"sampler": "dpmpp", "order": 2},
    "DPM-Solver++ 3M": {"sampler": "dpmpp", "order": 3},
    "DPM-Solver++ SDE 2M": {"sampler": "dpmpp", "order": 2, "sde": True},
    "UniPC 2": {"sampler": "unipc", "order": 2},
    "UniPC 3": {"sampler": "unipc", "order": 3},
    "iPNDM 4": {"sampler": "ipndm", "order": 4},
}


def plans(spacings: list[str]) -> list[dict]:
    """The reference, then every sampler with every spacing and number of steps."""
    return [
        REFERENCE,
        *(
            {**sampler, "spacing": spacing, "steps": steps}
            for sampler in SAMPLERS.values()
            for spacing in spacings
            for steps in STEPS
        ),
    ]


def name_of(plan: dict) -> str:
    """A file's name for a plan."""
    return ",".join(f"{k}={v}" for k, v in plan.items())


def work(jobs: list[tuple[dict, int, int]], cache: Path, worker: int, workers: int) -> None:
    """Make and judge the chunks of images that no other worker has begun."""
    warnings.simplefilter("ignore", SamplerWarning)
    with Generator.load(threads=1) as generator, FeatureNetwork.fashion_mnist(threads=1) as network:
        for plan, seed, first in jobs[worker::workers]:
            path = chunk_path(cache, plan, seed, first)
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            label = [i % 10 for i in range(first, first + CHUNK)]
            images = generator.sample(
                CHUNK, seed=seed, first=first, label=label, batch=CHUNK, **plan
            )
            temporary = path.with_suffix(f".{os.getpid()}.npy")
            np.save(temporary, network(images).features)
            temporary.replace(path)


def chunk_path(cache: Path, plan: dict, seed: int, first: int) -> Path:
    """Where the features of CHUNK images are kept; float32 (CHUNK, 96)."""
    return cache / name_of(plan) / str(seed) / f"{first:05d}.npy"


def real_moments(cache: Path) -> Moments:
    """Of the 10,000 test images."""
    from ddpm_edge.train.data import load

    path = cache / "real.npy"
    if not path.exists():
        with FeatureNetwork.fashion_mnist() as network:
            features = network(load("fashion-mnist", "test").images.transpose(0, 2, 3, 1)).features
        cache.mkdir(parents=True, exist_ok=True)
        np.save(path, features)
    return Moments.of(np.load(path))


def measure(a: argparse.Namespace) -> None:
    """Do what is missing, one plan and draw after the other, and note its distance."""
    results = read_results()
    real = real_moments(a.cache)
    for seed in range(a.draws):
        for plan in plans(a.spacings):
            row = results.setdefault(name_of(plan), {"plan": plan, "n": a.n, "distances": {}})
            if str(seed) in row["distances"]:
                continue
            jobs = [(plan, seed, first) for first in range(0, a.n, CHUNK)]
            start = time.perf_counter()
            with multiprocessing.get_context("spawn").Pool(a.processes) as pool:
                pool.starmap(work, [(jobs, a.cache, i, a.processes) for i in range(a.processes)])
            features = np.concatenate([np.load(chunk_path(a.cache, *job)) for job in jobs])
            distance = frechet_distance(Moments.of(features), real)
            row["distances"][str(seed)] = distance
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            seconds = time.perf_counter() - start
            print(f"{name_of(plan)} seed {seed}: {distance:.3f}, {seconds:.0f} s", flush=True)


def read_results() -> dict[str, dict]:
    """What was measured: name of a plan -> {"plan", "n", "distances": {seed: distance}}."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def log_distances(row: dict) -> np.ndarray:
    return np.log(list(row["distances"].values()))


def pooled_deviation(results: dict[str, dict]) -> tuple[float, int]:
    """Standard deviation of a log distance between draws, and its degrees of freedom."""
    logs = [log_distances(row) for row in results.values() if row["plan"]["steps"] >= 10]
    squares = sum(((x - x.mean()) ** 2).sum() for x in logs)
    freedom = sum(len(x) - 1 for x in logs)
    return float(np.sqrt(squares / max(freedom, 1))), freedom


def ratio(row: dict, reference: dict, deviation: float, freedom: int) -> tuple[float, float]:
    """Ratio of the distances' geometric means, and its upper 95 % bound."""
    from scipy import stats

    a, b = log_distances(row), log_distances(reference)
    difference = a.mean() - b.mean()
    error = deviation * np.sqrt(1 / len(a) + 1 / len(b))
    bound = difference + stats.t.ppf(0.95, freedom) * error if freedom else np.inf
    return float(np.exp(difference)), float(np.exp(bound))


def table(results: dict[str, dict], ms_an_evaluation: float) -> str:
    """The table in Markdown: one line a sampler and spacing, one column a number of steps."""
    reference = results[name_of(REFERENCE)]
    deviation, freedom = pooled_deviation(results)
    mean = float(np.exp(log_distances(reference).mean()))
    lines = [
        f"Algorithm 2, 1000 steps: {mean:.3f} ({len(reference['distances'])} draws of "
        f"{reference['n']}); deviation of a draw {100 * deviation:.1f} % ({freedom} degrees of "
        "freedom)",
        "",
        "| sampler | spacing | " + " | ".join(f"{s} steps" for s in STEPS) + " |",
        "|---" * (2 + len(STEPS)) + "|",
    ]
    spacings = list(dict.fromkeys(r["plan"]["spacing"] for r in results.values() if "spacing" in
                                  r["plan"]))  # fmt: skip
    for title, sampler in SAMPLERS.items():
        for spacing in spacings:
            cells = []
            for steps in STEPS:
                row = results.get(name_of({**sampler, "spacing": spacing, "steps": steps}))
                if row is None or not row["distances"]:
                    cells.append("")
                    continue
                value, bound = ratio(row, reference, deviation, freedom)
                cells.append(f"{value:.2f} (< {bound:.2f}, {len(row['distances'])})")
            if any(cells):
                lines.append(f"| {title} | {spacing} | {' | '.join(cells)} |")
    lines.append(
        "| time an image | | "
        + " | ".join(f"{s * ms_an_evaluation / 1e3:.2f} s" for s in STEPS)
        + f" | (1000 steps: {ms_an_evaluation:.1f} s)"
    )
    return "\n".join(lines)


def plot(results: dict[str, dict], path: Path) -> None:
    """Ratio to Algorithm 2 against steps, a line a sampler with its best spacing."""
    from matplotlib.figure import Figure

    reference = results[name_of(REFERENCE)]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for title, sampler in SAMPLERS.items():
        best = {}
        for steps in STEPS:
            rows = [r for r in results.values() if r["distances"] and r["plan"]["steps"] == steps
                    and sampler.items() <= r["plan"].items()
                    and ("sde" in r["plan"]) == ("sde" in sampler)
                    and ("eta" in r["plan"]) == ("eta" in sampler)]  # fmt: skip
            if rows:
                best[steps] = min(ratio(r, reference, 0.0, 0)[0] for r in rows)
        axes.plot(list(best), list(best.values()), marker="o", label=title)
    axes.axhline(1.0, color="black", linewidth=1, label="Algorithm 2, 1000 steps")
    axes.set(xscale="log", yscale="log", xlabel="evaluations of the network",
             ylabel="Frechet distance / Algorithm 2's")  # fmt: skip
    axes.set_xticks(STEPS, [str(s) for s in STEPS])
    axes.set_yticks([1, 1.2, 1.5, 2, 3, 5], ["1", "1.2", "1.5", "2", "3", "5"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def ms_an_evaluation() -> float:
    """Median time of an evaluation at batch 1, milliseconds, all cores."""
    with Generator.load() as generator:
        generator.warmup()
        times = [generator.run(1, seed=i, steps=20).milliseconds / 20 for i in range(15)]
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="show what was measured")
    parser.add_argument("--plot", type=Path, help="with --table: draw it there, as a PNG")
    parser.add_argument("-n", type=int, default=1000, help="images a draw")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--spacings", nargs="+", default=["trailing", "karras"])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--cache", type=Path, default=Path("runs/sampler-quality"))
    a = parser.parse_args()
    if not a.table:
        measure(a)
    results = read_results()
    print(table(results, ms_an_evaluation()))
    if a.plot:
        plot(results, a.plot)


if __name__ == "__main__":
    main()
