"""Modules as they are where nothing is compiled, beside the ones that the process uses."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

import pytest

from router.compiled import VARIABLE


def pythonic(names: Sequence[str]) -> list[ModuleType]:
    """These modules anew and without compiled parts; they see each other, and of all others those in use. Name them
    in the order in which they import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "0")
        for name in names:
            importlib.import_module(name)
            package, _, short = name.rpartition(".")
            patch.setattr(sys.modules[package], short, sys.modules[name])  # Put back at the end.
        for name in names:
            patch.delitem(sys.modules, name)
        return [importlib.import_module(name) for name in names]
