"""A schedule's text, and the factor at each share of sampling."""

import pytest

from tessera.schedule import Schedule


def test_a_curve_is_linear_between_its_points_and_level_outside_them():
    schedule = Schedule.parse("0.2:0, 0.6:1\n1:0.5")
    wanted = {0.0: 0.0, 0.2: 0.0, 0.4: 0.5, 0.6: 1.0, 0.8: 0.75, 1.0: 0.5}
    assert {share: pytest.approx(schedule.factor(share)) for share in wanted} == wanted


def test_a_window_is_open_at_its_end_unless_that_is_the_end_of_sampling():
    middle, late = Schedule.parse("", 0.25, 0.5), Schedule.parse("", 0.5, 1.0)
    assert [middle.factor(share) for share in (0.0, 0.24, 0.25, 0.49, 0.5, 1.0)] == [0, 0, 1, 1, 0, 0]
    assert [late.factor(share) for share in (0.49, 0.5, 1.0)] == [0, 1, 1]


def test_a_window_cuts_its_curve():
    assert [Schedule.parse("0:2, 1:1", 0.5, 1.0).factor(share) for share in (0.25, 0.5)] == [0.0, 1.5]


@pytest.mark.parametrize("curve", ["", "  ", "0:1", "0:1, 1:1"])
def test_what_moves_nothing_is_no_schedule(curve):
    assert Schedule.parse(curve) is None


@pytest.mark.parametrize(
    ("curve", "start", "end", "message"),
    [("half", 0, 1, "'half' is no point"), ("0.5", 0, 1, "'0.5' is no point"), ("0:1, 2:1", 0, 1, "'2:1' is no point"),
     ("0:nan", 0, 1, "'0:nan' is no point"), ("nan:1", 0, 1, "'nan:1' is no point"), ("0:1e9", 0, 1, "is no point"),
     ("0.5:1, 0.5:2", 0, 1, "shares must rise"), ("1:1, 0:1", 0, 1, "shares must rise"),
     ("", 0.5, 0.5, "the start must come before the end"), ("", -0.1, 1, "sampling goes from 0 to 1")],
)  # fmt: skip
def test_what_is_no_schedule_is_refused(curve, start, end, message):
    with pytest.raises(ValueError, match=message):
        Schedule.parse(curve, start, end)


def test_a_schedule_says_what_it_does():
    assert str(Schedule.parse("0:0, 1:0.5", 0.1, 0.9)) == "0:0, 1:0.5 from 0.1 to 0.9"
    assert str(Schedule.parse("", 0.5, 1.0)) == "1 from 0.5 to 1"
