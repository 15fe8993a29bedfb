"""Several ranks train as one process does; what ends one ends all; a stopped run goes on.

Most runs are real processes started with the variables that torchrun sets, some by torchrun itself.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Trained
from runner import ENVIRONMENT, ROOT, TIMEOUT, Result, Running, start
from test_resume_cli import assert_same_end, seen

import parallel
import utils

NO_DROPOUT = [w for name in ("", "h", "i", "e") for w in (f"--dropout{name}", 0)] + ["--wdrop", 0]
EVERY = [*SMALL, "--save", "m.pt", "--log-interval", 1]  # a batch of 4 columns
AVERAGING = ["--nonmono", 0, "--clip", 1, "--epochs", 4]
RUNS = {
    "LSTM": [2, *AVERAGING],
    "split QRNN": [2, *AVERAGING, "--model", "QRNN", "--splits", 6, 15],
    "3 ranks, GRU, Adam": [
        3,
        "--batch_size",
        6,
        "--model",
        "GRU",
        "--optimizer",
        "adam",
        "--lr",
        0.01,
        "--epochs",
        2,
    ],
}


def start_ranks(
    size: int, *argv: object, cwd: Path, last: tuple[object, ...] = (), **how: object
) -> list[Running]:
    """`main.py argv` by so many processes, as torchrun starts them; the last one with flags of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(
            *argv,
            *(last if rank == size - 1 else ()),
            cwd=cwd,
            environment={name: str(x) for name, x in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            **how,
        )
        for rank in range(size)
    ]


def run_ranks(size: int, *argv: object, cwd: Path, **how: object) -> Result:
    """The same to its end; rank 0's result, once it is sure that the others ended alike and silently."""
    first, *others = [rank.result() for rank in start_ranks(size, *argv, cwd=cwd, **how)]
    assert {(other.status, other.out, other.err) for other in others} == {(first.status, "", "")}, others
    return first


def torchrun(*argv: object, cwd: Path) -> subprocess.Popen:
    """`torchrun --nproc_per_node=2 main.py argv`; what it prints goes to the files `out` and `err`."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(cwd / "out", "w") as out, open(cwd / "err", "w") as err:
        environment = os.environ | ENVIRONMENT
        line += [ROOT / "main.py", *map(str, argv)]
        return subprocess.Popen(line, cwd=cwd, env=environment, stdout=out, stderr=err)


def wait_for(running: subprocess.Popen, path: Path, pattern: re.Pattern) -> None:
    end = time.monotonic() + TIMEOUT
    while not pattern.search(path.read_text()):
        assert running.poll() is None, path.with_name("err").read_text()
        assert time.monotonic() < end
        time.sleep(0.01)


def log(folder: Path, *kinds: str) -> list[dict]:
    lines = (folder / "m.pt.log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] in kinds]


def assert_same_losses(folder: Path, other: Path) -> None:
    """Step by step, valid and test: the same to 1e-5, averaged at the same time."""
    one, several = (log(d, "train", "valid", "test") for d in (folder, other))
    for a, b in zip(one, several, strict=True):
        assert [a.get(key) for key in ("kind", "step", "averaged")] == [
            b.get(key) for key in ("kind", "step", "averaged")
        ]
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5), (a, b)


@pytest.mark.parametrize("name", RUNS)
def test_ranks_train_as_one_process(corpus, tmp_path, name):
    """Without dropout losses agree step by step, through the switch to averaging, in validation and test."""
    size, *flags = RUNS[name]
    for folder, ranks in ((tmp_path / "one", 1), (tmp_path / "several", size)):
        folder.mkdir()
        result = run_ranks_or_one(ranks, "--data", corpus, *EVERY, *NO_DROPOUT, *flags, cwd=folder)
        assert result.status == 0, result
        assert "End of training" in result.out
    if "Adam" not in name:
        assert {entry["averaged"] for entry in log(tmp_path / "one", "valid")} == {False, True}
    assert_same_losses(tmp_path / "one", tmp_path / "several")
    one, several = (torch.load(tmp_path / d / "m.pt", weights_only=True) for d in ("one", "several"))
    for key, tensor in one["model"].items():
        torch.testing.assert_close(several["model"][key], tensor, rtol=0, atol=2e-4)


def run_ranks_or_one(size: int, *argv: object, cwd: Path, **how: object) -> Result:
    return run_ranks(size, *argv, cwd=cwd, **how) if size > 1 else start(*argv, cwd=cwd, **how).result()


def test_ranks_fine_tune_as_one_process(corpus, tmp_path):
    """finetune.py goes on from the same model with the same losses."""
    for folder, ranks in ((tmp_path / "one", 1), (tmp_path / "several", 2)):
        folder.mkdir()
        flags = ["--data", corpus, *EVERY, *NO_DROPOUT]
        assert start(*flags, "--epochs", 1, cwd=folder).result().status == 0
        result = run_ranks_or_one(ranks, *flags, "--epochs", 2, cwd=folder, script="finetune.py")
        assert result.status == 0, result
        assert "before fine-tuning" in result.out
    assert_same_losses(tmp_path / "one", tmp_path / "several")


SCRIPT = """
import sys, torch, parallel
ranks = parallel.find_ranks()
with ranks.rank_0_first():
    pass
