from __future__ import annotations

import asyncio
import datetime
import logging
import re
import threading
from pathlib import Path

import pytest

from router import files, keys, workers
from router.__main__ import main
from router.errors import ConfigError, KeyRefused, ModelForbidden
from router.ingress.gate import Gate
from router.ingress.refusals import BURST, RefusalLog
from router.options import Config, LogOptions
from tests.fakes import DEADLINE_S, eventually


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def gate_of(path: Path, *entries: str) -> tuple[Gate, list[tuple[str, str]]]:
    path.write_text("\n".join(entries))
    refused: list[tuple[str, str]] = []
    return Gate(str(path), lambda ingress, reason: refused.append((ingress, reason)), wall=lambda: 1.8e9), refused


def test_a_new_key_is_found_by_its_entry_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    (mine, my_entry), (other, other_entry) = keys.new("team-a", ["tiny"]), keys.new("team-b")
    path.write_text(my_entry + other_entry)
    known = keys.read(str(path))
    assert mine not in path.read_text()
    assert mine.split("-", 2)[2] not in path.read_text()  # A secret may have dashes of its own.
    found = keys.find(known, mine)
    assert found is not None
    assert (found.tenant, found.models, found.allows("tiny"), found.allows("x")) == (
        "team-a",
        frozenset({"tiny"}),
        True,
        False,
    )
    everything = keys.find(known, other)
    assert everything is not None
    assert everything.allows("x")
    swapped = mine[:17] + other[17:]
    last = mine[:-1] + ("A" if mine[-1] != "A" else "B")
    for wrong in (swapped, last, keys.new("x")[0], "kvl-" + "0" * 12 + mine[16:], "kvl-é" + mine[5:]):
        assert keys.is_well_formed(wrong)
        assert keys.find(known, wrong) is None


@pytest.mark.parametrize("text", ["", "kvl-", "sk-" + "a" * 57, "kvl-" + "a" * 55, "kvl-" + "a" * 5000])
def test_what_cannot_be_a_key_is_not_looked_up(text: str) -> None:
    assert not keys.is_well_formed(text)


HASH = "sha256:" + "0" * 12 + ":" + "1" * 32 + ":" + "2" * 64


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("keys = 3", "keys"),
        ("", "missing required field `keys`"),
        ("[[keys]", "is no TOML"),
        ("[[keys]]\nname = 'a'", "missing required field `hash`"),
        (f"[[keys]]\nname = 'a'\nhash = '{HASH}'\nmodel = ['x']", "unknown field `model`"),
        (f"[[keys]]\nname = ''\nhash = '{HASH}'", r"keys\.0\.name: expected 1 to 64"),
        (f"[[keys]]\nname = 'a\\n'\nhash = '{HASH}'".replace("'a\\n'", '"a\\n"'), r"keys\.0\.name"),
        (f"[[keys]]\nname = 'a'\nhash = '{HASH[:-2]}'", r"keys\.0\.hash: not what"),
        (f"[[keys]]\nname = 'a'\nhash = '{HASH.replace('sha256', 'md5')}'", r"keys\.0\.hash: not what"),
        ("[[keys]]\nname = 'a'\nhash = 'kvl-secret'", r"keys\.0\.hash: not what"),
        (f"[[keys]]\nname = 'a'\nhash = '{HASH}'\nexpires = '2030-01-01'", r"keys\.0\.expires: expected a date"),
        (f"[[keys]]\nname = 'a'\nhash = '{HASH}'\n" * 2, r"keys\.1\.hash: its id is that of an earlier key"),
    ],
)
def test_a_keys_file_that_is_wrong_is_refused_and_not_quoted(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        keys.read(str(path))
    assert caught.value.message.startswith("auth.keys_file")
    assert "000000" not in caught.value.message
    assert "secret" not in caught.value.message


def test_a_keys_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"auth\.keys_file: cannot read /absent: No such file"):
        keys.read("/absent")


@pytest.mark.parametrize(
    ("expires", "at"),
    [
        ("2030-01-01", "2030-01-01T00:00:00+00:00"),
        ("2030-01-01T12:00:00", "2030-01-01T12:00:00+00:00"),
        ("2030-01-01T12:00:00+02:00", "2030-01-01T10:00:00+00:00"),
    ],
)
def test_a_key_expires_at_its_day_or_moment(tmp_path: Path, expires: str, at: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f"{keys.new('a')[1]}expires = {expires}\n")
    (key,) = keys.read(str(path)).values()
    assert key.expires_at == datetime.datetime.fromisoformat(at).timestamp()


