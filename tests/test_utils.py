"""What every script starts with."""

import subprocess
import sys

from runner import ROOT

FAULTS = """
import resource, torch, utils
{call}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
before = faults()
for _ in range(10):
    torch.ones(2**24)
print(faults() - before)
"""


def test_freed_memory_is_kept():
    """Ten tensors of 64 MB, one after the other, cost a twentieth of their 160,000 page faults at most."""
    counts = []
    for call in ("", "utils.keep_freed_memory()"):
        command = [sys.executable, "-c", FAULTS.format(call=call)]
        end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        counts.append(int(end.stdout))
    plain, kept = counts
    assert plain > 20 * kept  # what is left depends on how many large pages the system has to give
