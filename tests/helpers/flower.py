"""Messages and contexts as Flower itself makes them on a node; the private names that this needs are here alone."""

from __future__ import annotations

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity


def message_for(client, content, kind):
    """A message of type `kind` that has been sent."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    message = Message(content, client + 2, kind, group_id="1")
    message.metadata.__dict__["_message_id"] = "m"
    return message


def context_of(client, clients, **config):
    """The context of the node that holds partition `client`."""
    given = {"partition-id": client, "num-partitions": clients, **config}
    return Context(run_id=1, node_id=client + 2, node_config=given, state=RecordDict(), run_config={})
