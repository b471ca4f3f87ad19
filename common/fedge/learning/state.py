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
    """Copies of all parameters and floating-point buffers, in the order of state_dict.

    Whole-number buffers (batch norm's step counter) stay where they are: an average of counters means
    nothing, and several strategies cannot aggregate integers.
    """
    state = model.state_dict().items()
    return {name: value.detach().numpy().copy() for name, value in state if value.is_floating_point()}


def names_of(model: nn.Module) -> list[str]:
    """The names of `arrays_of`, in its order."""
    return [name for name, value in model.state_dict().items() if value.is_floating_point()]


def load_arrays(model: nn.Module, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Put arrays into the model; names and shapes must be those of `arrays_of` (torch checks shapes).

    Raises:
        KeyError: a name is missing or unknown.
    """
    state = model.state_dict()
    _check_names(state, arrays)
    model.load_state_dict(state | {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()})


def _check_names(state: Mapping[str, torch.Tensor], arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
    expected = {name for name, value in state.items() if value.is_floating_point()}
    if expected != set(arrays):
        raise KeyError(f"names differ from the model's: {', '.join(sorted(expected ^ set(arrays))[:3])}")


def share_arrays(model: nn.Module, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Let the model's parameters and buffers be these arrays: no second copy, for a model that only answers.

    Training it would change the arrays. Where two names stand for one parameter, which they must go on
    doing, and where an array cannot be written to, the values are copied.

    Raises:
        KeyError: a name is missing or unknown.
    """
    everything = sum(1 for _ in model.named_parameters(remove_duplicate=False))
    if everything != sum(1 for _ in model.parameters()):
        load_arrays(model, arrays)
        return
    state = model.state_dict()
    _check_names(state, arrays)
    shared = {
        name: torch.from_numpy(value if value.flags.writeable else value.copy())
        for name, value in arrays.items()
    }
    model.load_state_dict(state | shared, assign=True)


def cast_like(arrays: NamedArrays, like: Mapping[str, npt.NDArray[np.generic]]) -> NamedArrays:
    """The arrays in the dtypes of `like`: an average may come back as float64, that of counters as float.

    `arrays` is empty afterwards, so that no array is there twice.
    """
    return {name: _cast(arrays.pop(name), model.dtype) for name, model in like.items()}


def _cast(value: npt.NDArray[np.generic], dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
    rounded = np.rint(value) if dtype.kind in "iub" and value.dtype.kind == "f" else value
    return np.asarray(rounded.astype(dtype, copy=False))


def digest(arrays: Mapping[str, npt.NDArray[np.generic]]) -> str:
    """SHA-256 over names, dtypes, shapes and little-endian bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        value = np.asarray(arrays[name], arrays[name].dtype.newbyteorder("<"))
        sha.update(f"{name}\0{value.dtype.str}\0{value.shape}\0".encode())
        sha.update(value.tobytes())
    return sha.hexdigest()
