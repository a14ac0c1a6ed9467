"""The names of Flower that are private, here and nowhere else: a run's record, who this process is, and the number of a message."""

from __future__ import annotations

from importlib.metadata import version

from flwr.app import Message

from hetfl.errors import UsageError

TESTED = "1.41"

try:
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
except ImportError as error:
    raise UsageError(
        f"flwr {version('flwr')} lacks what hetfl needs of it ({error}); install flwr {TESTED}: pip install 'flwr>={TESTED},<1.42'"
    ) from error

__all__ = ["TESTED", "Run", "TaskIdentity", "identify", "number"]


def identify(node: int) -> None:
    """Says who this process is; Flower wants to know before it makes a Message."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, node, 1


def number(message: Message, name: str) -> None:
    """Gives a message its id, which Flower's own grids do when they send it."""
    message.metadata.__dict__["_message_id"] = name
