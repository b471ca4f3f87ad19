"""Rounds in which clients teach a student: on every Grid alike, kept teachers, kills, and bad clients."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord

from fedge.config import Config, Distil
from fedge.errors import ConfigError
from fedge.learning.local import Job
from fedge.learning.messages import METRICS, Instructions, to_record
from fedge.learning.state import arrays_of, digest
from fedge.learning.terms import TEACHER, Terms
from fedge.statistics import Moments
from fedge.wire.arrays import records_of
from fedge_client.teaching import KEPT
from fedge_server import app as server_app
from fedge_server.registry.database import Registry
from fedge_server.rounds.loop import learn
from fedge_server.rounds.teaching import Teacher, Teaching, config_of
from fedge_simulations.engine import frames
from fedge_simulations.world import prepare

SOFT = Distil(mode="both", hard_weight=0.3)


class Killed(Exception):  # noqa: N818 - stands for a power cut
    """The server died here."""


class Lesson:
    """A world, a teacher that knows a little, and a student."""

    def __init__(self, engine="sequential", keep=False, rounds=3, **sections):
        self.config = Config.from_mapping(
            {
                "model": {"name": "mlp"},
                "clients": {"count": 5},
                "evaluate": {"client_holdout": 0.2, "federated": True},
                "compress": {"clients": {"rounds": rounds, "epochs": 1}},
                "simulation": {"engine": engine},
                **sections,
            }
        )
        self.world = prepare(self.config)
        spec = self.world.dataset.spec
        torch.manual_seed(0)
        self.name = next(iter(self.world.task.students))
        self.network, self.student = (
            self.world.task.model("mlp")(spec),
            self.world.task.students[self.name](spec),
        )
        moments = Moments.of(self.world.dataset.x, spec)
        self.teacher = Teacher.of("mlp", self.network.eval(), moments, keep=keep)
        self.records, self.messages = [], []

    def learned(self, home, settings=SOFT, *, stop_after=None, around=None):
        own = config_of(self.config, f"student:{self.name}", settings, robust=False)

        def observe(record):
            self.records.append(record)
            if record.round == stop_after:
                raise Killed

        def watched(app):
            def call(message, context):
                self.messages.append((message, context))
                return (around or (lambda honest: honest))(app)(message, context)

            return call

        settings_of = server_app.run_config(self.config, home, "s")
        watch = watched if around or self.teacher.keep else None
        with closing(self.world.grid(settings_of, around=watch)) as grid, Registry.open(home) as registry:
            teaching = Teaching(self.student, self.teacher, settings)
            run = (grid, own, self.world.task, self.world.server, registry, "s", observe, teaching)
            return learn(*run).model.network


def flat(network):
    return np.concatenate([value.ravel() for value in arrays_of(network).values()])


@pytest.mark.slow
@pytest.mark.parametrize("augment", [(), ("shift:1",)])
def test_batched_clients_learn_what_devices_learn(tmp_path, augment):
    settings = replace(SOFT, augment=augment)
    ends = {}
    for engine in ("vector", "sequential"):
        (tmp_path / engine).mkdir()
        ends[engine] = flat(Lesson(engine).learned(tmp_path / engine, settings))
    moved = np.linalg.norm(ends["sequential"] - flat(Lesson().student))
    assert np.linalg.norm(ends["vector"] - ends["sequential"]) < 1e-4 * moved


@pytest.mark.slow
def test_without_a_teacher_clients_would_learn_something_else(tmp_path):
    ends = []
    for settings in (SOFT, replace(SOFT, mode="hard"), replace(SOFT, mode="soft")):
        home = tmp_path / settings.mode
        home.mkdir()
        lesson = Lesson()
        ends.append(digest(arrays_of(lesson.learned(home, settings))))
        assert (Teaching(lesson.student, lesson.teacher, settings).lesson is None) == (
            settings.mode == "hard"
        )
    assert len(set(ends)) == 3


@pytest.mark.slow
def test_a_teacher_is_sent_once_and_kept(tmp_path):
    lesson = Lesson(keep=True)
    lesson.learned(tmp_path)
    with_teacher = [TEACHER in records_of(m.content, ArrayRecord) for m, _ in lesson.messages]
    assert with_teacher == [True] * 5 + [False] * 10
    assert lesson.teacher.holders == {1, 2, 3, 4, 5}
    size = sum(value.nbytes for value in lesson.teacher.arrays.values())
    assert lesson.records[0].bytes_down - lesson.records[1].bytes_down == 5 * size


@pytest.mark.slow
def test_who_keeps_the_teacher_learns_as_who_is_sent_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    kept, sent = Lesson(keep=True).learned(tmp_path / "a"), Lesson().learned(tmp_path / "b")
    assert digest(arrays_of(kept)) == digest(arrays_of(sent))


@pytest.mark.slow
def test_a_client_that_has_lost_the_teacher_gets_it_again(tmp_path):
    def forgetful(app):
        def call(message, context):
            if context.node_id == 2 and TEACHER not in records_of(message.content, ArrayRecord):
                context.state.pop(KEPT, None)
            return app(message, context)

        return call

    lesson = Lesson(keep=True)
    lesson.learned(tmp_path, around=forgetful)
    clients = [record.clients for record in lesson.records]
    assert clients == [5, 4, 5]
    assert "a teacher that this device does not hold" in lesson.records[1].rejected[0].reason


def test_another_teacher_than_the_lesson_names_is_refused_by_clients(tmp_path):
    def swapping(app):
        def call(message, context):
            own = {name: value + 1 for name, value in lesson.teacher.arrays.items()}
            if context.node_id == 1 and TEACHER in records_of(message.content, ArrayRecord):
                message.content[TEACHER] = to_record(own)
            return app(message, context)

        return call

    lesson = Lesson(keep=True, rounds=1)
    lesson.learned(tmp_path, around=swapping)
    (refused,) = lesson.records[0].rejected
    assert (refused.client, lesson.records[0].clients) == (1, 4)
    assert "not the one that the lesson names" in refused.reason


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vector", "sequential"])
def test_killed_rounds_go_on_to_the_same_student(tmp_path, engine):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = Lesson(engine, keep=engine == "sequential").learned(tmp_path / "whole")
    with pytest.raises(Killed):
        Lesson(engine, keep=engine == "sequential").learned(tmp_path / "killed", stop_after=2)
    again = Lesson(engine, keep=engine == "sequential").learned(tmp_path / "killed")
    assert digest(arrays_of(again)) == digest(arrays_of(whole))


@pytest.mark.slow
def test_one_bad_client_is_rejected_and_spoils_nothing(tmp_path):
    def bad(app):
        def call(message, context):
            reply = app(message, context)
            if context.node_id == 3:
                records_of(reply.content, MetricRecord)[METRICS]["num-examples"] = -1
            return reply

        return call

    lesson = Lesson(rounds=2)
    network = lesson.learned(tmp_path, around=bad)
    assert [(record.clients, len(record.rejected)) for record in lesson.records] == [(4, 1), (4, 1)]
    assert np.isfinite(flat(network)).all()


def test_a_student_that_the_task_does_not_have_is_named_with_the_nearest():
    task = Lesson().world.task
    name = next(iter(task.students))
    with pytest.raises(ConfigError, match=f"did you mean '{name}'"):
        task.model(f"student:{name}x")
    assert task.model(f"student:{name}") is task.students[name]


def test_a_worker_process_gets_the_teacher_with_the_job(tmp_path):
    lesson = Lesson("vector")
    told = replace(SOFT, mode="soft")
    own = config_of(lesson.config, f"student:{lesson.name}", told, robust=False)
    instructions = Instructions(
        task="digits",
        spec=lesson.world.dataset.spec,
        model=own.model.name,
        noise_filter="none",
        moments=lesson.teacher.moments,
        train=replace(own.train, schedule="constant"),
        seed=0,
        update="weights",
        terms=Terms(lesson=lesson.teacher.lesson(told)),
    )
    data = lesson.world.dataset.examples
    job = Job(
        lesson.world.task, instructions, arrays_of(lesson.student), data, 0, teacher=lesson.teacher.arrays
    )
    again = frames.job_of(*frames.of_job(job), data)
    assert again.instructions == instructions
    assert digest(again.teacher) == lesson.teacher.digest
    plain = replace(job, instructions=replace(instructions, terms=Terms()), teacher=None)
    assert frames.job_of(*frames.of_job(plain), data).teacher is None
