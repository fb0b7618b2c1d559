"""Networks: the U-Net of a preset, or a module of the user's own.

Any `torch.nn.Module` will do that maps `(x, t)` or, with classes, `(x, t, label)` to x's shape.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ddpm_edge.errors import ConfigError, ExportError, RunError
from ddpm_edge.train.unet import UNet, UNetConfig


def build(description: dict[str, Any]) -> nn.Module:
    """The network of a run's config, with new weights.

    Args:
        description: {"unet": fields of UNetConfig} or {"factory": "package.module:function"}.

    Raises:
        ConfigError: no such module or function, or what it returns is not a `torch.nn.Module`.
    """
    if "unet" in description:
        return UNet(UNetConfig.from_dict(description["unet"]))
    return from_factory(description["factory"])


def from_factory(name: str) -> nn.Module:
    """The module that "package.module:function", called without arguments, returns.

    The current directory is looked at too, as `python -m` does.

    Raises:
        ConfigError: no such module or function, or it does not return a `torch.nn.Module`.
    """
    package, _, function = name.partition(":")
    if not package or not function:
        raise ConfigError(f"a network is given as package.module:function; got {name!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory: Callable[[], object] = getattr(importlib.import_module(package), function)
        model = factory if isinstance(factory, nn.Module) else factory()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"no network {name!r}: {error}; give package.module:function, with the module "
            "installed or in this directory"
        ) from error
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(f"{name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} must return a torch.nn.Module; got {type(model).__name__}")
    return model


def prediction_of(output: Any) -> Tensor:
    """The tensor in what a network returns: itself, `.sample` (diffusers), or a tuple's first."""
    found = output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", output)
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"the network returns {type(output).__name__}; expected a tensor, a tuple that begins "
            "with one, or an object with one as .sample"
        )
    return found


class Prediction(nn.Module):
    """A network whose answer is a float32 tensor, whatever it is wrapped in."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Answer for x (B, C, H, W), t (B,) and perhaps label (B,)."""
        inputs = (x, t) if label is None else (x, t, label)
        return prediction_of(self.network(*inputs)).float()


def check_network(model: nn.Module, sample_shape: tuple[int, int, int], labelled: bool) -> None:
    """Raise ExportError unless the network is finite and maps (x, t[, label]) to x's shape."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise ExportError(
                f"{count} of {tensor.numel()} values of {name} are NaN or infinite; export an "
                "earlier checkpoint, or train again with a lower learning rate"
            )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    x = torch.zeros(2, *sample_shape, device=device)
    t = torch.zeros(2, dtype=torch.int64, device=device)
    arguments = (x, t, t) if labelled else (x, t)
    taken = "x, t, label" if labelled else "x, t"
    try:
        with torch.no_grad():
            answer = prediction_of(model(*arguments))
    except ConfigError as error:
        raise ExportError(str(error)) from error
    except Exception as error:
        raise ExportError(
            f"the network cannot be evaluated as forward({taken}) with x {tuple(x.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if answer.shape != x.shape:
        hint = ""
        if answer.ndim == 4 and answer.shape[1] == 2 * x.shape[1]:
            hint = "; twice the channels means a learned variance, which is not supported"
        raise ExportError(
            f"the network answers {tuple(answer.shape)} to x {tuple(x.shape)}; expected x's shape"
            f"{hint}"
        )


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or a run; of a run's checkpoint the averaged weights.

    Raises:
        RunError: nothing there, or it is damaged or of another kind.
    """
    if path.is_dir():
        path = path / "checkpoints" / "last.safetensors"
    if not path.is_file():
        raise RunError(f"no weights at {path}; give a run's directory or a .safetensors file")
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise RunError(
            f"{path} is not a whole .safetensors file ({error}); pickled weights are not read, "
            "because loading them can run any code: save them with safetensors.torch.save_file"
        ) from error
    if "losses" not in tensors:  # not a checkpoint of ours
        return tensors
    return {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}


def initialise(model: nn.Module, weights: dict[str, Tensor]) -> tuple[int, list[str]]:
    """Copy what fits from `weights` into the model: how many, and what did not, one line each.

    Raises:
        RunError: no tensor fits.
    """
    state = model.state_dict()
    misfits = [f"{name} is not in the checkpoint" for name in state if name not in weights]
    misfits += [f"{name} is not in the network" for name in weights if name not in state]
    fitting: dict[str, Tensor] = {}
    for name in state.keys() & weights.keys():
        if state[name].shape == weights[name].shape:
            fitting[name] = weights[name]
        else:
            shapes = f"{tuple(weights[name].shape)}, here {tuple(state[name].shape)}"
            misfits.append(f"{name} has shape {shapes}")
    if not fitting:
        raise RunError("none of the checkpoint's tensors fit: it is of another network")
    with torch.no_grad():
        model.load_state_dict(fitting, strict=False)
    return len(fitting), sorted(misfits)
