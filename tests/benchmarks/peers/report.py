"""What `compare_peers.py` measured, as Markdown and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def table(results: dict[str, Any]) -> str:
    """Markdown: the machine, a table a model, fresh processes, growth."""
    where = results["machine"]
    no_amx = "" if "amx_bf16" in where["instructions"] else ", no AMX"
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines = [
        f"{where['processor']}, {where['cpus']} CPUs ({', '.join(where['instructions'])}{no_amx}); "
        f"a dense product reaches {where['peak_fp32_gflop_s']:.0f} GFLOP/s in float32, "
        f"{where['peak_bf16_gflop_s']:.0f} in bfloat16. {versions}; {where['date']}."
    ]
    for model, found in results["models"].items():
        lines += ["", (
            f"**{model}**, {found['gflop']:.2f} GFLOP an evaluation; medians of {found['rounds']} "
            f"interleaved turns of {found['steps']} DDIM steps"
        ), ""]  # fmt: skip
        lines += peers(found.get("peers", []), where)
        if loop := found.get("loop"):
            shares = ", ".join(f"{name} {percent:.1f} %" for name, percent in loop.items())
            lines += ["", f"The loop around the network, of a step of batch 1: {shares}"]
        if found.get("fresh"):
            lines += ["", "| from process start | first 16 images, 20 steps | peak memory |"]
            lines += ["|---|---|---|"]
            for row in found["fresh"]:
                lines.append(
                    f"| {row['contender']} | {row['first_images_s']:.2f} s | "
                    f"{row['peak_memory_mb']:.0f} MB |"
                )
    if equal := results.get("equal_quality"):
        lines += ["", (
            f"Equal quality, built-in model, one image: {equal['diffusers_1000_steps_s']:.2f} s "
            f"(diffusers, DDPM, 1000 steps) and {equal['ours_20_steps_s']:.4f} s (20 steps): "
            f"{equal['times']:.0f} times = {equal['fewer_steps']:.0f} (fewer steps) x "
            f"{equal['times_a_step']:.2f} (a step)"
        )]  # fmt: skip
    for title, values, unit in (
        ("Import", results.get("imports_s", {}), "s"),
        ("Fresh environment", results.get("installs_mb", {}), "MB"),
    ):
        if values:
            digits = 2 if unit == "s" else 0
            parts = [f"{name} {value:.{digits}f} {unit}" for name, value in values.items()]
            lines += ["", f"{title}: {', '.join(parts)}"]
    if growth := results.get("growth"):
        lines += ["", "Growth: " + "; ".join(
            f"{key.replace('_', ' ')} ^ {value['power']:.2f}" for key, value in growth.items()
            if "power" in value
        )]  # fmt: skip
        peaks = growth["peak_mb_by_n"].items()
        lines += ["Peak memory less the images: " + ", ".join(
            f"n = {int(n):,}: {mb:.0f} MB" for n, mb in peaks
        )]  # fmt: skip
    return "\n".join(lines)


def peers(rows: list[dict[str, Any]], where: dict[str, Any]) -> list[str]:
    """A Markdown table of the contenders."""
    lines = [
        "| | batch | ms a step | times diffusers (95 %) | images/s, 20 steps | of the peak | "
        "peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        half = "bf16" in row["contender"]
        peak = where["peak_bf16_gflop_s" if half else "peak_fp32_gflop_s"]
        share = "" if "int8" in row["contender"] else f"{100 * row['gflop_s'] / peak:.0f} %"
        times, low, high = row["times_diffusers"]
        lines.append(
            f"| {row['contender']} | {row['batch']} | {row['ms_a_step']:.2f} | "
            f"{times:.2f} ({low:.2f} to {high:.2f}) | {row['images_s_of_20_steps']:.2f} | "
            f"{share} | {row['peak_memory_mb']:.0f} MB |"
        )
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of the time of a step, and growth on logarithmic axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    models, growth = results["models"], results.get("growth", {})
    curves = [(key, value) for key, value in growth.items() if "power" in value]
    figure, axes = plt.subplots(
        2, max(len(models), len(curves)), figsize=(13, 8), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, (model, found) in zip(axes[0], models.items(), strict=False):
        rows = [row for row in found["peers"] if row["batch"] == 1][::-1]
        names = [row["contender"].replace(" (network alone)", " *") for row in rows]
        ours = [row["contender"].startswith("ddpm-edge") for row in rows]
        bars = axis.barh(
            names, [r["ms_a_step"] for r in rows], color=["C0" if o else "0.7" for o in ours]
        )
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        axis.set(title=f"{model}, batch 1: ms a step", visible=True)
        axis.tick_params(labelsize=8)
    for axis, (key, value) in zip(axes[1], curves, strict=False):
        sizes = [int(n) for n in value["ms"]]
        axis.loglog(sizes, list(value["ms"].values()), "o-")
        axis.set(title=f"{key.replace('_', ' ')}: power {value['power']:.2f}", visible=True)
        axis.grid(visible=True, which="both", alpha=0.3)
    figure.supxlabel("* the network alone, without a sampling loop", fontsize=8)
    figure.savefig(path, dpi=110)


def readme(results: dict[str, Any]) -> str:
    """What the README shows: a step of every contender, starting, and equal quality."""
    models = results["models"]
    columns = [(name, batch) for name in models for batch in (1, 8)]
    of = {
        (name, row["batch"], row["contender"]): row
        for name, found in models.items()
        for row in found["peers"]
    }
    head = [f"{name} ({models[name]['gflop']:.2f} GFLOP), batch {batch}" for name, batch in columns]
    lines = [f"| ms a step (times diffusers) | {' | '.join(head)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for contender in dict.fromkeys(contender for _, _, contender in of):
        cells = [of.get((*column, contender)) for column in columns]
        lines.append(f"| {contender} | {' | '.join(_cell(row) for row in cells)} |")
    first = {row["contender"]: row for row in models["built-in"]["fresh"]}
    theirs, ours = first["diffusers"], first["ddpm-edge, ONNX Runtime fp32"]
    imports, sizes, equal = (results[k] for k in ("imports_s", "installs_mb", "equal_quality"))
    seconds = imports["diffusers"], imports["ddpm-edge and ONNX Runtime"]
    lines += [
        "",
        "| the built-in model, a new process | diffusers | ddpm-edge[cpu] |",
        "|---|---|---|",
        f"| import | {seconds[0]:.2f} s | {seconds[1]:.2f} s |",
        f"| start to the first 16 images, 20 steps | {theirs['first_images_s']:.2f} s | "
        f"{ours['first_images_s']:.2f} s |",
        f"| peak memory | {theirs['peak_memory_mb']:.0f} MB | {ours['peak_memory_mb']:.0f} MB |",
        f"| a fresh environment | {sizes['diffusers']:.0f} MB | {sizes['ddpm-edge[cpu]']:.0f} MB |",
        f"| an image of equal quality | {equal['diffusers_1000_steps_s']:.2f} s, 1000 steps | "
        f"{equal['ours_20_steps_s']:.3f} s, 20 steps |",
        "",
        f"The last line is {equal['times']:.0f} times: {equal['fewer_steps']:.0f} times fewer "
        f"steps (below), each {equal['times_a_step']:.1f} times as fast.",
    ]
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    return f"{row['ms_a_step']:.1f} ({row['times_diffusers'][0]:.1f})" if row else ""
