"""Records add, subtract and have a zero; they say what the rows say; what no shard can have made is refused."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ray_probe.core.estimator.record_checks import MOST_SHARD_PROMPTS, check, check_packed
from ray_probe.core.estimator.records import (
    Record,
    Shape,
    bin_of,
    packed_size,
    position_bins,
    record_of_tokens,
    total,
    with_prompts,
)
from ray_probe.errors import RecordError

CAP = 6
SHAPE = Shape(3, 2, CAP)


@dataclass
class Rows:
    """A shard as dense rows: one a token, and one a response (prompt id, entropy, length)."""

    phi_TD: np.ndarray
    target_TK: np.ndarray
    position_T: np.ndarray
    responses: list[tuple[int, float, int]]

    def record(self, cap: int = CAP) -> Record:
        prompt_ids, entropies, lengths = (np.array(column) for column in zip(*self.responses, strict=True))
        rows = np.stack([np.ones(len(lengths)), entropies, lengths], axis=1)
        return with_prompts(record_of_tokens(self.phi_TD, self.target_TK, self.position_T, cap), prompt_ids, rows)


def some_rows(seed: int, prompt_ids: Sequence[int] = (4, 1, 4), scale: float = 1.0, cap: int = CAP) -> Rows:
    numbers = np.random.default_rng(seed)
    lengths = numbers.integers(1, cap + 1, len(prompt_ids)).tolist()
    tokens = sum(lengths)
    return Rows(
        scale * numbers.normal(size=(tokens, SHAPE.features)),
        scale * numbers.normal(size=(tokens, SHAPE.targets)),
        np.concatenate([np.arange(length) for length in lengths]),
        [(i, scale * numbers.normal(), length) for i, length in zip(prompt_ids, lengths, strict=True)],
    )


def some_record(seed: int = 0, prompt_ids: Sequence[int] = (4, 1, 4), scale: float = 1.0) -> Record:
    return some_rows(seed, prompt_ids, scale).record()


RECORDS = st.builds(
    some_record,
    st.integers(0, 2**32),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.sampled_from([1e-3, 1.0, 30.0]),
)


def bits(record: Record) -> bytes:
    return record.pack().tobytes()


def same(left: Record, right: Record, *parts: Record) -> bool:
    """Equal counts and ids, and sums within 1e-12 of the largest of their parts."""
    for field in fields(Record):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if field.name in ("sequences", "tokens", "weight", "prompt_ids_P"):
            if not np.array_equal(a, b):
                return False
        elif a.shape != b.shape:
            return False
        else:
            scale = max(np.abs(getattr(part, field.name)).max(initial=0.0) for part in parts)
            if not (np.abs(a - b) <= 1e-12 * scale).all():
                return False
    return True


@given(RECORDS, RECORDS)
def test_adding_is_commutative_to_the_bit(a: Record, b: Record):
    assert bits(a + b) == bits(b + a)


@given(RECORDS, RECORDS, RECORDS)
def test_adding_is_associative(a: Record, b: Record, c: Record):
    assert same((a + b) + c, a + (b + c), a, b, c)


@given(RECORDS)
def test_zero_changes_nothing_and_a_record_less_itself_is_zero(a: Record):
    zero = Record.zero(SHAPE)
    assert bits(a + zero) == bits(zero + a) == bits(a - zero) == bits(a)
    assert bits(a - a) == bits(zero)
    assert bits(total([], SHAPE)) == bits(zero)


@given(RECORDS, RECORDS)
def test_subtracting_gives_back_what_was_there(a: Record, b: Record):
    assert same((a + b) - b, a, a, b)


@given(RECORDS, RECORDS)
def test_inputs_are_untouched(a: Record, b: Record):
    before = bits(a), bits(b)
    _ = a + b, a - b, total([a, b, a], SHAPE)
    assert (bits(a), bits(b)) == before


def test_arrays_are_read_only_and_no_one_elses():
    values = {field.name: getattr(some_record(), field.name) for field in fields(Record)}
    mine = {name: v.copy() if isinstance(v, np.ndarray) else v for name, v in values.items()}
    record = Record(**mine)
    before = bits(record)
    for name, value in mine.items():
        if isinstance(value, np.ndarray):
            value[...] = 7
            for owner in (record, record + record, Record.zero(SHAPE), Record.unpack(record.pack())):
                with pytest.raises(ValueError, match="read-only"):
                    getattr(owner, name)[...] = 7
    assert bits(record) == before


def test_records_of_other_shapes_are_refused():
    with pytest.raises(RecordError, match=r"features=3.*the run has Shape\(features=4"):
        _ = Record.zero(Shape(4, 2, CAP)) + some_record()


def vectors(size: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float64, size, elements=st.floats(allow_nan=False, allow_infinity=False))


@given(st.integers(0, 2**53), st.lists(st.integers(-(2**53), 2**53), max_size=4, unique=True), st.data())
def test_packing_and_unpacking_is_bit_exact(count: int, ids: list[int], data: st.DataObject):
    d, k, b, p = 2, 1, 3, len(ids)
    shapes = [(d, d), (d, k), (k,), (k, k), (b, k), (b,), (b, d)]
    sums = [data.draw(vectors(int(np.prod(shape)))).reshape(shape) for shape in shapes]
    rows = data.draw(vectors(3 * p)).reshape(p, 3)
    record = Record(count, count, data.draw(st.floats(0, 1e300)), *sums, np.array(sorted(ids), np.int64), rows)
    packed = record.pack()
    back = Record.unpack(packed)
    assert packed.dtype == np.float64 and packed.ndim == 1
    assert bits(back) == packed.tobytes()
    for field in fields(Record):
        before, after = (np.asarray(getattr(r, field.name)) for r in (record, back))
        assert (before.dtype, before.shape, before.tobytes()) == (after.dtype, after.shape, after.tobytes()), field.name


def put(index: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def changed(packed: np.ndarray) -> np.ndarray:
        packed[index] = value
        return packed

    return changed


FIRST_ID = -8  # two prompts: two ids, then three numbers each
UNREADABLE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "the version of 0.1.1": put(0, 1.0),
    "a later version": put(0, 3.0),
    "version NaN": put(0, np.nan),
    "two dimensions": lambda packed: packed[None],
    "float32": lambda packed: packed.astype(np.float32),
    "nothing": lambda packed: packed[:0],
    "half a header": lambda packed: packed[:5],
    "no sums": lambda packed: packed[:8],
    "one number short": lambda packed: packed[:-1],
    "one number more": lambda packed: np.append(packed, 0.0),
    "negative size": put(1, -3.0),
    "size is half": put(1, 2.5),
    "size NaN": put(2, np.nan),
    "size infinite": put(3, np.inf),
    "sizes whose product wraps to 0": lambda packed: np.array([2.0, 2.0**32, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]),
    "half a sequence": put(5, 1.5),
    "sequences NaN": put(5, np.nan),
    "tokens infinite": put(6, np.inf),
    "half a token": put(6, 8.5),
    "id NaN": put(FIRST_ID, np.nan),
    "id is half": put(FIRST_ID, 0.5),
    "id too large for float64": put(FIRST_ID, 1e17),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unpacking_refuses_what_is_no_record(case: str):
    with pytest.raises(RecordError, match=r"^record: "):
        Record.unpack(UNREADABLE[case](some_record().pack()))


def test_a_prompt_in_two_records_is_one_row():
    first, second = some_rows(0, (4, 1, 4)), some_rows(1, (4, 9))
    merged = first.record() + second.record()
    assert merged.prompt_ids_P.tolist() == [1, 4, 9]
    responses = first.responses + second.responses
    for prompt_id, row in zip(merged.prompt_ids_P, merged.prompt_rows_P3, strict=True):
        own = [(1, entropy, length) for i, entropy, length in responses if i == prompt_id]
        assert row == pytest.approx(np.sum(own, axis=0), rel=1e-14)
    left = merged - second.record()
    assert left.prompt_ids_P.tolist() == [1, 4], "a prompt without a response left is gone"


@pytest.mark.parametrize("cap", [1, CAP, 300])
@pytest.mark.parametrize("shards", [1, 5])
def test_a_record_is_the_sums_over_its_rows(cap: int, shards: int):
    parts = [some_rows(seed, (seed, 7, seed), cap=cap) for seed in range(shards)]
    record = total((part.record(cap) for part in parts), Shape(3, 2, position_bins(cap)))
    phi, target = np.vstack([p.phi_TD for p in parts]), np.vstack([p.target_TK for p in parts])
    position, responses = np.concatenate([p.position_T for p in parts]), [r for p in parts for r in p.responses]
    assert (record.sequences, record.tokens, record.weight) == (len(responses), len(phi), float(len(phi)))
    bins = [int(p) * position_bins(cap) // cap for p in position]
    expected = {
        "gram_DD": sum(np.outer(row, row) for row in phi),
        "cross_DK": sum(np.outer(row, r) for row, r in zip(phi, target, strict=True)),
        "target_sum_K": sum(target),
        "target_gram_KK": sum(np.outer(r, r) for r in target),
        "bin_sum_BK": [sum(target[[b == i for b in bins]], np.zeros(2)) for i in range(position_bins(cap))],
        "bin_weight_B": [bins.count(i) for i in range(position_bins(cap))],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(record, name), value, rtol=1e-12, atol=1e-12 * len(phi), err_msg=name)
    check(record, record.shape)


def test_position_bins_are_equal_and_at_most_256():
    assert [position_bins(cap) for cap in (1, 64, 256, 257, 100_000)] == [1, 64, 256, 256, 256]
    for cap in (1, 64, 256):
        assert bin_of(np.arange(cap), cap).tolist() == list(range(cap))
    assert bin_of(np.arange(512), 512).tolist() == [position // 2 for position in range(512)]
    for cap in (257, 300, 1000, 99_991):
        bins = bin_of(np.arange(cap), cap)
        sizes = np.bincount(bins)
        assert (np.diff(bins) >= 0).all() and len(sizes) == 256
        assert sizes.min() >= 1 and sizes.max() - sizes.min() <= 1


def bent_gram(record: Record, change: Callable[[np.ndarray], np.ndarray]) -> Record:
    return replace(record, gram_DD=change(record.gram_DD.copy()))


IMPOSSIBLE: dict[str, tuple[Callable[[Record], Record], str]] = {
    "NaN in the sums": (lambda r: replace(r, target_sum_K=np.array([np.nan, 0.0])), "NaN or infinity"),
    "infinity in the Gram matrix": (lambda r: bent_gram(r, lambda gram: gram * np.inf), "NaN or infinity"),
    "NaN weight": (lambda r: replace(r, weight=np.nan), "NaN or infinity"),
    "NaN entropy of a prompt": (lambda r: replace(r, prompt_rows_P3=r.prompt_rows_P3 * np.nan), "NaN or infinity"),
    "not symmetric": (lambda r: bent_gram(r, lambda gram: gram + np.triu(np.full((3, 3), 1e-6), 1)), "symmetric"),
    "negative diagonal": (
        lambda r: bent_gram(r, lambda gram: -gram),
        r"Phi\^T Phi has a negative diagonal: not positive semi-definite",
    ),
    "not positive semi-definite": (
        lambda r: bent_gram(r, lambda gram: gram - 1.001 * np.linalg.eigvalsh(gram)[0] * np.eye(3)),
        "positive semi-definite",
    ),
    "zero": (lambda r: Record.zero(SHAPE), "got 0 sequences"),
    "no sequence": (lambda r: replace(r, sequences=0), "got 0 sequences"),
    "no token": (lambda r: replace(r, tokens=0), "with 0 tokens"),
    "negative counts": (lambda r: Record.zero(SHAPE) - r, "got -3 sequences"),
    "fewer tokens than sequences": (lambda r: replace(r, tokens=2), "need 1 token each"),
    "other features": (lambda r: Record.zero(Shape(4, 2, CAP)), "features=4"),
    "other bins": (lambda r: Record.zero(Shape(3, 2, CAP + 1)), "bins=7"),
    "a prompt's responses left out": (lambda r: replace(r, sequences=r.sequences + 1), "prompts do not add up"),
    "a prompt's tokens left out": (lambda r: replace(r, tokens=r.tokens + 1), "prompts do not add up"),
    "a number that no sum comes near": (lambda r: replace(r, target_sum_K=np.array([-1e151, 0.0])), r"past 1e\+150"),
    "negative diagonal of R^T R": (
        lambda r: replace(r, target_gram_KK=r.target_gram_KK * -1.0),
        r"R\^T R has a negative diagonal",
    ),
    "R^T R not symmetric": (
        lambda r: replace(r, target_gram_KK=r.target_gram_KK + np.array([[0, 1e-6], [0, 0]])),
        r"R\^T R is not symmetric",
    ),
    "products that no rows have": (
        lambda r: replace(r, cross_DK=1e3 * r.cross_DK),
        r"\[Phi R\]\^T \[Phi R\] is not positive semi-definite",
    ),
    "half a response": (
        lambda r: replace(r, prompt_rows_P3=r.prompt_rows_P3 + np.array([[0.5, 0, 0], [-0.5, 0, 0]])),
        "no whole number",
    ),
    "half a token of a prompt": (
        lambda r: replace(r, prompt_rows_P3=r.prompt_rows_P3 + np.array([[0, 0, 0.5], [0, 0, -0.5]])),
        "no whole number",
    ),
    "a prompt without a token": (
        lambda r: replace(r, prompt_rows_P3=np.stack([[1, 0.0, 0], [2, 0.0, r.tokens]])),
        "1 token a response",
    ),
    "prompts out of order": (
        lambda r: replace(r, prompt_ids_P=r.prompt_ids_P[::-1].copy(), prompt_rows_P3=r.prompt_rows_P3[::-1].copy()),
        "not ascending",
    ),
    "a prompt twice": (lambda r: replace(r, prompt_ids_P=np.array([4, 4])), "not ascending"),
    "no weight": (lambda r: replace(r, weight=0.0, bin_weight_B=0.0 * r.bin_weight_B), "a weight of 0"),
    "a negative weight in a bin": (
        lambda r: replace(r, bin_weight_B=np.array([r.weight + 1, -1, 0, 0, 0, 0])),
        "a negative one in a bin",
    ),
    "a bin's tokens left out": (lambda r: replace(r, bin_weight_B=r.bin_weight_B * 0.5), "bins do not add up"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_record_that_no_shard_can_have_made_is_refused(case: str):
    spoil, reason = IMPOSSIBLE[case]
    check(some_record(), SHAPE)
    with pytest.raises(RecordError, match=reason):
        check(spoil(some_record()), SHAPE)


def test_singular_features_are_no_reason_to_refuse_a_record():
    rows = some_rows(0)
    rows.phi_TD[:, 1] = 1e6 * rows.phi_TD[:, 0]
    rows.phi_TD[:, 2] = 0.0
    check(rows.record(), SHAPE)


@pytest.mark.parametrize("prompts", [0, 1, 1000, MOST_SHARD_PROMPTS])
def test_a_vector_of_any_sensible_shard_may_be_read(prompts: int):
    empty = Record.zero(SHAPE)
    assert len(empty.pack()) == packed_size(SHAPE, 0) and len(some_record().pack()) == packed_size(SHAPE, 2)
    check_packed(np.zeros(packed_size(SHAPE, prompts)), SHAPE)


UNACCEPTABLE = {
    "longer than any": np.zeros(packed_size(SHAPE, MOST_SHARD_PROMPTS) + packed_size(SHAPE, 0) + 1),
    "two dimensions": np.zeros((3, 3)),
    "float32": np.zeros(50, np.float32),
    "objects": np.zeros(50, object),
    "a list": [0.0] * 50,
    "nothing": None,
}


@pytest.mark.parametrize("case", UNACCEPTABLE)
def test_what_is_no_vector_or_longer_than_any_record_is_refused_before_it_is_read(case: str):
    with pytest.raises(RecordError, match=r"^record: (got \d+ numbers; this run's have at most|need a float64 vector)"):
        check_packed(UNACCEPTABLE[case], SHAPE)


def test_a_gram_matrix_is_rounded_once():
    """To half a unit in the last place of its diagonal, where a sum in float64 loses more with every token."""
    phi_TD = np.random.default_rng(0).uniform(1.0, 2.0, size=(3000, 3))
    record = record_of_tokens(phi_TD, phi_TD[:, :2], np.arange(3000) % CAP, CAP)
    exact = np.array([[float(sum(Fraction(a) * Fraction(b) for a, b in zip(x, y, strict=True))) for x in phi_TD.T]
                      for y in phi_TD.T])  # fmt: skip
    assert (np.abs(record.gram_DD - exact) <= np.spacing(exact)).all()
    assert record.gram_DD.tobytes() == record.gram_DD.T.tobytes()
    assert record.cross_DK.tobytes() == np.ascontiguousarray(record.gram_DD[:, :2]).tobytes()
