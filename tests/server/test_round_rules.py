"""Closing, validation and stopping: the rules of a round, on values."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedge.config import Rounds
from fedge.learning.messages import to_record
from fedge.wire.arrays import MemoryArray
from fedge_server.rounds.closing import (
    Collected,
    TooFewError,
    collect,
    enough,
    if_enough,
    in_order,
    singles,
    sums,
)
from fedge_server.rounds.record import Rejected, RoundRecord
from fedge_server.rounds.stopping import reached_target_at, why_stop
from fedge_server.rounds.validation import Rules, UnfitError, evaluation_fault, validated

LIKE = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}


@pytest.fixture(autouse=True)
def identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1


def update(node=1, examples=5, loss=0.5, arrays=None, **records) -> Message:
    content = {"arrays": to_record(LIKE if arrays is None else arrays)}
    content["metrics"] = MetricRecord({"num-examples": examples, "train_loss": loss})
    return Message(RecordDict({**content, **records}), reply_to=Message(RecordDict(), node, "train"))


def changed(**arrays) -> dict[str, np.ndarray]:
    return {**LIKE, **{name: np.asarray(value) for name, value in arrays.items()}}


def fault(message: Message, **rules) -> str | None:
    """Why it is unfit; None: it is not."""
    try:
        validated(message, Rules(LIKE, **rules))
    except UnfitError as error:
        return str(error)
    return None


def test_a_good_update_has_no_fault():
    assert fault(update()) is None


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (lambda: update(arrays=changed(w=np.full((2, 3), np.nan, np.float32))), "'w' holds NaN"),
        (lambda: update(arrays=changed(b=np.full(3, np.inf, np.float32))), "'b' holds NaN or infinite"),
        (lambda: update(arrays=changed(w=np.zeros((1,), np.float32))), "'w' is float32 (1,)"),
        (lambda: update(arrays=changed(w=np.zeros((2, 3), np.float64))), "'w' is float64"),
        (lambda: update(arrays=changed(extra=np.zeros(1, np.float32))), "names differ: extra"),
        (lambda: update(arrays={"w": LIKE["w"]}), "names differ: b"),
        (lambda: update(arrays={"b": LIKE["b"], "w": LIKE["w"]}), "another order"),
        (lambda: update(examples=0), "num-examples is 0"),
        (lambda: update(examples=-1), "num-examples is -1"),
        (lambda: update(examples=10**12), "num-examples is 1000000000000"),
        (lambda: update(examples=1.5), "num-examples is 1.5"),
        (lambda: update(loss=float("nan")), "train_loss is nan"),
        (lambda: update(more=MetricRecord({"x": 1})), "records ['arrays', 'metrics', 'more']"),
        (
            lambda: Message(Error(2, "Traceback\nValueError: no data"), reply_to=update()),
            "client error: ValueError",
        ),
    ],
)
def test_a_bad_update_is_named(message, says):
    found = fault(message())
    assert found is not None
    assert says in found


def test_an_array_whose_bytes_are_not_its_header_is_refused_before_it_allocates():
    lying = Array("float32", (2, 3), "numpy.ndarray", b"\x93NUMPY\x01\x00garbage")
    message = update()
    message.content["arrays"] = ArrayRecord({"w": lying, "b": Array(LIKE["b"])})
    assert "cannot be decoded" in fault(message)
    bomb = Array("float32", (2, 3), "numpy.ndarray", b"\0" * 10_000)
    message.content["arrays"] = ArrayRecord({"w": bomb, "b": Array(LIKE["b"])})
    assert "carries 10000 bytes" in fault(message)


def test_a_pickle_is_never_loaded():
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    message = update()
    sneaky = Array("float32", (2, 3), "numpy.ndarray", buffer.getvalue())
    message.content["arrays"] = ArrayRecord({"w": sneaky, "b": Array(LIKE["b"])})
    assert "cannot be decoded" in fault(message)


class Taken:
    """What `collect` gave, gone through: as a list in the order of clients, and what it noted."""

    def __init__(self, messages, admit, needed, *, once=False):
        self.noted = Collected()
        self.valid = in_order(collect(messages, admit, self.noted, needed=needed, once=once))

    def __getattr__(self, name):
        return getattr(self.noted, name)


def collected(messages, asked, quorum=1.0, at_least=1, once=False, **rules):
    admit = singles(Rules(LIKE, **rules), asked)
    return Taken(iter(messages), admit, enough(len(asked), quorum, at_least), once=once)


def summed(clients, examples=50, **changes) -> Message:
    message = update(examples=examples, **changes)
    message.content["metrics"]["clients"] = clients
    return message


def failed(node: int) -> Message:
    return Message(Error(2, "no data"), reply_to=Message(RecordDict(), node, "train"))


def collected_sums(messages, asked, needed):
    return Taken(iter(messages), sums(Rules(LIKE), asked), needed)


def test_a_sum_counts_its_clients_and_each_failure_is_its_own():
    found = collected_sums([failed(4), summed(3), summed(2), summed(1)], set(range(1, 9)), needed=5)
    assert (found.clients, len(found.valid), found.bytes_up) == (5, 2, 5 * 36)
    assert found.rejected == [Rejected(4, "client error: no data")]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (lambda: summed(0), "clients is 0; it must be a whole number from 1 to 4"),
        (lambda: summed(5), "clients is 5"),
        (lambda: summed(2.0), "clients is 2.0"),
        (lambda: summed(3, examples=2), "num-examples is 2; it must be a whole number from 3 to 3000000000"),
        (lambda: summed(3, arrays=changed(b=np.full(3, np.nan, np.float32))), "'b' holds NaN"),
        (lambda: update(), "instead of ['clients', 'num-examples', 'train_loss']"),
    ],
)
def test_a_sum_that_cannot_be_is_rejected(message, says):
    found = collected_sums([message()], {1, 2, 3, 4}, needed=4)
    assert (found.clients, found.valid) == (0, [])
    assert says in found.rejected[0].reason


def test_sums_never_hold_more_clients_than_were_asked():
    found = collected_sums([failed(1), failed(1), summed(2), summed(2)], {1, 2, 3, 4}, needed=4)
    assert found.clients == 2
    assert [r.client for r in found.rejected] == [1, 1, 1]


def test_a_sum_is_refused_where_single_updates_were_asked_for():
    assert "metrics ['clients', 'num-examples', 'train_loss']" in fault(summed(3))


def test_the_digest_covers_how_many_clients_a_sum_holds():
    two, three = (collected_sums([summed(n)], {1, 2, 3}, needed=3) for n in (2, 3))
    assert two.updates != three.updates


def test_the_quorum_closes_a_round_early():
    later = iter([update(1), update(2), pytest.fail])
    found = Taken(later, singles(Rules(LIKE), {1, 2, 3, 4}), enough(4, 0.5, 1))
    assert [m.metadata.src_node_id for m in found.valid] == [1, 2]
    assert next(later) is pytest.fail  # the third was never waited for


def test_a_bad_update_does_not_count_towards_the_quorum():
    found = collected([update(1, examples=0), update(2), update(3)], {1, 2, 3, 4}, quorum=0.5)
    assert [m.metadata.src_node_id for m in found.valid] == [2, 3]
    assert [r.client for r in found.rejected] == [1]


def test_a_client_counts_once_and_only_when_asked():
    found = collected([update(1), update(1, examples=9), update(7)], {1, 2})
    assert len(found.valid) == 1
    assert [(r.client, r.reason.split(";")[0]) for r in found.rejected] == [
        (1, "answered twice"),
        (7, "was not asked"),
    ]


def test_order_of_arrival_changes_neither_updates_nor_their_digest():
    one, two = update(1, examples=3), update(2, examples=4)
    forth, back = collected([one, two], {1, 2}), collected([two, one], {1, 2})
    assert [m.metadata.src_node_id for m in back.valid] == [1, 2]
    assert forth.updates == back.updates


def test_the_digest_of_updates_does_not_depend_on_who_sent_them():
    assert collected([update(1)], {1}).updates == collected([update(5)], {5}).updates


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_digest_of_updates_does_not_depend_on_how_the_arrays_came(order):
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in LIKE.items()}
    plain = update(arrays=arrays)
    plain.content["arrays"] = ArrayRecord({n: Array(np.asarray(v, order=order)) for n, v in arrays.items()})
    by_memory, by_bytes = collected([update(arrays=arrays)], {1}), collected([plain], {1})
    assert by_memory.updates == by_bytes.updates
    assert by_bytes.bytes_up == by_memory.bytes_up + 2 * 128  # two headers


def test_arrays_that_came_as_bytes_are_decoded_once_and_can_be_written_to():
    plain = update()
    plain.content["arrays"] = ArrayRecord({name: Array(value) for name, value in LIKE.items()})
    (message,) = collected([plain], {1}).valid
    for array in message.content["arrays"].values():
        assert isinstance(array, MemoryArray)
        array.numpy()[...] += 1
        assert (array.numpy() == 1).all()


def test_a_round_does_not_close_before_it_would_count():
    found = collected([update(1), update(2), update(3)], {1, 2, 3, 4}, quorum=0.25, at_least=2)
    assert len(found.valid) == 2


def test_an_update_that_does_not_say_that_it_is_guarded_is_refused_where_clients_were_told_to():
    """A device of an older fedge knows nothing of it, and answers as ever."""
    message = update()
    assert "instead of ['guarded', 'num-examples', 'train_loss']" in fault(message, guarded=True)
    message.content["metrics"]["guarded"] = 1
    assert fault(message, guarded=True) is None


def test_metrics_beyond_those_expected_are_refused():
    message = update()
    message.content.metric_records["metrics"]["bonus"] = 1.0
    assert "metrics ['bonus', 'num-examples', 'train_loss']" in fault(message)


@pytest.mark.parametrize("loss", [-1.0, 1e308])
def test_a_loss_that_a_strategy_could_choke_on_is_refused(loss):
    assert "train_loss is" in fault(update(loss=loss))


def test_what_a_client_says_is_cut_and_printable_in_the_record():
    message = update()
    message.content["metrics"] = MetricRecord({"num-examples": [1.0] * 10_000, "train_loss": 0.5})
    assert len(fault(message)) <= 300
    hostile = Message(Error(2, "\x1b[2Jgone\x07"), reply_to=update())
    assert fault(hostile) == "client error: ?[2Jgone?"


def test_a_header_that_claims_gigabytes_allocates_nothing():
    import tracemalloc

    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (536870912,), }".ljust(117) + b"\n"
    claim = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    message = update()
    message.content["arrays"] = ArrayRecord(
        {"w": Array("float32", (2, 3), "numpy.ndarray", claim), "b": Array(LIKE["b"])}
    )
    tracemalloc.start()
    found = fault(message)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "its bytes declare" in found
    assert peak < 1_000_000


def test_a_dtype_that_does_not_exist_is_a_rejection_not_a_crash():
    message = update()
    message.content["arrays"] = ArrayRecord(
        {"w": Array("nonsense", (2, 3), "numpy.ndarray", b""), "b": Array(LIKE["b"])}
    )
    assert "cannot be read (TypeError" in fault(message)


def test_an_outage_does_not_use_up_patience():
    out = [RoundRecord(i, {"accuracy": 0.5}, counted=False) for i in (2, 3, 4)]
    records = [*rounds_with(0.1, 0.5), *out]
    assert why_stop(records, Rounds(count=99, patience=2)) is None


def evaluation(**metrics) -> Message:
    values = {"num-examples": 4, "loss": 0.5, "accuracy": 0.5, **metrics}
    return Message(
        RecordDict({"metrics": MetricRecord(values)}), reply_to=Message(RecordDict(), 1, "evaluate")
    )


def test_evaluations_are_held_to_the_same_rules():
    assert evaluation_fault(evaluation()) is None
    for bad in ({"num-examples": 0}, {"loss": float("nan")}, {"extra": 1.0}):
        assert evaluation_fault(evaluation(**bad)) is not None


def rounds_with(*accuracies: float) -> list[RoundRecord]:
    return [RoundRecord(i, {"accuracy": value, "loss": 1 - value}) for i, value in enumerate(accuracies)]


def test_training_ends_after_its_rounds():
    settings = Rounds(count=2)
    assert why_stop(rounds_with(0.1, 0.2), settings) is None
    assert why_stop(rounds_with(0.1, 0.2, 0.3), settings) == "all 2 rounds done"


def test_training_ends_when_the_target_is_reached():
    settings = Rounds(count=9, target="accuracy>=0.9")
    assert why_stop(rounds_with(0.1, 0.89), settings) is None
    assert why_stop(rounds_with(0.1, 0.9), settings) == "target accuracy>=0.9 reached in round 1"
    assert reached_target_at(rounds_with(0.1, 0.5, 0.95, 0.7), settings) == 2


def test_an_initial_model_does_not_reach_the_target():
    assert reached_target_at(rounds_with(0.95), Rounds(target="accuracy>=0.9")) is None


def test_patience_counts_rounds_without_gain():
    settings = Rounds(count=99, patience=2, min_gain=0.01)
    assert why_stop(rounds_with(0.1, 0.5, 0.505), settings) is None
    assert why_stop(rounds_with(0.1, 0.5, 0.505, 0.508), settings) == "no gain of 0.01 in 2 rounds"
    assert why_stop(rounds_with(0.1, 0.5, 0.505, 0.52), settings) is None


def test_a_falling_loss_is_a_gain():
    settings = Rounds(count=99, patience=1, target="loss<=0.05")
    assert why_stop(rounds_with(0.1, 0.2, 0.3), settings) is None
    assert why_stop(rounds_with(0.1, 0.2, 0.96), settings) == "target loss<=0.05 reached in round 2"


def test_a_record_survives_json():
    record = RoundRecord(
        3,
        {"accuracy": 0.5, "recall": [0.1, 0.9]},
        2,
        3,
        (Rejected(7, "late"),),
        0.25,
        1.5,
        10,
        20,
        1,
        "ab",
        True,
        {"loss": 0.5},
        12.5,
    )
    assert RoundRecord.from_json(record.to_json()) == record
    assert record.failures == 1


def test_a_target_with_a_confidence_waits_for_the_bound():
    settings = Rounds(count=9, target="accuracy>=0.9", target_confidence=0.95)
    records = [
        RoundRecord(1, {"accuracy": 0.95}, target_bound=0.89),
        RoundRecord(2, {"accuracy": 0.94}, target_bound=0.9),
    ]
    assert why_stop(records[:1], settings) is None
    assert why_stop(records, settings) == "target accuracy>=0.9 reached in round 2 at 95 % confidence"


def test_a_lucky_round_neither_ends_nor_prolongs_a_smoothed_run():
    lucky = rounds_with(0.5, 0.6, 0.8, 0.62, 0.64, 0.66)  # rises by 0.02 a round, but for one
    assert why_stop(lucky, Rounds(count=99, patience=3)) == "no gain of 0.001 in 3 rounds"
    assert why_stop(lucky, Rounds(count=99, patience=3, smooth=3)) is None
    # Means of 3: 0.6333, 0.6733, 0.6867, 0.64, 0.6533, 0.66, 0.66: none after the third is a gain.
    flat = rounds_with(0.5, 0.6, 0.8, 0.62, 0.64, 0.66, 0.66, 0.66, 0.66)
    assert why_stop(flat, Rounds(count=99, patience=4, smooth=3)) == (
        "no gain of 0.001 in 4 rounds (means of 3)"
    )


@pytest.mark.slow
def test_a_smoothed_run_is_stopped_by_noise_far_less_often():
    """30 rounds of a curve that still rises by 0.004 a round, with a deviation of 0.01 around it."""
    stopped = {1: 0, 4: 0}
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(0, 0.01, 30)
        records = rounds_with(*(0.5 + 0.004 * np.arange(30) + noise))
        for smooth in stopped:
            early = (why_stop(records[:n], Rounds(count=99, patience=4, smooth=smooth)) for n in range(1, 31))
            stopped[smooth] += any(early)
    assert stopped[1] > 100
    assert stopped[4] < 40


def test_intervals_survive_json():
    record = RoundRecord(1, {"accuracy": 0.5}, intervals={"accuracy": (0.4, 0.6)}, target_bound=0.41)
    assert RoundRecord.from_json(record.to_json()) == record


def moved(node: int, by: float, **more) -> Message:
    """An update whose change has the norm 3 * by: nine values."""
    return update(node, arrays={n: v + np.float32(by) for n, v in LIKE.items()}, **more)


def test_a_change_that_is_too_long_is_rejected_with_both_numbers():
    found = collected([moved(1, 1.0), moved(2, 10.0), moved(3, -1.0)], {1, 2, 3}, max_norm=5.0, norms=True)
    assert [m.metadata.src_node_id for m in found.valid] == [1, 3]
    assert found.rejected == [Rejected(2, "its change has the norm 30, over the 5 that is allowed", "norm")]
    assert found.norms == [3.0, 3.0]
    assert found.norm == 3.0


def test_the_norm_is_of_the_change_and_not_of_the_weights():
    origin = {name: value + np.float32(100) for name, value in LIKE.items()}
    message = update(arrays={name: value + np.float32(1) for name, value in origin.items()})
    assert validated(message, Rules(origin, norms=True)).norm == 3.0


def test_no_norm_is_kept_where_nobody_asked():
    assert collected([moved(1, 1.0)], {1}).norm is None
    assert collected([moved(1, 1.0)], {1}, max_norm=9.0).norms == []


def test_a_client_that_claims_more_examples_than_is_allowed_is_rejected():
    found = collected([update(1, examples=10), update(2, examples=11)], {1, 2}, max_examples=10)
    assert found.rejected == [
        Rejected(2, "num-examples is 11; it must be a whole number from 1 to 10", "metrics")
    ]


@pytest.mark.parametrize("once", [True, False])
def test_the_digest_is_the_same_whether_updates_are_kept_or_let_go(once):
    found = collected([update(1), update(2, examples=9)], {1, 2}, once=once)
    other = collected([update(2, examples=9), update(1)], {1, 2})
    assert found.updates == other.updates
    left = [sum(1 for _ in message.content["arrays"]) for message in found.valid]
    assert left == ([0, 0] if once else [2, 2])


def test_a_large_update_is_digested_beside_the_sum_to_the_same_digest():
    from fedge_server.rounds.digests import WORTH_A_THREAD, arrays_sent, digest_of

    big = {"w": np.arange(WORTH_A_THREAD, dtype=np.float32)}
    noted = Collected()
    admit = singles(Rules(big, read_once=True), {1})
    for _ in collect([update(1, arrays=big)], admit, noted, needed=1, once=True):
        pass
    message = update(1, arrays=big)
    assert noted.digests == [digest_of(arrays_sent(message), message)]


def test_what_a_client_sends_back_unchanged_is_let_go_without_touching_what_others_are_sent():
    sent = to_record(LIKE)
    message = update(1)
    message.content["arrays"] = sent
    collected([message], {1}, once=True)
    assert list(sent) == list(LIKE)


def test_too_few_updates_are_vetoed_at_their_end():
    noted = Collected()
    updates = if_enough(
        collect([update(1)], singles(Rules(LIKE), {1, 2}), noted, needed=2, once=True), noted, least=2
    )
    assert next(updates) is not None
    with pytest.raises(TooFewError, match="1 updates, and 2 are needed"):
        next(updates)


def test_what_a_grid_raises_is_told_apart():
    def breaks():
        yield update(1)
        raise RuntimeError("the network is gone")

    noted = Collected()
    with pytest.raises(RuntimeError, match="the network is gone") as caught:
        list(collect(breaks(), singles(Rules(LIKE), {1, 2}), noted, needed=2, once=True))
    assert noted.broke is caught.value


def test_plain_arrays_that_are_read_once_stay_where_they_came():
    message = update(1)
    plain = Array(np.ones((2, 3), np.float32))
    message.content["arrays"] = ArrayRecord({"w": plain, "b": Array(LIKE["b"])})
    value = validated(message, Rules(LIKE, read_once=True)).records["arrays"]["w"].numpy()
    assert np.shares_memory(value, np.frombuffer(plain.data, np.uint8))
    assert not value.flags.writeable


def test_a_round_needs_one_update_and_one_accumulator():
    import tracemalloc

    from fedge_server.strategies.fedavg import FedAvg

    size = 1_000_000  # values: 4 MB
    origin = {"w": np.zeros(size, np.float32)}

    def arriving(count):
        for node in range(1, count + 1):
            yield update(node, arrays={"w": np.full(size, node, np.float32)})

    def peak(count):
        updates = collect(
            arriving(count),
            singles(Rules(origin, max_norm=1e9, norms=True, read_once=True), set(range(1, count + 1))),
            Collected(),
            needed=count,
            once=True,
        )
        tracemalloc.start()
        FedAvg().aggregate_train(1, updates)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found / (4 * size)

    assert peak(3) < 2.2
    assert peak(30) < 2.2


@pytest.mark.parametrize("read_once", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_a_file_that_ends_early_rejects_its_client(read_once, dtype, tmp_path):
    from fedge.wire.arrays import FileArray

    (tmp_path / "w").write_bytes(bytes(100))
    message = update(1)
    arrays = ArrayRecord()
    arrays["w"] = FileArray(tmp_path / "w", 0, dtype, (1000,))
    message.content["arrays"] = arrays
    with pytest.raises(UnfitError, match="arrays cannot be decoded"):
        validated(message, Rules({"w": np.zeros(1000, dtype)}, read_once=read_once))


def test_a_large_update_is_looked_at_in_pieces_and_stays_in_its_file(tmp_path, monkeypatch):
    from fedge.wire.arrays import FileArray
    from fedge_server.rounds import validation

    value = np.arange(5000, dtype=np.float32)
    (tmp_path / "w").write_bytes(value.tobytes())
    rules = Rules({"w": np.zeros(5000, np.float32)}, norms=True, read_once=True)
    for held, kind in ((10**6, MemoryArray), (10, FileArray)):
        monkeypatch.setattr(validation, "HELD_BYTES", held)
        message = update(1)
        message.content["arrays"] = ArrayRecord()
        message.content["arrays"]["w"] = FileArray(tmp_path / "w", 0, "float32", (5000,))
        found = validated(message, rules)
        assert type(found.records["arrays"]["w"]) is kind
        assert found.norm == pytest.approx(float(np.linalg.norm(value.astype(np.float64))), rel=1e-6)
