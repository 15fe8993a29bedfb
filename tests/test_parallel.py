"""Several ranks train as one process does; what ends one ends all; a stopped run goes on.

Most runs are real processes started with the variables that torchrun sets, one by torchrun itself.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from textwrap import indent

import pytest
import torch
from conftest import SMALL, Trained, load, read_log, write_corpus
from runner import ENVIRONMENT, PRELUDE, ROOT, WALL_S, Result, Running, signal_itself, start
from test_resume_cli import assert_same_end, differences, seen, without_clock
from toys import KINDS, NO_DROPOUT_FLAGS, flags_of

from harness.ranks import Ranks
from utils import UserError

EVERY = [*SMALL, "--save", "m.pt", "--log-interval", 1]  # a batch of 4 columns
AVERAGING = ["--nonmono", 0, "--clip", 1, "--epochs", 4]
RUNS = {  # the number of ranks and the flags
    **{kind: [2, *flags_of(kind), "--epochs", 2] for kind in KINDS},
    "averaging, split softmax": [2, *AVERAGING, "--splits", 6, 15],
    "averaging, shuffled mixture": [2, *AVERAGING, "--shuffle", "--n_experts", 3, "--nhidlast", 9, "--dropoutl", 0],
    "two means": [2, "--average", "two-tailed", "--clip", 1, "--epochs", 4],
    "Adam, zero states": [
        *[3, "--batch_size", 6, "--drop_state", 0.3],
        *["--optimizer", "adam", "--lr", 0.01, "--epochs", 2],
    ],
}


def start_ranks(
    size: int,
    *argv: object,
    cwd: Path,
    last: tuple[object, ...] = (),
    last_cwd: Path | None = None,
    script: str = "main.py",
) -> list[Running]:
    """`main.py argv` by so many processes, as torchrun starts them; the last one with its own flags and folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(size):
        own = {name: str(x) for name, x in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        flags, folder = (last, last_cwd or cwd) if rank == size - 1 else ((), cwd)
        ranks.append(start(*argv, *flags, cwd=folder, script=script, environment=own))
    return ranks


def run_ranks(size: int, *argv: object, cwd: Path, **how: object) -> Result:
    """The same to its end; rank 0's result, once it is sure that the others ended alike and silently."""
    if size == 1:
        return start(*argv, cwd=cwd, **how).result()
    first, *others = [rank.result() for rank in start_ranks(size, *argv, cwd=cwd, **how)]
    assert {(other.status, other.out, other.err) for other in others} == {(first.status, "", "")}, others
    return first


def folders(tmp_path: Path, *names: str) -> list[Path]:
    for name in names:
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in names]


def assert_same_losses(folder: Path, other: Path, after: int = 0) -> None:
    """Step by step, valid and test: the same to 1e-5, averaged at the same time."""
    one, several = (
        [e for e in read_log(path / "m.pt.log.jsonl") if e["kind"] in ("train", "valid", "test")]
        for path in (folder, other)
    )
    one = [entry for entry in one if entry.get("step", after + 1) > after]
    for a, b in zip(one, several, strict=True):
        assert [a.get(key) for key in ("kind", "step", "averaged")] == [
            b.get(key) for key in ("kind", "step", "averaged")
        ]
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5), (a, b)


@pytest.mark.parametrize("name", RUNS)
def test_ranks_train_as_one_process(corpus, tmp_path, name):
    """Without dropout losses agree step by step, through the switch to averaging, in validation and test."""
    size, *flags = RUNS[name]
    one, several = folders(tmp_path, "one", "several")
    for folder, ranks in ((one, 1), (several, size)):
        result = run_ranks(ranks, "--data", corpus, *EVERY, *NO_DROPOUT_FLAGS, *flags, cwd=folder)
        assert result.status == 0, result
        assert "End of training" in result.out
    if "averaging" in name:
        valid = [entry for entry in read_log(one / "m.pt.log.jsonl") if entry["kind"] == "valid"]
        assert {entry["averaged"] for entry in valid} == {False, True}
    assert_same_losses(one, several)
    for key, tensor in load(one / "m.pt")["model"].items():
        torch.testing.assert_close(load(several / "m.pt")["model"][key], tensor, rtol=0, atol=2e-4)


def test_ranks_fine_tune_as_one_process(corpus, tmp_path):
    """finetune.py goes on from the same model with the same losses."""
    one, several = folders(tmp_path, "one", "several")
    for folder, ranks in ((one, 1), (several, 2)):
        flags = ["--data", corpus, *EVERY, *NO_DROPOUT_FLAGS]
        assert run_ranks(1, *flags, "--epochs", 1, cwd=folder).status == 0
        result = run_ranks(ranks, *flags, "--epochs", 2, cwd=folder, script="finetune.py")
        assert result.status == 0, result
        assert "before fine-tuning" in result.out
    assert_same_losses(one, several)


