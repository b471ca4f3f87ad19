from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedge.artefact import pack, unpack
from fedge.config import Config
from fedge.errors import ConfigError
from fedge.inference import CompactModel
from fedge.task import Family, Task
from fedge_server.compression import check_possible, compress, search
from fedge_server.compression.budgets import Figure, shortage
from fedge_server.compression.choose import source_of
from fedge_server.compression.gate import decide
from fedge_server.compression.possible import packed_floor
from fedge_server.compression.recipes import recipes
from fedge_server.compression.sources import parts
from fedge_server.data import ServerData

STAGES = {
    "forms": ["fp32", "int8"],
    "distil": {"epochs": 30, "learning_rate": 0.01},
    "prune": {"ratios": [0.5], "recovery_epochs": 10},
}
FEW = {**STAGES, "prune": {"ratios": []}}  # fewer candidates, where they do not matter


def configured(stages=STAGES, **tiers):
    return Config.from_mapping({"compress": stages, "tiers": tiers})


@pytest.fixture(scope="module")
def found(trained, digits):
    """One search over three tiers, what it said, and what it changed."""
    lines: list[str] = []
    config = configured(
        micro={"max_wire_bytes": 4000, "max_drop": 0.15, "max_class_drop": 0.6},
        gateway={"max_drop": 0.05},
        none={"max_wire_bytes": 900},
    )
    outcomes = searched(trained, digits, config, say=lines.append)
    return {outcome.tier: outcome for outcome in outcomes}, lines


def searched(teacher, digits, config, *, task=None, proxy=None, gate=None, say=lambda _line: None, **more):
    """A search with the server's own data."""
    own = digits.proxy if proxy is None else proxy
    data = ServerData(digits.spec, own, digits.gate, digits.gate if gate is None else gate)
    source = source_of(config, task or _task(), data, copy.deepcopy(teacher))
    return compress(teacher, task or _task(), digits.spec, source, config, say, **more)


def _task():
    def student(_spec):
        return nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))

    return Task(
        name="tiny", read=lambda _source: None, models={"mlp": student}, default_model="mlp",
        students={"s": student},
    )  # fmt: skip


@pytest.mark.slow
def test_each_tier_gets_a_variant_within_its_budgets_that_passed_the_gate(found, digits):
    micro, gateway = (found[0][name].variant for name in ("micro", "gateway"))
    assert micro.gate.passed
    assert gateway.gate.passed
    assert len(micro.wire) <= 4000
    assert micro.recipe == "student-s+int8"
    assert micro.parameters == 65 * 20 + 21 * 10
    assert gateway.accuracy >= gateway.gate.teacher_accuracy - 0.03
    assert "passed at attempt 1" in found[0]["micro"].reason


@pytest.mark.slow
def test_what_the_gate_scored_is_what_ships(found, digits):
    variant = found[0]["micro"].variant
    installed = unpack(variant.wire, len(variant.installed))
    assert installed == variant.installed
    assert variant.wire == pack(variant.installed)
    scored = CompactModel(installed, digits.spec).run_each(digits.gate.x)
    np.testing.assert_array_equal(scored, variant.probabilities)
    assert variant.accuracy == pytest.approx((scored.argmax(1) == digits.gate.y).mean())


@pytest.mark.slow
def test_a_tier_that_nothing_meets_says_by_how_much(found):
    outcome = found[0]["none"]
    assert outcome.variant is None
    assert "max_wire_bytes = 900, but the least is" in outcome.reason
    assert "(student-s+int8)" in outcome.reason
    assert all("over budget: max_wire_bytes is 900, it needs" in trial.result for trial in outcome.tried)


@pytest.mark.slow
def test_every_recipe_is_listed_with_its_figures_and_built_once(found):
    names = {"fp32", "int8", "prune50+int8", "student-s", "student-s+int8"}
    for outcome in found[0].values():
        assert {trial.recipe for trial in outcome.tried} == names
        assert all(trial.wire_bytes and trial.latency_us and trial.accuracy for trial in outcome.tried)
    built = [line for line in found[1] if "on selection data" in line]
    assert len(built) == len(names)


