import pytest

from stllava.data.chunks import get_chunk


@pytest.mark.parametrize("n_items", range(25))
@pytest.mark.parametrize("n", range(1, 13))
def test_every_item_is_in_exactly_one_chunk_of_nearly_equal_size(n_items, n):
    items = list(range(n_items))
    chunks = [get_chunk(items, n, k) for k in range(n)]
    assert [item for chunk in chunks for item in chunk] == items
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("n", "k"), [(0, 0), (-1, 0), (3, 3), (3, -1)])
def test_chunks_that_do_not_exist(n, k):
    with pytest.raises(ValueError, match=f"chunk {k} of {n}"):
        get_chunk([1, 2], n, k)
