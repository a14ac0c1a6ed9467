"""Who is who on a federation: a node is the client that it says, unless another is it or its key is not that client's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from helpers.flower import message_for
from hetfl.engines.flower import superlink
from hetfl.engines.flower.records import RecordCodec
from hetfl.engines.flower.remote import FlowerEngine, Outbox
from hetfl.engines.select import read_keys
from hetfl.errors import RunError, UsageError


def pair():
    """A public key as the grid gives it, and in OpenSSH's form."""
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem, public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


class Nodes:
    """A grid of nodes: id -> (client that it claims, public key); what they are asked beside who they are has no answer."""

    def __init__(self, nodes):
        self.nodes, self.asked = nodes, []

    def get_nodes(self):
        return [SimpleNamespace(node_id=node, public_key=key) for node, (_, key) in self.nodes.items()]

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(self.asked)}"
            self.asked.append(message.metadata.dst_node_id)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, ids):
        for message in ids:
            content = RecordCodec().encode({"client": float(self.nodes[self.asked[int(message[1:])]][0])})
            yield SimpleNamespace(content=content, has_content=lambda: True, metadata=SimpleNamespace(reply_to_message_id=message))


@pytest.fixture
def engine():
    message_for(0, RecordCodec().encode(0), "query")  # without which Flower makes no message

    def start(grid, keys=None):
        made = FlowerEngine(3, None, 1.0, keys)
        made._use(grid)
        return made

    return start


def test_a_second_node_of_the_same_client_is_not_heard_and_said_once(engine):
    grid = Nodes({11: (0, b""), 12: (1, b""), 13: (1, b"")})
    one = engine(grid)
    for _ in range(2):
        assert one._find_nodes() == {0: 11, 1: 12}
    assert one.notices == ["a node that claims to be client 1 is not heard: another node is this client"]
    assert grid.asked == [11, 12, 13]
    del grid.nodes[12]
    assert one._find_nodes() == {0: 11, 1: 13}, "a node that was started anew takes over once the old one is gone"


def test_a_round_waits_where_every_node_is_gone(engine):
    grid = Nodes({})
    made, looks = engine(grid), []

    def look():
        looks.append(1)
        if len(looks) > 3:
            grid.nodes[7] = (1, b"")
        return Nodes.get_nodes(grid)

    grid.get_nodes = look
    found = dict(made._send(Outbox(), "profile", {0: 1, 1: 1}))
    assert "not connected" in str(found[0])
    assert 1 not in found, "the node that came was asked"


def test_a_run_ends_where_nobody_comes_back(engine):
    made = engine(Nodes({}))
    made._wait = 0.01
    with pytest.raises(RunError, match="no node is connected any more, and none came back"):
        list(made.ask("train", {0: SimpleNamespace(round=1)}))


def test_an_impostor_with_a_key_of_its_own_is_not_heard_even_where_it_comes_first(engine):
    (own, listed), (other, _) = pair(), pair()
    grid = Nodes({11: (1, other)})
    one = engine(grid, {1: listed})
    assert one._find_nodes() == {}
    assert "its key is not the one of this client" in one.notices[0]
    grid.nodes[12] = (1, own)
    assert one._find_nodes() == {1: 12}
    assert engine(Nodes({11: (1, b"")}), {1: listed})._find_nodes() == {}


def test_the_table_of_keys(tmp_path):
    assert read_keys(tmp_path / "none.json") == {}
    (tmp_path / "keys.json").write_text('{"0": "ecdsa x"}')
    assert read_keys(tmp_path / "keys.json") == {0: "ecdsa x"}
    (tmp_path / "keys.json").write_text("[1]")
    with pytest.raises(UsageError, match="is no table of clients"):
        read_keys(tmp_path / "keys.json")


def test_certificates_are_renewed_before_they_end(tmp_path, monkeypatch):
    superlink.make_certificates(tmp_path)
    first = (tmp_path / "server.pem").read_bytes()
    superlink.make_certificates(tmp_path)
    assert (tmp_path / "server.pem").read_bytes() == first
    ends = x509.load_pem_x509_certificate(first).not_valid_after_utc

    class Late(superlink.datetime):
        @classmethod
        def now(cls, zone=None):
            return ends

    monkeypatch.setattr(superlink, "datetime", Late)
    superlink.make_certificates(tmp_path)
    assert (tmp_path / "server.pem").read_bytes() != first


def test_a_second_federation_in_a_folder_leaves_the_first_one_alone(tmp_path):
    one, two = (superlink.LocalFederation(tmp_path / "flower", 1, True) for _ in range(2))
    (tmp_path / "flower").mkdir()
    one._lock.acquire()
    (tmp_path / "flower" / "state.db").write_text("live")
    with pytest.raises(UsageError, match="is being run by another process"):
        two.__enter__()
    assert (tmp_path / "flower" / "state.db").read_text() == "live"
    one._lock.release()
