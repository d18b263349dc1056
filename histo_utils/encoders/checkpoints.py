"""Weights: found, read without executing anything, compared name by name.

A PyTorch checkpoint is a pickle, and a pickle can run code. Everything here is read
as plain tensors and numbers, NumPy's among them (``weights_only=True``, or
safetensors); what holds more is refused.
"""

import os
import pickle
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# What training scripts wrap a state dict in, beside epoch and optimiser.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_SHOWN = 3  # names of a list that an error spells out
# A NumPy number in a pickle (LGFFEM's best loss), also under the name before NumPy 2.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS = [np.dtype, _SCALAR, (_SCALAR, "numpy.core.multiarray.scalar")]
_NUMBERS += [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]


def read_checkpoint(path):
    """Read what a file of weights holds: tensors and numbers, on the CPU."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds Python objects besides tensors and numbers, "
            "which could run code: it was not executed. Get the file anew, or as "
            "safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read ({first}): it is damaged or no file of weights; "
            "copy or download it again"
        ) from error


def read_state(path) -> dict[str, torch.Tensor]:
    """Read a state dict, bare or wrapped, on the CPU; ValueError for anything else."""
    return unwrapped(read_checkpoint(path), path)


def unwrapped(found, path) -> dict[str, torch.Tensor]:
    """Return the state dict in what `read_checkpoint` gave; ValueError if none."""
    for name in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    values = found.values() if isinstance(found, dict) else [found]
    if not values or not all(isinstance(value, torch.Tensor) for value in values):
        what = some(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(
            f"{path} holds {what}; expected a state dict (names to tensors), bare or "
            f"under {', '.join(_WRAPPERS)}"
        )
    return dict(found)


def fit_state(network, state, source, rename=str):
    """Load a state dict strictly, or list what does not fit and change nothing.

    ``rename``: the state dict's name of one of the network's own.
    """
    own = {rename(name): name for name in network.state_dict()}
    shapes = {rename(k): tuple(v.shape) for k, v in network.state_dict().items()}
    found = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} where {shape} is expected"
            for name, shape in shapes.items()
            if name in state and state[name].shape != shape
        ],
    }
    wrong = [f"{len(names)} {w} ({some(names)})" for w, names in found.items() if names]
    if wrong:
        raise ValueError(
            f"{source} does not fit {type(network).__name__}: {'; '.join(wrong)}. "
            "Expected exactly its parameters: give the network's own weights"
        )
    network.load_state_dict({own[name]: value for name, value in state.items()})
    return network


def local_weights(name):
    """Return ``$HISTO_WEIGHTS/<name>[.<tag>].safetensors`` of a timm name, or None."""
    if not os.environ.get("HISTO_WEIGHTS"):
        return None
    folder = Path(os.environ["HISTO_WEIGHTS"])
    tagged = [] if "." in name else sorted(folder.glob(f"{name}.*.safetensors"))
    found = (folder / f"{name}.safetensors", *tagged)
    return next((path for path in found if path.is_file()), None)


def some(names):
    """Write out the first few names of a list, for an error."""
    names = [str(name) for name in names]
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
