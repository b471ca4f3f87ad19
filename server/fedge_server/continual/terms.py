"""`learn.toml`: when the server learns again, what a run begins with, and how its release is rolled out."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal

from fedge.config import Config, suggestion
from fedge.errors import UserError
from fedge.files import read_bounded
from fedge_server.continual.state import Policy
from fedge_server.rollout.plan import MAX_PLAN_BYTES, Plan

Begin = Literal["newest", "anew"]
_OWN: Final = ("begin", "remember", "rollout")
_WHOLE: Final = ("most_cycles", "new_examples")  # the policy's numbers that count


@dataclass(frozen=True, slots=True)
class Terms:
    """The whole file."""

    policy: Policy = field(default_factory=Policy)
    begin: Begin = "newest"  # a run's weights: of the release that devices have, or as its configuration says
    remember: float | None = (
        None  # `model.remember` of a run that begins with a release; None: configuration's
    )
    plan: Plan | None = None  # of rollouts; None: `fleet.default_plan`

    def config(self, config: Mapping[str, Any], version: int) -> dict[str, Any]:
        """What a cycle's run learns.

        Args:
            config: of the learning, as `Config.to_mapping` gives it.
            version: of the release that devices have; 0: none.

        Raises:
            ConfigError: the two do not go together.
        """
        values = dict(config)
        if self.begin == "newest" and version:
            model = {key: value for key, value in config.get("model", {}).items() if key != "distil_from"}
            model["start"] = f"release:{version}"
            if self.remember is not None:
                model["remember"] = self.remember
            values["model"] = model
        return Config.from_mapping(values).to_mapping()

    def to_json(self) -> dict[str, Any]:
        """What `from_mapping` reads."""
        values = asdict(self.policy) | {"begin": self.begin, "remember": self.remember}
        known = {key: value for key, value in values.items() if value is not None}
        return known | ({"rollout": self.plan.to_json()} if self.plan else {})

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Terms:
        """Terms as their file or the database holds them.

        Raises:
            UserError: a key is unknown, of another type, or out of range.
        """
        policy = {each.name: values[each.name] for each in fields(Policy) if each.name in values}
        for key in values:
            if key not in policy and key not in _OWN:
                valid = [*(each.name for each in fields(Policy)), *_OWN]
                raise UserError(f"learn: unknown key {key!r}: {suggestion(key, valid)}")
        for key, value in policy.items():
            _check(key, value)
        begin, remember, plan = values.get("begin", "newest"), values.get("remember"), values.get("rollout")
        if begin not in ("newest", "anew"):
            raise UserError(f"learn: begin = {begin!r}: must be 'newest' or 'anew'")
        if remember is not None:
            _check("remember", remember)
            if not 0 <= remember < 1:
                raise UserError(f"learn: remember = {remember:g}: must be 0 to below 1")
        if plan is not None and not isinstance(plan, Mapping):
            raise UserError(
                "learn: rollout must be a table, with [[rollout.stages]] and [rollout.criteria.NAME]"
            )
        return cls(Policy(**policy), begin, remember, None if plan is None else Plan.from_mapping(plan))

    @classmethod
    def load(cls, path: Path) -> Terms:
        """Read a TOML file.

        Raises:
            UserError: it is absent, no TOML, or cannot be used.
        """
        if not path.is_file():
            raise UserError(f"policy {path}: there is no such file")
        try:
            return cls.from_mapping(tomllib.loads(read_bounded(path, MAX_PLAN_BYTES).decode()))
        except (ValueError, UserError) as error:
            raise UserError(f"policy {path}: {error}") from error


def _check(key: str, value: Any) -> None:
    """Refuse a value of another type."""
    if key == "drift":
        if not isinstance(value, bool):
            raise UserError(f"learn: {key} = {value!r}: must be true or false")
        return
    kinds, word = ((int,), "a whole number") if key in _WHOLE else ((int, float), "a number")
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise UserError(f"learn: {key} = {value!r}: must be {word}")
