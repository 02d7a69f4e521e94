"""Ray API that is not public: running functions inside actors whose class is not ours, parts of request routers, and
asking a cluster's head whether it takes this process.

A Serve replica is an actor of Serve's own class, so a lane over actor calls and the watch for an actor's death need
functions that run there beside Serve's methods. `__ray_call__` does that, and Serve neither counts nor queues such
calls, so they do not hold a replica back from draining. Its form with a stream of results has no public name yet.
The one other module with such API is `router.ray_driver`. Ray 2.56 to 2.60 agree on all of it; `check_version` refuses
others.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from router.errors import ConfigError

OLDEST: Final = (2, 56)
NEWEST: Final = (2, 60)

P = ParamSpec("P")
T = TypeVar("T")


def check_version(version: str = ray.__version__) -> None:
    """Raises `ConfigError` for a Ray version that this module was not tried with."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if not OLDEST <= (major, minor) <= NEWEST:
        tried = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
        raise ConfigError(f"Ray {version} is installed, and kvlane was tried with {tried}")


class RayRefused(ConnectionRefusedError):
    """The cluster's head does not take this process, and will not before somebody changes something."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind
        """``token`` or ``tls``."""


def knock(address: str, timeout_s: float) -> None:
    """Asks the head at that address (HOST:PORT) for its name, as Ray does first, with this process's token and TLS.

    Ray itself would ask for 20 s, and then not say why it may not join. Raises `RayRefused`, or `ConnectionError` where
    there is no answer.
    """
    channel = None
    try:
        # A token in a file may have been put right since the last time.
        AuthenticationTokenLoader.instance().reset_cache()
        channel = init_grpc_channel(address, [("grpc.enable_retries", 0)])
        channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=timeout_s)
    except AuthenticationError as error:
        raise RayRefused(f"this process has no Ray token: {reason(error)}", "token") from error
    except grpc.RpcError as error:
        raise _refusal(address, error) from error
    except (RuntimeError, OSError) as error:
        raise RayRefused(f"this process's TLS for Ray cannot be used: {reason(error)}", "tls") from error
    finally:
        if channel is not None:
            channel.close()


def _refusal(address: str, error: Any) -> ConnectionError:
    code, details = error.code(), error.details() or ""
    tls = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        hint = "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
        return RayRefused(f"the Ray cluster at {address} refuses this process's token; {hint}", "token")
    if tls and "handshake" in details.lower():
        hint = "is its head without TLS, or with a certificate that RAY_TLS_CA_CERT did not sign or that is for others?"
        return RayRefused(f"no TLS with the Ray cluster at {address}; {hint}", "tls")
    hint = "" if tls else "; it may want TLS (RAY_USE_TLS)" if "Socket closed" in details else ""
    return ConnectionError(f"no Ray cluster answers at {address}: {code.name.lower()}{hint}")


def kind(error: Exception) -> str:
    """Of a failure to reach the cluster: ``token``, ``tls``, ``timeout`` or ``unreachable``, for metrics."""
    if isinstance(error, RayRefused):
        return error.kind
    if isinstance(error, TimeoutError):
        return "timeout"
    return "token" if isinstance(error, AuthenticationError) else "unreachable"


def call(actor: Any, function: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> Any:
    """Runs a plain function of an importable module in the actor's process, with the actor's object first.

    It runs beside the actor's event loop, on another thread. Returns an awaitable, which is a Ray object reference.
    """
    # No task events: one record per call at the cluster's head would cost more than the call.
    return actor.__ray_call__.options(enable_task_events=False).remote(function, *args, **kwargs)


def stream(
    actor: Any, function: Callable[Concatenate[Any, P], AsyncIterator[T]], *args: P.args, **kwargs: P.kwargs
) -> Any:
    """Runs an async generator function on the actor's event loop; returns an async iterator of object references.

    `ActorMethod.options(num_returns="streaming")` looks at `__ray_call__` itself, which is no generator, and refuses;
    what `.remote()` calls underneath does not look.
    """
    method = actor.__ray_call__
    return method._remote(
        args=(function, *args), kwargs=kwargs, num_returns="streaming", max_task_retries=0, enable_task_events=False
    )


def power_of_two() -> Any:
    """Serve's own request router. Its `choose_replicas` works on any router with the mixins for locality and
    multiplexing, and Ray's others call it so too."""
    from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter

    return PowerOfTwoChoicesRequestRouter


def with_version(deployment: Any, version: str) -> Any:
    """The Serve deployment with a version of our own.

    Serve makes one up for each deploy, and then replaces all replicas though nothing has changed. It replaces those of
    another version, and by the way those whose resources have changed; for the rest it does what is new in place.
    """
    return deployment.options(version=version, _internal=True)


def forget_serve() -> None:
    """Lets go of the controller that Serve's functions remember, so that one that was started since is found."""
    from ray.serve.context import _set_global_client

    _set_global_client(None)


def reason(error: Exception) -> str:
    """One line that says why a Ray call failed; Ray's own texts hold whole tracebacks."""
    lines = str(getattr(error, "cause", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
