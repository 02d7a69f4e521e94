"""The socket for vLLM's KV events, with a publisher as vLLM has one, and which engines' events are followed at all."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from engine import vllm_events
from engine.vllm_cache import VllmCache
from engine.vllm_events import KvEventSocket, connectable
from tests.fakes import DEADLINE_S, eventually

zmq = pytest.importorskip("zmq")

pytestmark = pytest.mark.vllm


def test_the_socket_is_asked_by_the_right_numbers() -> None:
    assert (vllm_events._EVENTS, vllm_events._POLLIN) == (zmq.EVENTS, zmq.POLLIN)


class Publisher:
    """Binds and publishes as vLLM's does: topic, number, payload."""

    def __init__(self, endpoint: str, topic: str = "") -> None:
        self._context = zmq.Context()
        # As PUB, and tells of subscriptions: a handshake may stand before its subscription has been read.
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.set_hwm(100_000)
        self._socket.bind(endpoint)
        self._topic = topic.encode()
        self._number = 0
        self._subscribed = False

    def publish(self, payload: bytes) -> None:
        self.send(self._topic, self._number.to_bytes(8, "big"), payload)
        self._number += 1

    def send(self, *frames: bytes) -> None:
        if not self._subscribed and self._socket.poll(1000):
            self._socket.recv()
            self._subscribed = True
        self._socket.send_multipart(frames)

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()


class Listening:
    """A subscriber and what it got."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, bytes]] = []
        self.causes: list[str] = []
        self.socket = KvEventSocket(lambda number, payload: self.batches.append((number, payload)), self.causes.append)
        self.settings = self.socket.settings()
        self.publisher = Publisher(self.settings["endpoint"])

    @property
    def folder(self) -> Path:
        return Path(self.settings["endpoint"].removeprefix("ipc://")).parent


@pytest.fixture
async def listening() -> AsyncIterator[Listening]:
    made = Listening()
    yield made
    made.socket.close()
    made.publisher.close()


async def test_every_batch_after_opening_comes_in_order(listening: Listening) -> None:
    await listening.socket.open(listening.settings["endpoint"], "")
    for number in range(2000):
        listening.publisher.publish(b"%d" % number)
    await eventually(lambda: len(listening.batches) == 2000)
    assert listening.batches == [(number, b"%d" % number) for number in range(2000)]
    assert listening.causes == []


async def test_what_came_can_be_taken_before_the_loop_turns(listening: Listening) -> None:
    await listening.socket.open(listening.settings["endpoint"], "")
    listening.publisher.publish(b"x")
    deadline = time.monotonic() + DEADLINE_S
    while not listening.batches and time.monotonic() < deadline:
        listening.socket.drain()
    assert len(listening.batches) == 1
    # And what comes later still wakes the loop, whose descriptor tells of changes only.
    listening.publisher.publish(b"y")
    await eventually(lambda: len(listening.batches) == 2)


async def test_a_message_of_another_shape_ends_it_with_a_cause(listening: Listening) -> None:
    await listening.socket.open(listening.settings["endpoint"], "")
    listening.publisher.send(b"", b"short", b"x")
    await eventually(lambda: bool(listening.causes))
    assert listening.causes == ["a message that is no KV event batch: frames of [0, 5, 1] bytes"]
    listening.publisher.publish(b"x")
    listening.socket.drain()
    assert listening.batches == []


async def test_the_folder_is_private_and_goes_with_the_socket(listening: Listening) -> None:
    assert listening.folder.stat().st_mode & 0o077 == 0
    await listening.socket.open(listening.settings["endpoint"], "")
    listening.socket.close()
    listening.socket.close()
    assert not listening.folder.exists()


async def test_nobody_at_the_endpoint_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.vllm_events._HANDSHAKE_S", 0.05)
    socket = KvEventSocket(lambda number, payload: None, lambda cause: None)
    with pytest.raises(OSError, match="no KV event publisher answers"):
        await socket.open(f"ipc://{tmp_path}/none", "")
    socket.close()


@pytest.mark.parametrize(
    ("bound", "connected"),
    [
        ("ipc:///tmp/events", "ipc:///tmp/events"),
        ("tcp://*:5557", "tcp://127.0.0.1:5557"),
        ("tcp://0.0.0.0:5557", "tcp://127.0.0.1:5557"),
        ("tcp://[::]:5557", "tcp://[::1]:5557"),
    ],
)
def test_what_vllm_binds_can_be_connected_to(bound: str, connected: str) -> None:
    assert connectable(bound) == connected


@pytest.mark.parametrize("endpoint", ["tcp://collector:5557", "tcp://*:0", "inproc://events", "tcp://*", ""])
def test_other_endpoints_are_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="cannot be followed"):
        connectable(endpoint)


def config(**changes: Any) -> Any:
    """As much of vLLM's configuration as matters here."""
    values = {"prefix_caching": True, "ranks": 1, "hybrid": False, "events": None} | changes
    return SimpleNamespace(
        observability_config=SimpleNamespace(enable_logging_iteration_details=False),
        kv_transfer_config=None,
        parallel_config=SimpleNamespace(data_parallel_size=values["ranks"]),
        cache_config=SimpleNamespace(enable_prefix_caching=values["prefix_caching"]),
        model_config=SimpleNamespace(is_hybrid=values["hybrid"]),
        kv_events_config=values["events"],
    )