@pytest.mark.slow
def test_candidates_face_the_gate_by_accuracy_on_the_selection_data(found):
    within = [trial for trial in found[0]["gateway"].tried if "over budget" not in trial.result]
    accuracies = [trial.accuracy for trial in within]
    assert accuracies == sorted(accuracies, reverse=True)
    assert [trial.result for trial in within][1:] == ["not needed"] * (len(within) - 1)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_the_teacher_is_not_changed(found, teacher, digits, helpers):
    before, state = helpers.weights(teacher), torch.get_rng_state()
    config = configured(FEW, micro={"max_wire_bytes": 4000, "max_drop": 0.15})
    (again,) = searched(teacher, digits, config)
    assert again.variant.wire == found[0]["micro"].variant.wire
    assert helpers.same(before, helpers.weights(teacher))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_without_proxy_data_only_the_unchanged_model_is_tried(teacher, digits):
    lines: list[str] = []
    none = digits.proxy.take(np.zeros(0, np.int64))
    config = configured(any={"max_drop": 0.02}, small={"max_wire_bytes": 4000})
    outcomes = searched(teacher, digits, config, proxy=none, say=lines.append)
    assert [trial.recipe for trial in outcomes[0].tried] == ["fp32"]
    assert outcomes[0].variant.recipe == "fp32"
    assert outcomes[0].variant.gate.drop == 0
    assert outcomes[1].variant is None


@pytest.mark.slow
def test_no_more_than_three_candidates_face_the_gate(teacher, digits):
    few = digits.gate.take(np.arange(40))
    config = configured({**FEW, "distil": {"epochs": 1}}, strict={"max_drop": 0.01})
    (outcome,) = searched(teacher, digits, config, gate=few)
    assert outcome.variant is None
    assert [trial.gate and trial.gate.attempt for trial in outcome.tried] == [1, 2, 3, None]
    assert outcome.tried[3].result == "not tried after 3 failed"
    assert "no candidate passed the gate in 3 attempts" in outcome.reason


@pytest.mark.slow
def test_a_stage_that_fails_loses_one_candidate_and_not_the_search(teacher, digits, helpers):
    lone = copy.deepcopy(teacher)
    lone.network = nn.Sequential(nn.Linear(64, 10))  # nothing in it can be pruned
    config = configured(any={"max_drop": 0.9})
    (outcome,) = searched(lone, digits, config, task=helpers.task())
    assert outcome.variant is not None
    assert outcome.tried[-1].recipe == "prune50+int8"
    assert "too small" in outcome.tried[-1].result


def test_no_tier_is_no_work(teacher, digits):
    assert searched(teacher, digits, Config()) == ()


def test_training_and_selection_share_no_example_and_hold_every_class(digits):
    training, selection = parts(digits.proxy, seed=3)
    assert len(training) + len(selection) == len(digits.proxy)
    assert len(selection) == pytest.approx(0.3 * len(digits.proxy), abs=6)
    rows = {row.tobytes() for row in training.x}
    assert not any(row.tobytes() in rows for row in selection.x)
    assert set(training.y) == set(selection.y) == set(range(10))


def test_one_example_of_a_class_is_too_little_to_select_with(digits):
    training, selection = parts(digits.proxy.take(np.arange(1)), seed=0)
    assert (len(training), len(selection)) == (0, 0)


def test_recipes_are_named_after_their_stages(helpers):
    task = helpers.task(small=8)
    names = [recipe.name for recipe in recipes(task, configured(), teachable=True)]
    assert names == ["fp32", "int8", "prune50+int8", "student-small", "student-small+int8"]
    fine = configured({"forms": ["ternary"]})
    names = [recipe.name for recipe in recipes(task, fine, teachable=True)]
    assert names == ["fp32", "ternary", "student-small", "student-small+ternary"]
    assert [recipe.name for recipe in recipes(task, fine, teachable=False)] == ["fp32"]


@pytest.mark.parametrize(
    ("patterns", "students"),
    [
        (["*"], {"small", "wide-4", "wide-8"}),
        (["wide-*"], {"wide-4", "wide-8"}),
        (["small", "wide-8"], {"small", "wide-8"}),
        ([], set()),
    ],
)
def test_students_are_those_that_are_asked_for(helpers, patterns, students):
    task = replace(
        helpers.task(small=8),
        families={"wide": Family(lambda width: lambda _spec: helpers.mlp(width), (4, 8))},
    )
    found = recipes(task, configured({"students": patterns}), teachable=True)
    assert {recipe.architecture.student for recipe in found} - {""} == students
    assert "fp32" in {recipe.name for recipe in found}


