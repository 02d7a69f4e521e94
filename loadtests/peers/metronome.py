"""An engine that takes next to nothing: at each beat every stream gets one token.

It is what a router or a front end is measured with, so that the engine is not: no scheduler, no KV blocks, and what a
stream is sent is rendered once. Requests join as in a real engine's steps: who comes during one is in the next, who
comes while nothing runs begins at once. With beats of 0 ms the next follows as soon as the event loop has turned. It
reports the prompts it has seen as cached, the oldest forgotten first, and what its steps computed.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import msgspec
from kvlane.v1 import inference_pb2 as pb

from engine.base import Abort, StreamOut
from engine.cache_ledger import CacheLedger, Watcher
from engine.cache_report import CacheFeed
from router.errors import InvalidRequest, KvlaneError, PathNotFound, ReplicaLost
from router.lane.frames import Submit, unpack_chain
from router.types import CacheMode, EngineInfo, Headers, Load, ModelCard, RouteInfo, Rpc

PATH: Final = "/v1/completions"
MAX_LAG_S: Final = 1.0
"""Held up longer than this it goes on from now instead of catching up."""
BLOCK_TOKENS: Final = 64
KEPT_BLOCKS: Final = 100_000
"""Prefix blocks of prompts that are said to be cached."""
_SSE: Final[Headers] = (("content-type", "text/event-stream; charset=utf-8"),)
_EVENT: Final = (
    b'data: {"id":"cmpl-%b","object":"text_completion","created":1795330117,"model":"%b","choices":[{"index":0,'
    b'"text":"k42 ","logprobs":null,"finish_reason":%b,"stop_reason":null}]}\n\n'
)
_DONE: Final = b"data: [DONE]\n\n"
_MAX_TOKENS: Final = re.compile(rb'"max_tokens": *(\d+)')
_WORD: Final = pb.GenerateResponse(text="k42 ", token_ids=[42]).SerializeToString()
_LAST_WORD: Final = pb.GenerateResponse(text="k42 ", token_ids=[42], finish_reason="length").SerializeToString()


class MetronomeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The engine's options."""

    step_ms: float = 20.0
    """From one beat to the next."""
    spread: bool = False
    """Whether the first step is cut at random, so that engines that begin together do not go on together."""
    max_num_seqs: int = 16_384


class _Stream(msgspec.Struct):
    out: StreamOut
    left: int
    """Tokens to come."""
    piece: bytes
    last: bytes
    is_http: bool
    blocks: tuple[int, ...]
    """Of its prompt, to be reported with its first token."""
    prompt_tokens: int
    """Computed with the first token; 0 where the router did not say."""
    begun: bool = False


class _Kept(CacheLedger):
    """The prefix blocks of prompts, without ties to KV blocks, which take more than all the rest of the engine."""

    def __init__(self) -> None:
        super().__init__(BLOCK_TOKENS)
        self._depths: OrderedDict[int, int] = OrderedDict()  # Least recently asked first.
        self._feeds: list[Watcher] = []

    def watch(self, watcher: Watcher) -> None:
        self._feeds.append(watcher)

    def depth(self, block: int) -> int | None:
        return self._depths.get(block)

    def blocks(self) -> list[int]:
        return list(self._depths)

    def hold(self, blocks: tuple[int, ...]) -> None:
        """A prompt was computed. Each of its prefix blocks is taken for a KV block, which it is about the size of."""
        depths, news = self._depths, list[int]()
        for place, block in enumerate(blocks, 1):
            if block in depths:
                depths.move_to_end(block)
            else:
                depths[block] = place * BLOCK_TOKENS
                news.append(block)
        while len(depths) > KEPT_BLOCKS:
            news.append(depths.popitem(last=False)[0])
        for feed in self._feeds:
            for block in news:
                feed.changed(block)