def events(enabled: bool = True, publisher: str = "zmq") -> Any:
    return SimpleNamespace(enable_kv_cache_events=enabled, publisher=publisher, endpoint="tcp://*:5557", topic="t")


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"prefix_caching": False}, "prefix caching is off in vLLM"),
        ({"ranks": 2}, "2 data parallel engines with a KV cache each answer as one replica"),
        ({"hybrid": True}, "a hybrid model keeps more than one kind of KV cache"),
        ({"events": events(enabled=False)}, "kv_events_config turns KV events off"),
        ({"events": events(publisher="null")}, "kv_events_config publishes by 'null', not by 'zmq'"),
    ],
)
def test_engines_whose_events_cannot_be_followed_get_a_cause(changes: dict[str, Any], cause: str) -> None:
    cache, made = VllmCache(), config(**changes)
    given = made.kv_events_config
    cache.configure(made)
    assert cache._cause == cause
    assert made.kv_events_config is given
    cache.close()


@pytest.mark.slow  # It imports vLLM.
def test_events_are_turned_on_over_a_private_socket() -> None:
    cache, made = VllmCache(), config()
    cache.configure(made)
    assert made.kv_events_config.enable_kv_cache_events
    assert made.kv_events_config.endpoint.startswith("ipc://")
    assert made.observability_config.enable_logging_iteration_details
    cache.close()


def test_an_operators_own_publisher_is_left_as_it_is() -> None:
    cache, given = VllmCache(), events()
    made = config(events=given)
    cache.configure(made)
    assert made.kv_events_config is given
    assert cache._cause == ""
    cache.close()


class Engine:
    """An `AsyncLLM` as far as the cache looks at it; its events come from a real socket."""

    def __init__(self, endpoint: str) -> None:
        self.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(block_size=4), kv_events_config=SimpleNamespace(endpoint=endpoint, topic="t")
        )
        self.renderer = SimpleNamespace(tokenizer=None)
        self.taken: list[Any] = []
        self.output_processor = SimpleNamespace(request_states={}, add_request=self._take)

    def _take(self, request: Any, prompt: Any = None) -> None:
        self.taken.append(request)
        self.output_processor.request_states[request.request_id] = SimpleNamespace(
            prompt_len=len(request.prompt_token_ids), is_prefilling=True, num_cached_tokens=0, detokenizer=None
        )

    async def reset_prefix_cache(self) -> bool:
        return True

    def get_kv_event_sources(self) -> dict[int, Any]:
        return {}


def stored(hashes: list[int], parent: int | None, tokens: list[int]) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": 4,
        "medium": "GPU",
    }


