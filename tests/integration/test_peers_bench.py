"""The bench of routers side by side, from the command line to its files, with a router of another house."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtests.__main__ import main as loadtests
from loadtests.peers.environments import BENCH, installed
from loadtests.peers.errors import PeerError

FIELDS = (
    *("system", "policy", "protocol", "streams", "cpu_us_per_chunk", "cpu_us_per_token", "cpu_us_per_request"),
    *("ttft_added_p50_ms", "ttft_added_p99_ms", "itl_added_p99_ms", "chunks_per_s", "requests_per_s"),
    *("rss_mb", "errors"),
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vllm_router() -> str:
    """Its name, once it is installed; skips, with the reason, where that cannot be done."""
    try:
        installed("vllm-router", "0.1.17")
    except PeerError as error:
        pytest.skip(str(error))
    return "vllm-router"


@pytest.mark.timeout(900)
def test_a_whole_comparison_is_written(vllm_router: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, text, pictures = tmp_path / "out.json", tmp_path / "out.md", tmp_path / "pictures"
    arguments = ["--systems", f"kvlane,{vllm_router}", "--streams", "4", "--tokens", "20", "--prompt-kb", "0.5"]
    arguments += ["--reps", "1", "--step-ms", "10", "--seconds", "0.5", "--load", "0.2"]
    arguments += ["--replay", "azure-code", "--replay-requests", "5", "--time-factor", "20"]
    files = ["--json", str(out), "--markdown", str(text), "--plots", str(pictures)]
    assert loadtests(["peers", *arguments, *files]) == 0, capsys.readouterr().err
    written = json.loads(out.read_text())
    every = [
        *(("direct", "none"), ("kvlane", "cost"), ("kvlane", "round-robin")),
        *((vllm_router, "cache_aware"), (vllm_router, "round_robin")),
    ]
    assert [(row["system"], row["policy"]) for row in written["results"]] == every
    assert [(row["system"], row["policy"]) for row in written["open"]] == every[1:]
    assert [(row["system"], row["policy"]) for row in written["replays"]] == every
    for row in written["results"]:
        assert set(FIELDS) <= row.keys()
        assert row["engine_cpu_us_per_chunk"] > 0
        assert row["engine_cores"] > 0 < row["load_cores"]
        if row["system"] != "direct":
            assert row["cpu_us_per_chunk"] > 0 < row["cpu_us_per_request"]
            assert row["rss_mb"] > 10
    assert not any(row["errors"] for kind in ("results", "open", "replays") for row in written[kind])
    assert written["generator"][0]["chunks_per_s"] > 0
    assert text.read_text().count(f"| {vllm_router} | cache_aware |") == 3
    assert len(list(pictures.glob("peers-*.svg"))) == 6
    assert (BENCH / "logs" / "vllm-router-cache_aware.log").exists()
