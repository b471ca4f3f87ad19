"""Text as codes: one byte for each character, its position in a vocabulary that both sides share.

An example is a window of T characters; its label is the one that follows. All windows of a data set are views
of one array, so a text of N characters takes N bytes, whatever T is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedge.dataset import NOBODY, Dataset
from fedge.errors import DataError, FormatError
from fedge.spec import MAX_CHARACTERS, Spec

Codes = npt.NDArray[np.uint8]

_log = logging.getLogger("fedge.data")


def encode(text: str, characters: Sequence[str]) -> Codes:
    """The position of each character of the text among `characters`; an unknown one is read as a space.

    Args:
        text: of N characters.
        characters: the vocabulary, each once, `MAX_CHARACTERS` at most.

    Returns:
        (N,) codes.

    Raises:
        DataError: a character is unknown, and the vocabulary has no space.
    """
    points, known = _points(text), _points("".join(characters))
    order = np.argsort(known)
    place = np.minimum(np.searchsorted(known, points, sorter=order), len(known) - 1)
    codes = order[place]
    unknown = known[codes] != points
    if unknown.any():
        if " " not in characters:
            raise DataError(f"holds {text[int(unknown.argmax())]!r}, which the model's characters lack")
        codes[unknown] = list(characters).index(" ")
    return codes.astype(np.uint8)


def _points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def read_text_files(path: Path, window: int, characters: tuple[str, ...] = ()) -> Dataset:
    """Read a .txt file, which is one client, or a folder of them, each a client; all UTF-8.

    Args:
        path: of the file or folder. Names that start with a dot are passed over.
        window: T, characters of an example.
        characters: the run's, where they are known; else those that occur, in order.

    Raises:
        DataError: no such file, no UTF-8, too many different characters, or too short for an example.
    """
    files = [path] if path.is_file() else sorted(f for f in path.glob("*.txt") if not f.name.startswith("."))
    if not files:
        raise DataError(f"data: {path} has no .txt files; one for each client")
    texts = {file.stem: _read_file(file) for file in files}
    known = characters or tuple(sorted(set().union(*map(set, texts.values()))))
    if len(known) > MAX_CHARACTERS:
        raise DataError(
            f"data: {path} has {len(known)} different characters; a text may have {MAX_CHARACTERS}: "
            "replace rare ones first"
        )
    try:
        return windows({name: encode(text, known) for name, text in texts.items()}, known, window)
    except DataError as error:
        raise DataError(f"data: {path}: {str(error).removeprefix('data: ')}") from error


def _read_file(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data: {file} cannot be read as UTF-8 text ({error})") from error


def of_arrays(
    arrays: Mapping[str, npt.NDArray[Any]], window: int, characters: tuple[str, ...] = ()
) -> Dataset:
    """A data set from the arrays text (N,) codes, vocab (K,) characters, offsets (C + 1,) and clients (C,).

    Client c holds text[offsets[c]:offsets[c + 1]]. Without offsets it is one client's text.

    Args:
        arrays: of the file.
        window: T, characters of an example.
        characters: the run's, where they are known; else the vocabulary.

    Raises:
        DataError: arrays are absent or do not fit each other, or the text is too short for an example.
    """
    if not {"text", "vocab"} <= set(arrays):
        raise DataError(
            f"data: it holds {sorted(arrays) or 'no arrays'}; it must hold text and vocab "
            "(and may hold offsets, clients)"
        )
    text, vocabulary = arrays["text"], arrays["vocab"]
    if text.ndim != 1 or text.dtype != np.uint8 or vocabulary.ndim != 1 or vocabulary.dtype.kind != "U":
        raise DataError("data: text must be (N,) uint8 codes, vocab (K,) text of one character each")
    names = tuple(str(character) for character in vocabulary)
    if len(text) == 0 or text.max() >= len(names):
        raise DataError(f"data: text holds {'no code' if not len(text) else f'code {text.max()}'}; "
                        f"vocab names {len(names)}")  # fmt: skip
    offsets = arrays.get("offsets", np.array([0, len(text)]))
    bounds = [int(offset) for offset in offsets] if offsets.ndim == 1 and offsets.dtype.kind in "ui" else []
    if len(bounds) < 2 or bounds != sorted(bounds) or (bounds[0], bounds[-1]) != (0, len(text)):
        raise DataError(f"data: offsets must rise from 0 to the {len(text)} characters of text")
    clients = [str(name) for name in arrays.get("clients", np.arange(len(bounds) - 1)).ravel()]
    if len(clients) != len(bounds) - 1 or len(set(clients)) != len(clients):
        raise DataError(f"data: clients must name each of the {len(bounds) - 1} parts of text once")
    if characters:
        text = encode("".join(names), characters)[text]
    pieces = {name: text[a:b] for name, a, b in zip(clients, bounds, bounds[1:], strict=False)}
    return windows(pieces, characters or names, window)


def windows(texts: Mapping[str, Codes], characters: tuple[str, ...], window: int) -> Dataset:
    """All windows of each client's text that have a next character, as views of one array.

    Consecutive windows share all but one character, so a split is by time (`fedge.dataset.latest`). A window
    over two clients' text is a row of `NOBODY`. A client too short for a window is left out; a line of the
    log says how many were.

    Args:
        texts: codes of each client, by its name.
        characters: what the codes mean.
        window: T, characters of an example.

    Raises:
        DataError: no text is long enough, or the characters cannot be labels.
    """
    kept = {name: codes for name, codes in texts.items() if len(codes) > window}
    if not kept:
        raise DataError(f"data: no client has more than the {window} characters of a window")
    if short := len(texts) - len(kept):
        _log.warning(
            "data: %d of %d clients are left out: their text has no more than the %d characters of a window",
            short, len(texts), window,
        )  # fmt: skip
    try:
        spec = Spec("text", (window,), "uint8", characters)
    except FormatError as error:
        raise DataError(f"data: {error}") from error
    text = np.concatenate(list(kept.values()))
    owner = np.repeat(np.arange(len(kept)), [len(codes) for codes in kept.values()])  # (N,)
    x = np.lib.stride_tricks.sliding_window_view(text, window, writeable=True)[:-1]  # (N - T, T)
    client = np.where(owner[:-window] == owner[window:], owner[window:], NOBODY)
    return Dataset(spec, x, text[window:].astype(np.int64), client, tuple(kept), overlap=window)
