"""From variants that passed their gate to signed releases in the repository, and back from a device."""

from fedge_server.release.place import KEYS, REPOSITORY, ReleasePlace
from fedge_server.release.publishing import Published, Waiting, draft_again, publish_draft

__all__ = [
    "KEYS",
    "REPOSITORY",
    "Published",
    "ReleasePlace",
    "Waiting",
    "draft_again",
    "publish_draft",
]
