"""The node budget on step times and acceptance that are known. python -m pytest tests/engine/test_budget.py"""

import random

import pytest

from medusa_serve.engine.node_budget import ALL_WEIGHT, HOST_STEPS, OWN_WEIGHT, PROBE, NodeBudget

CHOICES = (1, 4, 16)
EXPECTED = (1.0, 2.0, 3.0)
FLAT = {(rows, nodes): 10.0 for rows in (1, 8) for nodes in CHOICES}  # nodes cost nothing
BUSY = {(rows, nodes): 2.0 + rows * nodes for rows in (1, 8) for nodes in CHOICES}  # all that counts


def budget(step_ms, expected=EXPECTED, slots=8, **options):
    return NodeBudget(CHOICES, step_ms, expected, slots, **options)


def chosen(made, rows, steps=5):
    return [made.choose(rows) for _ in range(steps)][-1]


def speeds(made, rows):
    """Tokens per millisecond at each N."""
    return made._tokens(rows) / made._times(len(rows))


def test_the_calibrated_curve_decides_first():
    made = budget(FLAT)
    assert chosen(made, [("a", 0)]) == 16
    made = budget({(1, 1): 10, (1, 4): 12, (1, 16): 40})
    assert chosen(made, [("a", 0)]) == 4
    made = budget({(1, 1): 10, (1, 4): 25, (1, 16): 40})
    assert chosen(made, [("a", 0)]) == 1


def test_many_rows_make_nodes_dear():
    made = budget({(1, 1): 10, (1, 4): 10, (1, 16): 10.5, (8, 1): 12, (8, 4): 20, (8, 16): 60})
    assert chosen(made, [("a", 0)]) == 16
    rows = [(str(n), n) for n in range(8)]
    assert chosen(made, rows) == 4


def test_rows_that_decode_plainly_gain_nothing_by_nodes():
    made = budget({(rows, nodes): 10.0 + nodes for rows in (1, 8) for nodes in CHOICES})
    assert chosen(made, [("a", None), ("b", None), ("c", None)]) == 1
    assert chosen(made, [("a", 0), ("b", None), ("c", None), ("d", None)]) == 1
    assert chosen(made, [("a", 0)]) == 4


def test_times_between_and_past_measured_rows_lie_on_lines():
    made = budget({(1, 1): 10.0, (4, 1): 16.0, (1, 4): 5.0, (1, 16): 1.0, (2, 16): 2.0}, slots=6)
    assert made._ms == [[10, 12, 14, 16, 18, 20], [5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 5, 6]]


def test_a_tree_that_was_timed_for_one_row_alone_is_not_free_for_many():
    """As 16 nodes on a CPU: 8 rows of them would take longer than a measurement may."""
    made = budget({(1, 1): 5.0, (8, 1): 14.0, (1, 4): 9.0, (8, 4): 43.0, (1, 16): 25.0})
    assert made._ms[2][7] == pytest.approx(25 * 43 / 9)
    assert chosen(made, [(str(n), n) for n in range(8)]) == 1


def test_live_times_overrule_the_measured_ones():
    made = budget({(1, 1): 10, (1, 4): 12, (1, 16): 40})
    for _ in range(60):
        made.note_time(1, 4, 0.030, waited=0.025)
    assert made._ms[1][0] == pytest.approx(30, rel=0.02)
    assert chosen(made, [("a", 0)], steps=20) == 1


def test_on_cores_that_others_use_too_both_have_to_be_seen():
    made = budget({(1, 1): 10, (1, 4): 12, (1, 16): 40}, shared=True)
    for _ in range(60):
        for nodes, seconds in ((4, 0.030), (1, 0.010)):
            made.note_time(1, nodes, seconds, waited=seconds)
    assert made._ms[1][0] / made._ms[0][0] == pytest.approx(3, rel=0.05)
    assert chosen(made, [("a", 0)], steps=20) == 1


def test_what_slows_all_steps_changes_no_choice():
    """A neighbour's load: steps of the chosen N tell what the others would take now."""
    ms = {(1, 1): 10.0, (1, 4): 16.0, (1, 16): 40.0}
    made, rng = budget(ms, shared=True), random.Random(4)
    assert chosen(made, [("a", 0)]) == 4
    for slower in (1.0, 1.8, 0.9, 2.0, 1.1) * 4:
        for _ in range(40):
            made.note_time(1, 4, 0.016 * slower * rng.uniform(0.9, 1.1), waited=0.016)
            assert made.choose([("a", 0)]) in (4, 16)  # 16: a probe
    assert made._ms[1][0] == pytest.approx(16, rel=0.25)


