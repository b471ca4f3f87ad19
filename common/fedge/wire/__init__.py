"""The wire between server and devices: protobuf package `fedge.v1`; only `records` and `arrays` need flwr.

`v1/*.proto` say what travels; `make proto` generates the modules beside them.
"""

from __future__ import annotations

from typing import Final

WIRE_VERSION: Final = 2  # what this fedge speaks
OLDEST_WIRE_VERSION: Final = 1  # of a device that is still served

CHUNK_BYTES: Final = 64 * 1024  # of an object, in Fetch
PART_BYTES: Final = 32 * 1024  # of an object, in Submit: the hub keeps a buffer of this size per connection
BULK_BYTES: Final = 256 * 1024  # a larger object waits for its turn, and has a connection of its own
PING_MS: Final = 30_000  # of quiet on a connection, after which a device asks whether it still stands
TURN_S: Final = 20.0  # that a Turn may wait before it is answered; then the device asks again
MAX_MESSAGE_BYTES: Final = 4 * 1024**2  # of any one message on the link; tensors travel in chunks
MAX_OBJECT_BYTES: Final = 16 * 1024**3  # of one message's tensors together
MAX_TENSORS: Final = 20_000  # of one message
