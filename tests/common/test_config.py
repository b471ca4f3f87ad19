from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.config import (
    Config,
    Rounds,
    StrategyConfig,
    Target,
    Tier,
    Train,
    override,
    parse_train,
    suggestion,
)
from fedge.errors import ConfigError

FULL = """
task = "tables"
data = "sub/table.csv"
data_label = "outcome"
data_client = "site"
seed = 7

[model]
name = "logistic"
filter = "clip"

[clients]
count = 4
partition = "dirichlet:0.5"

[rounds]
count = 5
target = "accuracy>=0.97"
deadline_s = 2.5

[train]
augment = ["noise:0.1", "mask:0.2"]

[strategy]
name = "fedprox"
proximal_mu = 0.1

[compress.prune]
ratios = [0.25, 0.5]

[tiers.micro]
max_wire_bytes = 20_000
"""


def wrong(values: dict[Any, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.from_mapping(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"taks": "digits"}, "unknown key 'taks': did you mean 'task'?"),
        ({"rounds": {"cuont": 1}}, "unknown key 'rounds.cuont': did you mean 'count'?"),
        ({"tiers": {"micro": {"max_wire": 5}}}, "unknown key 'tiers.micro.max_wire': did you mean"),
        (
            {"compress": {"prune": {"criterium": "l2"}}},
            "'compress.prune.criterium': did you mean 'criterion'?",
        ),
        (
            {"compress": {"x": {"y": 2}}},
            "unknown key 'compress.x': valid: clients, data, distil, forms, gate, grid, max_seconds, prune",
        ),
        ({"zzz": 1, "qqq": 2}, "(and 1 more)"),
        ({"train": {"optimizer": "sdg"}}, "train.optimizer = 'sdg': did you mean 'sgd'?"),
        ({"train": {"loss": "zzz"}}, "train.loss = 'zzz': valid: cross_entropy, focal, multi_margin"),
        ({"model": {"filter": "Median"}}, "model.filter = 'Median': did you mean 'median'?"),
        ({"evaluate": {"metrics": ["acuracy"]}}, "evaluate.metrics.0 = 'acuracy': did you mean 'accuracy'?"),
        ({"compress": {"prune": {"criterion": "l3"}}}, "compress.prune.criterion = 'l3': did you mean 'lp'?"),
        ({"task": 5}, "task = 5: should be a valid string"),
        ({"seed": -1}, "seed = -1: should be greater than or equal to 0"),
        ({"seed": 2**31}, "seed = 2147483648: should be less than"),
        ({"seed": None}, "seed = None: should be a valid integer"),
        ({"rounds": {"count": 0}}, "rounds.count = 0: should be greater than or equal to 1"),
        ({"rounds": {"count": 5.5}}, "rounds.count = 5.5: should be a valid integer"),
        ({"rounds": {"count": "5"}}, "rounds.count = '5': should be a valid integer"),
        ({"rounds": {"count": True}}, "rounds.count = True: should be a valid integer"),
        ({"rounds": {"fraction": 0}}, "rounds.fraction = 0: should be greater than 0"),
        ({"rounds": {"fraction": 1.01}}, "rounds.fraction = 1.01: should be less than or equal to 1"),
        (
            {"train": {"batch_size": 10**30}},
            "train.batch_size = 1000000000000000000000000000000: should be less",
        ),
        ({"train": {"learning_rate": True}}, "train.learning_rate = True: should be a valid number"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate = nan: should be a finite number"),
        ({"train": {"learning_rate": float("inf")}}, "train.learning_rate = inf: should be a finite number"),
        ({"train": {"momentum": 1.0}}, "train.momentum = 1.0: should be less than 1"),
        ({"train": {"augment": "flip"}}, "train.augment = 'flip': must be a list"),
        ({"train": {"augment": ["flop"]}}, "train.augment.0 = 'flop': must be one of 'flip', 'shift:PIXELS'"),
        ({"train": {"augment": ["mask:1.5"]}}, "train.augment.0 = 'mask:1.5': must be one of"),
        ({"clients": {"partition": "dirichlet"}}, "clients.partition = 'dirichlet': must be one of 'iid'"),
        ({"clients": {"partition": "dirichlet:0.0"}}, "clients.partition = 'dirichlet:0.0': must be one of"),
        ({"clients": {"partition": "shards:0"}}, "clients.partition = 'shards:0': must be one of"),
        (
            {"rounds": {"target": "accuracy>0.9"}},
            "rounds.target = 'accuracy>0.9': must be like 'accuracy>=0.97'",
        ),
        ({"rounds": {"target": "f1>=0.9"}}, "metrics: accuracy, macro_f1, auc, loss"),
        ({"rounds": 5}, "rounds = 5: must be a table"),
        ({"strategy": 5}, "strategy = 5: must be a table"),
        ({"strategy": {"name": 5}}, "strategy.name = 5: should be a valid string"),
        ({"strategy": {"mu": [1]}}, "strategy.mu = [1]: must be a number, a text, true or false"),
        ({"strategy": {"mu": float("nan")}}, "strategy.mu = nan: must be a number, a text, true or false"),
        ({"tiers": 5}, "tiers = 5: must be a table"),
        ({"tiers": {"micro": 5}}, "tiers.micro = 5: must be a table"),
        ({"tiers": {"Bad Name": {}}}, "tiers.Bad Name = 'Bad Name': must be lower-case letters, digits"),
        ({"tiers": {"micro": {"max_drop": 1}}}, "tiers.micro.max_drop = 1: should be less than 1"),
        ({"data_size": [8]}, "data_size = [8]: must be a list of two"),
        ({"data_size": [8, 9, 10]}, "data_size = [8, 9, 10]: must be a list of two"),
        ({"data_size": [8, 0]}, "data_size.1 = 0: should be greater than or equal to 1"),
        ({5: 1}, "5 = 5: a key must be text"),
        (
            {"model": {"x\ny": 1}},
            (
                r"unknown key 'model.x\ny': valid: distil_from, filter, name, remember, "
                "remember_temperature, standardise, start"
            ),
        ),
    ],
)
def test_a_wrong_value_is_one_line_that_names_key_value_and_what_is_valid(
    values: dict[Any, Any], line: str
) -> None:
    assert line in wrong(values)


