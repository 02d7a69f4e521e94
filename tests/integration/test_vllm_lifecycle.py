"""A vLLM engine's start, its end and its death; arguments; and a model that embeds."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from kvlane.v1 import inference_pb2 as pb

from engine.tiny_model import make_tiny_model
from engine.vllm import VllmEngine
from engine.vllm_args import serve_namespace
from router.errors import ConfigError, InvalidRequest, ReplicaFailed, ReplicaLost
from router.types import Load
from tests.integration.ray_local import alive, descendants
from tests.integration.vllm_fixtures import (
    DEADLINE_S,
    FOREIGN_WARNINGS,
    MODEL,
    RecordingOut,
    ask,
    grpc_call,
    http_call,
    post,
    running_engine,
    submit,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow, FOREIGN_WARNINGS]

LONG = {"model": MODEL, "prompt": "Hello", "max_tokens": 3000, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models"))


def engine_cores() -> list[int]:
    return [pid for pid in descendants(os.getpid()) if "VLLM::" in Path(f"/proc/{pid}/cmdline").read_text()]


async def long_streams(engine: VllmEngine) -> list[RecordingOut]:
    """One stream of each kind, all in the engine; the streamed ones have begun."""
    request = pb.GenerateRequest(text="Hello", sampling=pb.SamplingParams(max_tokens=3000, ignore_eos=True))
    calls = [
        http_call("/v1/completions", LONG | {"stream": True}),
        grpc_call("Generate", request),
        http_call("/v1/completions", LONG),
    ]
    outs = [submit(engine, call)[0] for call in calls]
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*(out.started.wait() for out in outs[:2]))
        while engine.load().running < 3:
            await asyncio.sleep(0.001)
    return outs


async def test_when_the_engine_core_dies_all_streams_fail_and_health_says_so(model: Path) -> None:
    async with running_engine(model) as engine:
        outs = await long_streams(engine)
        (core,) = engine_cores()
        os.kill(core, signal.SIGKILL)
        for out in outs:
            await out.ended()
            assert [type(error) for error in out.failures] == [ReplicaLost]
        # Nothing of what vLLM's application makes of a dead engine reached the client.
        assert b"error" not in outs[0].body
        assert b"[DONE]" not in outs[0].body
        assert not outs[2].status
        with pytest.raises(ReplicaFailed):
            await engine.check_health()
        assert engine.load() == Load()
        late = await ask(engine, http_call("/v1/completions", LONG))
        assert [type(error) for error in late.failures] == [ReplicaLost]
    assert not any(map(alive, [core]))


async def test_closing_fails_the_streams_and_leaves_no_process(model: Path) -> None:
    async with running_engine(model) as engine:
        cores = engine_cores()
        assert cores
        outs = await long_streams(engine)
    for out in outs:
        await out.ended()
        assert [type(error) for error in out.failures] == [ReplicaLost]
    assert not any(map(alive, cores))
    with pytest.raises(ReplicaFailed):
        await engine.check_health()
    refused = await ask(engine, http_call("/v1/completions", LONG))
    assert [type(error) for error in refused.failures] == [ReplicaFailed]
    await engine.close()


async def test_a_model_that_embeds_answers_embed_with_every_digit(model: Path) -> None:
    args: dict[str, Any] = {"runner": "pooling", "convert": "embed", "enable_auto_tool_choice": False}
    async with running_engine(model, **args, tool_call_parser=None) as engine:
        texts = ["The old harbour town", "wakes before the sun"]
        over_http = (await post(engine, "/v1/embeddings", input=texts)).json()
        out = await ask(engine, grpc_call("Embed", pb.EmbedRequest(model=MODEL, texts=texts)))
        (answer,) = out.messages(pb.EmbedResponse)
        assert [list(each.values) for each in answer.embeddings] == [
            pytest.approx(each["embedding"], rel=1e-6) for each in over_http["data"]
        ]
        assert answer.usage.prompt_tokens == over_http["usage"]["prompt_tokens"]
        empty = await ask(engine, grpc_call("Embed", pb.EmbedRequest(model=MODEL)))
        assert [type(error) for error in empty.failures] == [InvalidRequest]
        generate = await ask(engine, grpc_call("Generate", pb.GenerateRequest(model=MODEL, text="x")))
        assert [error.name for error in generate.failures] == ["not_supported"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"max_model_length": 1}, "did you mean 'max_model_len'"),
        ({"zzzzzz": 1}, "no argument 'zzzzzz'"),
        ({"dtype": "float3"}, "dtype"),
        ({"max_num_seqs": "many"}, "max-num-seqs"),
        ({"enforce_eager": "yes"}, "true or false"),
        ({"model": "other"}, "field 'model'"),
        ({"port": 8000}, "no effect"),
        ({"max_model_len": 1 << 30}, "max_model_len"),
    ],
)
async def test_an_argument_that_cannot_be_used_stops_the_start(model: Path, args: dict[str, Any], words: str) -> None:
    engine = VllmEngine(str(model), MODEL, args)
    with pytest.raises(ConfigError) as caught:
        await engine.start()
    assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert not engine_cores()


def test_arguments_pass_through_and_the_rest_are_vllms_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    adapter = {"name": "a", "path": "/a", "base_model_name": "m"}
    args = {
        "max-model-len": 2048,
        "enable_prefix_caching": False,
        "lora_modules": [adapter],
        "middleware": ["a.b", "c.d"],
        "allowed_origins": ["*"],
        "kv_events_config": {"enable_kv_cache_events": True, "publisher": "zmq"},
        "max_num_seqs": None,
    }
    made = vars(serve_namespace("m", MODEL, args, cpu=False))
    assert made["max_model_len"] == 2048
    assert made["enable_prefix_caching"] is False
    assert made["lora_modules"][0].path == "/a"
    assert made["middleware"] == ["a.b", "c.d"]
    assert made["allowed_origins"] == ["*"]
    assert made["kv_events_config"].publisher == "zmq"
    assert made["served_model_name"] == [MODEL]
    defaults = vars(make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "m"]))
    changed = {name for name in defaults if made[name] != defaults[name]}
    assert changed == {name.replace("-", "_") for name in args if name != "max_num_seqs"} | {"served_model_name"}


def test_a_cpu_engine_is_eager_float32_and_small_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    made = serve_namespace("m", MODEL, {}, cpu=True)
    assert (made.dtype, made.enforce_eager, made.kv_cache_memory_bytes) == ("float32", True, 1 << 30)
    assert made.distributed_executor_backend == "uni"
    told = serve_namespace("m", MODEL, {"dtype": "bfloat16", "enforce_eager": False}, cpu=True)
    assert (told.dtype, told.enforce_eager) == ("bfloat16", False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    bound = serve_namespace("m", MODEL, {}, cpu=True)
    assert (bound.kv_cache_memory_bytes, bound.distributed_executor_backend) == (None, None)
