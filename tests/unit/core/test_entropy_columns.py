"""Columns made from entropies are their definitions, and a response never enters its own sibling columns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_probe.core.columns import COLUMNS, LOGIT_COLUMNS, made_from, recommended
from ray_probe.core.estimator.entropy_columns import FUNCTIONS, entropy_columns

NAMES = tuple(FUNCTIONS)
RESPONSES = st.lists(st.integers(1, 6), min_size=1, max_size=5).flatmap(
    lambda lengths: st.tuples(*[st.lists(st.floats(0, 9), min_size=n, max_size=n).map(np.array) for n in lengths])
)


def by_definition(responses: tuple[np.ndarray, ...], g: int, j: int) -> dict[str, float]:
    others = [entropy_T for k, entropy_T in enumerate(responses) if k != g]
    reaching = [entropy_T[j + 1 :].sum() for entropy_T in others if len(entropy_T) > j]
    return {
        "sibling_mu": float(np.mean(reaching)) if reaching else 0.0,
        "sibling_total": float(np.mean([entropy_T.sum() for entropy_T in others])) if others else 0.0,
        "entropy_so_far": float(responses[g][:j].sum()),
    }


@given(RESPONSES)
def test_a_column_is_its_definition(responses: tuple[np.ndarray, ...]):
    tables = entropy_columns(NAMES, responses)
    assert [len(table_TD) for table_TD in tables] == [len(entropy_T) for entropy_T in responses]
    for g, table_TD in enumerate(tables):
        expected = [[by_definition(responses, g, j)[name] for name in NAMES] for j in range(len(table_TD))]
        np.testing.assert_allclose(table_TD, expected, rtol=1e-12, atol=1e-12)


@given(RESPONSES, st.floats(0, 9))
def test_no_bit_of_a_response_enters_its_own_sibling_columns(responses: tuple[np.ndarray, ...], other: float):
    siblings = [NAMES.index(name) for name in ("sibling_mu", "sibling_total")]
    before = entropy_columns(NAMES, responses)
    for g, entropy_T in enumerate(responses):
        changed = [*responses]
        changed[g] = np.full_like(entropy_T, other)
        np.testing.assert_array_equal(entropy_columns(NAMES, changed)[g][:, siblings], before[g][:, siblings])


@given(RESPONSES)
def test_the_entropy_so_far_reads_the_prefix_alone(responses: tuple[np.ndarray, ...]):
    column = NAMES.index("entropy_so_far")
    for g, entropy_T in enumerate(responses):
        for j in range(len(entropy_T)):
            changed = [*responses]
            changed[g] = np.where(np.arange(len(entropy_T)) >= j, 7.0, entropy_T)
            ours, theirs = (entropy_columns(NAMES, group)[g][j, column] for group in (responses, changed))
            assert ours == theirs


def test_columns_are_selected_and_ordered_by_name():
    responses = [np.array([1.0, 2.0]), np.array([3.0])]
    whole, some = entropy_columns(NAMES, responses), entropy_columns(NAMES[::-1], responses)
    for left, right in zip(whole, some, strict=True):
        np.testing.assert_array_equal(left[:, ::-1], right)
    assert [table_TD.shape for table_TD in entropy_columns((), responses)] == [(2, 0), (1, 0)]


def test_the_registry_knows_every_function_and_says_what_it_reads():
    assert made_from(tuple(COLUMNS), "entropies") == NAMES
    assert made_from(tuple(COLUMNS), "logits") == LOGIT_COLUMNS
    for name, column in COLUMNS.items():
        assert column.name == name and column.meaning and "\n" not in column.meaning
        assert (column.reads == "siblings") == name.startswith("sibling")


@pytest.mark.parametrize("responses", [1, 2, 4, 16])
def test_the_recommended_columns_have_siblings_where_a_prompt_has(responses: int):
    names = recommended(responses)
    assert set(names) <= set(COLUMNS) and len(set(names)) == len(names)
    assert any(COLUMNS[name].reads == "siblings" for name in names) == (responses > 1)
