"""Rules are pure functions of scores: a brute-force reading of the paper judges them."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsoup.errors import RecipeError
from streamsoup.rules import Accept, Begin, Rule, Search, Trial


def play(rule, own, score_of, run=0):
    """Run a rule; returns the kept multiset, in order of first entry, its score, and what was tried."""
    search = Search(rule, own)
    steps = search.steps(run)
    current, tried, answer, best, pending = {}, [], None, None, None
    while True:
        try:
            step = next(steps) if answer is None else steps.send(answer)
        except StopIteration:
            return current, best, tried
        if isinstance(step, Begin):
            current = dict.fromkeys(step.ingredients, 1.0)
            best = answer = score_of(current)
        elif isinstance(step, Accept):
            current, best, answer = pending, score_of(pending), 0.0
        else:
            assert isinstance(step, Trial)
            pending = {**current, step.ingredient: current.get(step.ingredient, 0.0) + step.change}
            pending = {i: w for i, w in pending.items() if w}
            tried.append((step.ingredient, step.change))
            answer = score_of(pending)


def by_hand(rule, order, score_of):
    """All rules as a person would write them down; judges the generators. Returns what is kept, and its score."""
    kept = dict.fromkeys(order if rule.prune else order[:1], 1.0)
    best = score_of(kept)
    sign = -1.0 if rule.minimize else 1.0
    for number in range(rule.rounds):
        before = dict(kept)
        for i in list(reversed(order)) if rule.prune else order[number == 0 :]:
            trial = dict(kept)
            if rule.prune:
                if len(trial) == 1 or trial.pop(i, None) is None:
                    continue
            elif i not in trial and len(trial) == (rule.max_ingredients or len(order)):
                continue
            else:
                trial[i] = trial.get(i, 0.0) + 1.0
            gain = sign * (score_of(trial) - best)
            if gain > -rule.tolerance or (gain == -rule.tolerance and rule.accept == "ge"):
                kept, best = trial, score_of(trial)
        if kept == before and (rule.prune or number > 0):  # the first round tries all but the one it began with
            break
    return kept, best


def table(seed):
    """A score for every soup, few enough values that ties are common."""
    scores = {}

    def score_of(members):
        return scores.setdefault(
            tuple(members.items()), random.Random(f"{seed}{sorted(members.items())}").randrange(6) / 4
        )

    return score_of


RULES = st.builds(
    Rule,
    accept=st.sampled_from(["ge", "gt"]),
    minimize=st.booleans(),
    tolerance=st.sampled_from([0.0, 0.25, 0.3]),
    order=st.sampled_from(["score", "given", "random"]),
    seed=st.integers(0, 5),
    max_ingredients=st.sampled_from([None, 1, 2, 3]),
    rounds=st.integers(1, 3),
)


def dropping(rule):
    return dataclasses.replace(rule, prune=True, max_ingredients=None)


def order_by_hand(rule, own):
    """The order of the first run: by score, ties as given; or as given; or any."""
    if rule.order == "score":
        ranked = []
        for i, score in enumerate(own):
            place = sum(own[j] <= score if rule.minimize else own[j] >= score for j in ranked)
            ranked.insert(place, i)
        return ranked
    return list(range(len(own))) if rule.order == "given" else None


@given(rule=st.one_of(RULES, RULES.map(dropping)), seed=st.integers(0, 10**6), count=st.integers(2, 7))
def test_rules_decide_as_a_person_with_a_pencil_would(rule, seed, count):
    score_of = table(seed)
    own = [score_of({i: 1.0}) for i in range(count)]
    for run in range(3):
        order = Search(rule, own).order(run)
        assert sorted(order) == list(range(count))
        if run == 0 and (by_rank := order_by_hand(rule, own)) is not None:
            assert order == by_rank
        kept, best, _ = play(rule, own, score_of, run)
        expected = by_hand(rule, order, score_of)
        assert (list(kept.items()), best) == (list(expected[0].items()), expected[1])


@given(rule=RULES, seed=st.integers(0, 10**6), count=st.integers(2, 7))
def test_without_tolerance_the_soup_is_never_worse_than_what_it_began_with(rule, seed, count):
    rule, score_of = dataclasses.replace(rule, tolerance=0.0), table(seed)
    own = [score_of({i: 1.0}) for i in range(count)]
    first = own[Search(rule, own).order(0)[0]]
    _, best, _ = play(rule, own, score_of)
    assert best <= first if rule.minimize else best >= first


def test_ties_of_their_own_keep_the_given_order_and_are_told():
    search = Search(Rule(), [0.5, 0.9, 0.5, 0.9])
    assert search.order(0) == [1, 3, 0, 2]
    assert search.ties() == [[0, 2], [1, 3]]


def test_given_and_random_orders_need_no_scores():
    nothing = [None] * 5
    assert Search(Rule(order="given"), nothing).order(0) == [0, 1, 2, 3, 4]
    shuffled = Search(Rule(order="random", seed=3), nothing).order(0)
    assert sorted(shuffled) == [0, 1, 2, 3, 4]
    assert shuffled == Search(Rule(order="random", seed=3), nothing).order(0)
    assert any(Search(Rule(order="random", seed=s), nothing).order(0) != shuffled for s in range(5))


def test_accepting_equal_scores_is_the_paper_and_refusing_them_the_reference_code():
    kept, _, _ = play(Rule(), [1.0, 0.5], lambda members: 1.0)
    assert list(kept) == [0, 1]
    kept, _, _ = play(Rule(accept="gt"), [1.0, 0.5], lambda members: 1.0)
    assert list(kept) == [0]


def test_pruning_starts_from_all_and_drops_the_worst_first():
    kept, best, tried = play(Rule(prune=True), [0.9, 0.1, 0.5], lambda m: 1.0 if 1 not in m else 0.2)
    assert tried[0] == (1, -1.0)
    assert set(kept) <= {0, 2}
    assert best == 1.0


def test_pruning_never_drops_the_last():
    kept, _, _ = play(Rule(prune=True, rounds=5), [0.1, 0.2, 0.3], lambda members: 0.0)
    assert len(kept) == 1


def test_in_later_rounds_an_ingredient_may_enter_again_and_gets_weight():
    kept, _, _ = play(Rule(rounds=3), [1.0, 0.5], lambda members: members.get(0, 0.0) - members.get(1, 0.0))
    assert kept == {0: 3.0}


def test_rounds_end_when_nothing_changes():
    _, _, tried = play(Rule(rounds=9, accept="gt"), [1.0, 0.5, 0.2], lambda members: 1.0 if len(members) == 1 else 0.0)
    assert len(tried) == 2 + 3, "one round in which nothing changed, and no more"


def test_restarts_are_in_other_orders():
    orders = [Search(Rule(restarts=4), [0.1, 0.2, 0.3, 0.4]).order(run) for run in range(5)]
    assert orders[0] == [3, 2, 1, 0]
    assert any(a != b for a, b in itertools.pairwise(orders[1:]))


def test_tolerance_forgives_each_step_and_not_their_sum():
    score_of = lambda members: 1.0 - 0.25 * (len(members) - 1)  # noqa: E731
    kept, best, _ = play(Rule(tolerance=0.25), [1.0, 0.9, 0.8], score_of)
    assert (len(kept), best) == (3, 0.5)
    kept, _, _ = play(Rule(tolerance=0.25, accept="gt"), [1.0, 0.9, 0.8], score_of)
    assert len(kept) == 1


def test_the_most_that_may_be_kept_is_never_exceeded_by_pruning_in_silence():
    try:
        rule = Rule(prune=True, max_ingredients=2)
    except RecipeError:
        return
    kept, _, _ = play(rule, [0.4, 0.3, 0.2, 0.1], lambda members: float(len(members)))
    assert len(kept) <= 2


@pytest.mark.parametrize(
    "options",
    [
        {"accept": "maybe"},
        {"order": "alphabetical"},
        {"tolerance": -0.1},
        {"tolerance": float("nan")},
        {"rounds": 0},
        {"restarts": -1},
        {"max_ingredients": 0},
    ],
)
def test_rules_that_make_no_sense_are_refused(options):
    with pytest.raises(RecipeError):
        Rule(**options)
