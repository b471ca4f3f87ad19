"""Read folders of images by class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedge.dataset import Dataset
from fedge.errors import DataError
from fedge.readers.assembling import Array, assemble, first_line

if TYPE_CHECKING:
    from fedge.task import Source

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")  # by content; none that runs a program


def read_image_folder(path: Path, source: Source) -> Dataset:
    """Read FOLDER/CLASS/*.png, or FOLDER/train/CLASS and FOLDER/test/CLASS; all in one size and mode.

    Names that start with a dot are passed over: file managers and notebooks leave such behind.

    Raises:
        DataError: no class folders, a file that is no image, or sizes that differ and no data_size.
    """
    folders = {child.name: child for child in _visible(path) if child.is_dir()}
    parts = (
        {"train": folders["train"], "test": folders["test"]}
        if {"train", "test"} == set(folders)
        else {"": path}
    )
    files = [
        (file, child.name, part == "test")
        for part, root in parts.items()
        for child in _visible(root)
        if child.is_dir()
        for file in _visible(child)
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise DataError(f"data: {path} has no images in folders by class (such as {path}/cat/1.png)")
    images = _load_images([file for file, _, _ in files], source.size)
    labels = np.array([label for _, label, _ in files])
    test = np.array([held for _, _, held in files]) if len(parts) == 2 else None
    return assemble("image", images, labels, test=test, run_labels=source.labels)


def _visible(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def _load_images(files: list[Path], size: tuple[int, int] | None) -> Array:
    """(N, H, W) when every file is grey, else (N, H, W, 3)."""
    from PIL import Image

    loaded = []
    for file in files:
        try:
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                if image.mode.startswith(("I", "F")):
                    # Pillow would clip these to 255, so that most of a 16-bit image turned white.
                    raise DataError(
                        f"data: {file} has more than 8 bits per pixel (mode {image.mode}); "
                        "convert it to 8 bits, or bring the arrays as an .npz"
                    )
                grey = image.mode in ("L", "1")
                resized = image if size is None else image.resize((size[1], size[0]))
                loaded.append((np.asarray(resized.convert("L" if grey else "RGB")), grey))
        except DataError:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds for damaged files
            raise DataError(f"data: {file} cannot be read as an image ({first_line(error)})") from error
    grey = all(is_grey for _, is_grey in loaded)
    arrays = [a if grey or a.ndim == 3 else np.repeat(a[..., None], 3, axis=2) for a, _ in loaded]
    for file, array in zip(files, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise DataError(
                f"data: {file} is {array.shape[1]}x{array.shape[0]}, {files[0]} is "
                f"{arrays[0].shape[1]}x{arrays[0].shape[0]}; set data_size = [HEIGHT, WIDTH] to resize them"
            )
    return np.stack(arrays)
