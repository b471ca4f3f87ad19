"""A model's state as named arrays: what travels in a round and what a round's record keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

NamedArrays = dict[str, npt.NDArray[np.generic]]


def arrays_of(model: nn.Module) -> NamedArrays:
    """Copies of parameters and buffers, in the order of state_dict."""
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}


def load_arrays(model: nn.Module, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Put arrays into the model; names and shapes must be the model's own (torch checks them)."""
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()})


def cast_like(
    arrays: Mapping[str, npt.NDArray[np.generic]], like: Mapping[str, npt.NDArray[np.generic]]
) -> NamedArrays:
    """The arrays in the dtypes of `like`: an average may come back as float64, that of counters as float."""
    return {
        name: (
            np.rint(arrays[name])
            if model.dtype.kind in "iub" and arrays[name].dtype.kind == "f"
            else arrays[name]
        ).astype(model.dtype, copy=False)
        for name, model in like.items()
    }


def digest(arrays: Mapping[str, npt.NDArray[np.generic]]) -> str:
    """SHA-256 over names, dtypes, shapes and little-endian bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        value = np.asarray(arrays[name], arrays[name].dtype.newbyteorder("<"))
        sha.update(f"{name}\0{value.dtype.str}\0{value.shape}\0".encode())
        sha.update(value.tobytes())
    return sha.hexdigest()
