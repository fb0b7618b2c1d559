"""Whether calls keep a budget, and whether the next better plan would have fitted.

    python tests/benchmarks/budget.py                       # the built-in model, 50 calls a budget

On an otherwise idle machine. Calls of all budgets take turns, and so does, for each budget, the
plan of the next better quality than the one that ran, without a deadline. A plan fits if nine of
ten runs are expected to end in time. Prints Markdown, medians over the calls.
"""

import argparse
import tempfile

import numpy as np

from ddpm_edge import Generator

COLUMNS = (
    "budget, ms", "evaluations", "expected, ms", "took, ms", "within the budget",
    "within 1.1 of it", "cut short", "the next better plan: took, ms", "within the budget",
)  # fmt: skip
BUDGETS = (10.0, 20.0, 40.0, 80.0, 160.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="milliseconds")
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("-n", type=int, default=1, help="images a call")
    a = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as cache,  # latencies are measured now
        Generator.load(a.bundle, device="cpu", cache_dir=cache) as generator,
    ):
        tuned = generator.bundle.manifest.tuned
        if tuned is None:
            parser.error("the bundle was not tuned")
        latency = generator.latency(a.n)
        front = tuned.front()
        runs: dict[float, list] = {budget: [] for budget in a.budgets}
        better: dict[float, list[float]] = {budget: [] for budget in a.budgets}
        for seed in range(a.calls):
            for budget in a.budgets:
                result = generator.run(a.n, seed=seed, budget_ms=budget)
                runs[budget].append(result)
                over = [p for p in front if p.evaluations > result.plan.evaluations]
                if over:
                    took = generator.run(a.n, seed=seed, **over[0].plan).milliseconds
                    better[budget].append(took)
        print(f"{a.n} images, {a.calls} calls a budget, {latency.step_ms:.2f} ms a step\n")
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        for budget, results in runs.items():
            ms = np.array([result.milliseconds for result in results])
            expected = np.median([result.expected_ms for result in results])
            steps = sorted({result.plan.evaluations for result in results})
            others = np.array(better[budget])
            last = ["none", ""]
            if len(others):
                last = [f"{np.median(others):.1f}", f"{100 * (others <= budget).mean():.0f} %"]
            print(
                f"| {budget:g} | {', '.join(map(str, steps))} | {expected:.1f} | "
                f"{np.median(ms):.1f} | {100 * (ms <= budget).mean():.0f} % | "
                f"{100 * (ms <= 1.1 * budget).mean():.0f} % | "
                f"{100 * np.mean([result.stopped for result in results]):.0f} % | "
                f"{' | '.join(last)} |"
            )


if __name__ == "__main__":
    main()
