"""What passes between the loop and an engine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from helpers.oracles import quick
from hetfl.rounds.messages import LONGEST_LINE, Failure, exchange


class Scripted:
    """An engine that answers as told."""

    def __init__(self, answers):
        self.answers, self.asked = answers, 0

    def ask(self, kind, contents):
        for client, answer in self.answers:
            self.asked += 1
            yield client, answer


@quick
@given(st.permutations(range(6)), st.sets(st.integers(0, 5)), st.integers(0, 5))
def test_answers_are_taken_in_client_order_whatever_the_arrival(arrival, silent, twice):
    answers = [(i, f"answer {i}") for i in arrival if i not in silent]
    answers += [(i, "again") for i, _ in answers if i == twice]
    found = list(exchange(Scripted(answers), "train", dict.fromkeys(range(6), 1)))
    assert [client for client, _ in found] == list(range(6))
    for client, answer in found:
        assert answer == (Failure("it gave no answer") if client in silent else f"answer {client}")


def test_an_answer_is_given_as_soon_as_it_is_its_turn():
    engine = Scripted([(1, "b"), (0, "a"), (2, "c")])
    answers = exchange(engine, "train", dict.fromkeys(range(3), 1))
    assert next(answers) == (0, "a")
    assert engine.asked == 2
    assert next(answers) == (1, "b")
    assert engine.asked == 2


def test_nobody_is_asked_where_nobody_is_there():
    engine = Scripted([(0, "a")])
    assert list(exchange(engine, "train", {})) == []
    assert engine.asked == 0


def test_a_failure_has_a_line_and_the_whole():
    try:
        raise ValueError("x" * 2 * LONGEST_LINE)
    except ValueError as error:
        failure = Failure.of(error)
    assert failure.reason.startswith("ValueError: xx")
    assert len(failure.reason) == LONGEST_LINE
    assert "Traceback" in failure.details
    assert Failure("").reason == "no reason given"
