"""What `compare_peers.py` measured, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

Results = dict[str, Any]


def table(results: Results) -> str:
    """All of it, a section a part, each with the machine that it was measured on."""
    sections = []
    for part, found in results.items():
        lines = models(part, found) if "gflop" in found else OTHERS[part](found)
        sections.append(f"### {part}\n\n" + "\n".join(lines) + f"\n\n*{where(found['machine'])}*")
    return "\n\n".join(sections)


def where(machine: dict[str, Any]) -> str:
    """The machine, the versions and the date in one sentence."""
    no_amx = "" if "amx_bf16" in machine["instructions"] else "; no AMX"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cpus']} CPUs ({', '.join(machine['instructions'])}"
        f"{no_amx}), whose dense product reaches {machine['peak_fp32_gflop_s']:.0f} GFLOP/s in "
        f"float32 and {machine['peak_bf16_gflop_s']:.0f} in bfloat16; Python {machine['python']}, "
        f"{versions}; {machine['date']}"
    )


def models(part: str, found: Results) -> Iterator[str]:
    """A step of every contender."""
    machine = found["machine"]
    yield (
        f"{found['gflop']:.2f} GFLOP an evaluation of one image; {found['sittings']} sittings of "
        f"{found['rounds']} turns of {found['steps']} DDIM steps."
    )
    yield ""
    columns = ("", "batch", "ms a step", "times diffusers (95 %)", "images/s of 20 steps",
               "of the peak", "peak memory")  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in found["rows"]:
        head = f"| {row['contender']} | {row['batch']} | "
        if "reason" in row:
            yield f"{head}cannot run: {row['reason']} | | | | |"
            continue
        ms, half = row["ms_a_step"], "bf16" in row["contender"]
        peak = machine["peak_bf16_gflop_s" if half else "peak_fp32_gflop_s"]
        share = f"{found['gflop'] * row['batch'] / ms * 1e5 / peak:.0f} %"
        each = row["ms_of_each_sitting"]
        yield (
            f"{head}{ms:.2f} ({min(each):.2f} to {max(each):.2f}) | "
            f"{interval(row['times_diffusers'])} | {row['batch'] / ms * 1e3 / 20:.2f} | "
            f"{'' if 'int8' in row['contender'] else share} | {row['peak_memory_mb']:.0f} MB |"
        )
    if part == "cifar10":
        yield from ("", "Its weights are random; int8 has passed no gate and is only timed.")
    shares = ", ".join(f"{name} {share:.1f} %" for name, share in found["loop_percent"].items())
    yield from ("", f"The loop around the network, of a step of batch 1, ONNX Runtime: {shares}.")


def interval(times: list[float]) -> str:
    """A ratio with its interval."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*times)


def first_images(found: Results) -> Iterator[str]:
    yield from ("| from process start | first 16 images, 20 steps | peak memory |", "|---|---|---|")
    for row in found["rows"]:
        yield f"| {row['contender']} | {row['seconds']:.2f} s | {row['peak_memory_mb']:.0f} MB |"


def equal_quality(found: Results) -> Iterator[str]:
    for name, seconds in found["seconds"].items():
        yield f"- {name}: {seconds:.3f} s an image, {found['steps'][name]} steps"
    yield (
        f"\n{interval(found['times'])} times = {found['times_fewer_steps']:.0f} (fewer steps) x "
        f"{interval(found['times_a_step'])} (a step)"
    )


def quality(found: Results) -> Iterator[str]:
    yield from (
        f"| {found['images']:,} images | Frechet distance | times fp32's |",
        "|---|---|---|",
    )
    for row in found["rows"]:
        name = f"{row['variant']}, {row['runtime']}"
        yield f"| {name} | {row['frechet_distance']:.4f} | {row['times_fp32']:.3f} |"


def imports(found: Results) -> Iterator[str]:
    yield ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found["seconds"].items())


def environments(found: Results) -> Iterator[str]:
    yield ", ".join(f"{name} {mb:,.0f} MB" for name, mb in found["mb"].items())


def growth(found: Results) -> Iterator[str]:
    for title, curve in found["curves"].items():
        points = ", ".join(f"{n}: {ms:.1f}" for n, ms in curve["ms"].items())
        yield f"- {title}: {points}; grows with power {curve['power']:.2f}"
    peaks = ", ".join(f"{int(n):,}: {mb:.0f} MB" for n, mb in found["peak_mb_by_n"].items())
    yield f"- peak memory less the images themselves, by the number of images: {peaks}"


OTHERS = {
    "first images": first_images,
    "equal quality": equal_quality,
    "quality": quality,
    "imports": imports,
    "environments": environments,
    "growth": growth,
}


