"""Training: U-Net, Algorithm 1, data, runs. The only part of ddpm_edge that imports torch."""

from ddpm_edge.errors import RuntimeUnavailableError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise RuntimeUnavailableError(
        f"training and export need PyTorch ({error}); pip install 'ddpm-edge[train]' or "
        "'ddpm-edge[export]'"
    ) from error
