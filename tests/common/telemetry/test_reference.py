"""References: what they hold, that they travel unchanged, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import DataError, FormatError
from fedge.spec import Spec
from fedge.telemetry.reference import MAX_BYTES, Reference, deciles
from fedge.telemetry.sketch import Sketch, answers_of

SPEC = Spec("features", (3,), "float32", ("no", "yes"), ("age", "pulse", "smokes"))


def of(count: int = 1000) -> Reference:
    draw = np.random.default_rng(0)
    x = np.stack([draw.normal(50, 10, count), draw.normal(70, 5, count), draw.random(count) < 0.3], axis=1)
    x[::10, 1] = np.nan
    p = draw.random(count)
    return Reference.of(x.astype(np.float32), np.stack([p, 1 - p], axis=1), SPEC)


def test_bins_hold_a_tenth_each_and_what_is_missing_has_its_own() -> None:
    found = of()
    assert found.inputs[0, :10].tolist() == pytest.approx([100] * 10, abs=3)
    assert found.inputs[1, 10] == 100
    assert found.inputs.sum(1).tolist() == [1000] * 3
    assert found.edges[2].tolist() == [0, 1]  # a column of two values
    assert found.inputs[2, :3].tolist() == [0, 1000 - found.inputs[2, 2], found.inputs[2, 2]]


def test_a_reference_travels_unchanged_and_its_digest_stays() -> None:
    found = of()
    again = Reference.from_bytes(found.to_bytes(), SPEC)
    assert again.to_bytes() == found.to_bytes()
    assert again.digest == found.digest
    x = np.array([[30, 70, 1]], np.float32)
    assert (again.sketched(x, SPEC) == found.sketched(x, SPEC)).all()


def test_an_edge_is_no_examples_value() -> None:
    edges = of().edges[0]
    assert all(len(f"{edge:.10g}".replace(".", "")) <= 5 for edge in edges)


def test_too_few_examples_make_none() -> None:
    with pytest.raises(DataError, match="99 examples are fewer than 100"):
        of(99)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "format is not 1"),
        ({"edges": [[1, 0], [], []]}, "not rising"),
        ({"edges": [[1] * 10, [], []]}, "malformed"),
        ({"edges": [["x"], [], []]}, "malformed"),
        ({"edges": [[True], [], []]}, "malformed"),
        ({"names": ["a", "b", "c"]}, "another model"),
        ({"names": [1, 2, 3]}, "malformed"),
        ({"names": ["age"]}, "1 names"),
        ({"inputs": [[0.5]]}, "malformed"),
        ({"confidence": [0] * 19}, "other sizes"),
        ({"answers": [-1, 1]}, "a count is none"),
        ({"answers": [0, 0, 0]}, "another model"),
        ({"answers": [2**70, 0]}, "malformed"),
    ],
)
def test_a_malformed_reference_is_refused(change: dict[str, object], reason: str) -> None:
    value = json.loads(of().to_bytes()) | change
    with pytest.raises(FormatError, match=reason):
        Reference.from_bytes(json.dumps(value).encode(), SPEC)


def test_a_reference_of_too_many_bytes_is_not_even_read() -> None:
    with pytest.raises(FormatError, match="more than"):
        Reference.from_bytes(b" " * (MAX_BYTES + 1), SPEC)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        Reference.from_bytes(data, SPEC)


def test_clients_can_make_one_together_and_it_is_that_of_their_data() -> None:
    draw = np.random.default_rng(2)
    x = np.stack([draw.normal(50, 10, 900), draw.normal(70, 5, 900), draw.random(900)], axis=1)
    x, p = x.astype(np.float32), draw.dirichlet([1, 1], 900)
    grids = [np.linspace(0, 120, 257), np.linspace(0, 120, 257), np.linspace(0, 1, 257)]
    fine = [np.histogram(column, grid)[0] for column, grid in zip(x.T, grids, strict=True)]  # added up
    question = Reference.asking(SPEC, [deciles(g, counts) for g, counts in zip(grids, fine, strict=True)])
    again = Reference.from_bytes(question.to_bytes(), SPEC)  # as clients get it
    sketches = []
    for part in np.array_split(np.arange(900), 6):
        sketch = Sketch.empty(3, 2)
        sketch.inputs[:] = again.sketched(x[part], SPEC)
        sketch.answers[:], sketch.confidence[:] = answers_of(p[part])
        sketches.append(sketch)
    found, central = question.counting(Sketch.sum(sketches)), Reference.of(x, p, SPEC)
    assert found.answers.tolist() == central.answers.tolist()
    for one, two in zip(found.edges, central.edges, strict=True):
        assert one == pytest.approx(two, rel=0.02, abs=0.01)
    assert np.abs(found.inputs - central.inputs).max() < 30
    with pytest.raises(FormatError, match="fewer than 100"):
        question.counting(Sketch.empty(3, 2))
    with pytest.raises(FormatError, match="another model"):
        question.counting(Sketch.empty(2, 2))


def test_deciles_come_from_added_up_histograms_as_from_the_values() -> None:
    values = np.random.default_rng(1).normal(0, 1, 20_000)
    edges = np.linspace(-5, 5, 129)
    found = deciles(edges, np.histogram(values, edges)[0])
    assert found == pytest.approx(np.quantile(values, np.arange(1, 10) / 10), abs=0.01)
