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
for _ in range(2):
    torch.ones(1 << 24)  # 64 MiB; the second may lie behind the first
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(way: str) -> int:
    """Of four tensors as large as two that were freed before."""
    done = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_freed_memory_is_used_again_without_the_kernel():
    assert page_faults("kept") < 100
    assert page_faults("plain") > 1000  # or the measure would say nothing
