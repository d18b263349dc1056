"""Weights: found, read without executing anything, compared name by name.

A PyTorch checkpoint is a pickle, and a pickle can run code. Everything here is read
as plain tensors (``weights_only=True``, or safetensors); what holds more is refused.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# What training scripts wrap a state dict in, beside epoch and optimiser.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_SHOWN = 3  # names of a list that an error spells out


def read_state(path) -> dict[str, torch.Tensor]:
    """Read a state dict, on the CPU.

    Parameters
    ----------
    path : path
        ``.safetensors``, or what ``torch.save`` wrote: a state dict, bare or under
        ``state_dict``, ``model_state_dict`` or ``model``.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        A damaged file, one that holds other Python objects (they are not made, hence
        nothing of the file is run), or no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds Python objects besides tensors, which could "
            "run code: it was not executed. Get the file anew from its authors, or "
            "ask them for safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read ({first}): it is damaged or no file of weights; "
            "copy or download it again"
        ) from error
    for name in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    kinds = found.values() if isinstance(found, dict) else [found]
    if not kinds or not all(isinstance(value, torch.Tensor) for value in kinds):
        what = some(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(
            f"{path} holds {what}; expected a state dict (names to tensors), bare or "
            f"under {', '.join(_WRAPPERS)}"
        )
    return dict(found)


def without_prefix(state, prefix) -> dict[str, torch.Tensor]:
    """Keep the names that start with a prefix, without it.

    Examples
    --------
    >>> without_prefix({"module.a": 1, "module.b": 2, "c": 3}, "module.")
    {'a': 1, 'b': 2}
    """
    n = len(prefix)
    return {name[n:]: value for name, value in state.items() if name.startswith(prefix)}


def fit_state(network, state, source):
    """Load a state dict into a network, strictly.

    Parameters
    ----------
    network : torch.nn.Module
        Changed in place; and returned.
    state : dict
    source : str
        What the error calls these weights.

    Raises
    ------
    ValueError
        Names or shapes differ. Missing, unexpected and mis-shaped ones are counted and
        the first of each are named; the network is as before.
    """
    own = network.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} where {tuple(own[name].shape)} is expected"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    wrong = [f"{len(names)} {w} ({some(names)})" for w, names in found.items() if names]
    if wrong:
        raise ValueError(
            f"{source} does not fit {type(network).__name__}: {'; '.join(wrong)}. "
            "Expected a state dict with exactly its parameters: give the network's "
            "own weights"
        )
    network.load_state_dict(state, strict=True)
    return network


def local_weights(name):
    """Return the weight file of a timm name in ``HISTO_WEIGHTS``, or None.

    It is called ``<name>.safetensors``, or ``<name>.<tag>.safetensors`` for a name
    without a tag.
    """
    folder = os.environ.get("HISTO_WEIGHTS")
    if not folder:
        return None
    exact = Path(folder) / f"{name}.safetensors"
    tagged = [] if "." in name else sorted(Path(folder).glob(f"{name}.*.safetensors"))
    found = [path for path in (exact, *tagged) if path.is_file()]
    return found[0] if found else None


def some(names):
    """Write out the first few names of a list, for an error."""
    names = [str(name) for name in names]
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