SCRIPT = """
import torch
from harness.ranks import find_ranks
ranks = find_ranks()
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
seeds = []
for step in (3, 4):  # of two resumes: the masks of one do not come again in the other
    ranks.seed(5, step)
    seeds.append(torch.initial_seed())
assert ranks.gather(torch.tensor(seeds)).unique().numel() == 2 * n
columns = torch.arange(6).view(2, 3).T + me  # of a layout of its own
assert torch.equal(ranks.gather(columns), torch.stack([torch.arange(6).view(2, 3).T + r for r in range(n)]))
assert ranks.sum([me + 0.1, 1.0]) == [0.1 + 1.1 + 2.1, 3.0]
assert ranks.agree("SIGINT" if me == 2 else "") == "SIGINT"
assert ranks.agree(["SIGINT", "SIGTERM", ""][me]) == "SIGTERM"
hidden = [(torch.full((1, 2, 4), float(me)),)]
assert ranks.join_columns(hidden)[0][0][0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]
tensors = torch.arange(6).view(2, 3).t().contiguous(), torch.tensor(7, dtype=torch.uint8), torch.ones(0)
found = ranks.from_rank_0({"at": [1.5, None, "x"], "tensors": tensors} if me == 0 else None)
assert found["at"] == [1.5, None, "x"]
assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found["tensors"], tensors, strict=True))
for parameter in parameters:
    parameter.data.fill_(me + 1)
ranks.broadcast_weights(parameters)
assert all((parameter == 1).all() for parameter in parameters)
print("alike")
ranks.end()
"""


def test_what_ranks_share(tmp_path):
    """Gradients, missing, large or infinite, are averaged; rank 0's data and weights arrive as they are."""
    (tmp_path / "script.py").write_text(SCRIPT)
    for rank in start_ranks(3, cwd=tmp_path, script=str(tmp_path / "script.py")):
        result = rank.result()
        assert result == (0, "alike\n", ""), result.err


@pytest.mark.parametrize("wdrop", [0.5, 0])
def test_masks_differ_between_ranks(tmp_path, wdrop):
    """Two columns of the same text, one for each rank: they differ by what is dropped, and by nothing else."""
    text = " ".join(f"w{i * i % 17}" for i in range(60)) + "\n"
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(text * 2)
    flags = [*EVERY, "--batch_size", 2, *NO_DROPOUT_FLAGS, "--wdrop", wdrop, "--max_steps", 2]
    assert run_ranks(2, "--data", ".", *flags, cwd=tmp_path).status == 0
    columns = load(tmp_path / "m.pt.state")["hidden"][0][0]  # (1, 2, H)
    assert torch.equal(columns[:, 0], columns[:, 1]) == (wdrop == 0)


def test_a_stopped_run_goes_on_bit_for_bit(corpus, tmp_path):
    """A SIGTERM that only rank 1 gets stops both with 143; two ranks go on and end as if never stopped.

    Rank 0's settings count: what else the other command lines say changes nothing, at the start and after it.
    """
    flags = ["--data", corpus, *EVERY, *AVERAGING]
    other = ("--data", "nowhere", "--seed", 7, "--lr", 1, "--model", "GRU", "--save", "x.pt", "--batch_size", 9)
    whole, cut = folders(tmp_path, "whole", "cut")
    result = run_ranks(2, *flags, cwd=whole)
    code = f"import os\nif os.environ['RANK'] == '1':\n{indent(signal_itself(signal.SIGTERM, 3, 4), '    ')}"
    ranks = start_ranks(2, code, "main.py", *flags, cwd=cut, last=other, script=PRELUDE)
    first, second = (rank.result() for rank in ranks)
    assert (first.status, second.status, second.out, second.err) == (143, 143, "", ""), (first, second)
    assert first.out.endswith("\n| stopped (SIGTERM); --resume m.pt goes on\n")
    again = run_ranks(2, "--resume", "m.pt", cwd=cut, last=("--resume", "", *other))
    assert "bit for bit" not in again.out
    assert_same_end(cut, again, Trained(whole, result, whole / "m.pt"))
    assert not list(cut.glob("x.pt*"))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_another_number_of_ranks_goes_on(corpus, tmp_path, before, after):
    """Same weights, columns dealt anew: without dropout as if nothing had changed; and it says so."""
    flags = ["--data", corpus, *EVERY, "--batch_size", 6, *NO_DROPOUT_FLAGS, *AVERAGING]
    whole, cut = folders(tmp_path, "whole", "cut")
    assert run_ranks(1, *flags, cwd=whole).status == 0
    assert run_ranks(before, *flags, "--max_steps", 20, cwd=cut).status == 0
    os.remove(cut / "m.pt.log.jsonl")
    result = run_ranks(after, "--resume", "m.pt", cwd=cut)
    assert f"| {before} processes before, {after} now: not bit for bit the same run" in result.out
    assert_same_losses(whole, cut, after=20)


