"""What the routers are told of a vLLM engine's KV cache: its events, tied to the prompts that were submitted.

Job: has vLLM publish its KV events and follows them into the ledger; learns each prompt's tokens where vLLM's front end
takes the request, in this process; ties the prompt's prefix blocks and, when the answer is there, those of the answer;
holds what the router expected against what vLLM found cached. Rule: the feed's mode says how far that can be believed,
and a cause why not further; a request is served the same either way. `VllmCache` owns feed, ledger and socket.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, TypeAlias

from engine.alignment import Aligner, TokenBytes, agreeing_tokens
from engine.cache_ledger import CacheLedger
from engine.cache_report import CacheFeed
from engine.following import Following
from engine.kv_events import KvEvents, KvIdentity, block_keys
from engine.prompts import ForeignChain, HashedPrompt, expected_tokens, is_off, open_blocks, prompt_of
from engine.vllm_events import KvEventSocket, connectable
from engine.vllm_work import Running, VllmWork
from router.lane.frames import Submit
from router.types import CacheMode, Rpc

LONGEST_ANSWER: Final = 4096
"""Tokens of an answer that are tied when it ends, as tokenizing it anew takes 1 ms per 1,000; the rest of a longer one
is tied with the next turn's prompt."""

LONG_PROMPT: Final = 16_384
"""Tokens from which on a prompt is read and placed in a thread: it takes milliseconds, and the loop serves all."""

_REPORT_MODE: Final = "kv_cache_report_mode"

_log = logging.getLogger(__name__)


class _Asked:
    """One submit and what became of it in the engine."""

    __slots__ = ("call", "requests")

    def __init__(self, call: Submit) -> None:
        self.call: Submit | None = call
        self.requests = 0
        """How many requests vLLM made of it."""


class _Read:
    """A prompt looked into: its KV blocks' keys and, where the submit came with a chain, its prefix blocks' places."""

    __slots__ = ("ends", "keys", "prompt")

    def __init__(self, keys: Sequence[int], prompt: HashedPrompt | None, ends: tuple[int, ...]) -> None:
        self.keys = keys
        self.prompt = prompt
        self.ends = ends


_Ends: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Prefix blocks and the tokens at which they end."""

_asked: ContextVar[_Asked | None] = ContextVar("asked", default=None)
"""The submit that the running task serves. vLLM's handlers run in tasks of their own, which inherit it."""


@contextmanager
def serving(call: Submit) -> Iterator[None]:
    """What is asked of vLLM in this block, and in tasks that begin in it, is asked for `call`."""
    asked = _Asked(call)
    token = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(token)
        asked.call = None  # Tasks that live on keep the variable; not the body with it.


