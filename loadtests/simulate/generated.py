"""Generated loads in the Mooncake format: conversations, prompts behind shared system prompts, and agents.

Each is made from a seed alone. Texts are never written out: a text is a chain of pieces, each so many tokens of a
source, and a block's id stands for the pieces in it and for all blocks before it. So prompts share ids exactly where
they share text, and a row's ids go on over the answer, which the next turn's prompt repeats. Timestamps are those of a
service that answers at a nominal speed; a replay stretches them. A load is cut out of a longer one, so that its rate
neither grows at the beginning nor fades at the end.

Distributions marked (chosen) have no source but that they look plausible. All lengths are in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Final

import msgspec

from loadtests.simulate.perf import KV_BLOCK_TOKENS
from loadtests.simulate.traces import TraceRow


class Lengths(msgspec.Struct, frozen=True):
    """A log-normal distribution of token counts or seconds, cut off at both ends."""

    median: float
    sigma: float
    """Standard deviation of the logarithm: the 90th percentile is the median times exp(1.28 sigma)."""
    least: float = 1
    most: float = math.inf

    def draw(self, random: Random) -> float:
        return min(max(random.lognormvariate(math.log(self.median), self.sigma), self.least), self.most)

    def tokens(self, random: Random) -> int:
        return round(self.draw(random))


class Speed(msgspec.Struct, frozen=True):
    """How fast the service is taken to be: when the next turn can come (chosen, as of a fleet with little load)."""

    first_token_s: float = 0.5
    per_token_s: float = 0.012

    def answer_s(self, tokens: int) -> float:
        return self.first_token_s + self.per_token_s * tokens


class MultiTurn(msgspec.Struct, frozen=True):
    """People who talk with a few chat applications."""

    span_s: float = 1800.0
    lead_s: float = 900.0
    """Conversations that begin so long before the first row are there, as far as they go on then."""
    conversations_per_s: float = 1.1
    burstiness: float = 1.5
    """Coefficient of variation of the gaps between conversations, Gamma distributed: ServeGen (arXiv 2505.09999) finds
    production arrivals burstier than Poisson's 1, and Gamma or Weibull to fit them."""
    turns: float = 3.5
    """Mean, geometrically distributed: ShareGPT's, as the LMSYS-Chat-1M paper (arXiv 2309.11998) counts it."""
    applications: int = 6
    """Each with a system prompt of its own; the k-th is used in proportion to 1/k (chosen)."""
    system: Lengths = Lengths(1200, 0.6, 64, 8000)  # (chosen)
    message: Lengths = Lengths(60, 1.2, 1, 4000)
    """Mean 123; LMSYS-Chat-1M has 70 tokens per prompt, ShareGPT 94."""
    document_share: float = 0.2
    """Of the messages; they bring a document along (chosen)."""
    document: Lengths = Lengths(3000, 0.9, 200, 24_000)  # (chosen)
    answer: Lengths = Lengths(129, 0.93, 1, 2000)
    """Median and 90th percentile (424) of the Azure 2023 conversation trace, which is among the traces here."""
    gap_s: Lengths = Lengths(60, 1.0, 2, 900)
    """Between an answer and the next message: reading, thinking, writing (chosen; mean 99 s)."""
    most_tokens: int = 32_000
    """A conversation ends before its prompt is longer."""


class SharedPrefix(msgspec.Struct, frozen=True):
    """Single questions behind long prompts that are used again and again: examples, handbooks, instructions."""

    span_s: float = 1000.0
    requests_per_s: float = 6.0
    burstiness: float = 2.0  # As above; API traffic is burstier than chat.
    prefixes: int = 48
    """The k-th is used in proportion to 1/k (chosen)."""
    prefix: Lengths = Lengths(5000, 0.7, 512, 30_000)  # (chosen)
    question: Lengths = Lengths(300, 1.0, 8, 8000)  # (chosen)
    answer: Lengths = Lengths(129, 0.93, 1, 2000)  # As above.


