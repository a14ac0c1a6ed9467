"""Messages and contexts as Flower itself makes them on a node, and a grid of such nodes; the private names that this needs are here
alone."""

from __future__ import annotations

from types import SimpleNamespace

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from hetfl.engines.flower.node import build_runtime, make_client_app
from hetfl.engines.flower.records import RecordCodec


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


class Nodes:
    """A grid of nodes in this process, a client each, of the run that `config` resolves; what they keep is in `folder`.

    `held`: client -> for how many looks its replies to training are held back; `failing`: clients of which the next of these is an
    error. `sent`: (type, client) of every message; `trained`: by (round, client) the state that a reply to training has.
    """

    def __init__(self, config, clients, folder, held=(), failing=()):
        self.failing = set(failing)
        self.held, self.sent, self.trained, self._replies = dict(held), [], {}, {}
        self._app = make_client_app(lambda _: build_runtime(config), lambda _: folder)
        self._contexts = {client + 2: context_of(client, clients) for client in range(clients)}
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def get_nodes(self):
        return [SimpleNamespace(node_id=node, public_key=b"") for node in self._contexts]

    def push_messages(self, messages):
        for message in messages:
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            message.metadata.__dict__["_message_id"] = f"n{len(self.sent)}"
            self.sent.append((kind, node - 2))
            reply = self._app(message, self._contexts[node])
            if kind == "train" and node - 2 in self.failing:
                self.failing.remove(node - 2)
                reply = Message(Error(2, "boom"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = node
            if kind == "train" and not reply.has_error():
                self.trained[int(message.metadata.group_id), node - 2] = RecordCodec().decode(reply.content).state
            looks = self.held.get(node - 2, 0) if kind == "train" else 0
            self._replies[message.metadata.message_id] = [looks, reply]
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, ids):
        found = []
        for name in ids:
            waiting = self._replies[name]
            waiting[0] -= 1
            if waiting[0] < 0:
                found.append(self._replies.pop(name)[1])
        return found