def test_a_student_that_the_task_does_not_have_is_refused_before_training(digits, helpers):
    with pytest.raises(ConfigError, match=r"compress\.students: 'smal' is no student.*did you mean 'small'"):
        check_possible(
            helpers.task(small=8),
            digits.spec,
            configured({"students": ["smal"]}, any={}),
            digits.proxy.x[:32],
        )


@pytest.mark.slow
def test_impossible_budgets_are_refused_before_training_with_the_best_figures(digits, helpers):
    config = configured(FEW, micro={"max_wire_bytes": 500, "max_memory_bytes": 100, "max_latency_ms": 0.0001})
    with pytest.raises(ConfigError) as caught:
        check_possible(helpers.task(small=8), digits.spec, config, digits.proxy.x[:32])
    message = str(caught.value)
    assert message.startswith(
        "tiers.micro: no candidate of task 'tiny' can meet it: max_wire_bytes = 500, but"
    )
    assert "max_memory_bytes = 100, but the least is" in message
    assert "max_latency_ms = 0.0001, but the least is" in message
    assert "(student-small+int8)" in message


@pytest.mark.slow
def test_a_tier_that_a_student_can_meet_is_let_through(digits, helpers):
    config = configured(micro={"max_wire_bytes": 2500, "max_latency_ms": 50.0}, free={})
    check_possible(helpers.task(small=8), digits.spec, config, digits.proxy.x[:32])


@pytest.mark.slow
def test_without_proxy_data_the_students_do_not_count(digits, helpers):
    config = configured(micro={"max_wire_bytes": 2500})
    with pytest.raises(ConfigError, match=r"\(fp32\)"):
        check_possible(helpers.task(small=8), digits.spec, config, digits.proxy.x[:0])


def test_a_gate_set_too_small_for_the_limit_is_refused(digits, helpers):
    config = configured(strict={"max_drop": 0.01})
    few = digits.gate.take(np.arange(100))
    with pytest.raises(
        ConfigError, match=r"tiers\.strict\.max_drop = 0\.01: the 100 gate examples cannot show"
    ):
        check_possible(helpers.task(), digits.spec, config, digits.proxy.x[:8], gate=few)
    config = configured(strict={"max_drop": 0.5, "max_class_drop": 0.01})
    with pytest.raises(ConfigError, match=r"tiers\.strict\.max_class_drop"):
        check_possible(helpers.task(), digits.spec, config, digits.proxy.x[:8], gate=digits.gate)


def test_an_augmentation_that_does_not_fit_is_refused_before_training(digits, helpers):
    stages = {"distil": {"augment": ["flip"]}}
    with pytest.raises(ConfigError, match=r"compress\.distil\.augment"):
        check_possible(helpers.task(), digits.spec, configured(stages, any={}), digits.proxy.x[:8])


@pytest.mark.slow
def test_the_floor_lies_between_empty_and_random_weights(found):
    installed = found[0]["micro"].variant.installed  # 1.5 kB of weights and 0.9 kB of graph
    assert 0.55 * len(pack(installed)) < packed_floor(installed) < 0.85 * len(pack(installed))


def test_the_nearest_candidate_is_named_when_the_budgets_cannot_be_kept_together():
    rows = {
        "big": (Figure("max_wire_bytes", 300, 200), Figure("max_latency_ms", 1.0, 2.0)),
        "slow": (Figure("max_wire_bytes", 100, 200), Figure("max_latency_ms", 9.0, 2.0)),
    }
    assert shortage(rows) == (
        "each budget can be kept, but not all at once; nearest is big: max_wire_bytes is 200, it needs 300"
    )


@pytest.mark.slow
def test_an_empty_gate_set_lets_nothing_out(teacher, digits):
    none = digits.gate.take(np.zeros(0, np.int64))
    config = configured(FEW, any={"max_drop": 0.9})
    (outcome,) = searched(teacher, digits, config, gate=none)
    assert outcome.variant is None
    assert "the gate set is empty" in outcome.reason


