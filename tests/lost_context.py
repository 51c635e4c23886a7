"""A pytest plugin: an error of a kernel that makes every later CUDA call of the process fail is reported for the test
that caused it alone. A process of pytest-xdist ends, and another takes its place; pytest alone stops.
"""

import os
import sys
import time

import pytest
import torch


def context_is_lost() -> bool:
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    result = yield
    if context_is_lost():
        message = f"the CUDA context of this process was lost in {item.nodeid}"
        if hasattr(item.config, "workerinput"):
            print(message, file=sys.stderr, flush=True)
            time.sleep(0.5)  # the test's reports are on their way to the process that prints them
            os._exit(1)
        item.session.shouldstop = message
    return result
