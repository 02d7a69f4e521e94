"""Profiles of replicas, each a set of the simulated engine's options or a step-time model of its own, with sources."""

from __future__ import annotations

from math import sqrt
from typing import Final

import msgspec

from engine.simulated_core import SimulatedOptions, StepModel, StepWork

KV_BLOCK_TOKENS: Final = 512
"""One KV block per hash id of a Mooncake trace, so that blocks are few."""


class Profile(msgspec.Struct, frozen=True):
    """A kind of replica."""

    name: str
    options: SimulatedOptions
    step_model: StepModel | None = None
    """Instead of the options' step time."""


def _options(kv_tokens: int, **times: float) -> SimulatedOptions:
    blocks = kv_tokens // KV_BLOCK_TOKENS
    return SimulatedOptions(
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        kv_blocks=blocks,
        block_tokens=KV_BLOCK_TOKENS,
        # Only the KV cache sets a limit: the traces' longest prompts are past most models' context length.
        max_model_len=blocks * KV_BLOCK_TOKENS,
        prefill_ms_per_token=0.0,
        decode_ms_per_seq=0.0,
        context_ms_per_1k_tokens=0.0,
        **times,  # type: ignore[arg-type]
    )


# An 8B model with grouped-query attention (Llama-3.1-8B) in bfloat16 on one H200: 16 GB of weights at an effective
# 3.5 TB/s are the floor; 16 GFLOP per token at 760 TFLOP/s; 32 layers x 4 x 4096 FLOP per attention pair at
# 400 TFLOP/s; 128 KiB of KV cache per token at 3.6 TB/s. 2.5 ms per step are scheduling and launches.
H200_8B: Final = Profile(
    "h200-8b",
    _options(
        820_000,
        step_base_ms=2.5,
        roofline_floor_ms=4.6,
        roofline_ms_per_token=0.0211,
        prefill_ms_per_pair=1.31e-6,
        decode_ms_per_context_token=3.6e-5,
    ),
)

# Vidur's profiled linear operators (MLSys 2024) of Llama-2-7B on one H100: 5.5 ms for few tokens, 40.5 ms for 2,048, so
# (40.5² - 5.5²)**0.5 / 2048 ms per token. Attention as above, but with 512 KiB of KV cache per token (no grouped
# queries) at an effective 2.55 TB/s, of which 60 GB are left beside the weights.
H100_7B_VIDUR: Final = Profile(
    "h100-7b-vidur",
    _options(
        120_000,
        step_base_ms=2.5,
        roofline_floor_ms=5.5,
        roofline_ms_per_token=(40.5**2 - 5.5**2) ** 0.5 / 2048,
        prefill_ms_per_pair=1.31e-6,
        decode_ms_per_context_token=2.06e-4,
    ),
)


def mocker_step_ms(kv_tokens: int) -> StepModel:
    """The polynomial of the mocker of NVIDIA's Dynamo (`PerfModel::Polynomial` in its crate `dynamo-mocker`), in ms.

    Prompts: 4.209989e-07 n² + 1.518344e-02 n + 16.50142 for a step's n uncached prompt tokens. Decoding, in steps with
    any: -25.74 u² + 54.01 u + 5.74, at least 1, where u is the share of the KV cache that is being read. They add up.
    """

    def step_ms(work: StepWork) -> float:
        total = 0.0
        if tokens := work.prefill_tokens:
            total = 4.209989e-07 * tokens * tokens + 1.518344e-02 * tokens + 16.50142
        if work.decodes:
            share = min(work.decode_context / kv_tokens, 1.0)
            total += max(-25.74 * share * share + 54.01 * share + 5.74, 1.0)
        return total

    return step_ms


# The mocker's own default of 16,384 blocks of 64 tokens would never evict here; the H200's cache keeps them comparable.
DYNAMO_MOCKER: Final = Profile("dynamo-mocker", _options(820_000), mocker_step_ms(820_000))

PROFILES: Final = {profile.name: profile for profile in (H200_8B, H100_7B_VIDUR, DYNAMO_MOCKER)}


def cold_prefill_s(profile: Profile, tokens: int) -> float:
    """Time to the first token of a prompt of which nothing is cached, alone on an idle replica."""
    options, total, start = profile.options, 0.0, 0
    while start < tokens:
        count = min(tokens - start, options.max_num_batched_tokens)
        total += step_ms(profile, StepWork(count, count * start + count * count * 0.5, 0, 0))
        start += count
    return total / 1000


def step_ms(profile: Profile, work: StepWork) -> float:
    """How long a step with this work takes, in milliseconds."""
    if profile.step_model is not None:
        return profile.step_model(work)
    options = profile.options
    computing = options.roofline_ms_per_token * (work.prefill_tokens + work.decodes)
    return (
        options.step_base_ms
        + options.prefill_ms_per_token * work.prefill_tokens
        + options.decode_ms_per_seq * work.decodes
        + sqrt(options.roofline_floor_ms**2 + computing * computing)
        + options.prefill_ms_per_pair * work.prefill_pairs
        + options.decode_ms_per_context_token * work.decode_context
    )