@pytest.mark.slow
def test_the_smallest_that_should_pass_is_found_among_weights_of_few_bits(teacher, digits):
    stages = {"forms": ["fp32", "int8", "w4", "ternary"], "distil": {"epochs": 30}, "prune": {"ratios": []}}
    config, lines = configured(stages, tiny={"aim": "bytes", "max_drop": 0.12}), []
    (outcome,) = searched(teacher, digits, config, say=lines.append)
    built = [line.split(":")[1].strip() for line in lines if " bytes, " in line]
    assert built.index("student-s") < min(
        built.index(name) for name in built if name in ("student-s+ternary", "student-s+w4")
    )
    assert outcome.variant.recipe in ("student-s+ternary", "student-s+w4")
    smaller = [t for t in outcome.tried if t.wire_bytes and t.wire_bytes < len(outcome.variant.wire)]
    assert all(t.gate is not None or t.accuracy < outcome.variant.accuracy for t in smaller)
    assert unpack(outcome.variant.wire, len(outcome.variant.installed)) == outcome.variant.installed


@pytest.mark.slow
def test_nothing_is_begun_that_cannot_end_in_time_and_what_needs_no_training_is_there(teacher, digits):
    config = configured({**STAGES, "max_seconds": 0.001}, any={"max_drop": 0.05})
    (outcome,) = searched(teacher, digits, config)
    assert outcome.variant.recipe in ("fp32", "int8")
    results = {trial.recipe: trial.result for trial in outcome.tried}
    assert results["student-s"] == "not built: the time is up (compress.max_seconds = 0.001)"


@pytest.mark.slow
def test_where_the_gate_refuses_the_search_goes_on(teacher, digits, monkeypatch):
    tier = {"aim": "bytes", "max_drop": 0.08}
    stages = {**FEW, "forms": ["fp32", "int8", "w8", "w4"], "distil": {"epochs": 10}, "grid": {"epochs": 5}}
    (plain,) = searched(teacher, digits, configured(stages, t=tier))
    first = plain.tried[0].recipe

    def strict(evidence, *, attempt, **given):
        report = decide(evidence, attempt=attempt, **given)
        return replace(report, passed=False, reasons=("not today",)) if attempt == 1 else report

    monkeypatch.setattr(search, "decide", strict)
    lines: list[str] = []
    (later,) = searched(teacher, digits, configured(stages, t=tier), say=lines.append)
    assert (later.tried[0].recipe, later.tried[0].result) == (first, "gate: not today")
    assert later.variant is not None
    assert later.variant.recipe != first
    assert later.variant.gate.attempt >= 2
    assert lines.index(f"compress: tier t: the gate refused {first}") < len(lines) - 1


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_where_it_was(teacher, digits, tmp_path):
    config, lines, killed = configured(FEW, any={"max_drop": 0.05}), [], []

    def say(line):
        lines.append(line)
        if line.startswith("compress: student-s") and not killed:
            killed.append(line)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(teacher, digits, config, say=say, folder=tmp_path)
    (again,) = searched(teacher, digits, config, say=lines.append, folder=tmp_path)
    (fresh,) = searched(teacher, digits, config)
    assert again.variant.wire == fresh.variant.wire
    assert "compress: student-s was made before" in lines


def test_data_of_one_purpose_never_serve_another(teacher, digits):
    """Every example that is looked at is noted with what for; the three kinds share none."""
    config = configured(FEW, any={})
    data = ServerData(digits.spec, digits.proxy, digits.gate, copy.deepcopy(digits.gate))
    source = source_of(config, _task(), data, teacher)
    rows = [{row.tobytes() for row in part.x} for part in (source.training, source.apart, source.gate)]
    assert [len(part) for part in rows] == [len(source.training), len(source.apart), len(source.gate)]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]
    source.gate.y[:] = 0  # who learned or chose by the gate's answers would now do otherwise
    student = _task().students["s"](digits.spec)
    taught = source.teach(student, config.compress.distil, model="", seed=0)
    clean = source_of(
        config, _task(), ServerData(digits.spec, digits.proxy, digits.proxy, digits.proxy), teacher
    )
    same = clean.teach(student, config.compress.distil, model="", seed=0)
    assert torch.equal(taught[0].weight, same[0].weight)
