"""Independent parts of a script, in several processes."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch


def _with_one_thread(function, item):
    torch.set_num_threads(1)
    return function(item)


def in_parallel(function, items, jobs):
    """Return the results of a function for each item, in order, from `jobs` processes; 1: here."""
    if jobs == 1:
        return [function(item) for item in items]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(partial(_with_one_thread, function), items))
