"""Rows are shared by the threads that torch leaves."""

import threading

import torch

from openmm_tsf.utils.threads import available_threads, share_rows, torch_threads


def test_rows_are_shared_by_the_threads_outside():
    x = torch.arange(10).double()
    names = set()

    def double(rows):
        names.add(threading.current_thread().name)
        return x[rows], 2 * x[rows]

    with torch_threads(2), torch_threads(1):
        assert (torch.get_num_threads(), available_threads()) == (1, 2)
        for least, n_threads in ((5, 2), (6, 1), (3, 2)):
            names.clear()
            first, second = share_rows(double, 10, least)
            assert torch.equal(first, x)
            assert torch.equal(second, 2 * x)
            assert {name.startswith("share-rows") for name in names} == {n_threads > 1}
