"""A router of the simulation: the router's own index, accounts, load model and policy, on a virtual clock."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engine.simulated_cache import CacheEvent, Evicted
from loadtests.simulate.perf import KV_BLOCK_TOKENS, Profile
from loadtests.simulate.traces import TraceRequest
from router.load.account import Account, Foresight, News, new_account
from router.load.model import new_fleet
from router.policies.base import Policy
from router.prefix.prefixes import new_index
from router.types import CacheMode, Charge, EngineInfo, Load, Outlook, PrefixView, Request, Rpc, Snapshot

MODEL = "simulated"


class Report(msgspec.Struct, frozen=True, gc=False):
    """What a replica tells all routers after a step."""

    replica: str
    load: Load
    acked: Mapping[int, int]
    """For each router the last of its streams that the load counts."""
    cache: Sequence[CacheEvent]


class Mistaken:
    """A load model that is wrong by constant factors."""

    def __init__(self, true: Foresight, token: float, pair: float, step: float) -> None:
        self._true = true
        self._token = token
        self._pair = pair
        self._step = step

    @property
    def news(self) -> News:
        return self._true.news

    def observe(self, load: Load, now: float) -> None:
        self._true.observe(load, now)

    def outlook(self, load: Load, unacked_tokens: int, unacked_pairs: float, unacked: int) -> Outlook:
        true = self._true.outlook(load, unacked_tokens, unacked_pairs, unacked)
        return msgspec.structs.replace(
            true,
            wait_s=true.wait_s * self._token,
            sent_s=true.sent_s * self._token,
            token_s=true.token_s * self._token,
            pair_s=true.pair_s * self._pair,
            step_s=true.step_s * self._step,
            batch_s=true.batch_s * self._step,
        )


class SimRouter:
    """One router: what it knows and what it decides. The cluster carries its submits and reports."""

    def __init__(
        self,
        number: int,
        profile: Profile,
        random_: random.Random,
        *,
        model_error: float = 0.0,
        replica_error: float = 0.0,
        token_error: float = 0.05,
        index: bool = True,
    ) -> None:
        self.number = number
        self.policy: Policy
        """Set once the replicas are there."""
        self._random = random_
        # The cost model is the fleet's: a router is wrong about all replicas alike, in each term by its own share.
        self._model_errors = [random_.uniform(1 - model_error, 1 + model_error) for _ in range(3)]
        self._replica_error = replica_error
        self._token_error = token_error
        self._model = new_fleet()
        self._accounts: dict[str, Account] = {}
        self._streams: dict[str, int] = {}
        self._index = new_index()
        self._in_flight: dict[str, Counter[int]] = {}
        self._indexes = index
        options = profile.options
        self._info = EngineInfo(
            "sim", (), (), options.max_num_seqs, options.kv_blocks, options.block_tokens, options.prefix_caching
        )
        self._depths = tuple(KV_BLOCK_TOKENS * block for block in range(1, options.kv_blocks + 1))

    def join(self, replica: str) -> None:
        error = self._replica_error
        factor = self._random.uniform(1 - error, 1 + error)
        factors = [each * factor for each in self._model_errors]
        foresight: Foresight = self._model.foresight()
        if any(each != 1.0 for each in factors):
            foresight = Mistaken(foresight, *factors)
        account = self._accounts[replica] = new_account(replica, self._info, Load(), foresight)
        account.caches(CacheMode.EXACT if self._info.prefix_caching else CacheMode.OFF)
        self._streams[replica] = 0
        self._in_flight[replica] = Counter()
        self._index.join(replica)

    def leave(self, replica: str) -> None:
        del self._accounts[replica], self._streams[replica], self._in_flight[replica]
        self._index.leave(replica)
        while self._index.sweep():
            pass  # The real router does this in slices between requests.

    def route(self, request: TraceRequest, now: float) -> tuple[str, int, Any]:
        """Decides, and charges the replica. Returns it, the stream there and what `ended` wants back."""
        chain = request.chain
        held = self._index.match(chain.blocks, KV_BLOCK_TOKENS) if self._indexes else {}
        # As the router does it: what is held is known in tokens, what comes after it is estimated from its bytes.
        known = max([one.tokens for one in held.values()], default=0)
        error = self._random.uniform(-self._token_error, self._token_error)
        tokens = known + max(round((request.prompt.tokens - known) * (1 + error)), 1)
        views = tuple([account.view() for account in self._accounts.values()])
        snapshot = Snapshot(MODEL, views, PrefixView(chain, tokens, held), now)
        decision = self.policy.choose(request_of(request), snapshot)
        replica = decision.replica
        found = held.get(replica)
        cached, matched = (found.tokens, found.blocks) if found else (0, 0)
        new = max(tokens - cached, 1)
        charge = Charge(new, new * (cached + new * 0.5), chain, matched)
        account = self._accounts[replica]
        stream = self._streams[replica] = self._streams[replica] + 1
        account.submitted(stream, charge)
        account.leased(1)
        blocks = chain.blocks if self._indexes else ()
        self._in_flight[replica].update(blocks)
        return replica, stream, (self._index.hold(replica, blocks), blocks)

    def in_flight(self, replica: str, blocks: Sequence[int]) -> int:
        """How many of a prompt's blocks, from its first on, this router's requests in flight there have."""
        there = self._in_flight[replica]
        return next((place for place, block in enumerate(blocks) if not there[block]), len(blocks))

    def reported(self, report: Report, now: float) -> None:
        """A step's frame came."""
        account = self._accounts.get(report.replica)
        if account is None:
            return  # Lost meanwhile.
        for event in report.cache if self._indexes else ():
            if isinstance(event, Evicted):
                self._index.evict(report.replica, event.hashes)
            else:
                first = event.first_block
                self._index.store(report.replica, event.hashes, self._depths[first : first + len(event.hashes)])
        account.stepped(report.load, report.acked[self.number], now)

    def ended(self, replica: str, hold: Any) -> None:
        """One of its requests is over, however it ended."""
        index_hold, blocks = hold
        self._index.release(index_hold)
        if there := self._in_flight.get(replica):
            for block in blocks:
                there[block] -= 1
                if not there[block]:
                    del there[block]
        account = self._accounts.get(replica)
        if account is not None:
            account.leased(-1)


def request_of(request: TraceRequest) -> Request:
    """What routing may know of a request, beside its chain."""
    return Request(str(request.index), MODEL, Rpc.HTTP, "/v1/completions", b"", session_id=request.session)
