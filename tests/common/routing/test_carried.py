"""What a release carries about routing: calibrated, written, read back, refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fedge.errors import DataError, FormatError
from fedge.routing import Routing, Rule, Wanted, calibrated
from fedge.routing.carried import enough


def answers(n: int) -> tuple[Any, Any, Any]:
    """Doubts, device right, cloud right: the device errs where it doubts most."""
    doubts = np.linspace(0, 1, n)
    return doubts, doubts < 0.9, np.ones(n, bool)


def test_a_promise_travels_as_json_and_comes_back_whole() -> None:
    made = calibrated(*answers(4000), 0.01, doubt="margin", confidence=0.95)
    assert made.rule is not None
    assert 0.9 <= made.rule.threshold < 0.91  # a hundredth of all may be wrong: the first ones above 0.9
    assert (made.limit, made.confidence, made.examples) == (0.01, 0.95, 4000)
    assert made.sent == pytest.approx(1 - made.rule.threshold, abs=1e-3)
    assert Routing.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert made.wanted(Wanted()) == made.rule
    assert made.wanted(Wanted(share=0.25)).threshold == made.shares[0.2]  # the largest that is known below it
    assert made.wanted(Wanted(accuracy=0.955)).threshold == made.accuracies[0.96]  # the next that is known
    assert made.accuracies[0.9] >= 0.99  # the device alone is so good
    assert 0.9 < made.accuracies[0.995] < 0.91
    with pytest.raises(DataError, match=r"no threshold for share 0\.005; it has: 0\.01, "):
        made.wanted(Wanted(share=0.005))
    with pytest.raises(DataError, match=r"no threshold for accuracy 0\.999; it has: 0\.5, "):
        made.wanted(Wanted(accuracy=0.999))
    with pytest.raises(FormatError, match="give one of them"):
        Wanted(0.1, 0.9)


def test_without_labels_a_gap_is_promised_and_no_accuracy() -> None:
    made = calibrated(*answers(4000), 0.01, doubt="margin", confidence=0.95, labelled=False)
    assert made.rule is not None
    assert made.accuracies == {}


@pytest.mark.parametrize("confidence", [0.95, 0.975])
@pytest.mark.parametrize("gap", [0.05, 0.005])
def test_too_few_examples_give_a_reason_and_one_more_a_rule(gap: float, confidence: float) -> None:
    n = enough(gap, confidence)
    few = calibrated(*answers(n - 1), gap, doubt="confidence", confidence=confidence)
    assert few.rule is None
    assert f"{n - 1} examples cannot show a gap of {gap:g}" in few.reason
    assert few.reason.endswith(f"{n} can")
    with pytest.raises(DataError, match=f"carries no threshold .*{n} can"):
        few.wanted(Wanted())
    assert Routing.from_json(few.to_json()) == few
    assert calibrated(*answers(n), gap, doubt="confidence", confidence=confidence).rule is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"measure": "hunch"}, "doubt 'hunch' is unknown"),
        ({"measure": None}, "measure must be a short text"),
        ({"threshold": "0.5"}, "threshold must be a number"),
        ({"threshold": float("nan")}, "threshold must be a number"),
        ({"threshold": 1.5}, "threshold must be a number from -1 to 1"),
        ({"examples": True}, "examples must be"),
        ({"confidence": 2}, "confidence must be a number from 0 to 1"),
        ({"shares": {"0.1": 0.5}}, "shares must be a list"),
        ({"shares": [[0.1]]}, "shares must be pairs"),
        ({"shares": [[0.1, 7]]}, "threshold must be"),
        ({"shares": [[0.1, 0.5]] * 65}, "at most 64"),
        ({"accuracies": [[1.5, 0.5]]}, "accuracies must be a number"),
    ],
    ids=str,
)
def test_what_a_manifest_must_not_say_is_refused(change: dict[str, Any], said: str) -> None:
    value = Routing("confidence", Rule("confidence", 0.5), promise="p", examples=9).to_json()
    with pytest.raises(FormatError, match=said):
        Routing.from_json(value | change)
    with pytest.raises(FormatError, match="must be an object"):
        Routing.from_json([value])
