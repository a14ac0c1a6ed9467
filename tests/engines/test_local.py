"""The default engine."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from helpers.oracles import quick
from hetfl.engines.local import by_request, node


@quick
@given(st.permutations(range(6)), st.sets(st.integers(0, 5)), st.integers(0, 5))
def test_replies_are_taken_in_client_order_whatever_the_arrival(arrival, silent, twice):
    sent = [SimpleNamespace(metadata=SimpleNamespace(message_id=f"m{i}", dst_node_id=node(i))) for i in range(6)]
    replies = [SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=f"m{i}")) for i in arrival if i not in silent]
    replies += [r for r in replies if r.metadata.reply_to_message_id == f"m{twice}"]
    replies.insert(twice, SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id="of an earlier round")))
    assert [client for client, _ in by_request(sent, iter(replies))] == [i for i in range(6) if i not in silent]
