"""Text becomes windows that are views of one array, and a split of it is by time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.dataset import NOBODY, split
from fedge.errors import DataError
from fedge.task import Source, resolve
from fedge.tasks.characters import task
from fedge.texts import encode, of_arrays, windows

TASK = task(window=3)


def codes(text: str) -> Any:
    return encode(text, "abc ")


def decoded(found: Any) -> str:
    return "".join(np.array(list("abc "))[found])


def test_a_character_is_its_place_in_the_vocabulary_and_an_unknown_one_a_space() -> None:
    assert encode("cab", "abc").tolist() == [2, 0, 1]
    assert encode("cäb\U0001f600", "b ac").tolist() == [3, 1, 0, 1]
    assert encode("", "abc").tolist() == []
    with pytest.raises(DataError, match="holds 'x', which the model's characters lack"):
        encode("abx", "abc")


def test_a_window_is_a_view_and_its_label_the_next_character_of_the_same_client() -> None:
    found = windows({"one": codes("abcab"), "two": codes("cc cb")}, tuple("abc "), 3)
    mine = [(int(found.client[i]), decoded(found.x[i]), decoded(found.y[i : i + 1])) for i in found.usable]
    assert mine == [(0, "abc", "a"), (0, "bca", "b"), (1, "cc ", "c"), (1, "c c", "b")]
    assert found.client.tolist().count(NOBODY) == 3  # cab|c, ab|cc, b|cc_: none of them belongs to a client
    assert found.x.strides == (1, 1)
    assert found.x.base is not None
    assert found.clients == ("one", "two")
    assert found.used_examples.x.shape == (4, 3)


def test_one_clients_windows_are_all_used_and_never_copied() -> None:
    found = windows({"one": codes("abcab")}, tuple("abc "), 3)
    assert np.shares_memory(found.used_examples.x, found.x)


def test_a_client_too_short_for_a_window_is_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    found = windows({"a": codes("abc"), "b": codes("abca"), "c": codes("")}, tuple("abc "), 3)
    assert (found.clients, len(found)) == (("b",), 1)
    assert "2 of 3 clients are left out" in caplog.text
    with pytest.raises(DataError, match="no client has more than the 3 characters"):
        windows({"a": codes("abc")}, tuple("abc "), 3)


def test_each_purpose_has_the_last_of_every_clients_text_and_shares_no_character_with_training() -> None:
    rng = np.random.default_rng(0)
    texts = {str(i): rng.integers(0, 3, n).astype(np.uint8) for i, n in enumerate((103, 53, 7))}
    data = windows(texts, tuple("abc"), 3)  # 100, 50 and 4 examples
    parts = split(data, holdout=0.2, gate=0.5, proxy=0.1, seed=0)
    # Of the first client: 100 = 77 and 20, with 3 between; 77 = 66 and 8; 20 = 7 (test) and 10 (gate).
    # Of the second: 50 = 37 and 10; 37 = 30 and 4; 10 = 2 and 5. The third is too short and stays whole.
    assert [len(parts.train), len(parts.proxy)] == [66 + 30 + 4, 8 + 4]
    assert [len(parts.test), len(parts.gate)] == [7 + 2, 10 + 5]
    covered = [{p + i for p in part.tolist() for i in range(4)} for part in
               (parts.train, parts.proxy, parts.test, parts.gate)]  # fmt: skip
    assert sum(map(len, covered)) == len(set().union(*covered))
    assert parts.gate.max() == 103 + 53 - 4  # the last window that the second client has
    assert (data.client[np.concatenate([parts.train, parts.test])] != NOBODY).all()


def test_a_folder_and_an_archive_of_the_same_text_are_the_same_data(tmp_path: Path) -> None:
    folder = tmp_path / "speakers"
    folder.mkdir()
    (folder / "anna.txt").write_bytes("née à\r\nParis".encode())
    (folder / "bert.txt").write_text("\ufeffParis, la nuit", "utf-8")
    (folder / ".hidden.txt").write_text("no")
    (folder / "notes.md").write_text("no")
    found = TASK.read(Source(folder))
    texts = ("née à\nParis", "Paris, la nuit")
    vocabulary = sorted(set("".join(texts)))
    assert found.spec.labels == tuple(vocabulary)
    np.savez(
        tmp_path / "speakers.npz",
        text=encode("".join(texts), vocabulary),
        offsets=np.array([0, 11, 25]),
        clients=np.array(["anna", "bert"]),
        vocab=np.array(vocabulary),
    )
    same = TASK.read(Source(tmp_path / "speakers.npz"))
    for a, b in ((found.x, same.x), (found.y, same.y), (found.client, same.client)):
        np.testing.assert_array_equal(a, b)
    assert (found.spec, found.clients, found.overlap) == (same.spec, same.clients, 3)


def test_a_device_reads_its_own_text_by_the_runs_characters(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("baß!")
    for path in (tmp_path / "mine.txt", tmp_path / "mine.npz"):
        np.savez(tmp_path / "mine.npz", text=np.array([1, 0, 2, 3], np.uint8), vocab=np.array(list("abß!")))
        found = TASK.read(Source(path, labels=("!", " ", "a", "b")))
        assert (found.x.tolist(), found.y.tolist()) == ([[3, 2, 1]], [0])
        assert found.with_labels(("!", " ", "a", "b")) is not None
        with pytest.raises(DataError, match="run's characters"):
            found.with_labels(("a", " ", "!", "b"))


TEXT = {"text": np.array([0, 1, 2, 0, 1, 2], np.uint8), "vocab": np.array(["a", "b", "c"])}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"vocab": None}, "must hold text and vocab"),
        ({"text": TEXT["text"].astype(int)}, r"uint8 codes"),
        ({"text": np.array([3], np.uint8)}, "holds code 3; vocab names 3"),
        ({"text": np.array([], np.uint8)}, "holds no code"),
        ({"vocab": np.array(["a", "bc", "c"])}, "each by itself"),
        ({"vocab": np.array(["a", "a", "c"])}, "each named once"),
        ({"offsets": np.array([0, 4])}, "must rise from 0 to the 6"),
        ({"offsets": np.array([0, 4, 3, 6])}, "must rise"),
        ({"offsets": np.array([0.0, 6.0])}, "must rise"),
        ({"clients": np.array(["x", "y"])}, "name each of the 1 parts"),
        ({"offsets": np.array([0, 3, 6]), "clients": np.array(["x", "x"])}, "name each of the 2 parts"),
    ],
)
def test_each_mistake_in_an_archive_of_text_is_named(changes: dict[str, Any], line: str) -> None:
    arrays = {key: value for key, value in {**TEXT, **changes}.items() if value is not None}
    with pytest.raises(DataError, match=line):
        of_arrays(arrays, 3)


def test_files_that_cannot_be_text_are_named(tmp_path: Path) -> None:
    read = resolve("characters").read
    with pytest.raises(DataError, match=r"no \.txt files"):
        read(Source(tmp_path))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        read(Source(tmp_path))
    (tmp_path / "bad.txt").write_text("".join(map(chr, range(0x4E00, 0x4F10))))
    with pytest.raises(DataError, match="272 different characters; a text may have 256"):
        read(Source(tmp_path))
    (tmp_path / "x.csv").write_text("x")
    with pytest.raises(DataError, match=r"from \.txt files, a folder of them, or an \.npz"):
        read(Source(tmp_path / "x.csv"))
