"""Membership from the configuration: replicas at fixed addresses, for tests and for clusters without Ray.

Rule: everything is read once, at start-up, so that a missing secret stops the router and not a request.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from router.errors import ConfigError
from router.membership.base import OnMembers, ReplicaRecord
from router.options import MembershipOptions, StaticReplica


class StaticMembership:
    """The replicas that the configuration names."""

    def __init__(self, options: MembershipOptions) -> None:
        """Raises `ConfigError` for two replicas of one name, none at all, or a secret that cannot be read."""
        if not options.replicas:
            raise ConfigError("membership.replicas is empty", param="membership.replicas")
        self._records: dict[str, ReplicaRecord] = {}
        for replica in options.replicas:
            if replica.name in self._records:
                raise ConfigError(f"two replicas are named {replica.name!r}", param="membership.replicas")
            self._records[replica.name] = ReplicaRecord(replica.name, replica.host, replica.port, _secret(replica))

    async def run(self, on_members: OnMembers) -> None:
        """Reports the replicas once, then waits to be cancelled."""
        on_members(self._records)
        await asyncio.get_running_loop().create_future()


def _secret(replica: StaticReplica) -> bytes:
    """The bytes of the secret's file without white space around them; no file means an empty secret."""
    if not replica.secret_file:
        return b""
    try:
        secret = Path(replica.secret_file).read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"the secret of replica {replica.name!r} cannot be read: {error}", param="membership.replicas"
        ) from error
    if not secret:
        raise ConfigError(
            f"the secret file of replica {replica.name!r} is empty: {replica.secret_file}", param="membership.replicas"
        )
    return secret
