"""Sample diffusion models (DDPM) on the device, without PyTorch.

from ddpm_edge import Generator
images = Generator.load().sample(16, seed=0)      # uint8 (16, 28, 28, 1)
"""

from ddpm_edge import samplers
from ddpm_edge._version import __version__
from ddpm_edge.bundle import Bundle
from ddpm_edge.errors import DdpmEdgeError
from ddpm_edge.generator import Generator, Result, Step
from ddpm_edge.images import save_grid, save_image
from ddpm_edge.plan import Plan
from ddpm_edge.schedule import Schedule

__all__ = [
    "Bundle",
    "DdpmEdgeError",
    "Generator",
    "Plan",
    "Result",
    "Schedule",
    "Step",
    "__version__",
    "samplers",
    "save_grid",
    "save_image",
]
