from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.checkpoint.rectangles import Rect, first_fault, flat_range_to_rects, intersect

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def rects_in(draw, shape):
    offset = tuple(draw(st.integers(0, n)) for n in shape)
    return Rect(offset, tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True)))


@st.composite
def shape_and_range(draw):
    shape = draw(shapes)
    start, stop = sorted(draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    return shape, start, stop


def mask(shape, rect):
    out = np.zeros(shape, dtype=int)
    out[rect.slices_from((0,) * len(shape))] = 1
    return out


@settings(deadline=None)
@given(shape_and_range())
def test_the_rectangles_of_a_flat_range_are_that_range_in_its_order(case):
    shape, start, stop = case
    flat_index = np.arange(math.prod(shape)).reshape(shape)
    found = []
    for rect, flat in flat_range_to_rects(shape, start, stop):
        inside = flat_index[rect.slices_from((0,) * len(shape))].ravel().tolist()
        assert inside == list(range(flat, flat + rect.numel))
        found += inside
    assert found == list(range(start, stop))


@settings(deadline=None)
@given(shape_and_range())
def test_a_flat_range_needs_at_most_2n_minus_1_rectangles(case):
    shape, start, stop = case
    rects = flat_range_to_rects(shape, start, stop)
    assert len(rects) <= max(1, 2 * len(shape) - 1)
    assert all(rect.numel for rect, _ in rects)


def test_the_bound_of_2n_minus_1_rectangles_is_reached():
    assert len(flat_range_to_rects((4, 4, 4), 1, 63)) == 5


def test_a_flat_range_outside_the_array_is_refused():
    with pytest.raises(AssertionError, match=r"\[0, 7\) does not lie in \[2, 3\]"):
        flat_range_to_rects((2, 3), 0, 7)


@settings(deadline=None)
@given(st.data(), shapes)
def test_the_intersection_holds_the_elements_in_both(data, shape):
    a, b = data.draw(rects_in(shape)), data.draw(rects_in(shape))
    both = mask(shape, a) * mask(shape, b)
    common = intersect(a, b)
    assert (common is None) == (both.sum() == 0)
    if common is not None:
        assert (mask(shape, common) == both).all()


@settings(deadline=None)
@given(st.data(), shapes)
def test_a_fault_is_a_region_with_exactly_the_named_owners(data, shape):
    rects = [r for r in data.draw(st.lists(rects_in(shape), max_size=5)) if r.numel]
    owned = sum((mask(shape, r) for r in rects), np.zeros(shape, dtype=int))
    fault = first_fault(shape, rects)
    assert (fault is None) == bool((owned == 1).all())
    if fault is not None:
        region, owners = fault
        assert region.numel
        at = region.slices_from((0,) * len(shape))
        assert (owned[at] == len(owners)).all()
        assert len(owners) != 1
        assert all((mask(shape, rects[i])[at] == 1).all() for i in owners)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 40))
def test_flat_slices_of_column_blocks_tile_the_tensor(blocks, rows, cuts):
    columns = 3 * blocks
    rects = []
    for b in range(blocks):
        size = rows * 3
        for i in range(cuts):
            for rect, _ in flat_range_to_rects((rows, 3), size * i // cuts, size * (i + 1) // cuts):
                rects.append(rect.shifted((0, 3 * b)))
    assert first_fault((rows, columns), rects) is None
    lost = rects.pop()
    fault = first_fault((rows, columns), rects)
    assert fault is not None
    assert intersect(fault[0], lost) == fault[0]
    assert fault[1] == []
