"""The server as hooks see it."""

from __future__ import annotations

import pytest

from hetfl.errors import UsageError


def test_a_run_without_public_data_says_so():
    from hetfl.hooks.server import Server

    server = object.__new__(Server)
    server._public = None
    with pytest.raises(UsageError, match="--server-data"):
        _ = server.public
