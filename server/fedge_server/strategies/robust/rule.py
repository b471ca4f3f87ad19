"""What robust rules share: they take all updates of a round and measure changes from its global state."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from fedge.wire.arrays import records_of
from fedge_server.strategies.robust.updates import Updates


class RobustRule(flower.FedAvg):
    """A strategy that makes a model of `Updates`; every client counts once, whatever examples it claims."""

    origin: ArrayRecord | None = None  # while a round is under way: there is nothing to keep with it

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember what clients start from, and ask them."""
        self.origin = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The model that `combined` makes; metrics are averaged as in every other strategy."""
        origin, self.origin = self.origin, None
        # The round loop has looked at each reply; Flower's check would do so again, at a greater cost.
        valid, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        if not valid:
            return None, None
        contents = [message.content for message in valid]
        records = [next(iter(records_of(content, ArrayRecord).values())) for content in contents]
        found = self.combined(Updates(records, origin))
        return found, self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def combined(self, updates: Updates) -> ArrayRecord:
        """The next global state."""
        raise NotImplementedError