ranks.start(torch.device("cpu"))
me, n = ranks.rank, ranks.size

shapes = [(3,), (1100, 1000), (2, 5), (), (1000, 1100)]  # two of them large
parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
gradients = [[torch.full(s, float(i + 10 * r)) for i, s in enumerate(shapes)] for r in range(n)]
for r in range(n):
    gradients[r][r] = None  # not hit by this rank's words
expected = [sum(torch.zeros(s) if g is None else g for g in gs) / n for s, gs in zip(shapes, zip(*gradients))]
expected[3].fill_(float("inf"))
for parameter, gradient in zip(parameters, gradients[me]):
    parameter.grad = gradient
parameters[4].grad = gradients[me][4].t().contiguous().t()  # another layout
if me == 1:
    parameters[3].grad.fill_(float("inf"))
ranks.average_gradients(parameters)
torch.testing.assert_close([p.grad for p in parameters], expected)

assert ranks.columns(10) == [slice(0, 3), slice(3, 6), slice(6, 10)][me]
assert ranks.columns(2) == [slice(0, 0), slice(0, 1), slice(1, 2)][me]
assert ranks.sum([me + 0.1, 1.0]) == [0.1 + 1.1 + 2.1, 3.0]
assert ranks.agree("SIGINT" if me == 2 else "") == "SIGINT"
assert ranks.agree(["SIGINT", "SIGTERM", ""][me]) == "SIGTERM"
hidden = [(torch.full((1, 2, 4), float(me)),)]
assert ranks.join_columns(hidden)[0][0][0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]
ranks.check_same(parameters)
parameters[2].data[1, 1] = 1e-38 * (me == 1)
try:
    ranks.check_same(parameters)
except parallel.RunError:
    print("differ")
