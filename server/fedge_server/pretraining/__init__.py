"""A global model is trained on the server's own data, by several processes, before any device takes part.

Read `training` first: one round, shared out. `preparing` makes the run and its round 0 in a registry,
`launching` starts the processes and says what became of them, `worker` is what each of them runs, and
`chronicle` what the first of them writes down.
"""

from __future__ import annotations
