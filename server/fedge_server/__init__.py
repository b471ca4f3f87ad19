"""The cloud side of fedge: rounds, compression, registry and releases."""
