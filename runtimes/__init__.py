"""Engines evaluate the network: named arrays in, named arrays out, nothing about diffusion."""

from ddpm_edge.runtimes.base import Engine, TensorSpec
from ddpm_edge.runtimes.select import RUNTIMES, open_engine

__all__ = ["RUNTIMES", "Engine", "TensorSpec", "open_engine"]
