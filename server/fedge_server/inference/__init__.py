"""The global model answers devices: several releases at once, in batches, within bounded memory.

`batching` puts requests together, `models` keeps releases open, `service` is `fedge.v1.Inference`, `exports`
keeps where the models come from. Only `exporting` needs torch.
"""
