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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeAlias

from engine.alignment import Aligner, TokenBytes, agreeing_tokens
from engine.cache_ledger import CacheLedger
from engine.cache_report import CacheFeed
from engine.kv_events import KvEvents, KvIdentity, block_keys
from engine.prompts import HashedPrompt, expected_tokens, is_off, open_blocks, prompt_of
from engine.vllm_events import KvEventSocket, connectable
from engine.vllm_work import Running, VllmWork
from router.lane.frames import Submit
from router.types import CacheMode, Rpc

LONGEST_ANSWER: Final = 4096
"""Tokens of an answer that are tied when it ends, as tokenizing it anew takes 1 ms per 1,000; the rest of a longer one
is tied with the next turn's prompt."""

_REPORT_MODE: Final = "kv_cache_report_mode"

_log = logging.getLogger(__name__)


class _Asked:
    """One submit and what became of it in the engine."""

    __slots__ = ("call", "requests")

    def __init__(self, call: Submit) -> None:
        self.call: Submit | None = call
        self.requests = 0
        """How many requests vLLM made of it."""


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
        self._socket = KvEventSocket(self._received, self._lost)
        self._mode = CacheMode.APPROXIMATE
        self._cause = ""
        """Why events are not followed at all; empty where they are."""
        self._connected = False
        self._compares = True
        self._shows_details = False
        self._parses_reasoning = False
        self._block_tokens = 0
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
        self._events = KvEvents(self._identity, replays=False)
        self.feed = CacheFeed(self._ledger, self._mode, self._cause or "not started")
        self._tokenizer, tokens = await asyncio.to_thread(_own_tokenizer, engine)
        self._aligner = Aligner(tokens)
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
        self._socket.close()

    async def _subscribe(self, engine: Any) -> None:
        settings = engine.get_kv_event_sources().get(0) or engine.vllm_config.kv_events_config
        try:
            await self._socket.open(connectable(settings.endpoint), settings.topic)
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
            self._socket.drain()
            if done and not self._states and self._identity.counts.cleared == before:
                # vLLM tells of it with its next step, which an idle engine does not make.
                self._identity.cleared()
                self._judge()
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
        self._socket.drain()
        details = None
        if scheduler_stats is not None:
            details = scheduler_stats.iteration_details
            if not self._shows_details:
                scheduler_stats.iteration_details = None  # Else vLLM's own logger writes a line per step.
        self.work.step(details, iteration_stats.num_generation_tokens if iteration_stats is not None else 0)
        return details is not None

    def _received(self, number: int, payload: bytes) -> None:
        self._events.receive(number, payload)
        self._judge()

    def _lost(self, cause: str) -> None:
        self._connected = False
        self._cause = cause
        self._identity.forget()
        self._judge()

    def _judge(self) -> None:
        """Sets the feed's mode by what is known now."""
        if self.feed is None or self._mode is CacheMode.OFF:
            return
        cause = self._cause or self._events.cause
        if cause and self.feed.mode is CacheMode.EXACT:
            _log.warning("what the KV cache holds is not known exactly any more: %s", cause)
        self.feed.set_mode(CacheMode.APPROXIMATE if cause else CacheMode.EXACT, cause)
        if self.work is not None:
            self.work.cache_changed()

    # -- requests

    def _taken(self, request: Any) -> None:
        """vLLM's front end has taken a request and sends it to the engine core next. Never raises."""
        try:
            _report_once(request.sampling_params)
            self._add(request)
        except Exception:
            _log.exception("request %s is not followed", request.request_id)

    def _add(self, request: Any) -> None:
        work, id = self.work, request.request_id
        if work is None or work.knows(id):
            return  # Known: more of a prompt that comes in parts.
        asked = _asked.get()
        known = request.prompt_token_ids is not None and request.prompt_embeds is None and not request.resumable
        running = work.add(id, self._keys(request) if known and self._connected else [])
        if asked is None or asked.call is None:
            return
        asked.requests += 1
        if asked.requests == 1 and known:
            # Not in the request's way: vLLM sends it to the engine core first.
            asyncio.get_running_loop().call_soon(self._tie, asked, asked.call, request, running)

    def _keys(self, request: Any, answer: Sequence[int] = ()) -> list[int]:
        """Of the full KV blocks of a prompt and its answer."""
        lora = request.lora_request
        return block_keys(
            [*request.prompt_token_ids, *answer] if answer else request.prompt_token_ids,
            self._block_tokens,
            lora_name=lora.lora_name if lora is not None else None,
            cache_salt=request.cache_salt,
            media=[
                (feature.identifier, feature.mm_position.offset, feature.mm_position.length)
                for feature in request.mm_features or ()
            ],
        )

    def _tie(self, asked: _Asked, call: Submit, request: Any, running: Running) -> None:
        """Ties a prompt's prefix blocks to KV blocks; whatever is odd about it leaves them untied."""
        if self.feed is None or self._mode is CacheMode.OFF:
            return
        prompt = prompt_of(call)
        if prompt is None:
            return
        chain, token_ids, params = prompt.chain, request.prompt_token_ids, request.sampling_params
        self.feed.seen(chain.prompt_bytes, len(token_ids))
        ends = self._aligner.ends(prompt.data, prompt.pieces, token_ids, chain.block_bytes, len(chain.blocks)).ends
        if self._connected:
            self._ledger.prompt(chain, running.keys, ends)
        if self._compares and not (params or request.pooling_params).skip_reading_prefix_cache:
            running.expected = expected_tokens(call.matched, ends, len(token_ids), self._block_tokens)
        if params is not None and params.n == 1 and not request.mm_features and self._is_plain(call):
            open = open_blocks(chain, ends, len(token_ids), self._block_tokens)
            running.left = lambda: self._answered(asked, prompt, open, request, running)

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
            asyncio.get_running_loop().call_soon(self._tie_answer, prompt, open, request, running)

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
            self._ledger.answer((*open[0], *blocks), self._keys(request, answer), (*open[1], *ends))

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
