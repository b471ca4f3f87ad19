"""The test's side of the gated task: who waits, and who may go on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from federation import is_alive, wait_for

TASK = "gated_task:TASK"


@dataclass(frozen=True, slots=True)
class Gate:
    """A folder of marks, beside the task's module."""

    folder: Path

    @classmethod
    def install(cls, federation: Path) -> Gate:
        """Put the task into a federation's folder, its gate closed."""
        shutil.copyfile(Path(__file__).with_name("gated.py"), federation / "gated_task.py")
        (federation / "gate").mkdir()
        return cls(federation / "gate")

    def waiting(self) -> list[Path]:
        """Marks of trainings that wait now."""
        marks = [path for path in self.folder.iterdir() if path.name[0].isdigit() and not path.suffix]
        return [
            mark
            for mark in marks
            if not mark.with_suffix(".pass").exists() and is_alive(int(mark.name.partition("-")[0]))
        ]

    def wait(self, count: int) -> None:
        """Until so many trainings wait."""
        wait_for(lambda: len(self.waiting()) >= count, f"{count} trainings have begun")

    def pass_one_round(self, count: int) -> None:
        """Let exactly those go on that wait, once there are so many."""
        self.wait(count)
        for mark in self.waiting():
            mark.with_suffix(".pass").touch()

    def open(self) -> None:
        """Nobody waits any more."""
        (self.folder / "open").touch()

    def close(self) -> None:
        """Everybody waits again."""
        (self.folder / "open").unlink(missing_ok=True)
