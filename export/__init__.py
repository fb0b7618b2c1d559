"""From a torch network to a bundle: ONNX, parity gate, files. Needs `ddpm-edge[export]` to run.

`to_tensorrt` is for the device: it needs neither torch nor onnx.
"""

from ddpm_edge.export.from_diffusers import export_diffusers
from ddpm_edge.export.pipeline import GATES, export, export_bundle, export_run
from ddpm_edge.export.variants import VARIANTS

__all__ = ["GATES", "VARIANTS", "export", "export_bundle", "export_diffusers", "export_run"]