def test_one_wrong_option_of_a_strategy_counts_once_though_it_fits_none_of_four_types() -> None:
    assert wrong({"strategy": {"mu": [1]}}).endswith("true or false")


@pytest.mark.slow
@given(
    st.dictionaries(
        st.sampled_from(["task", "data", "seed", "rounds", "train", "strategy", "tiers", "compress", "new"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
            max_leaves=6,
        ),
    )
)
def test_any_mapping_is_a_configuration_or_one_line(values: dict[str, Any]) -> None:
    message = ""
    try:
        config = Config.from_mapping(values)
    except ConfigError as error:
        message = str(error)
    else:
        assert Config.from_mapping(config.to_mapping()) == config
    assert len(message.splitlines()) <= 1


@pytest.mark.parametrize(
    "values",
    [
        {},
        tomllib.loads(FULL),
        {"strategy": {"name": "krum", "a": 1, "b": True, "c": 0.5, "d": "text"}},
        {"data_size": [8, 9], "evaluate": {"metrics": ["auc"]}, "tiers": {"a": {}, "b-1": {"max_drop": 0.0}}},
    ],
)
def test_a_configuration_survives_its_plain_form(values: dict[str, Any]) -> None:
    config = Config.from_mapping(values)
    assert Config.from_mapping(config.to_mapping()) == config


def test_options_of_a_strategy_keep_their_types() -> None:
    options = Config.from_mapping({"strategy": {"a": 1, "b": True, "c": 0.5, "d": "x"}}).strategy.options
    assert [type(options[key]) for key in "abcd"] == [int, bool, float, str]


def test_every_further_key_of_the_strategy_table_is_an_option_of_its_own() -> None:
    config = Config.from_mapping({"strategy": {"name": "fedprox", "proximal_mu": 0.1}})
    assert config.strategy == StrategyConfig(name="fedprox", options={"proximal_mu": 0.1})
    assert config.to_mapping()["strategy"] == {"name": "fedprox", "proximal_mu": 0.1}
    assert Config.from_mapping({"strategy": {"x": 1}}).strategy.name == "fedavg"


def test_a_toml_file_is_read_with_data_relative_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(FULL)
    config = Config.load(tmp_path / "run.toml")
    assert config.data == str(tmp_path / "sub/table.csv")
    assert (config.task, config.data_label, config.data_client, config.seed) == (
        "tables",
        "outcome",
        "site",
        7,
    )
    assert config.tiers == {"micro": Tier(max_wire_bytes=20_000)}
    assert config.train.augment == ("noise:0.1", "mask:0.2")
    assert config.compress.prune.ratios == (0.25, 0.5)


def test_an_absolute_data_path_stays_and_one_given_with_set_is_the_shells(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('data = "/somewhere/x.npz"')
    assert Config.load(file).data == "/somewhere/x.npz"
    assert Config.load(file, ["data=here/x.npz"]).data == "here/x.npz"


def test_a_byte_order_mark_from_a_windows_editor_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfseed = 3")
    assert Config.load(tmp_path / "run.toml").seed == 3


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"seed = ", "not valid TOML"),
        (b"seed = 1\nseed = 2", "not valid TOML"),
        (b'task = "\xff"', "not valid TOML"),
        (b"sed = 1", "unknown key 'sed': did you mean 'seed'?"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_with_its_name(
    tmp_path: Path, content: bytes | None, line: str
) -> None:
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Config.load(file)
    assert str(caught.value).startswith(f"configuration {file}: ")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_set_overrides_what_the_file_says_and_leaves_the_rest(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(FULL)
    config = Config.load(
        tmp_path / "run.toml",
        [
            "rounds.count=9",
            "train.learning_rate = 1e-3",
            "train.augment=['flip']",
            "strategy.name=fedavgm",
            "tiers.board.max_wire_bytes=50_000",
            "rounds.target=loss<=0.1",
            "data_size=[8, 9]",
        ],
    )
    assert (config.rounds.count, config.rounds.deadline_s, config.rounds.target) == (9, 2.5, "loss<=0.1")
    assert (config.train.learning_rate, config.train.augment) == (0.001, ("flip",))
    assert (config.strategy.name, sorted(config.tiers)) == ("fedavgm", ["board", "micro"])
    assert config.data_size == (8, 9)


@pytest.mark.parametrize(
    ("assignment", "line"),
    [
        ("rounds.count", "write it as key=value, such as --set rounds.count=5"),
        ("=5", "write it as key=value"),
        ("seed.x=1", "'seed' is a value, not a table"),
    ],
)
def test_a_malformed_override_is_one_line(assignment: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        override({"seed": 3}, [assignment])


def test_an_override_changes_no_mapping_that_it_was_given() -> None:
    values: dict[str, Any] = {"rounds": {"count": 3}}
    assert override(values, ["rounds.count=4"]) == {"rounds": {"count": 4}}
    assert values == {"rounds": {"count": 3}}


def test_a_configuration_is_frozen() -> None:
    for value, name in ((Config(), "seed"), (Train(), "epochs"), (Rounds(), "count")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 2)


def test_ten_clients_are_wanted_unless_a_number_is_given() -> None:
    assert Config().clients.wanted == 10
    assert Config.from_mapping({"clients": {"count": 3}}).clients.wanted == 3


def test_a_target_is_reached_at_its_value_and_never_by_a_metric_that_is_absent() -> None:
    target = Target.parse(" accuracy >= 0.97 ")
    assert target == Target("accuracy", True, 0.97)
    assert [target.reached({"accuracy": value}) for value in (0.96, 0.97, 0.98)] == [False, True, True]
    loss = Target.parse("loss<=.5")
    assert [loss.reached({"loss": value}) for value in (0.6, 0.5)] == [False, True]
    assert not loss.reached({"accuracy": 1.0})


def test_train_settings_travel_as_json_and_come_back_checked() -> None:
    config = Config.from_mapping({"train": {"epochs": 3, "augment": ["flip"], "learning_rate": 1}})
    assert parse_train(config.section_json("train")) == config.train
    for text in ("{", "[]", '{"epochs": 0}', '{"loss": "x"}', '{"new": 1}'):
        with pytest.raises(ConfigError, match="train settings in the message"):
            parse_train(text)


def test_a_suggestion_is_the_nearest_name_or_the_list() -> None:
    assert suggestion("fedavgg", ["fedavg", "krum"]) == "did you mean 'fedavg'?"
    assert suggestion("zzz", ["b", "a"]) == "valid: a, b"


def test_a_deployment_chooses_devices_by_tier_tag_and_speed() -> None:
    clients = {"tiers": ["micro", "board"], "tags": ["north", "lab-2"], "max_seconds": 5}
    found = Config.from_mapping({"clients": clients}).clients
    assert (found.tiers, found.tags, found.max_seconds) == (("micro", "board"), ("north", "lab-2"), 5)
    assert found.needed == 1
    assert Config.from_mapping({"clients": {"count": 4}}).clients.needed == 4


@pytest.mark.parametrize(
    "clients", [{"tiers": ["Micro!"]}, {"tags": ["two words"]}, {"tags": "north"}, {"max_seconds": 0}]
)
def test_a_choice_that_no_device_can_match_is_refused(clients: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="clients"):
        Config.from_mapping({"clients": clients})


def test_a_tiers_preset_gives_what_the_tier_leaves_out() -> None:
    tier = Config.from_mapping({"tiers": {"pi": {"preset": "board", "max_wire_bytes": 9}}}).tiers["pi"]
    assert (tier.max_wire_bytes, tier.max_memory_bytes, tier.slowdown) == (9, 64_000_000, 10.0)
    plain = Config.from_mapping({"tiers": {"pi": {"preset": "board"}}})
    assert Config.from_mapping(plain.to_mapping()) == plain
    with pytest.raises(ConfigError, match=r"tiers\.pi\.preset = 'bord': did you mean 'board'"):
        Config.from_mapping({"tiers": {"pi": {"preset": "bord"}}})
