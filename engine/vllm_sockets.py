"""The Unix sockets between a vLLM engine's processes: in a private folder that goes with the engine.

vLLM makes them under random names in the machine's folder for temporary files and leaves them there: three per engine,
for as long as the machine runs. Rule: only what is made while the engine starts goes into the folder; the environment
is afterwards as it was.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from engine.vllm_args import forget_environment

_VARIABLE: Final = "VLLM_RPC_BASE_PATH"
_PREFIX: Final = "kvlane-rpc-"
_LONGEST_PATH: Final = 107 - 1 - 36
"""What a folder's path may have: Linux takes names of sockets of up to 107 bytes, and vLLM's are 36 long."""
_RANDOM_CHARS: Final = 8


class EngineSockets:
    """One engine's."""

    def __init__(self) -> None:
        self._folder = ""

    @contextmanager
    def starting(self, config: Any) -> Iterator[None]:
        """An engine of this `VllmConfig` starts in the block. Where that fails, its folder is removed."""
        if config.parallel_config.distributed_executor_backend == "ray":
            # Its workers get the same variables, and may be on machines where there is no such folder.
            yield
            return
        before = os.environ.get(_VARIABLE)
        self._folder = tempfile.mkdtemp(prefix=_PREFIX, dir=_parent(before))
        forget_environment()  # Another engine of this process may have had vLLM keep its own.
        os.environ[_VARIABLE] = self._folder
        try:
            yield
        except BaseException:
            self.remove()
            raise
        finally:
            if before is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = before

    def remove(self) -> None:
        """The engine has ended. May be called more than once."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = ""


def _parent(given: str | None) -> str:
    """Where vLLM would put its sockets, as far as their names are then short enough."""
    usual = given or tempfile.gettempdir()
    fits = len(os.fsencode(usual)) + 1 + len(_PREFIX) + _RANDOM_CHARS <= _LONGEST_PATH
    return usual if fits else "/tmp"