class Agentic(msgspec.Struct, frozen=True):
    """Agents that call tools in a loop: long shared tool prompts, many short steps, bursts, sub-agents.

    TraceLab (arXiv 2606.30560) is where such loops were measured: 7.8 tool-initiated steps per request on average, 20
    at the 90th and 86 at the 99th percentile; short outputs; heavily tailed tool outputs and times. Its contexts are
    longer (154,000 tokens on average) than an 8B model's replica could hold many of.
    """

    span_s: float = 1200.0
    lead_s: float = 300.0
    bursts_per_s: float = 0.1
    burstiness: float = 1.5  # As above.
    burst: float = 3.0
    """Mean number of tasks that come together, geometrically distributed (chosen)."""
    agents: int = 5
    """Kinds of agents, each with its own tool prompt; the k-th is used in proportion to 1/k (chosen)."""
    tools: Lengths = Lengths(9000, 0.35, 2000, 24_000)  # (chosen)
    helper_tools: Lengths = Lengths(4000, 0.35, 1000, 12_000)  # Sub-agents' (chosen).
    task: Lengths = Lengths(600, 1.2, 16, 12_000)  # (chosen)
    steps: Lengths = Lengths(4, 1.25, 0, 90)
    """After the first; mean 8.7, 90th percentile 20, 99th 73: near TraceLab's."""
    output: Lengths = Lengths(120, 1.1, 8, 4000)  # (chosen; mean 220)
    tool_output: Lengths = Lengths(500, 1.5, 8, 16_000)  # (chosen; mean 1,400)
    tool_s: Lengths = Lengths(1.5, 1.5, 1, 180)  # (chosen)
    branch_share: float = 0.06
    """Of the steps; instead of a tool, they start sub-agents and wait for all of them (chosen)."""
    branches: tuple[int, int] = (2, 4)
    fork_share: float = 0.5
    """Of the branchings; their sub-agents go on from the parent's context instead of starting from their own tools."""
    helper_steps: Lengths = Lengths(3, 0.8, 0, 20)  # (chosen)
    helper_report: Lengths = Lengths(300, 0.8, 32, 2000)  # What the parent gets of each (chosen).
    most_tokens: int = 64_000
    """Where a context would be longer, it is compacted: the tool prompt and a summary remain."""
    summary: Lengths = Lengths(1500, 0.4, 300, 4000)  # (chosen)


class Text:
    """A text that can be continued and forked, as the ids of its blocks."""

    __slots__ = ("_blocks", "_open", "_room", "full", "tokens")

    def __init__(self, blocks: Blocks) -> None:
        self.tokens = 0
        self._blocks = blocks
        self.full: list[int] = []
        """Ids of its full blocks."""
        self._open: tuple[tuple[int, int, int], ...] = ()
        self._room = KV_BLOCK_TOKENS

    def fork(self) -> Text:
        """A copy that is continued on its own."""
        copy = Text(self._blocks)
        copy.tokens, copy.full, copy._open, copy._room = self.tokens, self.full.copy(), self._open, self._room
        return copy

    def append(self, source: int, tokens: int) -> None:
        """The first `tokens` tokens of a source follow."""
        start = 0
        self.tokens += tokens
        while start < tokens:
            taken = min(tokens - start, self._room)
            self._open += ((source, start, taken),)
            self._room -= taken
            start += taken
            if not self._room:
                self.full.append(self._blocks.id_of(self._parent(), self._open))
                self._open, self._room = (), KV_BLOCK_TOKENS

    def ids(self) -> list[int]:
        """Of its blocks, the last one perhaps not full."""
        return [*self.full, self._blocks.id_of(self._parent(), self._open)] if self._open else self.full.copy()

    def _parent(self) -> int:
        return self.full[-1] if self.full else -1


class Blocks:
    """Gives every block of text a small number, the same one for the same text behind the same blocks."""

    def __init__(self) -> None:
        self._ids: dict[tuple[int, tuple[tuple[int, int, int], ...]], int] = {}
        self._sources = 0

    def id_of(self, parent: int, pieces: tuple[tuple[int, int, int], ...]) -> int:
        return self._ids.setdefault((parent, pieces), len(self._ids))

    def source(self) -> int:
        """A new text that nothing else shares."""
        self._sources += 1
        return self._sources


class _Load:
    """Rows in the making."""

    def __init__(self, name: str, seed: int, span_s: float, lead_s: float = 0.0) -> None:
        self.random = Random(f"{name}/{seed}")
        self._rows: list[TraceRow] = []
        self._span_s = span_s
        self._lead_s = lead_s
        self._blocks = Blocks()
        self._speed = Speed()

    def start(self) -> Text:
        return Text(self._blocks)

    def shared(self, count: int, lengths: Lengths) -> list[tuple[int, int]]:
        """Texts that many prompts begin with: source and length."""
        return [(self._blocks.source(), lengths.tokens(self.random)) for _ in range(count)]

    def write(self, text: Text, tokens: int) -> None:
        """Something that was never said before."""
        text.append(self._blocks.source(), tokens)

    def ask(self, at_s: float, text: Text, answer: int, session: str) -> float:
        """A request with this prompt, to which the answer is then added. Returns when the answer is there."""
        prompt, ids = text.tokens, text.ids()
        self.write(text, answer)
        if 0 <= at_s < self._span_s:
            # Where the answer fills the prompt's last block, the block that counts is the full one.
            ids = text.full + ids[len(text.full) :]
            self._rows.append(TraceRow(round(at_s * 1000), prompt, answer, ids, session))
        return at_s + self._speed.answer_s(answer)

    def arrivals(self, per_s: float, burstiness: float) -> Iterable[float]:
        """Gaps are Gamma distributed with this coefficient of variation."""
        shape = 1 / burstiness**2
        at = -self._lead_s
        while (at := at + self.random.gammavariate(shape, 1 / (shape * per_s))) < self._span_s:
            yield at

    def popular(self, texts: Sequence[tuple[int, int]]) -> int:
        """The place of one of the texts, the k-th in proportion to 1/k."""
        weights = [1 / place for place in range(1, len(texts) + 1)]
        return self.random.choices(range(len(texts)), weights)[0]

    def geometric(self, mean: float) -> int:
        """At least 1."""
        return 1 if mean <= 1 else 1 + int(math.log(1 - self.random.random()) / math.log(1 - 1 / mean))

    def ordered(self) -> list[TraceRow]:
        return sorted(self._rows, key=lambda row: row.timestamp)


