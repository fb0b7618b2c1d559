"""Engines evaluate the network: named arrays in, named arrays out, nothing about diffusion."""

from ddpm_edge.runtimes.base import Engine, TensorSpec
from ddpm_edge.runtimes.select import RUNTIMES, open_engine
from ddpm_edge.runtimes.trt import EngineStore

__all__ = ["RUNTIMES", "Engine", "EngineStore", "TensorSpec", "open_engine"]
