"""What every script starts with."""

import os
import subprocess
import sys

from runner import ROOT

FAULTS = """
import resource, torch, utils
{call}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(6 * 2**20)
before = faults()
for _ in range(10):
    torch.ones(6 * 2**20)
print(faults() - before)
"""


def test_freed_memory_is_kept():
    """Ten tensors of 24 MB in turn, after five others, cost a twentieth of the page faults at most."""
    counts = []
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    for call in ("", "utils.keep_freed_memory()"):
        command = [sys.executable, "-c", FAULTS.format(call=call)]
        end = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        counts.append(int(end.stdout))
    plain, kept = counts
    assert plain > 20 * kept


# Each case is a process of its own, forked from one that has imported torch, and ends as Python ends.
ENDS = """
import os, sys, utils
def fails():
    raise utils.UserError("--lr 0: is wrong")
cases = {
    "done": lambda: print("x"),
    "stopped": lambda: print("x") or sys.exit(143),
    "failed": lambda: print("x") or fails(),
    "said at once": lambda: print("x", flush=True),
    "stderr too": lambda: print("x") or fails(),
    "nobody reads": lambda: print("x"),
    "one of two": lambda: print("x"),
}
sys.argv = ["script.py"]
for name, main in cases.items():
    err, (reader, writer) = os.open("err", os.O_RDWR | os.O_CREAT | os.O_TRUNC), os.pipe()
    os.close(reader)
    if os.fork() == 0:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(writer if name == "nobody reads" else full, 1)
        os.dup2(full if name == "stderr too" else err, 2)
        if name == "one of two":
            os.environ.update(RANK="0", WORLD_SIZE="2")
        utils.run_script(main, parallel=True)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    os.write(1, f"{name}: {status}: {open('err').read()!r}\\n".encode())
"""


def test_a_full_disk_under_stdout_changes_no_status(tmp_path):
    """Nor do a full stderr or a reader that has gone; what is lost is said in one line, without traceback."""
    end = subprocess.run(
        [sys.executable, "-c", ENDS], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    lost = "script.py: warning: stdout: No space left on device; the last lines are not there\n"
    error = "script.py: error: --lr 0: is wrong\n"
    assert end.stdout.splitlines() == [
        f"done: 0: {lost!r}",
        f"stopped: 143: {lost!r}",
        f"failed: 2: {error + lost!r}",
        f"said at once: 1: {'script.py: error: stdout: No space left on device' + chr(10)!r}",
        "stderr too: 2: ''",
        "nobody reads: 0: ''",
        f"one of two: 0: {lost!r}",
    ]
