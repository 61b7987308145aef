"""Draws the sums that the demonstration checkpoint learns, with their working.

The order of the working, its remarks and its end are random, so that a trained policy has real choices between long
runs of nearly certain copying:

    17+5+48=   ->   48+17=65[8+7=15];65+5=70.
"""

import random

MAX_RESPONSE_CHARS = 96  # past the demonstration's cap of 64, so that a few responses are cut
TERM_COUNTS, TERM_COUNT_WEIGHTS = (2, 3, 4, 5, 6), (3, 4, 4, 4, 4)
TERM_LIMITS, TERM_LIMIT_WEIGHTS = (9, 99, 299), (5, 3, 2)
NEGATIVE_SHARE = 0.15
ORDERS, ORDER_WEIGHTS = ("as_written", "largest_first", "any"), (2, 1, 6)
DIRECT_SHARE = 0.1  # two or three terms, answered without working
DOUBLE_STEP_SHARE = 0.25  # two terms taken in one step
CARRY_REMARK_SHARE = 0.3
CHECK_SHARE = 0.2


def draw_terms(rng: random.Random) -> list[int]:
    """Draw two to six signed terms under one limit; the first is positive."""
    count = rng.choices(TERM_COUNTS, TERM_COUNT_WEIGHTS)[0]
    limit = rng.choices(TERM_LIMITS, TERM_LIMIT_WEIGHTS)[0]
    sizes = [rng.randint(1, limit) for _ in range(count)]
    return [size if i == 0 or rng.random() >= NEGATIVE_SHARE else -size for i, size in enumerate(sizes)]


def prompt_text(terms: list[int]) -> str:
    """Return the prompt of a sum, for example `17+5-48=`."""
    return f"{terms[0]}{''.join(f'{term:+d}' for term in terms[1:])}="


def draw_order(terms: list[int], rng: random.Random) -> list[int]:
    """Draw the order in which the working takes the terms, from a positive one on."""
    order = rng.choices(ORDERS, ORDER_WEIGHTS)[0]
    if order == "as_written":
        return list(terms)
    if order == "largest_first":
        return sorted(terms, reverse=True)
    first = rng.choice([i for i, term in enumerate(terms) if term > 0])
    rest = terms[:first] + terms[first + 1 :]
    rng.shuffle(rest)
    return [terms[first], *rest]


def draw_step(total: int, taken: list[int], rng: random.Random) -> str:
    """Draw a step of the working, `48+17=65`, perhaps with its carry, `[8+7=15]`."""
    step = f"{total}{''.join(f'{term:+d}' for term in taken)}={total + sum(taken)}"
    carries = len(taken) == 1 and total > 0 and taken[0] > 0 and total % 10 + taken[0] % 10 >= 10
    if carries and rng.random() < CARRY_REMARK_SHARE:
        step += f"[{total % 10}+{taken[0] % 10}={total % 10 + taken[0] % 10}]"
    return step


def draw_ending(total: int, last: int, rng: random.Random) -> str:
    """Draw the end: a full stop, perhaps after a check that subtracts the last term."""
    return f";{total}{-last:+d}={total - last} ok." if rng.random() < CHECK_SHARE else "."


def draw_response(terms: list[int], rng: random.Random) -> str:
    """Draw one way to work out the sum, without EOS."""
    if len(terms) <= 3 and rng.random() < DIRECT_SHARE:
        return f"{sum(terms)}."
    total, *rest = draw_order(terms, rng)
    steps, taken = [], []
    while rest:
        size = 2 if len(rest) > 1 and rng.random() < DOUBLE_STEP_SHARE else 1
        taken, rest = rest[:size], rest[size:]
        steps.append(draw_step(total, taken, rng))
        total += sum(taken)
    return ";".join(steps) + draw_ending(total, taken[-1], rng)


def draw_example(rng: random.Random) -> tuple[str, str]:
    """Draw a prompt and a response that is short enough to learn from."""
    while True:
        terms = draw_terms(rng)
        response = draw_response(terms, rng)
        if len(response) <= MAX_RESPONSE_CHARS:
            return prompt_text(terms), response


def draw_prompts(count: int, seed: int) -> list[str]:
    """Draw `count` distinct prompts."""
    rng = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[prompt_text(draw_terms(rng))] = None
    return list(prompts)