def batch(*events: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode([0.0, list(events), 0])


@pytest.fixture
async def followed(tmp_path: Path) -> AsyncIterator[tuple[VllmCache, Engine, Publisher]]:
    """A cache that follows an operator's publisher."""
    endpoint = f"ipc://{tmp_path}/e"
    publisher, cache, engine = Publisher(endpoint, "t"), VllmCache(), Engine(endpoint)
    cache.configure(config(events=events()))
    await cache.follow(engine, SimpleNamespace())
    yield cache, engine, publisher
    cache.close()
    publisher.close()


Followed = tuple[VllmCache, Engine, Publisher]


async def test_following_begins_exact_and_a_gap_ends_it(followed: Followed) -> None:
    cache, _, publisher = followed
    assert cache.feed is not None
    assert cache.feed.mode == "exact"
    publisher.publish(batch(stored([1], None, [1, 2, 3, 4])))
    await eventually(lambda: cache._ledger.held == 1)
    publisher._number += 3
    publisher.publish(batch(stored([2], 1, [5, 6, 7, 8])))
    await eventually(lambda: cache.feed is not None and cache.feed.mode == "approximate")
    assert cache.feed.cause == "event batches 1 to 3 were lost"
    # vLLM says that it holds nothing: from there on all is known again.
    publisher.publish(batch({"type": "AllBlocksCleared"}))
    await eventually(lambda: cache.feed is not None and cache.feed.mode == "exact")


async def test_a_step_takes_the_events_that_are_here_before_its_output_is_rendered(followed: Followed) -> None:
    cache, _, publisher = followed
    publisher.publish(batch(stored([1, 2], None, [1, 2, 3, 4, 5, 6, 7, 8])))
    deadline = time.monotonic() + DEADLINE_S
    while not cache._ledger.held and time.monotonic() < deadline:
        cache.stepped(None, None)  # No await: the loop's reader cannot have done it.
    assert cache._ledger.held == 2


async def test_waiting_requests_count_less_once_their_blocks_are_stored(followed: Followed) -> None:
    cache, engine, publisher = followed
    assert cache.work is not None
    engine.output_processor.add_request(request("a", list(range(1, 11))), None)
    assert cache.work.queued()[0] == 10
    publisher.publish(batch(stored([1, 2], None, list(range(1, 9)))))
    await eventually(lambda: cache.work is not None and cache.work.queued()[0] == 2)


async def test_a_request_that_cannot_be_followed_is_served_all_the_same(
    followed: Followed, caplog: pytest.LogCaptureFixture
) -> None:
    _, engine, _ = followed
    broken = request("a", [1, 2, 3])
    broken.sampling_params = object()
    engine.output_processor.add_request(broken, None)
    assert engine.taken == [broken]
    assert "request a is not followed" in caplog.text


async def test_clients_cannot_have_cached_blocks_reported_again(followed: Followed) -> None:
    _, engine, _ = followed
    asked = request("a", [1, 2, 3])
    asked.sampling_params.extra_args = {"kv_cache_report_mode": "full", "other": 1}
    engine.output_processor.add_request(asked, None)
    assert asked.sampling_params.extra_args == {"other": 1}


async def test_a_reset_is_told_at_once_where_no_step_will_tell_of_it(followed: Followed) -> None:
    cache, engine, publisher = followed
    publisher.publish(batch(stored([1], None, [1, 2, 3, 4])))
    await eventually(lambda: cache._ledger.held == 1)
    reset: Callable[[], Any] = engine.reset_prefix_cache
    assert await reset()
    assert cache._ledger.held == 0
    publisher.publish(batch({"type": "AllBlocksCleared"}, stored([2], None, [1, 2, 3, 4])))
    await eventually(lambda: cache._ledger.held == 1)


async def test_steps_say_what_they_computed_without_a_log_line_each(followed: Followed) -> None:
    cache, _, _ = followed
    details = SimpleNamespace(num_ctx_tokens=12, num_generation_requests=3)
    stats = SimpleNamespace(iteration_details=details)
    cache.stepped(stats, SimpleNamespace(num_generation_tokens=0))
    assert cache.work is not None
    assert (cache.work.step_prefill_tokens, cache.work.step_decodes) == (12, 3)
    assert stats.iteration_details is None


def request(id: str, tokens: list[int]) -> Any:
    return SimpleNamespace(
        request_id=id,
        prompt_token_ids=tokens,
        prompt_embeds=None,
        resumable=False,
        lora_request=None,
        cache_salt=None,
        mm_features=None,
        sampling_params=SimpleNamespace(extra_args=None, n=1, skip_reading_prefix_cache=None),
        pooling_params=None,
    )
