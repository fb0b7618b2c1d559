"""Sample diffusion models (DDPM) on the device, without PyTorch.

from ddpm_edge import Generator
images = Generator.load().sample(16, seed=0)      # uint8 (16, 28, 28, 1)
"""

from ddpm_edge import samplers
from ddpm_edge._version import __version__
from ddpm_edge.bundle import Bundle
from ddpm_edge.errors import DdpmEdgeError
from ddpm_edge.generator import Generator, Result
from ddpm_edge.images import save_grid, save_image
from ddpm_edge.latents import slerp
from ddpm_edge.plan import Plan
from ddpm_edge.request import Step
from ddpm_edge.restoration import AveragePool, Grayscale, Mask, Matrix
from ddpm_edge.schedule import Schedule
from ddpm_edge.tasks import Restore, Vary

__all__ = [
    "AveragePool",
    "Bundle",
    "DdpmEdgeError",
    "Generator",
    "Grayscale",
    "Mask",
    "Matrix",
    "Plan",
    "Restore",
    "Result",
    "Schedule",
    "Step",
    "Vary",
    "__version__",
    "samplers",
    "save_grid",
    "save_image",
    "slerp",
]
