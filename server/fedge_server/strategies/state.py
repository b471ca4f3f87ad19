"""A strategy's memory between rounds as safetensors, so that a resumed run goes on as if never stopped.

Flower's strategies keep moments, momentum and clipping norms in plain attributes and lose them in a
restart. Whatever attribute is a number, text, array or collection of arrays is saved; functions and
settings objects are rebuilt from the configuration.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy

from fedge import tensors
from fedge.errors import FormatError, RoundError
from fedge.wire.arrays import put

_BESIDE: Final = "|beside|"  # no attribute has such a name
_NOTHING: Final[Mapping[str, npt.NDArray[Any]]] = {}


def capture(strategy: Strategy, beside: Mapping[str, npt.NDArray[Any]] = _NOTHING) -> bytes:
    """All that the strategy remembers.

    Args:
        strategy: of the run.
        beside: what the round loop itself remembers.

    Raises:
        RoundError: an attribute holds something that cannot be saved; a resumed run would differ.
    """
    arrays: dict[str, Any] = {}
    shape = _describe(strategy, "", arrays)
    arrays |= {f"{_BESIDE}{name}": value for name, value in beside.items()}
    return tensors.dump(arrays, {"strategy": json.dumps(shape, sort_keys=True)})


def beside_of(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """What the round loop remembered beside a strategy's memory."""
    arrays, _ = tensors.parse(data)
    return {name[len(_BESIDE) :]: value for name, value in arrays.items() if name.startswith(_BESIDE)}


def restore(strategy: Strategy, data: bytes) -> None:
    """Give a freshly built strategy its memory back, in place.

    Raises:
        FormatError: the bytes are not what `capture` wrote.
    """
    arrays, metadata = tensors.parse(data)
    try:
        _rebuild(strategy, json.loads(metadata["strategy"]), "", arrays)
    except (KeyError, ValueError, TypeError) as error:
        raise FormatError(f"strategy state: malformed ({type(error).__name__}: {error})") from error


class Remembered:
    """What a strategy remembers at a moment, to be put back when its round is given up.

    Arrays are not copied: strategies put new ones in the place of old ones.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._values = {key: _held(value) for key, value in vars(strategy).items()}
        nested = (value for value in self._values.values() if isinstance(value, Strategy))
        self._nested = [Remembered(each) for each in nested]

    def put_back(self) -> None:
        """Let the strategy be as it was."""
        vars(self._strategy).clear()
        vars(self._strategy).update(self._values)
        for each in self._nested:
            each.put_back()


def _held(value: Any) -> Any:
    """The value itself, or a copy of a collection, which strategies do change in place."""
    if isinstance(value, ArrayRecord):
        record = ArrayRecord()
        put(record, dict(value))
        return record
    return copy.copy(value) if isinstance(value, (dict, list)) else value


def _describe(strategy: Strategy, prefix: str, arrays: dict[str, Any]) -> dict[str, Any]:
    shape: dict[str, Any] = {}
    for key, value in vars(strategy).items():
        path = f"{prefix}{key}"
        if isinstance(value, Strategy):
            shape[key] = {"kind": "strategy", "value": _describe(value, f"{path}/", arrays)}
        elif isinstance(value, (ArrayRecord, dict, list, tuple)) and _all_arrays(value):
            names = (
                list(value) if isinstance(value, (ArrayRecord, dict)) else [str(i) for i in range(len(value))]
            )
            values = value.values() if isinstance(value, (ArrayRecord, dict)) else value
            shape[key] = {"kind": _kind(value), "names": names}
            arrays |= {
                f"{path}/{i}": item.numpy() if isinstance(item, Array) else np.asarray(item)
                for i, item in enumerate(values)
            }
        elif isinstance(value, (np.ndarray, np.generic)):
            shape[key] = {"kind": "array"}
            arrays[path] = np.asarray(value)
        elif value is None or isinstance(value, (bool, int, float, str)):
            shape[key] = {"kind": "plain", "value": value}
        elif not callable(value) and not _is_setting(value):
            raise RoundError(
                f"strategy {type(strategy).__name__} keeps {key} as a {type(value).__name__}, which cannot "
                "be saved with the round; keep arrays, numbers or text there"
            )
    return shape


def _is_setting(value: Any) -> bool:
    """Collections without arrays that come from construction: names of parameters, an empty ledger."""
    items = value.values() if isinstance(value, dict) else value
    return isinstance(value, (dict, list, tuple)) and (
        len(value) == 0 or all(isinstance(v, str) for v in items)
    )


def _all_arrays(value: Any) -> bool:
    items = value.values() if isinstance(value, (ArrayRecord, dict)) else value
    # An empty record is one that a strategy of Flower has used up (QFedAvg does).
    some = len(value) > 0 or isinstance(value, ArrayRecord)
    return some and all(isinstance(item, (np.ndarray, np.generic, Array)) for item in items)


def _kind(value: Any) -> str:
    if isinstance(value, ArrayRecord):
        return "record"
    return "dict" if isinstance(value, dict) else "list"


def _rebuild(strategy: Strategy, shape: dict[str, Any], prefix: str, arrays: dict[str, Any]) -> None:
    for key, item in shape.items():
        path = f"{prefix}{key}"
        if item["kind"] == "strategy":
            _rebuild(getattr(strategy, key), item["value"], f"{path}/", arrays)
            continue
        setattr(strategy, key, _value(item, path, arrays))


def _value(item: dict[str, Any], path: str, arrays: dict[str, Any]) -> Any:
    if item["kind"] == "plain":
        return item["value"]
    if item["kind"] == "array":
        return arrays[path]
    values = [arrays[f"{path}/{i}"] for i in range(len(item["names"]))]
    if item["kind"] == "list":
        return values
    named = dict(zip(item["names"], values, strict=True))
    return (
        ArrayRecord({name: Array(value) for name, value in named.items()})
        if item["kind"] == "record"
        else named
    )