class VllmCache:
    """Follows one engine's KV cache. `configure`, `follow` and `close` frame its life."""

    def __init__(self) -> None:
        self.feed: CacheFeed | None = None
        """Set by `follow`."""
        self.work: VllmWork | None = None
        """The same."""
        self._socket = KvEventSocket(self._received, self._lost, self._replayed)
        self._following = Following()
        self._thread: ThreadPoolExecutor | None = None
        self._closed = False
        self._reading: set[asyncio.Future[Any]] = set()
        """Long prompts in the thread."""
        self._asked_for: int | None = None
        """The first batch of the replay under way."""
        self._failing = False
        self._estimates = False
        """Prefix blocks are placed by estimate."""
        self._mode = CacheMode.APPROXIMATE
        self._cause = ""
        """Why events are not followed at all; empty where they are."""
        self._connected = False
        self._compares = True
        self._shows_details = False
        self._parses_reasoning = False
        self._block_tokens = 0
        self._adapters: dict[str, str] = {}
        """Where each LoRA adapter that was asked for lies; an operator may put another one under its name."""
        self._states: dict[str, Any] = {}
        self._tokenizer: Any = None

    # -- the engine's life

    def configure(self, config: Any) -> None:
        """Before the engine starts: has it publish its KV events, unless there are none to be had.

        `config` is vLLM's `VllmConfig`. What the operator set in `kv_events_config` stays.
        """
        from vllm.config import KVEventsConfig

        details = config.observability_config
        self._shows_details = details.enable_logging_iteration_details
        details.enable_logging_iteration_details = True
        # What a connector brings counts as cached, though it was not in the KV cache.
        self._compares = config.kv_transfer_config is None
        ranks = config.parallel_config.data_parallel_size
        if not config.cache_config.enable_prefix_caching:
            self._mode, self._cause = CacheMode.OFF, "prefix caching is off in vLLM"
        elif ranks > 1:
            self._cause = f"{ranks} data parallel engines with a KV cache each answer as one replica"
        elif config.model_config.is_hybrid:
            self._cause = "a hybrid model keeps more than one kind of KV cache"
        elif config.kv_events_config is None:
            config.kv_events_config = KVEventsConfig(**self._socket.settings())
        elif not config.kv_events_config.enable_kv_cache_events:
            self._cause = "kv_events_config turns KV events off"
        elif config.kv_events_config.publisher != "zmq":
            self._cause = f"kv_events_config publishes by {config.kv_events_config.publisher!r}, not by 'zmq'"

    async def follow(self, engine: Any, state: Any) -> None:
        """Before the first request: subscribes, and looks on as `engine` (an `AsyncLLM`) takes requests.

        `state` is that of vLLM's application, for what it does with answers.
        """
        config = engine.vllm_config
        self._block_tokens = config.cache_config.block_size
        self._parses_reasoning = _parses_reasoning(state)
        self._ledger = CacheLedger(self._block_tokens)
        self._identity = KvIdentity(self._ledger)
        self._events = KvEvents(self._identity, replays=False)  # Until the socket says otherwise.
        self.feed = CacheFeed(self._ledger, self._mode, self._cause or "not started")
        self._tokenizer, tokens = await asyncio.to_thread(_own_tokenizer, engine)
        self._estimates = engine.renderer.tokenizer is not None and tokens is None
        self._aligner = Aligner(tokens)
        self._aligner_of_long_ones = Aligner(tokens)  # The thread's own: they learn as they go.
        if not self._cause:
            await self._subscribe(engine)
        if self._cause:
            _log.warning("what the KV cache holds is not reported: %s", self._cause)
        self._states = engine.output_processor.request_states
        self.work = VllmWork(
            self._states, self._block_tokens, self._ledger.held_blocks, self._compare, time.perf_counter
        )
        self._look_on(engine)

    def close(self) -> None:
        """Stops following. May be called more than once."""
        self._closed = True
        self._socket.close()
        for future in tuple(self._reading):
            future.cancel()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None

    async def _subscribe(self, engine: Any) -> None:
        settings = engine.get_kv_event_sources().get(0) or engine.vllm_config.kv_events_config
        replay = _replay_of(settings)
        self._events = KvEvents(self._identity, replays=bool(replay))
        try:
            await self._socket.open(connectable(settings.endpoint), settings.topic, replay)
        except (OSError, ValueError) as error:
            self._lost(str(error))
        else:
            self._connected = True
            self._judge()

    def _look_on(self, engine: Any) -> None:
        """Sees every request on its way to the engine core, and every reset of the cache.

        The instances' own methods are wrapped, which leaves vLLM's classes as they are.
        """
        take, reset = engine.output_processor.add_request, engine.reset_prefix_cache

        def add_request(request: Any, *args: Any, **kwargs: Any) -> None:
            take(request, *args, **kwargs)
            self._taken(request)

        async def reset_prefix_cache(*args: Any, **kwargs: Any) -> bool:
            before = self._identity.counts.cleared
            done: bool = await reset(*args, **kwargs)
            try:
                self._socket.drain()
                if done and not self._states and self._identity.counts.cleared == before:
                    # vLLM tells of it with its next step, which an idle engine does not make.
                    self._identity.cleared()
                    self._judge()
            except Exception as error:
                self._failed("a reset of the cache", error)
            return done

        engine.output_processor.add_request = add_request
        engine.reset_prefix_cache = reset_prefix_cache

    # -- events

    @property
    def busy_since(self) -> float:
        """When the engine last got a request after it had none, on the performance counter."""
        return self.work.busy_since if self.work is not None else 0.0

    def stepped(self, scheduler_stats: Any, iteration_stats: Any) -> bool:
        """vLLM has news: its events first, then what its requests say. Called before the news are rendered.

        Returns whether a step was behind it: vLLM also tells by itself of requests that have ended.
        """
        if self.work is None:
            return False
        details = None
        try:
            self._socket.drain()
            if scheduler_stats is not None:
                details = scheduler_stats.iteration_details
                if not self._shows_details:
                    scheduler_stats.iteration_details = None  # Else vLLM's own logger writes a line per step.
            self.work.step(details, iteration_stats.num_generation_tokens if iteration_stats is not None else 0)
        except Exception as error:
            # This runs in vLLM's output handler: what it raised would end the engine.
            self._failed("a step", error)
        return details is not None

    def slept(self) -> None:
        """The engine sleeps, and its cache is empty: vLLM tells of that only with its next step."""
        try:
            self._socket.drain()
            self._identity.cleared()
            self._judge()
        except Exception as error:
            self._failed("the engine's sleep", error)

    def queued(self) -> tuple[int, float]:
        """Prompt tokens that are still to be computed, and their attention pairs."""
        if self.work is not None:
            try:
                return self.work.queued()
            except Exception as error:
                self._failed("the queue", error)
        return 0, 0.0

    def _received(self, number: int, payload: bytes) -> None:
        try:
            self._events.receive(number, payload)
            self._ask_for_missing()
            self._judge()
        except Exception as error:
            self._failed("an event batch", error)

    def _replayed(self) -> None:
        try:
            # A gap that was seen since is in none of what came.
            if self._events.missing == self._asked_for:
                self._events.replay_ended()
            self._asked_for = None
            self._ask_for_missing()
            self._judge()
        except Exception as error:
            self._failed("a replay", error)

    def _ask_for_missing(self) -> None:
        missing = self._events.missing
        if missing is not None and self._asked_for is None:
            self._asked_for = missing
            self._socket.replay(missing)

    def _failed(self, what: str, error: Exception) -> None:
        """A defect of ours, or a vLLM that is not as expected: the engine goes on, and routers know less then."""
        if self._failing:
            return
        self._failing = True
        _log.error("%s could not be followed; what the KV cache holds is not reported any more", what, exc_info=error)
        self._socket.close()
        self._lost(f"{what} could not be followed: {type(error).__name__}: {error}"[:200])

    def _lost(self, cause: str) -> None:
        self._connected = False
        self._cause = cause
        self._judge()  # First: from here on no router is told of single blocks.
        self._identity.forget()

    def _judge(self) -> None:
        """Sets the feed's mode by what is known now."""
        if self.feed is None or self._mode is CacheMode.OFF:
            return
        cause = self._cause or self._events.cause or self._following.cause
        if cause and self.feed.mode is CacheMode.EXACT:
            _log.warning("what the KV cache holds is not known exactly any more: %s", cause)
        if cause:
            self.feed.set_mode(CacheMode.APPROXIMATE, cause)
        else:
            self.feed.set_mode(CacheMode.EXACT, self._reservation())
        if self.work is not None:
            self.work.cache_changed()

    def _reservation(self) -> str:
        """What is less than exact though no event is missing."""
        if self._estimates:
            return "the tokenizer does not tell its tokens' bytes: prefix blocks are placed by estimate"
        if self._ledger.dropped:
            return "more prefix blocks are held than are kept track of: some count as evicted"
        return ""

    # -- requests

    def _taken(self, request: Any) -> None:
        """vLLM's front end has taken a request and sends it to the engine core next. Never raises."""
        asked = _asked.get()
        call = asked.call if asked is not None else None
        try:
            _report_once(request.sampling_params)
            self._add(request, asked, call)
        except Exception as error:
            self._not_followed(call, request.request_id, repr(error), error)

    def _not_followed(self, call: Submit | None, id: str, why: str, error: Exception | None = None) -> None:
        if call is None or not call.chain:
            self._following.note(id, why, error)
            return
        self._following.failed(call.request_id, why, error)
        self._judge()

    def _add(self, request: Any, asked: _Asked | None, call: Submit | None) -> None:
        work, id = self.work, request.request_id
        if work is None or work.knows(id):
            return  # Known: more of a prompt that comes in parts.
        if request.lora_request is not None:
            self._check_adapter(request.lora_request)
        known = request.prompt_token_ids is not None and request.prompt_embeds is None and not request.resumable
        keyed, long = known and self._connected, known and len(request.prompt_token_ids) >= LONG_PROMPT
        running = work.add(id, self._keys(request) if keyed and not long else [])
        first = False
        if asked is not None and call is not None:
            asked.requests += 1
            first = known and asked.requests == 1 and bool(call.chain) and self._mode is not CacheMode.OFF
        if long and (keyed or first):
            read = partial(self._read, self._aligner_of_long_ones, call if first else None, request, None)
            self._in_thread(read, partial(self._tie, asked, call, request, running))
        elif first:
            # Not in the request's way: vLLM sends it to the engine core first.
            read = partial(self._read, self._aligner, call, request, running.keys)
            asyncio.get_running_loop().call_soon(self._tie, asked, call, request, running, read)

    def _check_adapter(self, lora: Any) -> None:
        """vLLM tells adapters of one name apart by their paths, its events do not."""
        before = self._adapters.setdefault(lora.lora_name, lora.lora_path)
        if before != lora.lora_path:
            self._adapters[lora.lora_name] = lora.lora_path
            self._identity.forget_lora(lora.lora_name)
            self._judge()

    def _in_thread(self, work: Callable[[], Any], then: Callable[[Callable[[], Any]], None]) -> None:
        """Does `work` in the thread, one after the other, and calls `then` with how to get what came of it."""
        if self._closed:
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "kvlane-long-prompts")
        future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        self._reading.add(future)

        def done(future: asyncio.Future[Any]) -> None:
            self._reading.discard(future)
            if not future.cancelled():
                then(future.result)

        future.add_done_callback(done)

    def _read(self, aligner: Aligner, call: Submit | None, request: Any, keys: Sequence[int] | None) -> _Read:
        """Reads a prompt. Touches nothing but `aligner`, so it may run in a thread that has one of its own.

        Raises `ForeignChain`.
        """
        keys = self._keys(request) if keys is None else keys
        prompt = prompt_of(call) if call is not None else None
        if prompt is None:
            return _Read(keys, None, ())
        chain = prompt.chain
        tokens: Sequence[int] = request.prompt_token_ids
        ends = aligner.ends(prompt.data, prompt.pieces, tokens, chain.block_bytes, len(chain.blocks)).ends
        return _Read(keys, prompt, ends)

    def _keys(self, request: Any, answer: Sequence[int] = (), known: Sequence[int] = ()) -> list[int]:
        """Of the full KV blocks of a prompt and its answer; `known` are those of the prompt, as far as they are."""
        lora = request.lora_request
        return block_keys(
            [*request.prompt_token_ids, *answer] if answer else request.prompt_token_ids,
            self._block_tokens,
            lora_name=lora.lora_name if lora is not None else None,
            cache_salt=request.cache_salt,
            known=known,
            media=[
                (feature.identifier, feature.mm_position.offset, feature.mm_position.length)
                for feature in request.mm_features or ()
            ],
        )

    def _tie(
        self, asked: _Asked | None, call: Submit | None, request: Any, running: Running, read: Callable[[], _Read]
    ) -> None:
        """Ties a prompt's prefix blocks to KV blocks; whatever is odd about it leaves them untied.

        The request may have left by now: its KV blocks are there all the same.
        """
        try:
            found = read()
            if self._connected and not running.keys and self.work is not None:
                running.keys = found.keys
                self.work.cache_changed()
            if asked is not None and call is not None and found.prompt is not None:
                self._tie_prompt(asked, call, request, running, found.prompt, found.ends)
        except ForeignChain as error:
            self._not_followed(call, request.request_id, str(error))
        except Exception as error:
            self._not_followed(call, request.request_id, repr(error), error)

    def _tie_prompt(
        self,
        asked: _Asked,
        call: Submit,
        request: Any,
        running: Running,
        prompt: HashedPrompt,
        ends: tuple[int, ...],
    ) -> None:
        chain, token_ids, params = prompt.chain, request.prompt_token_ids, request.sampling_params
        if self.feed is None or self.work is None:
            return
        if not (request.mm_features or prompt.has_media):
            self.feed.seen(chain.prompt_bytes, len(token_ids))
        if self._connected:
            self._ledger.prompt(chain, running.keys, ends)
        if self._compares and not (params or request.pooling_params).skip_reading_prefix_cache:
            running.expected = expected_tokens(call.matched, ends, len(token_ids), self._block_tokens)
        if params is not None and params.n == 1 and not request.mm_features and self._is_plain(call):
            open = open_blocks(chain, ends, len(token_ids), self._block_tokens)
            answered = partial(self._answered, asked, prompt, open, request, running)
            if self.work.knows(running.id):
                running.left = answered
            else:
                answered()
        before = self._following.cause
        self._following.followed()
        if self._following.cause != before or self._reservation() != self.feed.cause:
            self._judge()

    def _is_plain(self, call: Submit) -> bool:
        """Whether the client gets the generated text as it is, no reasoning or tool calls taken out of it."""
        if call.rpc != Rpc.HTTP or call.path.startswith("/v1/completions"):
            return True
        return not self._parses_reasoning and b'"tools"' not in call.body

    def _compare(self, running: Running) -> None:
        """A request's first token is here: now vLLM says how much of the prompt it found cached."""
        if running.expected is not None and self.feed is not None:
            self.feed.compared(is_off(running.expected, running.state.num_cached_tokens, self._block_tokens))

    def _answered(self, asked: _Asked, prompt: HashedPrompt, open: _Ends, request: Any, running: Running) -> None:
        if asked.requests == 1 and self._connected and prompt.answer_prefix is not None:
            # After the step's output is on its way to the routers.
            asyncio.get_running_loop().call_soon(self._answer, prompt, open, request, running)

    def _answer(self, prompt: HashedPrompt, open: _Ends, request: Any, running: Running) -> None:
        try:
            self._tie_answer(prompt, open, request, running)
        except Exception as error:
            self._following.failed(request.request_id, repr(error), error)
            self._judge()

    def _tie_answer(self, prompt: HashedPrompt, open: _Ends, request: Any, running: Running) -> None:
        """Ties the prefix blocks that the next turn has over this answer, as far as its tokens will come again.

        `open` are the prompt's last ones, which end in a KV block that only the answer fills.
        """
        answer = running.produced[:LONGEST_ANSWER]
        if not answer or not (prompt.tokens_given or self._ledger.answers_return):
            return
        size, first = prompt.chain.block_bytes, len(prompt.chain.blocks)
        token_ids: list[int] = request.prompt_token_ids
        if prompt.tokens_given:
            blocks = prompt.continued(array("I", answer).tobytes())
            ends = tuple(-(-(block + 1) * size // 4) for block in range(first, first + len(blocks)))
        else:
            text = self._text(running, answer)
            blocks = prompt.continued(text.encode("utf-8", "surrogatepass"))
            answer = answer[: self._agreeing(token_ids, answer, text)]
            start = len(prompt.data) + len(prompt.answer_prefix or b"")
            ends = self._aligner.answer_ends(first, size, first + len(blocks), start, len(token_ids), answer)
        if open[0] or ends:
            keys = self._keys(request, answer, running.keys)
            self._ledger.answer((*open[0], *blocks), keys, (*open[1], *ends))

    def _text(self, running: Running, answer: list[int]) -> str:
        """The answer's beginning as the client got it."""
        if len(answer) == len(running.produced):
            text: str = running.state.detokenizer.output_text
            return text
        joined = self._aligner.tokens.join_and_ends(answer) if self._aligner.tokens is not None else None
        return joined[0].decode("utf-8", "ignore") if joined is not None else ""

    def _agreeing(self, token_ids: list[int], answer: list[int], text: str) -> int:
        tokens = self._aligner.tokens
        if tokens is None:
            return 0
        keeps = self._aligner.keeps_edges
        return agreeing_tokens(self._tokenizer, tokens, token_ids, answer, text, keeps_edges=keeps)


def _replay_of(settings: Any) -> str:
    """Where missing batches can be asked for; empty where the operator's publisher keeps none, or not for us."""
    endpoint = getattr(settings, "replay_endpoint", None)
    try:
        return connectable(endpoint) if endpoint else ""
    except ValueError:
        return ""


def _report_once(params: Any) -> None:
    """A client may ask vLLM to report blocks again that were cached before, which would count as copies of them."""
    if params is not None and params.extra_args and _REPORT_MODE in params.extra_args:
        params.extra_args = {name: value for name, value in params.extra_args.items() if name != _REPORT_MODE}


def _own_tokenizer(engine: Any) -> tuple[Any, TokenBytes | None]:
    """A copy of the engine's tokenizer, which its renderer uses in other threads, and the table of its tokens."""
    if engine.renderer.tokenizer is None:
        return None, None
    try:
        tokenizer = copy.deepcopy(engine.renderer.tokenizer)
        tokens = TokenBytes.of(tokenizer)
    except Exception:
        # Some models bring tokenizers of their own making; what is lost with one is precision.
        _log.warning("the tokenizer does not tell its tokens' bytes", exc_info=True)
        tokenizer = tokens = None
    if tokens is None:
        _log.warning("tokens do not join to text: prefix blocks are placed by estimate")
    return tokenizer, tokens


def _parses_reasoning(state: Any) -> bool:
    """Whether chat answers come back in parts, so that the next turn's prompt holds less than was generated."""
    chat = getattr(state, "openai_serving_chat", None)
    parser = getattr(chat, "parser_cls", None)
    return getattr(parser, "reasoning_parser_cls", None) is not None