def test_clocks_stop_all_ranks_at_once(corpus, tmp_path):
    """--max_minutes looks at clocks, which differ: the ranks stop at the same step."""
    flags = ["--data", corpus, *EVERY, "--epochs", 9000, "--max_minutes", 0.02]
    result = run_ranks(2, *flags, cwd=tmp_path)
    assert result.status == 0, result
    assert result.out.endswith("\n| stopped (--max_minutes); --resume m.pt goes on\n")
    assert run_ranks(2, "--resume", "m.pt", "--max_steps", 1, cwd=tmp_path).status == 0


def assert_failed(result: Result, rank: int, why: str = "") -> None:
    """Status 1, and one line on stderr that names the rank."""
    assert result.status == 1, result
    assert re.fullmatch(rf"main.py: rank {rank}: .*{re.escape(why)}.*\n", result.err), result.err


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_all(corpus, tmp_path, killed):
    """SIGKILL to one of three: the others end within seconds, status 1, one line each; the state is whole."""
    flags = ["--data", corpus, *EVERY, "--batch_size", 6, "--epochs", 500, "--checkpoint_every", 5]
    ranks = start_ranks(3, *flags, cwd=tmp_path)
    ranks[0].wait_for(seen(2, 3))
    ranks[killed].kill(signal.SIGKILL)
    begin = time.monotonic()
    results = [rank.result() for rank in ranks]
    assert time.monotonic() - begin < 300  # far less than what a lost process is waited for
    assert results[killed].status == -signal.SIGKILL
    for rank, result in enumerate(results):
        if rank != killed:
            assert_failed(result, rank)
    assert load(tmp_path / "m.pt.state")["at"]["step"] >= 5


def test_a_batch_that_cannot_be_dealt_out(corpus, tmp_path):
    """Each rank says so, with a number that would do; nothing is written."""
    for rank, running in enumerate(start_ranks(2, "--data", corpus, *EVERY, "--batch_size", 5, cwd=tmp_path)):
        rest = "error: --batch_size 5: is the whole batch, dealt out to 2 processes; give a multiple of 2,"
        assert_failed(running.result(), rank, rest)
    assert not list(tmp_path.glob("m.pt*"))


@pytest.mark.parametrize("bad", [0, 1])
def test_a_rank_that_fails_says_why(tmp_path, bad):
    """A text that is not there for rank 0, another one on rank 1's machine: both end, that one says it."""
    first, second = folders(tmp_path, "first", "second")
    for folder, seed in ((first, 0), (second, 1)):
        if folder == second or bad == 1:
            write_corpus(folder / "corpus", seed=seed)
    ranks = start_ranks(2, "--data", "corpus", *EVERY, cwd=first, last_cwd=second)
    why = "there is no such folder", "is another text on this machine than on rank 0's"
    for rank, running in enumerate(ranks):
        assert_failed(running.result(), rank, f"error: --data corpus: {why[bad]}" if rank == bad else "")


def test_a_disk_that_fills_under_rank_0(corpus, tmp_path):
    """No first model can be written, which rank 0 alone sees: Ctrl-C ends all ranks all the same."""
    code = "import os, train; end = train.validate\n"  # no file can be renamed to a folder
    code += "train.validate = lambda *a, **b: (os.makedirs('m.pt', exist_ok=True), end(*a, **b))[1]"
    ranks = start_ranks(2, code, "main.py", "--data", corpus, *EVERY, "--epochs", 500, cwd=tmp_path, script=PRELUDE)
    ranks[0].wait_for(seen(2, 2))
    ranks[0].kill(signal.SIGINT)
    first, second = (rank.result() for rank in ranks)
    assert (first.status, second.status, second.out, second.err) == (1, 0, "", ""), (first, second)
    warning, error = first.err.splitlines()
    assert warning.startswith("main.py: warning: m.pt: cannot be written")
    assert error.startswith("main.py: rank 0: error: ")
    assert load(tmp_path / "m.pt.state")["at"]["best_loss"] is None


