"""The caching allocator's rules: what is reserved for a sequence of requests."""

from trainer.planner.allocator import CachingAllocator

MIB = 2**20


def test_sizes_are_rounded_and_memory_comes_in_pages():
    allocator = CachingAllocator()
    allocator.allocate(1, 100, "compute")
    assert (allocator.allocated, allocator.reserved) == (512, 2 * MIB)
    allocator.allocate(2, 30 * MIB, "compute")
    assert (allocator.allocated, allocator.reserved) == (512 + 30 * MIB, 42 * MIB)


def test_freed_memory_is_used_again_on_its_stream_alone():
    allocator = CachingAllocator()
    allocator.allocate(1, 40 * MIB, "compute")
    allocator.free(1)
    allocator.allocate(2, 30 * MIB, "compute")
    allocator.allocate(3, 10 * MIB, "compute")
    assert allocator.reserved == 40 * MIB
    allocator.free(3)
    allocator.allocate(4, 10 * MIB, "reduce")
    assert allocator.reserved_by_stream() == {"compute": 40 * MIB, "reduce": 20 * MIB}


def test_neighbours_that_are_free_are_one_block_and_the_end_grows():
    allocator = CachingAllocator()
    for key in range(3):
        allocator.allocate(key, 20 * MIB, "compute")
    allocator.free(0)
    allocator.allocate(3, 40 * MIB, "compute")  # 20 MiB free at the beginning do not help
    assert allocator.reserved == 100 * MIB
    for key in (1, 2, 3):
        allocator.free(key)
    allocator.allocate(4, 110 * MIB, "compute")  # all of it is one block, which grows by a page
    assert (allocator.reserved, allocator.allocated) == (120 * MIB, 110 * MIB)


def test_request_takes_the_smallest_block_that_fits():
    allocator = CachingAllocator()
    for key, size in enumerate((60, 2, 40, 2)):
        allocator.allocate(key, size * MIB, "compute")
    allocator.free(0)
    allocator.free(2)
    allocator.allocate(4, 40 * MIB, "compute")
    allocator.allocate(5, 60 * MIB, "compute")
    assert allocator.reserved == 120 * MIB


def test_among_equal_blocks_the_first_is_taken_and_the_last_of_the_range_only_if_there_is_no_other():
    allocator = CachingAllocator()
    for key in range(5):
        allocator.allocate(key, 20 * MIB, "compute")
    allocator.free(3)
    allocator.free(1)
    allocator.allocate(5, 20 * MIB, "compute")  # takes the place of 1, so that those of 3 and 4 become one
    allocator.free(4)
    allocator.allocate(6, 40 * MIB, "compute")
    assert allocator.reserved == 100 * MIB
    allocator = CachingAllocator()
    for key, size in enumerate((60, 20, 40)):
        allocator.allocate(key, size * MIB, "compute")
    allocator.free(0)
    allocator.free(2)
    allocator.allocate(3, 40 * MIB, "compute")  # the end fits as well, and better, but grows for the next
    allocator.allocate(4, 60 * MIB, "compute")
    assert allocator.reserved == 140 * MIB