ranks.end()
"""


def test_what_ranks_share(tmp_path):
    """Gradients, missing, large or infinite, are averaged; a weight that drifts is seen."""
    (tmp_path / "script.py").write_text(SCRIPT)
    for rank in start_ranks(3, cwd=tmp_path, script=str(tmp_path / "script.py")):
        result = rank.result()
        assert result == (0, "differ\n", ""), result.err


@pytest.mark.parametrize("wdrop", [0.5, 0])
def test_masks_differ_between_ranks(tmp_path, wdrop):
    """Two columns of the same text, one a rank: they differ by what is dropped, and by nothing else."""
    text = " ".join(f"w{i * i % 17}" for i in range(60)) + "\n"
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(text * 2)
    flags = [*EVERY, "--batch_size", 2, *NO_DROPOUT, "--wdrop", wdrop, "--max_steps", 2]
    assert run_ranks(2, "--data", ".", *flags, cwd=tmp_path).status == 0
    state = torch.load(tmp_path / "m.pt.state", weights_only=True)
    columns = state["hidden"][0][0]  # (1, 2, H)
    assert torch.equal(columns[:, 0], columns[:, 1]) == (wdrop == 0)


def test_a_stopped_run_goes_on_bit_for_bit(corpus, tmp_path):
    """A SIGTERM that only rank 1 gets stops both with 143; two ranks go on and end as if never stopped."""
    flags = ["--data", corpus, *EVERY, *AVERAGING]
    whole, folder = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    folder.mkdir()
    result = run_ranks(2, *flags, cwd=whole)
    ranks = start_ranks(2, *flags, cwd=folder)
    ranks[0].wait_for(seen(3, 4))
    ranks[1].kill(signal.SIGTERM)
    first, second = (rank.result() for rank in ranks)
    assert (first.status, second.status, second.out, second.err) == (143, 143, "", "")
    assert re.search(r"\| stopped; go on with: .* --nproc_per_node=2 \S*main.py --resume m.pt", first.out)
    again = run_ranks(2, "--resume", "m.pt", cwd=folder)
    assert "bit for bit" not in again.out
    assert_same_end(folder, again, Trained(whole, result, whole / "m.pt"))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_another_number_of_ranks_goes_on(corpus, tmp_path, before, after):
    """Same weights, columns dealt anew: without dropout as if nothing had changed; and it says so."""
    flags = ["--data", corpus, *EVERY, "--batch_size", 6, *NO_DROPOUT, *AVERAGING]
    whole, folder = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    folder.mkdir()
    assert start(*flags, cwd=whole).result().status == 0
    assert run_ranks_or_one(before, *flags, "--max_steps", 20, cwd=folder).status == 0
    os.remove(folder / "m.pt.log.jsonl")
    result = run_ranks_or_one(after, "--resume", "m.pt", cwd=folder)
    assert f"| {before} processes before, {after} now: not bit for bit the same run" in result.out
    rest = [entry for entry in log(whole, "train", "valid", "test") if entry.get("step", 99) > 20]
    for a, b in zip(rest, log(folder, "train", "valid", "test"), strict=True):
        assert (a["kind"], a.get("step")) == (b["kind"], b.get("step"))
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)


def test_clocks_stop_and_save_on_all_ranks_at_once(corpus, tmp_path):
    """--checkpoint_minutes and --max_minutes look at clocks, which differ: the ranks act at the same step."""
    flags = ["--data", corpus, *EVERY, "--epochs", 900, "--checkpoint_minutes", 0.0005, "--max_minutes", 0.02]
    result = run_ranks(2, *flags, "--keep_last", 2, cwd=tmp_path)
    assert result.status == 0, result
    assert "| stopped; go on with: " in result.out
    assert len(list(tmp_path.glob("m.pt.state.*"))) == 2
    assert run_ranks(2, "--resume", "m.pt", "--max_steps", 1, cwd=tmp_path).status == 0


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_all(corpus, tmp_path, killed):
    """SIGKILL to one of three: the others end within 30 seconds, non-zero, and rank 0 says so in one line."""
    flags = ["--data", corpus, *EVERY, "--batch_size", 6, "--epochs", 500, "--checkpoint_every", 5]
    ranks = start_ranks(3, *flags, cwd=tmp_path)
    ranks[0].wait_for(seen(2, 3))
    ranks[killed].kill(signal.SIGKILL)
    begin = time.monotonic()
    results = [rank.result() for rank in ranks]
    assert time.monotonic() - begin < 30
    assert results[killed].status == -signal.SIGKILL
    for rank, result in enumerate(results):
        if rank != killed:
            assert result.status == 1, result
            pattern = r"main.py: error: another rank has ended .*\n" if rank == 0 else ""
            assert re.fullmatch(pattern, result.err), result.err
    assert torch.load(tmp_path / "m.pt.state", weights_only=True)["progress"]["step"] >= 5


def test_a_rank_that_fails_alone_says_so(corpus, tmp_path):
    """Its message names it; the others, which torchrun then ends, say nothing."""
    ranks = start_ranks(2, "--data", corpus, *EVERY, cwd=tmp_path, last=("--data", "nowhere"))
    result = ranks[1].result()
    ranks[0].kill(signal.SIGTERM)
    assert (result.status, result.out) == (2, "")
    assert re.fullmatch(r"main.py: rank 1: error: --data nowhere: there is no .*\n", result.err), result.err
    assert ranks[0].result() == (-signal.SIGTERM, "", "")


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] "
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {}, NCCL version 2.27.5\n{}"
SYSTEM = NCCL.format(
    "unhandled system error (run with NCCL_DEBUG=INFO for details)",
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. \n"
    "Last error:\n{}",
)
REMOTE = NCCL.format(
    "remote process exited or there was a network error",
    "ncclRemoteError: A call failed possibly due to a network error.\nLast error:\n",
)
SHM = "Error while creating shared memory segment /dev/shm/nccl-a, error: No space left on device (28)"
FULL_GPU = "Cuda failure 2 'out of memory'"
PORT = "The server socket has failed to listen on any local network address. port: 1, name: EADDRINUSE"
TORCH = torch.distributed
GONE = "another rank has ended"
FAILURES = [
    (RuntimeError(f"{GLOO}Connection closed by peer [127.0.0.1]:36517"), GONE),
    (RuntimeError(f"{GLOO}Read error [127.0.0.1]:36517: Connection reset by peer"), GONE),
    (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), GONE),
    (RuntimeError("Application timeout caused pair closure"), GONE),
    (TORCH.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), GONE),
    (TORCH.DistStoreError("wait timeout after 1800000ms, keys: /0"), GONE),
    (TORCH.DistBackendError(REMOTE), GONE),
    (TORCH.DistBackendError(SYSTEM.format(SHM)), SHM),
    (TORCH.DistBackendError(SYSTEM.format(FULL_GPU)), FULL_GPU),
    (TORCH.DistNetworkError(PORT), PORT),
    (RuntimeError(f"{GLOO}Gloo connectFullMesh failed: Too many open files"), "Too many open files"),
    (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory"),
]


@pytest.mark.parametrize(("error", "says"), FAILURES)
def test_who_has_failed(error, says):
    """A lost rank's error is for that one to say; a failure of this one comes with its reason."""
    with pytest.raises((utils.RunError, torch.OutOfMemoryError)) as caught, parallel.others_alive():
        raise error
    assert isinstance(caught.value, utils.LostRankError) == (says == GONE)
    assert says in str(caught.value)


