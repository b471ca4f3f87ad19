"""The distribution service: which version is for a device, and the files that it needs for it.

service     the gRPC service, on the hub's link port
shelf       the repository's files: which a device may have, and what the newest metadata says
streams     what streams may hold in memory, together and by device
waiting     devices that wait for news
sealing     keys and deltas of versions that are sealed
deltas      what makes one version's bytes out of another's, kept for the next who asks
"""

from fedge_server.delivery.service import Distribution, Keys, no_keys
from fedge_server.delivery.shelf import Shelf

__all__ = ["Distribution", "Keys", "Shelf", "no_keys"]
