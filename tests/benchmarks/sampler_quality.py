"""Which sampler makes the best images in few steps, with the built-in model.

    python tests/benchmarks/sampler_quality.py                # measures what is not measured yet
    python tests/benchmarks/sampler_quality.py --table --plot docs/samplers.png    # shows it

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
# Trials of 300 images chose the spacings; the chosen sampler stands here with others too.
SAMPLERS = {
    "DDIM": {"sampler": "ddim", "spacing": "trailing"},
    "Algorithm 2, respaced (beta-tilde)": {"sampler": "ddim", "eta": 1.0, "spacing": "trailing"},
    "DPM-Solver 2": {"sampler": "dpm", "order": 2, "spacing": "trailing"},
    "DPM-Solver++ 2M": {"sampler": "dpmpp", "order": 2, "spacing": "trailing"},
    "DPM-Solver++ 3M": {"sampler": "dpmpp", "order": 3, "spacing": "trailing"},
    "UniPC 2": {"sampler": "unipc", "order": 2, "spacing": "trailing"},
    "iPNDM 4": {"sampler": "ipndm", "order": 4, "spacing": "trailing"},
    "DPM-Solver++ SDE 2M, trailing": {"sampler": "dpmpp", "order": 2, "sde": True,
                                      "spacing": "trailing"},
    "DPM-Solver++ SDE 2M, karras": {"sampler": "dpmpp", "order": 2, "sde": True,
                                    "spacing": "karras"},
    "DPM-Solver++ SDE 2M, logsnr": {"sampler": "dpmpp", "order": 2, "sde": True,
                                    "spacing": "logsnr"},
}  # fmt: skip
FIRST = ("DPM-Solver++ SDE 2M, logsnr",)  # measured first, with all draws


def plans() -> list[dict]:
    """The reference, then every sampler with every number of steps."""
    order = sorted(SAMPLERS, key=lambda title: title not in FIRST)
    return [REFERENCE, *({**SAMPLERS[title], "steps": n} for title in order for n in STEPS)]


def name_of(plan: dict) -> str:
    """A file's name for a plan."""
    return ",".join(f"{k}={v}" for k, v in plan.items())


def work(jobs: list[tuple[dict, int, int]], cache: Path, worker: int, workers: int) -> None:
    """Make and judge this worker's share of the chunks, but for those that are there."""
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
    from ddpm_edge.data import load

    path = cache / "real.npy"
    if not path.exists():
        with FeatureNetwork.fashion_mnist() as network:
            features = network(load("fashion-mnist", "test").images.transpose(0, 2, 3, 1)).features
        cache.mkdir(parents=True, exist_ok=True)
        np.save(path, features)
    return Moments.of(np.load(path))


def measure(a: argparse.Namespace) -> None:
    """Do what is missing, one draw and plan after the other, and note its distance."""
    real = real_moments(a.cache)
    wanted = [(plan, seed) for seed in range(a.draws) for plan in plans() if matches(plan, a.only)]
    for plan, seed in wanted:
        results = read_results()
        row = results.setdefault(name_of(plan), {"plan": plan, "n": a.n, "distances": {}})
        if str(seed) in row["distances"]:
            continue
        if row["n"] != a.n:
            raise SystemExit(f"{name_of(plan)} was measured with -n {row['n']}; got -n {a.n}")
        jobs = [(plan, seed, first) for first in range(0, a.n, CHUNK)]
        start = time.perf_counter()
        with multiprocessing.get_context("spawn").Pool(a.processes) as pool:
            pool.starmap(work, [(jobs, a.cache, i, a.processes) for i in range(a.processes)])
        features = np.concatenate([np.load(chunk_path(a.cache, *job)) for job in jobs])
        row["distances"][str(seed)] = frechet_distance(Moments.of(features), real)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        seconds = time.perf_counter() - start
        print(f"{name_of(plan)}, draw {seed}: {row['distances'][str(seed)]:.4f}, {seconds:.0f} s")


def matches(plan: dict, only: list[str]) -> bool:
    """Whether a plan's name has all these words, such as "steps=20"."""
    return all(word in name_of(plan).split(",") for word in only)


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
    """The table in Markdown: one line a sampler, one column a number of steps."""
    reference = results[name_of(REFERENCE)]
    deviation, freedom = pooled_deviation(results)
    mean = float(np.exp(log_distances(reference).mean()))
    lines = [
        f"Algorithm 2, 1000 steps: distance {mean:.4f} ({len(reference['distances'])} draws of "
        f"{reference['n']} images), {ms_an_evaluation:.1f} s an image.",
        f"Below: ratio of distances (upper 95 % bound; draws). Standard deviation of a draw "
        f"{100 * deviation:.1f} %, {freedom} degrees of freedom.",
        "",
        "| sampler | " + " | ".join(f"{s} steps" for s in STEPS) + " |",
        "|---" * (1 + len(STEPS)) + "|",
    ]
    for title, sampler in SAMPLERS.items():
        cells = []
        for steps in STEPS:
            row = results.get(name_of({**sampler, "steps": steps}))
            if row is None or not row["distances"]:
                cells.append("")
                continue
            value, bound = ratio(row, reference, deviation, freedom)
            cells.append(f"{value:.2f} (< {bound:.2f}; {len(row['distances'])})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    times = " | ".join(f"{s * ms_an_evaluation / 1e3:.2f} s" for s in STEPS)
    return "\n".join([*lines, f"| time an image, batch 1 | {times} |"])


def plot(results: dict[str, dict], path: Path) -> None:
    """Ratio to Algorithm 2 against steps, a line a sampler."""
    from matplotlib.figure import Figure

    reference = results[name_of(REFERENCE)]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for title, sampler in SAMPLERS.items():
        rows = {n: results.get(name_of({**sampler, "steps": n})) for n in STEPS}
        ratios = {
            n: ratio(r, reference, 0.0, 0)[0] for n, r in rows.items() if r and r["distances"]
        }
        axes.plot(list(ratios), list(ratios.values()), marker="o", label=title)
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
    parser.add_argument("--only", nargs="+", default=[], help="such as sde=True steps=20")
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