def multi_turn(seed: int, given: MultiTurn | None = None) -> list[TraceRow]:
    """Conversations of people, in order of arrival. See `MultiTurn`."""
    options = given or MultiTurn()
    load = _Load("multi-turn", seed, options.span_s, options.lead_s)
    random = load.random
    systems = load.shared(options.applications, options.system)
    for number, start in enumerate(load.arrivals(options.conversations_per_s, options.burstiness)):
        text, at = load.start(), start
        text.append(*systems[load.popular(systems)])
        for _ in range(load.geometric(options.turns)):
            load.write(text, options.message.tokens(random))
            if random.random() < options.document_share:
                load.write(text, options.document.tokens(random))
            if text.tokens > options.most_tokens:
                break
            at = load.ask(at, text, options.answer.tokens(random), f"conversation-{number}")
            at += options.gap_s.draw(random)
    return load.ordered()


def shared_prefix(seed: int, given: SharedPrefix | None = None) -> list[TraceRow]:
    """Single questions behind shared prompts, in order of arrival. See `SharedPrefix`."""
    options = given or SharedPrefix()
    load = _Load("shared-prefix", seed, options.span_s)
    random = load.random
    prefixes = load.shared(options.prefixes, options.prefix)
    for at in load.arrivals(options.requests_per_s, options.burstiness):
        text = load.start()
        text.append(*prefixes[load.popular(prefixes)])
        load.write(text, options.question.tokens(random))
        load.ask(at, text, options.answer.tokens(random), "")
    return load.ordered()


def agentic(seed: int, given: Agentic | None = None) -> list[TraceRow]:
    """Agents at work, in order of arrival. See `Agentic`."""
    options = given or Agentic()
    load = _Load("agentic", seed, options.span_s, options.lead_s)
    work = _Agents(options, load)
    number = 0
    for burst in load.arrivals(options.bursts_per_s, options.burstiness):
        for _ in range(load.geometric(options.burst)):
            number += 1
            work.task(burst + load.random.random(), f"task-{number}")
    return load.ordered()


class _Agents:
    def __init__(self, options: Agentic, load: _Load) -> None:
        self._options = options
        self._load = load
        self._tools = load.shared(options.agents, options.tools)
        self._helper_tools = load.shared(options.agents, options.helper_tools)
        self._helpers = 0

    def task(self, at: float, session: str) -> None:
        """One task from its beginning to its end."""
        options, load = self._options, self._load
        kind = load.popular(self._tools)
        text = load.start()
        text.append(*self._tools[kind])
        load.write(text, options.task.tokens(load.random))
        for step in range(1 + options.steps.tokens(load.random)):
            if step:
                at = self._between(at, text, kind, session)
            if text.tokens > options.most_tokens:
                text = load.start()
                text.append(*self._tools[kind])
                load.write(text, options.summary.tokens(load.random))
            at = load.ask(at, text, options.output.tokens(load.random), session)

    def _between(self, at: float, text: Text, kind: int, session: str) -> float:
        """What happens between two steps, and adds to the context: a tool's output, or sub-agents' reports."""
        options, load = self._options, self._load
        random = load.random
        if random.random() >= options.branch_share:
            load.write(text, options.tool_output.tokens(random))
            return at + options.tool_s.draw(random)
        forks = random.random() < options.fork_share
        ends = []
        for _ in range(random.randint(*options.branches)):
            self._helpers += 1
            helper = text.fork() if forks else load.start()
            if not forks:
                helper.append(*self._helper_tools[kind])
            load.write(helper, options.task.tokens(random))
            ends.append(self._helper(at, helper, f"{session}/{self._helpers}"))
            load.write(text, options.helper_report.tokens(random))
        return max(ends) + 1

    def _helper(self, at: float, text: Text, session: str) -> float:
        options, load = self._options, self._load
        random = load.random
        for step in range(1 + options.helper_steps.tokens(random)):
            if step:
                load.write(text, options.tool_output.tokens(random))
                at += options.tool_s.draw(random)
            at = load.ask(at, text, options.output.tokens(random), session)
        return at


GENERATORS: Final[dict[str, Callable[[int], list[TraceRow]]]] = {
    "multi-turn": multi_turn,
    "shared-prefix": shared_prefix,
    "agentic": agentic,
}
"""By the name that ``--trace`` takes; from a seed."""


def lines(rows: Iterable[TraceRow]) -> bytes:
    """The rows as a file in the Mooncake format."""
    return b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
