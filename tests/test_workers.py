"""What a training worker does to its process."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from raygr.workers import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(24):
    torch.ones(1 << 24)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(way: str) -> int:
    """Of 24 tensors of 64 MiB, each freed before the next."""
    done = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_freed_memory_is_used_again_without_the_kernel():
    plain = page_faults("plain")
    assert plain > 24 * 10_000
    # a few tensors, until one fits where another lay
    assert page_faults("kept") < plain / 2
