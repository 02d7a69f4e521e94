"""A vLLM engine's start, its end and its death; arguments; and a model that embeds."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kvlane.v1 import inference_pb2 as pb

from engine.tiny_model import make_tiny_model
from engine.vllm import VllmEngine
from engine.vllm_args import serve_namespace
from loadtests.processes import descendants
from router.errors import ConfigError, InvalidRequest, ReplicaFailed, ReplicaLost
from router.types import Load
from tests.integration.ray_local import alive
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
    """One stream of each kind, all in the engine; the streamed ones have begun. The last is like the first, but goes
    past vLLM's web framework, which has shown by the first how such an answer begins.
    """
    request = pb.GenerateRequest(text="Hello", sampling=pb.SamplingParams(max_tokens=3000, ignore_eos=True))
    calls = [
        http_call("/v1/completions", LONG | {"stream": True}),
        grpc_call("Generate", request),
        http_call("/v1/completions", LONG),
    ]
    outs = [submit(engine, call)[0] for call in calls]
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*(out.started.wait() for out in outs[:2]))
        outs.append(submit(engine, http_call("/v1/completions", LONG | {"stream": True}))[0])
        await outs[-1].started.wait()
        while engine.load().running < len(outs):
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
        for streamed in (outs[0], outs[3]):
            assert b"error" not in streamed.body
            assert b"[DONE]" not in streamed.body
        assert not outs[2].status
        assert engine.dead()
        with pytest.raises(ReplicaFailed):
            await engine.check_health()
        assert engine.load() == Load()
        late = await ask(engine, http_call("/v1/completions", LONG))
        assert [type(error) for error in late.failures] == [ReplicaLost]
    assert not any(map(alive, [core]))


async def test_the_death_of_an_idle_engine_is_told(model: Path) -> None:
    async with running_engine(model) as engine:
        assert not engine.dead()
        told = asyncio.Event()
        engine.on_step(lambda: told.set() if engine.dead() else None)
        (core,) = engine_cores()
        os.kill(core, signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            await told.wait()


def folders(parent: Path) -> list[Path]:
    return list(parent.iterdir())


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where vLLM is told to put its sockets; a path that is short enough for their names."""
    with tempfile.TemporaryDirectory(prefix="kv-", dir="/tmp") as folder:
        monkeypatch.setenv("VLLM_RPC_BASE_PATH", folder)
        yield Path(folder)


async def test_closing_fails_the_streams_and_leaves_no_process_and_no_socket(model: Path, sockets: Path) -> None:
    async with running_engine(model) as engine:
        cores = engine_cores()
        assert cores
        (folder,) = folders(sockets)
        assert any(path.is_socket() for path in folders(folder))
        assert os.environ["VLLM_RPC_BASE_PATH"] == str(sockets)
        outs = await long_streams(engine)
    for out in outs:
        await out.ended()
        assert [type(error) for error in out.failures] == [ReplicaLost]
    assert not any(map(alive, cores))
    assert not folders(sockets)
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


def make_adapter(directory: Path) -> Path:
    """A LoRA adapter for the tiny model that changes what it says."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 64, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "tiny"}))
    random = torch.Generator().manual_seed(1)
    layers = [f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    weights = {}
    for layer in layers:
        weights[f"{layer}.lora_A.weight"] = torch.randn(8, 128, generator=random)
        weights[f"{layer}.lora_B.weight"] = torch.randn(128, 8, generator=random)
    save_file(weights, directory / "adapter_model.safetensors")
    return directory


async def test_an_adapter_answers_under_its_name_on_both_protocols(model: Path, tmp_path: Path) -> None:
    adapter = {"name": "tiny-lora", "path": str(make_adapter(tmp_path / "adapter"))}
    async with running_engine(model, enable_lora=True, max_lora_rank=8, lora_modules=[adapter]) as engine:
        cards = engine.info().models
        assert [(card.name, card.parent) for card in cards] == [(MODEL, ""), ("tiny-lora", MODEL)]
        sampling = pb.SamplingParams(max_tokens=12, temperature=0)

        async def generated(**fields: Any) -> str:
            request = pb.GenerateRequest(text="The old harbour town", sampling=sampling, **fields)
            out = await ask(engine, grpc_call("Generate", request))
            return "".join(message.text for message in out.messages(pb.GenerateResponse))

        async def completed(name: str) -> str:
            body = {"model": name, "prompt": "The old harbour town", "max_tokens": 12, "temperature": 0}
            text: str = (await ask(engine, http_call("/v1/completions", body))).json()["choices"][0]["text"]
            return text

        base, adapted = await completed(MODEL), await completed("tiny-lora")
        assert base != adapted
        assert await generated(model=MODEL) == base
        assert await generated(model="tiny-lora") == adapted
        assert await generated(model=MODEL, routing=pb.RoutingParams(lora="tiny-lora")) == adapted


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
        ({"api_key": "secret"}, "through the router only"),
        ({"middleware": ["a.b"]}, "through the router only"),
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


def test_an_api_key_in_the_environment_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with pytest.raises(ConfigError, match=r"VLLM_API_KEY .* through the router only"):
        serve_namespace("m", MODEL, {}, cpu=True)


def test_arguments_pass_through_and_the_rest_are_vllms_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    adapter = {"name": "a", "path": "/a", "base_model_name": "m"}
    args = {
        "max-model-len": 2048,
        "enable_prefix_caching": False,
        "lora_modules": [adapter],
        "allowed_origins": ["*"],
        "kv_events_config": {"enable_kv_cache_events": True, "publisher": "zmq"},
        "max_num_seqs": None,
    }
    made = vars(serve_namespace("m", MODEL, args, cpu=False))
    assert made["max_model_len"] == 2048
    assert made["enable_prefix_caching"] is False
    assert made["lora_modules"][0].path == "/a"
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
