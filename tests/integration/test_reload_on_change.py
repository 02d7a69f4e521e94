"""`kvlane serve` follows the file that it was started with."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtests.processes import engines
from router.options import Config, GrpcOptions, HttpOptions
from router.supervisor import Supervisor
from router.watched import WatchedFile
from tests.integration.ray_local import wait_until
from tests.integration.served import Load, Served, serving
from tests.unit.grpc_serving import until

pytestmark = pytest.mark.slow

OK, REFUSED = 'kvlane_reloads_total{outcome="ok"}', 'kvlane_reloads_total{outcome="refused"}'


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[dict[str, Any]]]:
    """Two simulated replicas that take 5 ms for a token."""
    with engines(2, {"step_base_ms": 5.0, "prefill_ms_per_token": 0.0}) as (_, found):
        yield found


@pytest.fixture
def served(tmp_path: Path, addresses: list[dict[str, Any]]) -> Iterator[Served]:
    with serving(tmp_path, addresses, watched=True) as found:
        yield found


def swap(folder: Path, version: str, text: str) -> None:
    """Puts a file where Kubernetes has it: in a folder of that version, behind a link to the folder."""
    (folder / version).mkdir()
    (folder / version / "config.toml").write_text(text)
    (folder / "..data_tmp").symlink_to(version)
    os.replace(folder / "..data_tmp", folder / "..data")


async def test_changes_of_the_file_are_reloaded_under_load_without_a_broken_stream(served: Served) -> None:
    load = Load(served)
    async with load.running(streams=4, callers=2, newcomers=2):
        await load.more()
        served.write('[policy]\nname = "random"')
        await asyncio.to_thread(wait_until, lambda: served.metrics()[OK] == 1, "it was reloaded")
        await load.more()
        served.write('[policy]\nname = "round-robin"')
        await asyncio.to_thread(wait_until, lambda: served.metrics()[OK] == 2, "it was reloaded")
        await load.more()
    assert load.broken == []


def test_a_mounted_config_map_that_is_swapped_is_reloaded(served: Served) -> None:
    link, workers, text = served.config, served.workers(), served.config.read_text()
    swap(link.parent, "..1", text)
    (link.parent / "link").symlink_to("..data/config.toml")
    os.replace(link.parent / "link", link)  # Another file that says the same: nobody is replaced.
    wait_until(lambda: "no reload: the configuration is the one in use" in served.log(), "it was looked at")
    assert served.workers() == workers
    swap(link.parent, "..2", text.replace("workers = 2", "workers = 1"))
    wait_until(lambda: served.metrics()[OK] == 1, "it was reloaded")
    wait_until(lambda: len(served.workers()) == 1 and not workers & served.workers(), "the old workers have gone")


def test_a_file_that_is_wrong_is_refused_once_for_each_change(served: Served) -> None:
    workers, good = served.workers(), served.config.read_text()
    for count, text in enumerate(("workers = 0\n", "workers =", ""), 1):
        if text:
            served.config.write_text(text)
        else:
            served.config.unlink()
        wait_until(lambda count=count: served.metrics()[REFUSED] == count, "it was refused")
    served.config.write_text(good)  # What is in use.
    served.process.send_signal(signal.SIGHUP)  # Takes what is in the file, changed or not.
    wait_until(lambda: served.metrics()[OK] == 1, "it was reloaded")
    assert served.metrics()[REFUSED] == 3
    assert served.log().count("reload refused, the configuration in use stays: ") == 3
    wait_until(lambda: not workers & served.workers(), "the old workers have gone")


@pytest.mark.parametrize("wanted", [True, False])
async def test_a_change_is_passed_over_where_that_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    class Changing(WatchedFile):
        looks = 0

        def changed(self) -> bool:
            self.looks += 1
            return True

    monkeypatch.setattr("router.supervisor.LOOK_S", 0.0)
    file = Changing(str(tmp_path / "config.toml"))
    config = Config(http=HttpOptions(port=0), grpc=GrpcOptions(port=0), reload_on_change=wanted)
    supervisor = Supervisor(config, lambda: config, file)
    watching = asyncio.create_task(supervisor._watch())
    await until(lambda: file.looks > 2)
    assert supervisor._hangup.is_set() is wanted
    watching.cancel()
    await asyncio.wait([watching])
    supervisor._listeners.close()
