"""Sampled stacks as a picture and a table."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from loadtests import flame, sampled

STACKS = "main (a.py);run (b.py);work (c.py) 6\nmain (a.py);run (b.py) 3\nmain (a.py);other (d.py) 1\n"


def test_stacks_are_read_as_they_are_written() -> None:
    stacks = flame.parse(STACKS)
    assert stacks["main (a.py)", "run (b.py)"] == 3
    assert flame.parse(flame.collapsed(stacks)) == stacks


def test_the_table_tells_what_functions_took_themselves_and_in_all() -> None:
    lines = flame.top(flame.parse(STACKS), 2)
    assert lines == [("work (c.py)", 60.0, 60.0), ("run (b.py)", 30.0, 90.0)]
    assert flame.markdown(lines).splitlines()[-1] == "| `run (b.py)` | 30.0 | 90.0 |"


def test_a_function_that_calls_itself_counts_once() -> None:
    (line,) = flame.top(Counter({("f", "f", "f"): 4}), 5)
    assert (line.itself, line.total) == (100.0, 100.0)


def test_the_picture_shows_frames_over_their_callers_as_wide_as_often() -> None:
    root = ElementTree.fromstring(flame.svg(flame.parse(STACKS), "a <title>"))
    boxes = {}
    for group in root.findall("{*}g"):
        title, rect = group.find("{*}title"), group.find("{*}rect")
        assert title is not None
        assert rect is not None
        assert title.text is not None
        boxes[title.text.split(":")[0]] = (float(rect.attrib["width"]), float(rect.attrib["y"]))
    assert {name: width for name, (width, _) in boxes.items()} == {
        "main (a.py)": 1200.0,
        "run (b.py)": 1080.0,
        "work (c.py)": 720.0,
        "other (d.py)": 120.0,
    }
    assert boxes["main (a.py)"][1] > boxes["run (b.py)"][1] > boxes["work (c.py)"][1]


def test_files_are_named_from_their_package_on() -> None:
    places = {
        "f (/somewhere/site-packages/h2/connection.py)": "f (h2/connection.py)",
        "f (/usr/lib/python3.11/asyncio/tasks.py:12)": "f (asyncio/tasks.py)",
        "f (/checkout/router/lane/client.py)": "f (router/lane/client.py)",
        "f (/checkout/protos/kvlane/client.py)": "f (kvlane/client.py)",
        "f (odd.py)": "f (odd.py)",
        "take (router/load/_outlooks.pyx)": "take (router/load/_outlooks.pyx)",
        "send (/usr/lib/x86_64-linux-gnu/libc.so.6)": "send (libc.so.6)",
        "native": "native",
    }
    assert set(flame.short(Counter({(place,): 1 for place in places}))) == {(short,) for short in places.values()}


def test_a_process_can_sample_itself(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(
        "import sys, time\ndef work():\n    while time.process_time() < float(sys.argv[1]):\n        pass\nwork()\n"
    )
    env = os.environ | {
        sampled.MODULE: "busy",
        sampled.FILE: str(tmp_path / "out"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]),
    }
    command = [sys.executable, "-m", "loadtests.sampled", "0.5"]
    subprocess.run(command, env=env, check=True, timeout=60, cwd=tmp_path)
    lines = flame.top(flame.short(flame.parse((tmp_path / "out").read_text())), 1)
    assert lines[0].function.startswith("work (")
    assert lines[0].itself > 50
