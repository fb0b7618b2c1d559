"""From a torch network to a bundle: ONNX, parity gate, files. Needs `ddpm-edge[export]` to run."""

from ddpm_edge.export.from_diffusers import export_diffusers
from ddpm_edge.export.pipeline import GATES, export, export_run

__all__ = ["GATES", "export", "export_diffusers", "export_run"]