def test_a_host_that_needs_more_than_the_device_makes_nodes_free():
    """The device's times stay what they were: those of other N could not be compared with one that holds the host's."""
    made = budget({(1, 1): 1.0, (1, 4): 2.0, (1, 16): 4.0, (8, 1): 1.0, (8, 4): 2.2, (8, 16): 3.5})
    rows = [(str(n), n) for n in range(8)]
    assert chosen(made, rows) == 1
    for _ in range(20):
        made.note_time(8, 1, 0.005, waited=0.0005)
    assert chosen(made, rows, steps=20) == 16
    assert made._ms[0][7] == 1.0
    assert chosen(made, rows[:1], steps=20) == 1  # one row is another matter
    for _ in range(60):
        made.note_time(8, 16, 0.0035, waited=0.003)
    assert chosen(made, rows, steps=20) == 1


def test_what_the_host_does_now_and_then_is_not_what_it_needs():
    """It captures a step, collects garbage, or sees to prompts: 300 ms once, and 20 ms beside each prefill pass."""
    made = budget({(1, 1): 1.0, (1, 4): 2.0, (1, 16): 4.0, (8, 1): 1.0, (8, 4): 2.2, (8, 16): 3.5})
    rows = [(str(n), n) for n in range(8)]
    for _ in range(5):
        made.note_time(8, 1, 0.300, waited=0.0)
        for _ in range(HOST_STEPS):
            made.note_time(8, 1, 0.001, waited=0.0005)
            made.note_time(8, 1, 0.020, waited=0.0, no_prefill=False)
            assert made.choose(rows) == 1


def test_steps_that_are_made_for_some_numbers_of_rows_cost_what_those_cost():
    """Five rows in a step of eight: 4 nodes would pay if it were a step of five."""
    ms = {(1, 1): 1.0, (8, 1): 1.0, (1, 4): 1.0, (8, 4): 2.4, (1, 16): 9.0, (8, 16): 60.0}
    rows = [(str(n), n) for n in range(5)]
    assert chosen(budget(ms), rows) == 4
    made = budget(ms, step_rows=lambda rows: 8 if rows > 4 else 4)
    assert chosen(made, rows) == 1
    for _ in range(60):
        made.note_time(5, 4, 0.0012, waited=0.0012)
    assert chosen(made, [(str(n), n) for n in range(7)]) == 4, "what five rows took tells of seven"


def test_few_rows_that_many_wait_for_take_cheap_steps():
    """One of 128 prompts is read: its large tree would keep all others waiting, who will give more in the same time."""
    ms = {(1, 1): 1.0, (64, 1): 1.2, (1, 4): 1.3, (64, 4): 1.7, (1, 16): 1.5, (64, 16): 2.6}
    first = [("a", 0)]
    made = budget(ms, slots=128)
    assert made.choose(first) == 16
    assert made.choose([("b", 0)], joining=1) == 16, "a few do not matter"
    assert made.choose([("c", 0)], joining=127) == 1
    assert made.choose([(str(n), n) for n in range(127)], joining=1) == 4


def test_a_step_tells_what_smaller_trees_would_have_given():
    made = budget(FLAT)
    own = made._own
    made.note([3], [(4, 4, 16)], [16])  # three accepted, the last one only in the large tree
    assert list(own.more[3]) == [0, 2, 3]
    assert list(own.less[3]) == [0, 0, 2]
    made.note([3], [(4,)], [4])  # says nothing of 16
    assert list(own.weight[3]) == [pytest.approx(1.95), pytest.approx(1.95), 1]
    assert list(own.more[3]) == [0, pytest.approx(2 * 0.95 + 1), 3]
    assert list(own.less[3]) == [0, 0, 2]
    made.note([3], [()], [1])
    assert list(own.weight[3, 1:]) == [pytest.approx(1.95), 1]
    made.begin(3)
    assert not own.weight.any()


def test_a_step_of_many_rows_counts_as_one_row_after_the_other():
    """But in what the rows of one step forget of each other."""
    rng, many, single = random.Random(5), budget(FLAT), budget(FLAT)
    for _ in range(40):
        slots = rng.sample(range(8), rng.randint(1, 8))
        nodes = [rng.choice(CHOICES) for _ in slots]
        held = [[rng.choice([n for n in CHOICES[1:] if n <= most]) for _ in range(rng.randint(0, 3) * (most > 1))]
                for most in nodes]  # fmt: skip
        many.note(slots, held, nodes)
        for slot, mine, most in zip(slots, held, nodes, strict=True):
            single.note([slot], [mine], [most])
    for name in ("more", "less", "weight"):
        assert getattr(many._own, name)[:, 1:] == pytest.approx(getattr(single._own, name)[:, 1:], rel=1e-9)
        assert getattr(many._all, name)[0, 1:] == pytest.approx(getattr(single._all, name)[0, 1:], rel=0.01)


