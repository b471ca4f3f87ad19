"""FedDF's fusion, where what the ensemble answers is known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedge.config import Config, Train
from fedge.dataset import Examples
from fedge.learning import local
from fedge.learning.messages import Instructions, from_record, to_record
from fedge.learning.state import arrays_of
from fedge.spec import Spec
from fedge.task import resolve
from fedge_server.data import ServerData
from fedge_server.strategies.feddf import FedDf

SPEC = Spec("features", (3,), "float32", ("a", "b", "c"), ())
TASK = resolve("tables")
RNG = np.random.default_rng(0)
NONE = Examples(np.zeros((0, 3), np.float32), np.zeros(0, np.int64))
PROXY = Examples(RNG.normal(size=(64, 3)).astype(np.float32), np.zeros(64, np.int64))
START = arrays_of(local.first(TASK, "logistic", SPEC, 0))


class Nodes:
    def __init__(self, *ids):
        self.ids = ids

    def get_node_ids(self):
        return list(self.ids)


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1


def made(proxy=PROXY, codec=(), anomalies=None, **options):
    sections = {"model": {"name": "logistic"}, "communication": {"codec": list(codec)}}
    if anomalies is not None:
        sections["evaluate"] = {"anomalies": anomalies}
    run = Config.from_mapping({"task": "tables", **sections})
    return FedDf(
        run, TASK, ServerData(SPEC, proxy, NONE, NONE), min_train_nodes=1, min_available_nodes=1, **options
    )


def asked(strategy, *nodes):
    told = Instructions(
        task="tables", spec=SPEC, model="logistic", noise_filter="none", moments=None, train=Train(), seed=0,
        update="weights",
    )  # fmt: skip
    sent = strategy.configure_train(1, to_record(START), told.to_config(), Nodes(*nodes))
    return {message.metadata.dst_node_id: message for message in sent}


def reply(node, state, examples):
    metrics = MetricRecord({"num-examples": examples, "train_loss": 1.0})
    content = RecordDict({"arrays": to_record(state), "metrics": metrics})
    return Message(content, reply_to=Message(RecordDict(), node, "train"))


def some(seed, model="logistic"):
    rng = np.random.default_rng(seed)
    state = arrays_of(local.first(TASK, model, SPEC, 0))
    return {name: rng.normal(size=v.shape).astype(np.float32) for name, v in state.items()}


def answers(state, model="logistic"):
    network = local.blank(TASK, model, SPEC)
    network.load_state_dict({name: torch.from_numpy(np.array(v)) for name, v in state.items()})
    x = TASK.preprocess(SPEC, None, "none")(torch.from_numpy(PROXY.x))
    return local.logits(network, x).softmax(1).numpy()


def mean(states, weights=None):
    return {
        name: np.average([s[name] for s in states], axis=0, weights=weights).astype(np.float32)
        for name in START
    }


def test_linear_models_of_equal_weight_are_fused_to_their_mean():
    """The mean of linear models answers as their ensemble does: nothing is left to distil."""
    strategy, states = made(), [some(1), some(2)]
    asked(strategy, 1, 2)
    found, metrics = strategy.aggregate_train(1, [reply(i + 1, s, 10) for i, s in enumerate(states)])
    assert answers(from_record(found)) == pytest.approx(answers(mean(states)), abs=0.01)
    assert metrics["train_loss"] == 1.0


def test_the_average_by_examples_moves_to_what_all_clients_answer_alike():
    states, weights = [some(1), some(2)], [1, 99]
    first, wanted = answers(mean(states, weights)), answers(mean(states))
    far = []
    for epochs in (1, 20, 100):
        strategy = made(epochs=epochs, learning_rate=0.05)
        asked(strategy, 1, 2)
        replies = [reply(i + 1, s, n) for i, (s, n) in enumerate(zip(states, weights, strict=True))]
        found, _ = strategy.aggregate_train(1, replies)
        far.append(float(np.abs(answers(from_record(found)) - wanted).mean()))
    before = float(np.abs(first - wanted).mean())
    assert before > far[0] > far[1] > far[2]
    assert far[2] < 0.1 * before


def test_each_client_gets_its_own_architecture_and_all_learn_from_all():
    strategy = made(models="logistic,mlp", epochs=60, learning_rate=0.01)
    sent = asked(strategy, 2, 3)
    assert [sent[node].content["config"]["model"] for node in (2, 3)] == ["logistic", "mlp"]
    assert list(from_record(sent[2].content["arrays"])) == list(START)
    assert set(strategy.like(3)) == set(from_record(sent[3].content["arrays"])) != set(START)
    states = {2: some(1), 3: some(2, "mlp")}
    ensemble = torch.stack(
        [torch.from_numpy(answers(states[2])).log(), torch.from_numpy(answers(states[3], "mlp")).log()]
    )
    wanted = ensemble.mean(0).softmax(1).numpy()  # logits, up to what a softmax leaves out
    found, _ = strategy.aggregate_train(1, [reply(2, states[2], 5), reply(3, states[3], 5)])
    assert np.abs(answers(strategy.like(3), "mlp") - wanted).mean() < 0.05
    assert np.abs(answers(from_record(found)) - wanted).mean() < np.abs(answers(states[2]) - wanted).mean()


def test_an_architecture_whose_clients_did_not_answer_learns_all_the_same():
    strategy = made(models="logistic,mlp", epochs=40, learning_rate=0.01)
    asked(strategy, 2, 3)
    before, state = strategy.like(3), some(1)
    strategy.aggregate_train(1, [reply(2, state, 5)])
    wanted = answers(state)
    assert (
        np.abs(answers(strategy.like(3), "mlp") - wanted).mean()
        < np.abs(answers(before, "mlp") - wanted).mean()
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"proxy": NONE}, r"raise evaluate\.proxy_fraction"),
        ({"models": "logistic,resnet"}, r"models \['resnet'\] are none of task 'tables'"),
        ({"models": "mlp", "codec": ["int8"]}, r"communication\.codec is for one architecture"),
        ({"models": "mlp", "anomalies": True}, r"evaluate\.anomalies is for one architecture"),
        ({"epochs": 0}, "epochs 0"),
        ({"learning_rate": 0.0}, r"learning_rate 0\.0"),
    ],
)
def test_what_cannot_work_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        made(**options)