def test_the_gate_tells_why_it_refuses_and_never_what_was_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, entry = keys.new("team-a", ["tiny"])
    old, old_entry = keys.new("old", expires=datetime.date(2020, 1, 1))
    wrong = keys.new("nobody")[0]
    gate, refused = gate_of(tmp_path / "keys.toml", entry, old_entry)
    shown: list[dict[str, str]] = [
        {},
        bearer(wrong),
        bearer("sk-mine"),
        {"authorization": f"Basic {good}"},
        bearer(old),
    ]
    for given in shown:
        with pytest.raises(KeyRefused):
            gate.admit("http", given)
    reasons = ["missing", "unknown", "malformed", "malformed", "expired"]
    assert refused == [("http", reason) for reason in reasons]
    key = gate.admit("grpc", {"authorization": f"bearer  {good}"})
    assert gate.admit("http", {"x-api-key": good}) is key
    gate.check_model("http", key, "tiny")
    for model, adapter in (("large", ""), ("tiny", "lora")):
        with pytest.raises(ModelForbidden, match="not for the model"):
            gate.check_model("http", key, model, adapter)
    assert gate.asked == {"team-a": 2, "old": 0}
    assert "of 'old'" in caplog.text
    for secret in (good, old, wrong, "sk-mine"):
        assert secret not in caplog.text
        assert secret[-20:] not in caplog.text


def test_a_flood_of_refusals_is_no_flood_of_lines(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    log = RefusalLog(lambda: now)
    for _ in range(1000):
        log.tell("refused: %s", "why")
    assert len(caplog.records) == BURST
    now = 1.0
    log.tell("refused: %s", "why")
    assert caplog.messages[-1] == f"refused: why ({1000 - BURST} more were not logged)"


def test_keys_are_read_again_where_their_mount_is_swapped_and_kept_where_they_break(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (first, entry), (second, other) = keys.new("a"), keys.new("b")
    for name, text in (("v1", entry), ("v2", other), ("v3", other[:-9])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys.toml").write_text(text)
    path, link = tmp_path / "keys.toml", tmp_path / "..data"

    def mount(version: str) -> None:  # As Kubernetes does with a Secret.
        fresh = tmp_path / "..tmp"
        fresh.symlink_to(version)
        fresh.rename(link)

    mount("v1")
    path.symlink_to("..data/keys.toml")
    gate = Gate(str(path))
    told: list[str] = []
    followed = files.Followed("keys", [str(path)], gate.reload, lambda _, outcome: told.append(outcome))
    gate.admit("http", bearer(first))
    followed.look()
    assert told == []
    mount("v2")
    followed.look()
    gate.admit("http", bearer(second))
    with pytest.raises(KeyRefused):
        gate.admit("http", bearer(first))
    mount("v3")
    followed.look()
    followed.look()
    gate.admit("http", bearer(second))
    link.unlink()
    followed.look()
    gate.admit("http", bearer(second))
    assert told == ["ok", "failed", "failed"]
    assert caplog.text.count("cannot be used, the ones in use stay") == 2
    assert gate.asked == {"a": 1, "b": 3}


async def test_streams_go_on_while_files_are_read_again() -> None:
    reading, others = asyncio.Event(), threading.Event()
    loop, went_on = asyncio.get_running_loop(), []

    def read() -> None:
        loop.call_soon_threadsafe(reading.set)
        went_on.append(others.wait(DEADLINE_S))

    following = asyncio.create_task(files.follow([files.Followed("keys", [], read, lambda what, outcome: None)]))
    await reading.wait()
    others.set()
    await eventually(lambda: bool(went_on))
    assert went_on == [True]
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


def test_the_command_makes_keys_and_lists_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    assert main(["key", "new", "--name", "team-a", "--model", "tiny", "--model", "big", "--expires", "2030-01-01"]) == 0
    entry, shown = capsys.readouterr()
    path.write_text(entry)
    key = shown.splitlines()[-1]
    assert keys.find(keys.read(str(path)), key) is not None
    assert key not in entry
    assert main(["key", "list", str(path)]) == 0
    line, _ = capsys.readouterr()
    assert re.fullmatch(r"team-a  [0-9a-f]{12}  big, tiny  expires 2030-01-01 00:00:00\+00:00\n", line)
    assert main(["key", "new", "--name", "a\tb"]) == 2
    assert main(["key", "new", "--name", "a", "--expires", "soon"]) == 2


def test_no_log_level_has_a_library_tell_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    hpack = logging.getLogger("hpack.hpack")
    workers.log_to_stderr(Config(log=LogOptions(level="debug")))
    assert not hpack.isEnabledFor(logging.DEBUG)
