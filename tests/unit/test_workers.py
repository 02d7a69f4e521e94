"""What each of several router processes is told."""

from __future__ import annotations

import pytest

from router.errors import ConfigError
from router.options import AdminOptions, Config
from router.workers import MAX_PORT, config_of


def test_each_worker_has_an_admin_port_of_its_own() -> None:
    config = Config(admin=AdminOptions(enabled=True, port=9100), workers=3)
    assert [config_of(n, config).admin.port for n in range(3)] == [9100, 9101, 9102]
    assert config_of(1, config).http == config.http


def test_any_free_port_stays_any_free_port() -> None:
    config = Config(admin=AdminOptions(enabled=True, port=0))
    assert config_of(5, config) == config


def test_a_worker_for_which_no_port_is_left_stops_start_up() -> None:
    config = Config(admin=AdminOptions(enabled=True, port=MAX_PORT))
    assert config_of(0, config) == config
    with pytest.raises(ConfigError, match=r"admin\.port"):
        config_of(1, config)
    assert config_of(1, Config(admin=AdminOptions(port=MAX_PORT))).admin.port == MAX_PORT  # It is not enabled.