class Metronome:
    """An `Engine`. Streamed completions over HTTP, and Generate over gRPC."""

    def __init__(self, options: MetronomeOptions, model: str) -> None:
        self._options = options
        self._step_s = options.step_ms / 1e3
        self._card = ModelCard(model, max_model_len=1 << 24)
        self._kept = _Kept()
        self._feed = CacheFeed(self._kept, CacheMode.EXACT)
        self._streams: dict[int, _Stream] = {}
        self._joining: dict[int, _Stream] = {}
        self._number = 0
        self._listeners: list[Callable[[], None]] = []
        self._handle: asyncio.Handle | None = None
        self._due = 0.0
        self._queued = 0
        """Prompt tokens of those that have not begun."""
        self._step = (0, 0)
        """Prompt tokens that the last beat computed, and how many streams it went on with."""

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()

    def info(self) -> EngineInfo:
        routes = (RouteInfo(PATH, ("POST",)),)
        return EngineInfo("sim", (self._card,), routes, self._options.max_num_seqs, 1 << 20, BLOCK_TOKENS)

    def load(self) -> Load:
        prompts, decodes = self._step
        return Load(
            len(self._streams),
            len(self._joining),
            self._queued,
            step_ms=self._options.step_ms,
            step_prefill_tokens=prompts,
            step_decodes=decodes,
        )

    def cache(self) -> CacheFeed:
        return self._feed

    def on_step(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def submit(self, call: Submit, out: StreamOut) -> Abort:
        try:
            stream = self._asked(call, out)
        except KvlaneError as error:
            out.fail(error)
            return _nothing
        self._number = number = self._number + 1
        self._joining[number] = stream
        self._queued += stream.prompt_tokens
        if self._handle is None:
            # At the end of this turn of the loop: requests that come together begin together.
            self._handle = self._loop.call_soon(self._begin)
        return lambda: self._abort(number)

    def dead(self) -> bool:
        return False

    async def check_health(self) -> None:
        """It cannot die."""

    async def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        for stream in (*self._streams.values(), *self._joining.values()):
            stream.out.fail(ReplicaLost("the engine was closed"))
        self._streams.clear()
        self._joining.clear()

    def _asked(self, call: Submit, out: StreamOut) -> _Stream:
        chain = unpack_chain(call.chain)
        blocks: tuple[int, ...] = ()
        prompt_tokens = 0
        if chain is not None:
            blocks, prompt_tokens = chain.blocks, max(1, chain.prompt_bytes // 4)
            self._feed.seen(chain.prompt_bytes, prompt_tokens)
        if call.rpc == Rpc.GRPC:
            asked = pb.GenerateRequest.FromString(call.body)
            return _Stream(out, max(1, asked.sampling.max_tokens), _WORD, _LAST_WORD, False, blocks, prompt_tokens)
        if call.path.partition("?")[0] != PATH:
            raise PathNotFound("Not Found")
        found = _MAX_TOKENS.search(call.body, max(0, call.body.rfind(b'"max_tokens"')))
        if found is None:
            raise InvalidRequest("`max_tokens` is missing.", param="max_tokens")
        id, model = call.request_id.encode(), self._card.name.encode()
        piece, last = _EVENT % (id, model, b"null"), _EVENT % (id, model, b'"length"') + _DONE
        return _Stream(out, max(1, int(found[1])), piece, last, True, blocks, prompt_tokens)

    def _abort(self, number: int) -> None:
        stream = self._streams.pop(number, None) or self._joining.pop(number, None)
        if stream is not None and not stream.begun:
            self._queued -= stream.prompt_tokens

    def _begin(self) -> None:
        self._due = self._loop.time()
        if self._options.spread:
            self._due -= random.random() * self._step_s
        self._join()

    def _join(self) -> None:
        """Those who came go into the next beat; without any there is none."""
        self._streams.update(self._joining)
        self._joining.clear()
        if not self._streams:
            self._handle = None
        elif not self._step_s:
            self._handle = self._loop.call_soon(self._beat)
        else:
            now = self._loop.time()
            if now - self._due > MAX_LAG_S:
                self._due = now
            # From when the last one should have been: delays do not add up.
            self._due += self._step_s
            self._handle = self._loop.call_at(self._due, self._beat)

    def _beat(self) -> None:
        streams = self._streams
        prompts, begun, decoded = 0, 0, len(streams)
        for number, stream in list(streams.items()):
            out, left = stream.out, stream.left - 1
            if not stream.begun:
                if number not in streams:
                    continue  # Aborted by an output of this very beat.
                prompts += stream.prompt_tokens
                begun += 1
                self._opened(stream)
            if left:
                stream.left = left
                out.data(stream.piece, 1)
            else:
                streams.pop(number, None)
                out.data(stream.last, 1)
                out.end("length")
        self._step = (prompts, decoded - begun)
        self._join()
        for listener in self._listeners:
            listener()

    def _opened(self, stream: _Stream) -> None:
        stream.begun = True
        self._queued -= stream.prompt_tokens
        if stream.blocks:
            self._kept.hold(stream.blocks)
        if stream.is_http:
            stream.out.head(200, _SSE)


def _nothing() -> None:
    """The abort of a stream that never was."""
