"""The audit trail: one chain, whoever writes, and every way of tampering with it is found."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fedge.errors import UserError
from fedge_server.registry import schema
from fedge_server.registry.database import Registry
from fedge_server.registry.engine import writing
from fedge_server.rollout.audit import GENESIS, Anchor, Audit, append


def write(registry: Registry, *what: str, at: float = 1.5) -> None:
    for each in what:
        with writing(registry.engine) as connection:
            append(connection, at=at, who="ann", what=each, subject="micro-1", why="because")


@pytest.fixture
def audit(registry: Registry) -> Audit:
    write(registry, "a", "b", "c", "d", "e")
    return Audit(registry.engine)


def test_an_entrys_digest_is_that_of_its_canonical_json(audit: Audit) -> None:
    first, second = audit.entries()[:2]
    text = (
        '{"at_ms":1500,"number":1,"previous":"' + GENESIS + '","subject":"micro-1","what":"a",'
        '"who":"ann","why":"because"}'
    )
    assert first.digest == hashlib.sha256(text.encode()).hexdigest() == second.previous
    assert json.loads(text)["number"] == first.number == 1


def test_a_whole_trail_holds_and_tells_its_head(audit: Audit) -> None:
    verdict = audit.verify()
    assert (verdict.entries, verdict.broken) == (5, None)
    assert verdict.head == Anchor(5, audit.entries()[-1].digest)
    assert audit.verify(verdict.head).broken is None
    assert Anchor.parse(str(verdict.head)) == verdict.head


@pytest.mark.slow
def test_an_empty_trail_holds(registry: Registry) -> None:
    assert (Audit(registry.engine).verify().entries, Audit(registry.engine).verify().head) == (0, None)


table = schema.audit
Tamper = Callable[[sa.Connection], Any]


def forged(connection: sa.Connection) -> None:
    """Somebody changes an entry and its digest, but not the entries after it."""
    row = connection.execute(sa.select(table).where(table.c.number == 3)).mappings().one()
    fields = {name: row[name] for name in row if name != "digest"} | {"who": "bob"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    connection.execute(table.update().where(table.c.number == 3).values(who="bob", digest=digest))


def swapped(connection: sa.Connection) -> None:
    for old, new in ((2, 99), (3, 2), (99, 3)):
        connection.execute(table.update().where(table.c.number == old).values(number=new))


def put_before(connection: sa.Connection) -> None:
    row = dict(connection.execute(sa.select(table).where(table.c.number == 1)).mappings().one())
    connection.execute(table.insert().values(**row | {"number": 0}))


@pytest.mark.parametrize(
    ("tamper", "broken", "why"),
    [
        (lambda c: c.execute(table.update().where(table.c.number == 2).values(why="x")), 2, "was changed"),
        (lambda c: c.execute(table.update().where(table.c.number == 4).values(at_ms=1)), 4, "was changed"),
        (lambda c: c.execute(table.delete().where(table.c.number == 3)), 3, "missing: the next one is 4"),
        (lambda c: c.execute(table.delete().where(table.c.number == 1)), 1, "missing: the next one is 2"),
        (forged, 4, "does not follow"),
        (swapped, 2, "does not follow"),
        (put_before, 1, "missing: the next one is 0"),
    ],
)
def test_the_first_entry_that_does_not_hold_is_found(
    registry: Registry, audit: Audit, tamper: Tamper, broken: int, why: str
) -> None:
    with writing(registry.engine) as connection:
        tamper(connection)
    verdict = audit.verify()
    assert (verdict.broken, verdict.entries) == (broken, broken - 1)
    assert why in verdict.why


def test_entries_cut_off_at_the_end_are_found_by_an_anchor_alone(registry: Registry, audit: Audit) -> None:
    head = audit.verify().head
    assert head
    with writing(registry.engine) as connection:
        connection.execute(table.delete().where(table.c.number >= 4))
    assert audit.verify().broken is None
    assert (audit.verify(head).broken, audit.verify(head).entries) == (4, 3)
    assert "entries up to 5 were there once" in audit.verify(head).why
    write(registry, "d", "other")  # and written anew
    assert (audit.verify(head).broken, audit.verify(Anchor(4, head.digest)).broken) == (5, 4)


def test_a_clock_that_is_set_back_stands_still_in_the_trail(registry: Registry, audit: Audit) -> None:
    write(registry, "f", at=0.5)
    assert [entry.at_ms for entry in audit.entries(last=2)] == [1500, 1500]


def test_text_that_a_database_would_refuse_or_that_has_no_end_is_cut(registry: Registry) -> None:
    write(registry, "a\0b" + "\ud800" + "x" * 5000)
    audit = Audit(registry.engine)
    (entry,) = audit.entries()
    assert (entry.what[:4], len(entry.what)) == ("ab?x", 255)
    assert audit.verify().broken is None


def test_entries_can_be_had_by_subject_and_number(registry: Registry, audit: Audit) -> None:
    with writing(registry.engine) as connection:
        append(connection, at=2.0, who="bob", what="f", subject="board-1", why="")
    assert [entry.what for entry in audit.entries("board-1")] == ["f"]
    assert [entry.what for entry in audit.entries("micro-1", 2)] == ["d", "e"]


@pytest.mark.parametrize("text", ["", "5", "5:abc", f"0:{'a' * 64}", f"-1:{'a' * 64}", f"x:{'a' * 64}"])
def test_an_anchor_is_a_number_and_a_digest(text: str) -> None:
    with pytest.raises(UserError, match="must be NUMBER:DIGEST"):
        Anchor.parse(text)


def test_what_is_rolled_back_leaves_no_entry(registry: Registry, audit: Audit) -> None:
    def fails() -> None:
        with writing(registry.engine) as connection:
            append(connection, at=2.0, who="ann", what="f", subject="x", why="")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert audit.verify().entries == 5


@pytest.mark.slow
def test_processes_that_append_at_once_keep_one_chain(tmp_path: Path, database_url: str | None) -> None:
    Registry.open(tmp_path, database_url).close()
    script = (
        "import sys; from pathlib import Path; from fedge_server.registry.database import Registry\n"
        "from fedge_server.registry.engine import writing; from fedge_server.rollout.audit import append\n"
        "sys.stdin.readline()\n"
        "with Registry.open(Path(sys.argv[1]), sys.argv[2] or None) as r:\n"
        "    for number in range(40):\n"
        "        with writing(r.engine) as c:\n"
        "            append(c, at=number, who=sys.argv[3], what=str(number), subject='s', why='')"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), database_url or "", who], stdin=subprocess.PIPE
        )
        for who in ("ann", "bob")
    ]
    for process in started:
        process.stdin.write(b"go\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    for process in started:
        process.communicate()
    assert [process.returncode for process in started] == [0, 0]
    with Registry.open(tmp_path, database_url) as registry:
        audit = Audit(registry.engine)
        assert (audit.verify().entries, audit.verify().broken) == (80, None)
        by_bob = [int(entry.what) for entry in audit.entries() if entry.who == "bob"]
    assert by_bob == list(range(40))
