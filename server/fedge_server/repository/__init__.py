"""A TUF repository of model releases: its keys, its rules, and a publisher that a kill cannot hurt."""

from fedge_server.repository.content_keys import ContentKeys
from fedge_server.repository.edits import TopRole
from fedge_server.repository.keys import (
    FileSigning,
    create_key,
    load_key,
    load_public,
    passphrase_in,
    public_pem,
)
from fedge_server.repository.lifetimes import Lifetimes
from fedge_server.repository.policy import Policy, reasons_against
from fedge_server.repository.repository import Repository
from fedge_server.repository.signing import Evidence, Request, RoleKeys, Sealed, Signing
from fedge_server.repository.status import RoleStatus

__all__ = [
    "ContentKeys",
    "Evidence",
    "FileSigning",
    "Lifetimes",
    "Policy",
    "Repository",
    "Request",
    "RoleKeys",
    "RoleStatus",
    "Sealed",
    "Signing",
    "TopRole",
    "create_key",
    "load_key",
    "load_public",
    "passphrase_in",
    "public_pem",
    "reasons_against",
]
