import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from divergent_tokens.measure.batches import BatchSize, first_batch_size, padded, run_batches

CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def limited(n: int, error: BaseException):
    """Work that fails on more than n items at once, and gives back what it was given."""

    def run(batch):
        if len(batch) > n:
            raise error
        return list(batch)

    return run


@given(n=st.integers(0, 40), size=st.integers(1, 20), fits=st.integers(1, 20))
def test_every_item_goes_through_once_and_in_order(n, size, fits):
    batches = list(run_batches(range(n), BatchSize(size), limited(fits, CPU)))
    assert all(list(batch) == result for batch, result in batches)
    assert [item for _, result in batches for item in result] == list(range(n))


@pytest.mark.parametrize(
    "error",
    [
        CPU,
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("out of memory"),
    ],
)
def test_the_size_is_halved_until_it_fits_and_stays_so(error):
    size = BatchSize(16)
    lengths = [len(batch) for batch, _ in run_batches(range(10), size, limited(3, error))]
    assert lengths == [2] * 5  # 10 did not fit, 5 did not, 2 did
    assert size.value == 2


def test_other_errors_pass_through_untouched():
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError) as caught:
        list(run_batches(range(4), BatchSize(2), limited(1, error)))
    assert caught.value is error


def test_one_item_that_does_not_fit_is_the_allocators_error():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        list(run_batches(range(4), BatchSize(8), limited(0, CPU)))


def test_trying_starts_higher_on_an_accelerator():
    assert (
        first_batch_size(torch.device("cpu")).value < first_batch_size(torch.device("cuda")).value
    )


def test_rows_are_padded_on_the_right():
    ids = padded([[5], [6, 7, 8]], torch.device("cpu"))
    assert ids.tolist() == [[5, 0, 0], [6, 7, 8]]
    assert ids.dtype == torch.int64
