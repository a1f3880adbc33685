"""The processes of a run."""

import platform
import subprocess
import sys

import pytest
from support import ROOT


PAGE_FAULTS_OF_REUSED_MEMORY = """
import resource
from gpt2repro.processes import keep_freed_memory
{call}
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(2**27)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_kept_memory_is_used_again_without_page_faults():
    faults = {}
    for call in ("", "keep_freed_memory()"):
        code = PAGE_FAULTS_OF_REUSED_MEMORY.format(call=call)
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        faults[call] = int(done.stdout)
    assert faults["keep_freed_memory()"] < 100 < faults[""]