def test_a_port_that_is_taken(tmp_path):
    """Rank 0's own failure, with the port."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        assert_failed(start(*EVERY, cwd=tmp_path, environment=shared).result(), 0, port)


def test_ranks_without_torchrun(tmp_path):
    """WORLD_SIZE without MASTER_ADDR, as a cluster may set it: one line with the variable that is missing."""
    result = start(*EVERY, cwd=tmp_path, environment={"WORLD_SIZE": "2", "RANK": "0"}).result()
    assert_failed(result, 0, "error: WORLD_SIZE 2: environment variable MASTER_ADDR")


def test_torchrun_goes_on_and_stops(corpus, tmp_path):
    """It starts two ranks that go on with a run of two; SIGTERM to it stops both, and loses no step."""
    assert run_ranks(2, "--data", corpus, *EVERY, "--device", "cpu", "--max_steps", 3, cwd=tmp_path).status == 0
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "main.py"]
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        running = subprocess.Popen(
            [*line, "--resume", "m.pt", "--max_steps", "0"],
            cwd=tmp_path, env=os.environ | ENVIRONMENT, stdout=stdout, stderr=stderr,
        )  # fmt: skip
    end = time.monotonic() + WALL_S
    while not seen(2, 2)(out.read_text()):
        assert running.poll() is None, err.read_text()
        assert time.monotonic() < end
        time.sleep(0.01)
    running.terminate()
    assert running.wait(WALL_S) != 0
    assert out.read_text().count("Args:") == 1
    assert out.read_text().endswith("\n| stopped (SIGTERM); --resume m.pt goes on\n")
    step = load(tmp_path / "m.pt.state")["at"]["step"]
    result = run_ranks(2, "--resume", "m.pt", "--max_steps", step + 2, cwd=tmp_path)
    assert len(re.findall(r"(?m)^\| epoch ", result.out)) == 2


def test_one_process_has_the_gpu_that_it_names_as_the_current_one(monkeypatch):
    """Streams and graphs are of torch's current GPU."""
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cpu", "cuda", "cuda:1"):
        Ranks(0, 1).start(torch.device(name))
    assert current == [torch.device("cuda:1")]


def test_each_rank_has_the_gpu_of_its_own_number_on_its_machine(monkeypatch):
    """The sixth of eight processes, the second of four on its machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Ranks(5, 8).device_name("auto") == Ranks(5, 8).device_name("cuda") == "cuda:1"
    assert Ranks(5, 8).device_name("cpu") == "cpu"
    with pytest.raises(UserError, match="--device cuda:1"):
        Ranks(5, 8).device_name("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--nproc_per_node 4"):
        Ranks(5, 8).device_name("auto")


DIES = """
import os, runpy, signal, sys

rank, sys.argv = sys.argv[1], ["main.py", *sys.argv[2:]]
sys.path.insert(0, ROOT)
import train

step = train.train_step

def dying(run, *batch):
    if run.at.step == 9 and not run.args.resume and os.environ["RANK"] == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(run, *batch)

train.train_step = dying
runpy.run_path(f"{ROOT}/main.py", run_name="__main__")
"""


@pytest.mark.parametrize(("nodes", "dies"), [(1, 0), (2, 1)])
def test_killed_ranks_come_back(corpus, tmp_path, nodes, dies):
    """--max_restarts, on one machine and on two with a shared disk: bit for bit the run that was not killed."""
    flags = ["--data", corpus, *EVERY, "--device", "cpu", "--epochs", 1, "--checkpoint_every", 4, "--resume", "auto"]
    (tmp_path / "whole").mkdir()
    assert run_ranks(2, *flags, cwd=tmp_path / "whole").status == 0
    (tmp_path / "dies.py").write_text(f"ROOT = {str(ROOT)!r}\n{DIES}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    line = [
        *[sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc_per_node", 2 // nodes],
        *["--max_restarts", 1, "--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--local-addr", "127.0.0.1"],
        *[tmp_path / "dies.py", dies, *flags],
    ]
    agents = []
    for node in range(nodes):
        with open(tmp_path / f"out{node}", "wb") as out:
            how = {"cwd": tmp_path, "env": os.environ | ENVIRONMENT, "stdout": out, "stderr": subprocess.STDOUT}
            agents.append(subprocess.Popen([str(word) for word in line], **how))
    try:
        statuses = [agent.wait(WALL_S) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    said = "".join(path.read_text() for path in tmp_path.glob("out*"))
    assert statuses == [0] * nodes, said
    assert said.count("| resumed at epoch 1, batch 8\n") == 1, said
    for name in ("m.pt", "m.pt.state"):
        found, expected = (without_clock(load(folder / name)) for folder in (tmp_path, tmp_path / "whole"))
        for contents in (found, expected):
            contents["args"].pop("resume", None)
        assert not differences(found, expected)


def test_a_state_that_rank_0_does_not_see_is_not_started_over(corpus, tmp_path):
    """Two machines without a shared disk, after a restart: rank 0 is where no state is."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "m.pt.state").write_bytes(b"")
    flags = ["--data", corpus, *EVERY, "--device", "cpu", "--resume", "auto"]
    results = [rank.result() for rank in start_ranks(2, *flags, cwd=tmp_path, last_cwd=tmp_path / "other")]
    assert [result.status for result in results] == [1, 1], results
    for result in results:
        assert "m.pt.state is on the machine of rank 1 and not on that of rank 0" in result.err
    assert not (tmp_path / "m.pt.state").exists()