def plot(results: Results, path: Path) -> None:
    """Bars of the time of a step, and growth on logarithmic axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    steps = [(part, found) for part, found in results.items() if "gflop" in found]
    curves = [*results.get("growth", {}).get("curves", {}).items()]
    figure, axes = plt.subplots(
        1 + bool(curves), max(len(steps), len(curves)), figsize=(13, 4 + 3 * bool(curves)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, (part, found) in zip(axes[0], steps, strict=False):
        first = found["rows"][0]["batch"]
        rows = [r for r in found["rows"] if r["batch"] == first and "reason" not in r][::-1]
        names = [row["contender"].replace(" (network alone)", " *") for row in rows]
        ours = [row["contender"].startswith("ddpm-edge") for row in rows]
        bars = axis.barh(
            names, [r["ms_a_step"] for r in rows], color=["C0" if o else "0.7" for o in ours]
        )
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        axis.set(title=f"{part}, batch {first}: ms a step", visible=True)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)
    for axis, (title, curve) in zip(axes[-1], curves, strict=False):
        sizes = [int(n) for n in curve["ms"]]
        axis.loglog(sizes, list(curve["ms"].values()), "o-")
        axis.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axis.set_xticks([], minor=True)
        axis.set(title=f"{title}: power {curve['power']:.2f}", visible=True)
        axis.grid(visible=True, which="both", alpha=0.3)
    figure.supxlabel("* the network alone, without a sampling loop", fontsize=8)
    figure.savefig(path, dpi=110)


def readme(results: Results) -> str:
    """What the README shows: a step of every contender, a new process, and equal quality."""
    columns = [(name, batch) for name in ("built-in", "cifar10") for batch in (1, 8)]
    of = {
        (name, row["batch"], row["contender"]): row
        for name in ("built-in", "cifar10")
        for row in results[name]["rows"]
    }
    head = [f"{name}, {results[name]['gflop']:.2f} GFLOP, batch {batch}" for name, batch in columns]
    lines = [f"| ms a step (times diffusers) | {' | '.join(head)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for contender in dict.fromkeys(contender for _, _, contender in of):
        cells = [_cell(of[(*column, contender)]) for column in columns]
        lines.append(f"| {contender} | {' | '.join(cells)} |")
    rows = {row["contender"]: row for row in results["first images"]["rows"]}
    theirs, ours = rows["diffusers"], rows["ddpm-edge, ONNX Runtime fp32"]
    imported = results["imports"]["seconds"]
    mb, equal = results["environments"]["mb"], results["equal quality"]
    seconds, steps = equal["seconds"], equal["steps"]
    quality, loop = results["quality"], results["built-in"]["loop_percent"]
    lines += [
        "",
        "| the built-in model | diffusers | ddpm-edge[cpu] |",
        "|---|---|---|",
        f"| an image of equal quality | {seconds['diffusers']:.1f} s, {steps['diffusers']} steps | "
        f"{seconds['ddpm-edge']:.3f} s, {steps['ddpm-edge']} steps |",
        f"| a new process to its first 16 images, 20 steps | {theirs['seconds']:.1f} s | "
        f"{ours['seconds']:.1f} s |",
        f"| import | {imported['diffusers']:.1f} s | "
        f"{imported['ddpm-edge and ONNX Runtime']:.1f} s |",
        f"| peak memory | {theirs['peak_memory_mb']:.0f} MB | {ours['peak_memory_mb']:.0f} MB |",
        f"| a fresh environment | {mb['diffusers']:,.0f} MB | {mb['ddpm-edge[cpu]']:.0f} MB |",
        "",
        f"Equal quality is {equal['times'][0]:.0f} times quicker: {equal['times_fewer_steps']:.0f} "
        f"times fewer steps (below), each {equal['times_a_step'][0]:.1f} times as fast.",
        f"Of a step of batch 1 the loop around the network takes {loop['DDIM']:.1f} % with DDIM, "
        f"{loop['default']:.1f} % with the default.",
        f"The Frechet distance of {quality['images']:,} images to the test images is "
        f"{_times(quality, 'openvino', 'bf16')} (bf16) and "
        f"{_times(quality, 'onnxruntime', 'int8')} (int8) times that of float32.",
    ]
    return "\n".join(lines)


def _times(quality: Results, runtime: str, variant: str) -> str:
    (row,) = (r for r in quality["rows"] if (r["runtime"], r["variant"]) == (runtime, variant))
    return f"{row['times_fp32']:.2f}"


def _cell(row: Results) -> str:
    if "reason" in row:
        return "cannot run"
    return f"{row['ms_a_step']:.1f} ({row['times_diffusers'][0]:.1f})"
