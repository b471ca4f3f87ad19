"""Whole runs with a codec: they learn, count what travels, resume bit for bit, and survive bad clients."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedge.codecs.chain import Codec
from fedge.errors import ConfigError
from fedge.learning.messages import ARRAYS, CODED, from_record, to_record
from fedge.learning.state import arrays_of, digest

CHAINS = [["int8"], ["sign"], ["topk:0.05"], ["topk:0.05", "int8"], ["topk:0.05", "sign"], ["randomk:0.2"]]


def without_time(records):
    return [json.dumps({**record.to_json(), "seconds": 0}, sort_keys=True) for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS, ids="+".join)
def test_it_learns_with_fewer_bytes_up_and_as_many_down(chain, small, learn, tmp_path):
    base = small(rounds={"count": 10}, simulation={"engine": "sequential"})
    plain = learn(base, tmp_path / "plain").records
    config = small(rounds={"count": 10}, communication={"codec": chain})
    found = learn(config, tmp_path / "codec").records
    assert all(record.clients == 5 and not record.rejected for record in found)
    assert found[-1].metrics["accuracy"] > 0.8
    assert found[0].bytes_down == plain[0].bytes_down
    times = plain[0].bytes_up / found[0].bytes_up
    assert times > {"int8": 3, "sign": 12, "topk:0.05": 7, "randomk:0.2": 4}.get("+".join(chain), 14)


@pytest.mark.quick_where(strategy=("fedavg",), chain=(["topk:0.05", "int8"],))
@pytest.mark.parametrize("strategy", ["fedavg", "fedsgd", "fedmedian", "fedadam"])
@pytest.mark.parametrize("chain", [["topk:0.05", "int8"], ["int8"]], ids="+".join)
def test_a_run_with_a_codec_resumes_bit_for_bit(strategy, chain, small, learn, tmp_path):
    config = small(
        strategy={"name": strategy},
        rounds={"count": 4, "fraction": 0.8},
        communication={"codec": chain},
    )
    whole = learn(config, tmp_path / "whole")
    with pytest.raises(Exception, match=r"^$"):  # the fixture's Interrupted
        learn(config, tmp_path / "cut", stop_after=2)
    resumed = learn(config, tmp_path / "cut")
    assert without_time(resumed.records) == without_time(whole.records)
    assert digest(arrays_of(resumed.model.network)) == digest(arrays_of(whole.model.network))


@pytest.mark.slow
def test_clients_are_still_trained_together_and_give_what_each_gives_alone(small, learn, tmp_path):
    made = {
        engine: learn(
            small(communication={"codec": ["topk:0.2"]}, simulation={"engine": engine}), tmp_path / engine
        )
        for engine in ("vector", "sequential")
    }
    expected = arrays_of(made["sequential"].model.network)
    for name, value in arrays_of(made["vector"].model.network).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-4)


def flipped(_, reply):
    data = reply.content[ARRAYS][CODED].numpy().copy()
    data[len(data) // 2] ^= 1
    reply.content[ARRAYS] = to_record({CODED: data}, shared=False)
    return reply


def cut(_, reply):
    data = reply.content[ARRAYS][CODED].numpy()[:-1].copy()
    reply.content[ARRAYS] = to_record({CODED: data}, shared=False)
    return reply


def huge(_, reply):
    reply.content[ARRAYS] = to_record({CODED: np.zeros(10**6, np.uint8)}, shared=False)
    return reply


def floats(_, reply):
    reply.content[ARRAYS] = to_record({CODED: np.zeros(100, np.float32)}, shared=False)
    return reply


def absurd(_, reply):
    """Well-formed, and beyond what any array of the model can hold."""
    from fedge.codecs import stages

    codec = Codec.of(["topk:0.05", "int8"])
    values = stages.written(np.full(32, 3e38, np.float32), codec)
    assert np.isfinite(np.frombuffer(values, "<f4", 1)).all()
    import struct
    import zlib

    body = bytes(40) + struct.pack("<I", 32) + bytes(32) + values
    data = b"FU\x01" + bytes([len(codec.text)]) + codec.text.encode() + zlib.compress(body)
    reply.content[ARRAYS] = to_record({CODED: np.frombuffer(data, np.uint8)}, shared=False)
    return reply


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (flipped, "codec: "),
        (cut, "codec: "),
        (huge, "it must be one of"),
        (floats, "is float32 (100,) instead of uint8"),
        (absurd, "NaN or infinite"),
    ],
)
def test_a_client_whose_update_cannot_be_read_is_rejected_and_the_round_goes_on(
    tamper, says, small, learn, tmp_path
):
    config = small(rounds={"count": 2}, communication={"codec": ["topk:0.05", "int8"]})
    learned = learn(config, tmp_path, tamper={2: tamper})
    for record in learned.records:
        assert record.clients == 4
        assert [(r.client, says in r.reason) for r in record.rejected] == [(2, True)], record.rejected


def test_a_device_of_an_older_release_answers_whole_and_counts(small, learn, tmp_path):
    def old(sent, reply):
        state = from_record(sent.content[ARRAYS])
        reply.content[ARRAYS] = to_record({n: v + np.float32(0.01) for n, v in state.items()}, shared=False)
        return reply

    config = small(rounds={"count": 1}, communication={"codec": ["topk:0.05"]})
    (record,) = learn(config, tmp_path, tamper={2: old}).records
    assert (record.clients, record.rejected) == (5, ())


def test_a_slow_uplink_takes_less_simulated_time(small, learn, tmp_path):
    slow = {"rounds": {"count": 1}, "scenario": {"up_bytes_per_s": 100.0, "seconds_per_example": 1e-9}}
    whole = learn(small(**slow), tmp_path / "whole").records[0].simulated_s
    coded = (
        learn(small(**slow, communication={"codec": ["topk:0.01"]}), tmp_path / "c").records[0].simulated_s
    )
    assert whole == pytest.approx(26, abs=0.1)  # 650 values of 4 bytes
    assert coded == pytest.approx((40 + 6 * 5) / 100, abs=0.01)  # biases, and six values with positions


@pytest.mark.parametrize("mechanism", ["local", "example", "central"])
def test_noise_and_codec_go_together(mechanism, small, learn, tmp_path):
    config = small(
        model={"standardise": False},
        rounds={"count": 2},
        privacy={"mechanism": mechanism, "accountant": "rdp"},
        communication={"codec": ["topk:0.2", "int8"]},
    )
    records = learn(config, tmp_path).records
    assert [(record.clients, record.rejected) for record in records] == [(5, ())] * 2


def test_attackers_who_change_arrays_on_their_way_are_refused(small, learn, tmp_path):
    codec = {"codec": ["int8"]}
    config = small(communication=codec, scenario={"attackers": 0.2})
    with pytest.raises(ConfigError, match=r"communication\.codec: 'sign_flip'"):
        learn(config, tmp_path / "a")
    config = small(communication=codec, scenario={"attackers": 0.2, "attacks": ["label_flip"]})
    assert learn(config, tmp_path / "b").records[-1].clients == 5
