"""A vLLM engine's cache when things go wrong or prompts are long: the engine goes on, and routers hear what is lost."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import vllm_cache
from engine.vllm_args import serve_words
from engine.vllm_cache import VllmCache, serving
from router.errors import ConfigError
from router.lane.frames import Submit, pack_chain
from router.prefix.hashing import Hasher
from router.types import Chain, Request, Rpc
from tests.fakes import eventually
from tests.unit.test_vllm_events import Engine, Publisher, batch, config, events, request, stored

zmq = pytest.importorskip("zmq")

pytestmark = pytest.mark.vllm

PATH = "/v1/completions"
LONG = 32
FOREIGN = pack_chain(Chain(16, 7, (1, 2), 40))

Followed = tuple[VllmCache, Engine, Publisher]


@pytest.fixture
async def followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Followed]:
    monkeypatch.setattr(vllm_cache, "LONG_PROMPT", LONG)
    endpoint = f"ipc://{tmp_path}/e"
    publisher, cache, engine = Publisher(endpoint, "t"), VllmCache(), Engine(endpoint)
    cache.configure(config(events=events()))
    await cache.follow(engine, SimpleNamespace())
    yield cache, engine, publisher
    cache.close()
    publisher.close()


def known(cache: VllmCache) -> tuple[str, str]:
    assert cache.feed is not None
    return cache.feed.mode, cache.feed.cause


def raising(*args: Any) -> Any:
    raise RuntimeError("a defect")


def submit(tokens: list[int], chain: bytes | None = None) -> Submit:
    body = json.dumps({"model": "m", "prompt": tokens}).encode()
    made = Hasher(16, 1 << 20).chain(Request("r", "m", Rpc.HTTP, PATH, body))
    return Submit(1, "r", Rpc.HTTP, "POST", PATH, (), body, chain=pack_chain(made) if chain is None else chain)


async def ask(engine: Engine, id: str, tokens: list[int], chain: bytes | None = None) -> None:
    with serving(submit(tokens, chain)):
        engine.output_processor.add_request(request(id, tokens))
        await asyncio.sleep(0)


async def test_a_step_that_cannot_be_followed_does_not_reach_vllm(
    followed: Followed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, _, _ = followed
    monkeypatch.setattr(cache.work, "step", raising)
    stats = SimpleNamespace(iteration_details=SimpleNamespace(num_ctx_tokens=1, num_generation_requests=1))
    assert cache.stepped(stats, None)
    assert known(cache) == ("approximate", "a step could not be followed: RuntimeError: a defect")
    cache.stepped(None, None)
    assert sum("could not be followed" in record.getMessage() for record in caplog.records) <= 2
    assert sum(record.exc_info is not None for record in caplog.records) == 1


async def test_an_event_that_cannot_be_followed_ends_exactness(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, _, publisher = followed
    publisher.publish(batch(stored([1], None, [1, 2, 3, 4])))
    await eventually(lambda: cache._ledger.held == 1)
    monkeypatch.setattr(cache._identity, "stored", raising)
    publisher.publish(batch(stored([2], None, [5, 6, 7, 8])))
    await eventually(lambda: known(cache)[0] == "approximate")
    assert known(cache)[1] == "an event batch could not be followed: RuntimeError: a defect"
    assert cache._ledger.held == 0
    cache.stepped(None, None)


async def test_a_queue_that_cannot_be_counted_is_empty(followed: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _, _ = followed
    monkeypatch.setattr(cache.work, "queued", raising)
    assert cache.queued() == (0, 0.0)
    assert known(cache)[0] == "approximate"


async def test_requests_that_are_not_followed_end_exactness_until_others_are(
    followed: Followed, caplog: pytest.LogCaptureFixture
) -> None:
    cache, engine, _ = followed
    for number in range(5):
        assert known(cache) == ("exact", "")
        await ask(engine, f"a{number}", list(range(10)), FOREIGN)
    assert known(cache)[0] == "approximate"
    assert "the router made another chain of its prompt" in known(cache)[1]
    assert sum("not followed" in record.getMessage() for record in caplog.records) == 1
    for number in range(100):
        await ask(engine, f"b{number}", list(range(10)))
    assert known(cache) == ("exact", "")


async def test_defects_in_placing_count_and_requests_without_a_chain_do_not(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, engine, _ = followed
    for number in range(20):
        await ask(engine, f"a{number}", list(range(10)), b"")
    monkeypatch.setattr(cache._aligner, "ends", raising)
    for number in range(20):
        await ask(engine, f"b{number}", list(range(10)), b"")
    assert known(cache) == ("exact", "")
    for number in range(5):
        await ask(engine, f"c{number}", list(range(10)))
    assert "a defect" in known(cache)[1]


async def test_a_long_prompt_is_placed_off_the_loop(followed: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, engine, publisher = followed
    tokens = list(range(LONG))
    publisher.publish(batch(stored([1, 2], None, tokens[:8])))
    await eventually(lambda: cache._ledger.held == 2)
    threads = list[str]()
    read = cache._aligner_of_long_ones.ends

    def ends(*args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return read(*args)

    monkeypatch.setattr(cache._aligner_of_long_ones, "ends", ends)
    await ask(engine, "a", tokens)
    await eventually(lambda: len(cache._ledger) == 2)
    assert cache.queued()[0] == LONG - 8
    assert [name.startswith("kvlane-long-prompts") for name in threads] == [True]


@pytest.fixture
def blocked(followed: Followed, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Long prompts wait in their thread until this is called."""
    cache, _, _ = followed
    gate, read = threading.Event(), cache._aligner_of_long_ones.ends

    def ends(*args: Any) -> Any:
        assert gate.wait(10)
        return read(*args)

    monkeypatch.setattr(cache._aligner_of_long_ones, "ends", ends)
    return gate.set


