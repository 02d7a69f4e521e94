"""The thread that wakes a model, with a stand-in for its Serve handle."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from router.membership import waker
from router.membership.waker import Caller

DEADLINE_S = 10.0


class Handle:
    """One to a deployment that cannot be had."""

    def __init__(self) -> None:
        self.calls = 0
        self.ended = False

    def remote(self, router: str, held: int) -> Handle:
        assert not self.ended
        self.calls += 1
        return self

    def result(self, timeout_s: float) -> None:
        raise RuntimeError("the deployment has failed")

    def cancel(self) -> None: ...

    def shutdown(self) -> None:
        self.ended = True
        raise RuntimeError("Serve is away")


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_handle_that_fails_is_ended_before_another_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Handle] = []

    def get(deployment: str, application: str) -> Handle:
        assert all(handle.ended for handle in made), "it would go on reporting to Serve for ever"
        made.append(Handle())
        return made[-1]

    monkeypatch.setattr(waker, "PAUSE_S", 0.01)
    monkeypatch.setattr(waker, "LINGER_S", 0.01)
    monkeypatch.setattr(waker, "ray", SimpleNamespace(is_initialized=lambda: True))  # Ray itself shall know better.
    monkeypatch.setattr("ray.serve.get_deployment_handle", get)
    caller = Caller("kvlane-a", "router")
    caller.want(1)
    wait_until(lambda: len(made) >= 3)
    caller.close()
    wait_until(lambda: not caller._running)
    assert all(handle.calls == 1 for handle in made)
    assert made[0].ended
