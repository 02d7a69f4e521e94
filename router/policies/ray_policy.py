"""Any request router of Ray Serve as a policy."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from router.types import Decision, Reason, Request, Snapshot

if TYPE_CHECKING:
    from router.ray_driver import Driver

POWER_OF_TWO: Final = "ray.serve._private.request_router.pow_2_router:PowerOfTwoChoicesRequestRouter"
MAX_POOLS: Final = 64
"""Models, LoRA adapters among them, for which a router is kept; of more, those asked for last."""


class RayPolicy:
    """Sends each request where a Ray Serve request router would, such as Ray's own power-of-two or prefix-aware one.

    There is one such router for each model; Ray has one for each deployment.
    """

    affinity = True  # Some of them keep requests together.

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"router": "class"}):
        router: Annotated[str, msgspec.Meta(min_length=1)] = POWER_OF_TWO
        """Where the class is: ``module:name`` or ``module.name``. Ray's default."""
        kwargs: dict[str, Any] = {}
        """As `RequestRouterConfig.request_router_kwargs`: what its `initialize_state` gets."""

    def __init__(self, options: Options, random: random.Random) -> None:
        """Raises `ValueError` for a class that is no request router or does not take the `kwargs`."""
        from router import ray_driver  # Ray takes a second to import

        self._new = ray_driver.Driver
        self._class = ray_driver.load(options.router)
        self._kwargs = options.kwargs
        self._random = random
        self._drivers: OrderedDict[str, Driver] = OrderedDict()
        try:
            self._new(self._class, self._kwargs, "check")
        except Exception as error:  # whatever a foreign class raises is the reason why it cannot be used
            raise ValueError(f"{options.router} does not start: {type(error).__name__}: {error}") from error

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        # Ray's routers draw from Python's own source of chance; seeded and given back, it leaves no trace.
        state = random.getstate()
        random.seed(self._random.getrandbits(64))
        try:
            chosen, *others = self._driver(snapshot.model).choose(request, snapshot.replicas)
        finally:
            random.setstate(state)
        depth = next(view.queue_depth for view in snapshot.replicas if view.replica == chosen)
        reason = Reason.POLICY if len(snapshot.replicas) > 1 else Reason.ONLY_REPLICA
        return Decision(chosen, reason, tuple(others), depth)

    def _driver(self, model: str) -> Driver:
        driver = self._drivers.get(model)
        if driver is None:
            driver = self._drivers[model] = self._new(self._class, self._kwargs, model)
            if len(self._drivers) > MAX_POOLS:
                self._drivers.popitem(last=False)
        else:
            self._drivers.move_to_end(model)
        return driver
