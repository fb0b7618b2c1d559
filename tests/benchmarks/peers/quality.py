"""How good the images of each precision are: Frechet distance to the real test images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

IMAGES = 2_000
BATCH = 20
RUNS = (
    ("onnxruntime", "fp32"), ("openvino", "bf16"), ("onnxruntime", "int8"), ("openvino", "int8"),
)  # fmt: skip


def quality(folder: Path, images: int = IMAGES) -> dict[str, Any]:
    """The distance of the built-in model's images, labels in turn, the default plan, seed 0.

    Of every precision with the same noise; `times_fp32` is its ratio to float32's.
    """
    from ddpm_edge import Generator
    from ddpm_edge.data import load
    from ddpm_edge.features import FeatureNetwork
    from ddpm_edge.metrics import Moments, frechet_distance

    labels = [i % 10 for i in range(images)]
    rows: list[dict[str, Any]] = []
    with FeatureNetwork.fashion_mnist() as network:
        test = load("fashion-mnist", "test").images.transpose(0, 2, 3, 1)
        real = Moments.of(network(test).features)
        for runtime, variant in RUNS:
            with Generator.load(
                folder / "bundle", runtime=runtime, variant=variant, device="cpu"
            ) as g:
                made = g.sample(images, label=labels, seed=0, batch=BATCH)
            distance = frechet_distance(Moments.of(network(made).features), real)
            rows.append({"runtime": runtime, "variant": variant, "frechet_distance": distance})
    for row in rows:
        row["times_fp32"] = row["frechet_distance"] / rows[0]["frechet_distance"]
    return {"images": images, "rows": rows}