async def test_a_request_may_leave_while_its_long_prompt_is_read(
    followed: Followed, blocked: Callable[[], None]
) -> None:
    cache, engine, publisher = followed
    tokens = list(range(LONG))
    await ask(engine, "a", tokens)
    publisher.publish(batch(stored([1, 2], None, tokens[:8])))
    await eventually(lambda: cache._ledger.held == 2)
    del engine.output_processor.request_states["a"]
    cache.stepped(None, None)
    assert cache.queued() == (0, 0.0)
    blocked()
    await eventually(lambda: len(cache._ledger) == 2)
    assert known(cache) == ("exact", "")


async def test_closing_does_not_wait_for_long_prompts(
    followed: Followed, blocked: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    cache, engine, _ = followed
    await ask(engine, "a", list(range(LONG)))
    await ask(engine, "b", list(range(LONG)))
    cache.close()
    blocked()
    await eventually(lambda: not cache._reading)
    assert cache._ledger.ties == 0
    assert not caplog.records


async def test_a_tokenizer_without_bytes_is_told_though_the_mode_is_exact(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/e"
    publisher, cache, engine = Publisher(endpoint, "t"), VllmCache(), Engine(endpoint)
    engine.renderer.tokenizer = object()
    cache.configure(config(events=events()))
    await cache.follow(engine, SimpleNamespace())
    assert known(cache)[0] == "exact"
    assert "placed by estimate" in known(cache)[1]
    cache.close()
    publisher.close()


async def test_media_do_not_count_in_bytes_per_token(followed: Followed) -> None:
    cache, engine, _ = followed
    assert cache.feed is not None
    cursor = cache.feed.cursor()
    cursor.take()
    tokens = list(range(10))
    pictured = request("a", tokens)
    pictured.mm_features = [SimpleNamespace(identifier="x", mm_position=SimpleNamespace(offset=0, length=2))]
    with serving(submit(tokens)):
        engine.output_processor.add_request(pictured)
        await asyncio.sleep(0)
    assert cursor.take() is None
    await ask(engine, "b", tokens)
    report = cursor.take()
    assert report is not None
    assert report.prompt_tokens == 10


class Replaying(threading.Thread):
    """The replay end of a publisher, which keeps all that was published."""

    def __init__(self, endpoint: str, kept: list[bytes]) -> None:
        super().__init__(daemon=True)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(endpoint)
        self._kept = kept

    def run(self) -> None:
        client, _, start = self._socket.recv_multipart()
        for number in range(int.from_bytes(start, "big"), len(self._kept)):
            self._socket.send_multipart((client, b"", b"t", number.to_bytes(8, "big"), self._kept[number]))
        self._socket.send_multipart((client, b"", b"", b"\xff" * 8, b""))

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()


@pytest.mark.parametrize(("kept", "mode"), [(3, "exact"), (0, "approximate")])
async def test_missing_batches_are_asked_for_again(tmp_path: Path, kept: int, mode: str) -> None:
    endpoint, replay = f"ipc://{tmp_path}/e", f"ipc://{tmp_path}/r"
    batches = [batch(stored([i], i - 1 if i else None, [i] * 4)) for i in range(3)]
    replaying = Replaying(replay, batches[:kept])
    publisher, cache, engine = Publisher(endpoint, "t"), VllmCache(), Engine(endpoint)
    engine.vllm_config.kv_events_config.replay_endpoint = replay
    cache.configure(config(events=events()))
    await cache.follow(engine, SimpleNamespace())
    publisher.publish(batches[0])
    publisher._number = 2
    publisher.publish(batches[2])
    await eventually(lambda: known(cache) == ("approximate", "event batch 1 is missing"))
    assert cache._ledger.held == 1
    replaying.start()
    await eventually(lambda: cache._asked_for is None)
    assert known(cache)[0] == mode
    assert cache._ledger.held == (3 if kept else 0)
    cache.close()
    publisher.close()
    replaying.join()
    replaying.close()


@pytest.mark.slow  # It imports vLLM.
async def test_vllms_own_publisher_replays_what_is_missing() -> None:
    from vllm.distributed.kv_events import BlockStored, KVEventBatch, ZmqEventPublisher

    cache, made = VllmCache(), config()
    cache.configure(made)
    settings = made.kv_events_config
    publisher = ZmqEventPublisher(
        0, settings.endpoint, settings.replay_endpoint, settings.buffer_steps, settings.hwm, topic=settings.topic
    )
    engine = Engine(settings.endpoint)
    engine.vllm_config.kv_events_config = settings
    await cache.follow(engine, SimpleNamespace())
    received = cache._socket._received
    heard, loses = list[int](), set[int]()

    def lossy(number: int, payload: bytes) -> None:
        heard.append(number)
        if number in loses:
            loses.remove(number)
        else:
            received(number, payload)

    cache._socket._received = lossy
    sent = 0
    while not heard:  # What is published before a subscription has come through is for nobody.
        publisher.publish(KVEventBatch(ts=0.0, events=[]))
        sent += 1
        await asyncio.sleep(0.01)
    await eventually(lambda: heard[-1] == sent - 1 and known(cache) == ("exact", ""))
    gaps = cache._identity.counts.gaps
    loses.add(sent + 1)
    for i in range(3):
        block = BlockStored([i], i - 1 if i else None, [i] * 4, 4, None, "GPU", None)
        publisher.publish(KVEventBatch(ts=0.0, events=[block]))
    await eventually(lambda: cache._ledger.held == 3)
    assert not loses
    assert cache._identity.counts.gaps == gaps + 1
    assert known(cache) == ("exact", "")
    cache.close()
    publisher.shutdown()


@pytest.mark.slow  # It imports vLLM.
def test_statistics_cannot_be_turned_off() -> None:
    with pytest.raises(ConfigError, match="load and cache"):
        serve_words("", {"disable-log-stats": True}, cpu=True)
    assert serve_words("", {"disable_log_stats": False}, cpu=True)


async def test_an_adapter_that_was_replaced_under_its_name_holds_nothing(followed: Followed) -> None:
    cache, engine, publisher = followed
    event = {**stored([1], None, [1, 2, 3, 4]), "lora_name": "german"}
    publisher.publish(batch(event))
    await eventually(lambda: cache._ledger.held == 1)

    def asks(path: str) -> Any:
        made = request(path, [1, 2, 3, 4, 5])
        made.lora_request = SimpleNamespace(lora_name="german", lora_path=path)
        engine.output_processor.add_request(made)
        return made

    first = asks("/adapters/one")
    assert cache._ledger.held_blocks(cache._keys(first)) == 1
    asks("/adapters/one")
    assert cache._ledger.held_blocks(cache._keys(first)) == 1
    second = asks("/adapters/two")
    assert cache._ledger.held_blocks(cache._keys(second)) == 0
    assert known(cache)[0] == "exact"
