"""Freed memory stays with the process, and is not faulted in again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import os, resource, sys
from allostasis.core.memory import keep_freed
if sys.argv[1] == "kept":
    keep_freed()
assert "torch" not in sys.modules
import torch
torch.set_num_threads(1)

def faults():
    for _ in range(20):
        torch.ones(4 * 2**20).mul(2.0).add(1.0)  # 16 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = faults()
print(faults() - before, sorted(name for name in os.environ if name.startswith("MALLOC")))
"""


def page_faults(word: str, **environment: str) -> tuple[int, str]:
    given = {name: v for name, v in os.environ.items() if not name.startswith(("MALLOC", "THP"))}
    words = [sys.executable, "-c", SCRIPT, word]
    said = subprocess.run(
        words, env=given | environment, capture_output=True, text=True, check=True
    )
    number, _, names = said.stdout.strip().partition(" ")
    return int(number), names


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_an_array_that_is_freed_is_found_again_without_page_faults() -> None:
    asked = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024), "MALLOC_TRIM_THRESHOLD_": str(128 * 1024)}
    kept, names = page_faults("kept")
    given_back, _ = page_faults("kept", **asked)  # what the environment says is left as it is
    assert names == "['MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_']", "workers read them"
    assert kept * 20 < given_back
