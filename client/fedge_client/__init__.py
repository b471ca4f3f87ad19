"""The device side of fedge: training client, updater and runtime."""
