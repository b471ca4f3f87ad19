"""Changes of who signs what: functions from the old metadata to the new, neither signed nor written here."""

from __future__ import annotations

from copy import deepcopy
from typing import Final, Literal, get_args

from tuf.api.metadata import DelegatedRole, Delegations, Root, Targets

from fedge.delivery import role_of, tier_of
from fedge.errors import UserError
from fedge.manifest import MAX_VARIANTS
from fedge_server.repository.folder import MAX_ROOTS
from fedge_server.repository.signing import RoleKeys, role_in

TopRole = Literal["root", "targets", "snapshot", "timestamp"]
TOP_ROLES: Final[tuple[TopRole, ...]] = get_args(TopRole)
_ONLINE = ("snapshot", "timestamp")


def top_role(role: str) -> TopRole | None:
    """The role if the root names its keys."""
    return next((known for known in TOP_ROLES if known == role), None)


def first_root(keys: dict[TopRole, RoleKeys]) -> Root:
    """The root of a new repository.

    Raises:
        UserError: a role has no keys, or a key is online and offline at once.
    """
    if set(keys) != set(TOP_ROLES):
        raise UserError(f"a repository needs keys for: {', '.join(TOP_ROLES)}")
    root = Root(consistent_snapshot=True)
    for role in TOP_ROLES:
        _set_keys(root, role, keys[role])
    check_separation(root, None)
    return root


def next_root(root: Root, role: TopRole | None = None, keys: RoleKeys | None = None) -> Root:
    """The root after this one, with other keys for a role.

    Raises:
        UserError: there have been too many roots.
    """
    if root.version >= MAX_ROOTS:
        raise UserError(
            f"the root has been changed {MAX_ROOTS} times, and devices follow no more; begin a new repository"
        )
    new = deepcopy(root)
    new.version += 1
    if role is not None and keys is not None:
        _set_keys(new, role, keys)
    return new


def has_keys(delegator: Root | Targets, role: str, keys: RoleKeys) -> bool:
    """Whether a role has these keys and this threshold already."""
    held = role_in(delegator, role)
    return set(held.keyids) == set(keys.ids) and held.threshold == keys.threshold


def first_targets() -> Targets:
    """A targets role that delegates to nobody yet."""
    return Targets(delegations=Delegations(keys={}, roles={}))


def with_tier(targets: Targets, tier: str, keys: RoleKeys) -> Targets:
    """With one tier more: terminating, for its own paths alone, and delegated nowhere else.

    Raises:
        UserError: it is there already, or there are too many.
    """
    role, new = role_of(tier), deepcopy(targets)
    roles = roles_of(new)
    if role in roles:
        raise UserError(f"tier {tier!r} is there already; change its keys with rotate")
    if len(roles) >= MAX_VARIANTS:
        raise UserError(f"there are {len(roles)} tiers; a release serves at most {MAX_VARIANTS}")
    roles[role] = DelegatedRole(role, [], keys.threshold, terminating=True, paths=[f"{tier}/*"])
    _set_keys(new, role, keys)
    return new


def with_tier_keys(targets: Targets, tier: str, keys: RoleKeys | None) -> Targets:
    """With other keys for a tier; None: with no key at all, so that devices accept nothing for it.

    Raises:
        UserError: there is no such tier.
    """
    role, new = role_of(tier), deepcopy(targets)
    role_in(new, role)
    _set_keys(new, role, keys)
    return new


def roles_of(targets: Targets) -> dict[str, DelegatedRole]:
    """The roles of the tiers, by name."""
    delegations = targets.delegations
    return {} if delegations is None or delegations.roles is None else delegations.roles


def check_separation(root: Root, targets: Targets | None) -> None:
    """No key serves online and offline, or two tiers: a stolen one would reach further than its role.

    Raises:
        UserError: one does.
    """
    online = {key for role in _ONLINE for key in root.roles[role].keyids}
    held: dict[str, str] = {
        key: role for role in TOP_ROLES if role not in _ONLINE for key in root.roles[role].keyids
    }
    for key, role in held.items():
        if key in online:
            raise UserError(f"key {key[:8]} of {role} is an online key too; each needs keys of its own")
    for role, delegated in ({} if targets is None else roles_of(targets)).items():
        for key in delegated.keyids:
            if key in online or key in held:
                other = held.get(key, "snapshot or timestamp")
                raise UserError(
                    f"key {key[:8]} of tier {tier_of(role)!r} signs for {other} too; make a new one"
                )
            held[key] = role


def _set_keys(delegator: Root | Targets, role: str, keys: RoleKeys | None) -> None:
    found = role_in(delegator, role)
    for key_id in list(found.keyids):
        delegator.revoke_key(key_id, role)
    for key in () if keys is None else keys.keys:
        delegator.add_key(key, role)
    found.threshold = 1 if keys is None else keys.threshold