def test_a_larger_tree_that_was_tried_with_hard_tokens_alone_is_not_held_to_be_worse():
    """A step of 16 nodes where nothing could be foreseen; with 4 nodes, easy ones before and after."""
    made = budget(FLAT)
    for _ in range(20):
        made.note([0], [(4,)], [4])
        made.note([0], [()], [16])
        made.note([0], [(4,)], [4])
    everybody = made._all.curve([0], made._expected, ALL_WEIGHT)
    assert everybody[0, 1] == pytest.approx(1.68, abs=0.02), "two of three steps accepted one"
    assert everybody[0, 2] - 1 == pytest.approx(2 * (everybody[0, 1] - 1)), "as calibrated: 2.0 to 1.0 draft tokens"


@pytest.mark.parametrize(("truth", "best"), [((1.0, 1.0), 1), ((1.9, 2.0), 4), ((2.2, 4.5), 16)])
def test_live_figures_overrule_the_calibration(truth, best):
    """Steps simulated with a known acceptance: the choice comes to rest at the truly fastest N."""
    ms = {(1, 1): 10.0, (1, 4): 11.0, (1, 16): 20.0}
    made, rng = budget(ms), random.Random(3)
    drafted_for, picks = 16, []
    for _ in range(3000):
        nodes = made.choose([("a", 0)])
        tree, drafted_for = min(nodes, drafted_for), nodes
        held = [4] * _count(rng, truth[0] - 1) if tree >= 4 else []
        held += [16] * _count(rng, truth[1] - truth[0]) if tree == 16 else []
        made.note([0], [held], [tree])
        picks.append(nodes)
    late = picks[-600:]
    assert late.count(best) >= 0.9 * len(late)
    assert speeds(made, [0])[CHOICES.index(best)] == max(speeds(made, [0]))


def _count(rng, mean):
    """A whole number of this mean."""
    return int(mean) + (rng.random() < mean - int(mean))


def test_a_larger_tree_is_looked_at_now_and_then():
    ms = {(1, 1): 10.0, (1, 4): 11.0, (1, 16): 100.0}
    made = budget(ms)
    picks = [made.choose([("a", 0)]) for _ in range(3 * (PROBE + 2))]
    assert picks.count(16) == 6
    assert picks.count(4) == len(picks) - 6
    slow = budget({(1, 1): 10.0, (1, 4): 100.0, (1, 16): 200.0})
    picks = [slow.choose([("a", 0)]) for _ in range(2 * (PROBE + 2))]
    assert picks.count(4) == 4  # two each: behind a plain step nothing is drafted
    plain = budget(FLAT)
    assert {plain.choose([("a", None)]) for _ in range(200)} == {1}


def test_one_of_many_rows_that_comes_or_goes_changes_nothing_at_once():
    made = budget({(1, 1): 10, (1, 4): 12, (1, 16): 40}, slots=32)
    rows = [(str(n), n) for n in range(20)]
    assert made.choose(rows) == 4
    for _ in range(60):
        made.note_time(20, 4, 0.060, waited=0.060)
    assert made.choose([*rows[1:], ("new", 0)]) == 4, "two of twenty are others: the choice stands"
    assert made.choose([*rows[2:], ("new", 0), ("newer", 1)]) == 1
    assert made.choose(rows[:3]) == 4


def test_a_small_gain_does_not_change_the_choice():
    ms = {(1, 1): 10.0, (1, 4): 10.0, (1, 16): 15.0}
    made = budget(ms, expected=(1.0, 2.0, 2.0))
    assert chosen(made, [("a", 0)]) == 4
    for _ in range(OWN_WEIGHT):
        made.note([0], [(4, 16)], [16])  # 16 nodes: 3 tokens in 15 ms, just what 4 nodes give
    _, four, sixteen = speeds(made, [0])
    assert sixteen < 1.03 * four
    assert made.choose([("b", 0)]) == 4


def test_one_sequence_does_not_speak_for_the_others():
    made = budget(FLAT)
    for _ in range(60):
        made.note([2, 5], [(4, 4, 16, 16), ()], [16, 16])
    everybody = made._all.curve([0], made._expected, ALL_WEIGHT)[0]
    good, bad = made._own.curve([2, 5], everybody, OWN_WEIGHT)
    assert good[2] > 3.5
    assert bad[2] < 2.2
