"""From a torch network to a bundle: ONNX, parity gate, files. Needs `ddpm-edge[export]` to run."""

from ddpm_edge.export.pipeline import export, export_run

__all__ = ["export", "export_run"]
