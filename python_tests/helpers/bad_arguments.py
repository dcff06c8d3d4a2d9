"""Ways to spoil one argument of a call, for tests of errors."""

from __future__ import annotations


def replaced(field, change, at=None):
    """A function that spoils one argument of a problem: a field, or one place of a list."""

    def spoil(problem):
        if at is None:
            setattr(problem, field, change(getattr(problem, field)))
        else:
            values = list(getattr(problem, field))
            values[at] = change(values[at])
            setattr(problem, field, values)

    return spoil


def meta(tensor):
    return tensor.to("meta")


def strided(vector):
    return vector.repeat_interleave(2)[::2]


def both_moments_half(problem):
    problem.exp_avg, problem.exp_avg_sq = problem.exp_avg.half(), problem.exp_avg_sq.half()


def nothing(problem):
    pass


CHECKED = {"validate": True}
