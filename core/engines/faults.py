"""Flower's codes for what a client can fail by, and the reply of one that raised."""

from __future__ import annotations

import traceback

from flwr.app import Error, Message

RAISED = 2  # an exception in a client

LATE = 3  # a reply that is not there

UNAVAILABLE = 5  # a node that is not there

DIED = 8  # a client whose process has ended


def raised(message: Message, error: BaseException) -> Message:
    """The error reply to `message` of a client that raised, with its traceback."""
    return Message(Error(RAISED, "".join(traceback.format_exception(error))), reply_to=message)
