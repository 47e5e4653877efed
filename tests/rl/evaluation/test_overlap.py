"""Problems that leak, in the disguises they come in, and problems that only look alike."""

from plumbline.rl.data import Problem
from plumbline.rl.evaluation.overlap import find_overlap, normalise

TEXT = "Let $x$ be a real number such that $\\frac{x}{3} + 7 = 12$. Find the value of $x^2 - 2x + 1$ exactly."


def problems(*texts, prefix="p"):
    return [Problem(f"{prefix}{number}", text, "1") for number, text in enumerate(texts)]


def test_layout_does_not_hide_a_copy():
    disguised = "let x be a real number, such that \\( \\dfrac{x}{3}+7=12 \\).\n Find the value of \\left( x^2-2x+1 \\right) exactly"
    found = find_overlap(
        problems(TEXT), problems("Another problem of no relation to the first.", disguised, prefix="t")
    )
    assert [(m.evaluation, m.training, m.kind) for m in found.matches] == [("p0", "t1", "same")]
    assert found.same == found.mostly == 1


def test_a_changed_tail_is_a_share():
    changed = TEXT.replace("Find the value of $x^2 - 2x + 1$ exactly.", "What is $5x$?")
    (match,) = find_overlap(problems(TEXT), problems(changed, prefix="t")).matches
    assert match.kind == "shared"
    assert 0.2 < match.share < 0.8
    assert match.common in " ".join(normalise(TEXT))


def test_the_training_problem_that_shares_most_is_named():
    near, far = TEXT + " Justify.", TEXT[:60] + " something else entirely follows here."
    (match,) = find_overlap(problems(TEXT), problems(far, near, prefix="t")).matches
    assert match.training == "t1"


def test_other_numbers_are_another_problem():
    other = "Let $x$ be an integer with $\\frac{x}{5} + 2 = 9$. Compute $x^3$ when this holds."
    assert find_overlap(problems(TEXT), problems(other, prefix="t")).matches == []


def test_another_sign_is_another_problem():
    found = find_overlap(problems(TEXT), problems(TEXT.replace("+ 7", "- 7"), prefix="t"))
    assert [(m.kind, m.share) for m in found.matches] == [("shared", 1.0)]
    assert found.same == 0
    assert found.mostly == 1


def test_short_problems_match_only_their_copies():
    short, longer = "Compute $2+3$.", "Compute $2+3+4$ and then add the result to the number of your fingers."
    assert [
        m.training for m in find_overlap(problems(short), problems(longer, "compute 2 + 3", prefix="t")).matches
    ] == ["t1"]


def test_a_thousand_problems_take_seconds_not_hours():
    import time

    many = problems(
        *(f"Problem {i}: find the sum of {i} and {i + 1} then multiply the sum by {i * 3}." for i in range(1000))
    )
    began = time.monotonic()
    found = find_overlap(many, many)
    assert found.same == 1000
    assert time.monotonic() - began < 20
