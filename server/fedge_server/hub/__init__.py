"""The hub: connections of devices, a durable queue, and the processes of runs. It imports no torch."""