def test_a_port_that_is_taken(tmp_path):
    """Rank 0's own failure: it gives the port and does not look for another rank."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        result = start(*EVERY, cwd=tmp_path, environment=shared).result()
    assert (result.status, len(result.err.splitlines())) == (1, 1), result
    assert "another rank" not in result.err
    assert port in result.err
    assert "use" in result.err


def test_ranks_without_torchrun(tmp_path):
    """WORLD_SIZE without MASTER_ADDR, as a cluster may set it: one line with the variable that is missing."""
    result = start(*EVERY, cwd=tmp_path, environment={"WORLD_SIZE": "2", "RANK": "0"}).result()
    assert (result.status, len(result.err.splitlines())) == (2, 1), result
    assert "main.py: error: WORLD_SIZE 2: environment variable MASTER_ADDR" in result.err


@pytest.mark.parametrize(
    ("last", "named"),
    [
        (["--batch_size", 8], "--batch_size: 4 on rank 0, 8 on rank 1;"),
        (["--save", "new.pt"], "goes on with a run: True on rank 0, False on rank 1;"),
        (["--resume", "old.pt"], "step of the .state: 7 on rank 0, 3 on rank 1;"),
    ],
)
def test_ranks_that_would_not_do_the_same(corpus, tmp_path, last, named):
    """Other flags, or machines without a common disk: refused by all before a step, nothing is written."""
    flags = ["--data", corpus, *EVERY, "--resume", "auto"]
    for steps in (3, 7):
        assert start(*flags, "--max_steps", steps, cwd=tmp_path).result().status == 0
        if steps == 3:
            for suffix in ("", ".state"):
                shutil.copy(tmp_path / f"m.pt{suffix}", tmp_path / f"old.pt{suffix}")
    before = (tmp_path / "m.pt").read_bytes()
    ranks = start_ranks(2, *flags, cwd=tmp_path, last=tuple(last))
    results = [rank.result() for rank in ranks]
    for result, who in zip(results, ("", "rank 1: "), strict=True):
        assert (result.status, len(result.err.splitlines())) == (2, 1), result
        assert f"main.py: {who}error: {named}" in result.err
    assert (tmp_path / "m.pt").read_bytes() == before
    assert "| epoch" not in results[0].out


def test_torchrun_says_once_what_is_wrong(tmp_path):
    """A batch that cannot be dealt out: rank 0's line alone and its status, 2; no text is read."""
    running = torchrun("--batch_size", 5, "--data", "nowhere", cwd=tmp_path)
    assert running.wait(TIMEOUT) != 0
    err = (tmp_path / "err").read_text()
    assert [line for line in err.splitlines() if line.startswith("main.py:")] == [
        "main.py: error: --batch_size 5: is the whole batch, dealt out to 2 processes; give a multiple of 2, "
        "such as 4, or another --nproc_per_node"
    ]
    statuses = re.findall(r"exitcode  : (\S+)", err)  # torchrun may end rank 1 while it still imports
    assert "2" in statuses
    assert set(statuses) <= {"2", "143", "-15"}


def test_torchrun_stops_and_goes_on(corpus, tmp_path):
    """SIGTERM to torchrun stops both ranks, with a state; torchrun ends the run that goes on with 0."""
    flags = ["--data", corpus, *EVERY, "--device", "cpu", "--epochs", 500]
    running = torchrun(*flags, cwd=tmp_path)
    wait_for(running, tmp_path / "out", re.compile(r"^\| epoch +2 \| +2/", re.M))
    running.terminate()
    assert running.wait(TIMEOUT) != 0
    assert "| stopped; go on with: " in (tmp_path / "out").read_text()
    step = torch.load(tmp_path / "m.pt.state", weights_only=True)["progress"]["step"]
    running = torchrun("--resume", "m.pt", "--max_steps", step + 2, cwd=tmp_path)
    assert running.wait(TIMEOUT) == 0, (tmp_path / "err").read_text()
    out = (tmp_path / "out").read_text()
    assert out.count("Args:") == out.count("| End of training") == 1
    assert len(re.findall(r"^\| epoch ", out, re.M)) == 2
