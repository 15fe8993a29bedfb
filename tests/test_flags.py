"""The flag table: defaults, spellings, abbreviations, and which of given, stored and default values wins."""

import importlib
import math
import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import toys
from runner import ROOT

import dynamiceval
import finetune
import generate
import main
import pointer
import score
from harness.files import open_model
from harness.flags import BY_NAME, DEFAULTS, FLAGS, MAIN, ArgumentParser, check_shape, check_stored, resolve_args
from utils import UserError

# DESIGN.md, section 4, to the letter
CONTRACT = (
    "--data data/penn --model LSTM --emsize 400 --nhid 1150 --nlayers 3 --lr 30 --clip 0.25 --epochs 8000 "
    "--batch_size 80 --bptt 70 --dropout 0.4 --dropouth 0.3 --dropouti 0.65 --dropoute 0.1 --wdrop 0.5 "
    "--seed 1111 --nonmono 5 --log-interval 200 --alpha 2 --beta 1 --wdecay 1.2e-6 --optimizer sgd --when -1"
)
FORMAT_1 = Path(__file__).parent / "models"  # saved before the table was made
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md"]
# The flags behind the name of a script that has a model, in the lines of code of all pages, each once
COMMAND = re.compile(r"^    .*?\b(main|finetune|pointer|dynamiceval|generate|score)\.py ([^&>|\n]*)", re.MULTILINE)
COMMANDS = sorted({found for page in PAGES for found in COMMAND.findall(page.read_text(encoding="utf-8"))})
OF_MAIN = tuple(FLAGS)
OF_FINETUNE = tuple(group for group in FLAGS if group != MAIN)


def parse(*argv: object, groups: tuple[str, ...] = OF_MAIN) -> dict[str, object]:
    """What a script makes of a command line."""
    return vars(ArgumentParser("", *groups).parse_args([*map(str, argv)]))


def test_defaults_are_those_of_the_contract():
    """The contract's flags, given, change nothing, except that --log-interval then holds for short epochs too."""
    expected, args = resolve_args(parse(*CONTRACT.split()), {}), resolve_args({}, {})
    assert vars(expected) | {"save": "", "log_interval": None} == vars(args) | {"save": ""}
    assert (args.resume, args.device, args.tied, args.splits) == ("", "auto", True, None)
    assert re.fullmatch(r"\d+\.pt", args.save)


def test_the_rate_is_the_optimizers_own():
    """Without --lr: 30 for SGD, 1e-3 for Adam; a stored rate is that of the stored optimizer alone."""
    assert resolve_args({"optimizer": "adam"}, {}).lr == 1e-3
    assert resolve_args({"optimizer": "radam"}, {}).lr == 1e-3
    assert resolve_args({"optimizer": "adam", "lr": 0.5}, {}).lr == 0.5
    sgd, adam = {"optimizer": "sgd", "lr": 20.0}, {"optimizer": "adam", "lr": 0.01}
    assert resolve_args({}, sgd).lr == 20.0
    assert resolve_args({"optimizer": "sgd"}, sgd).lr == 20.0
    assert resolve_args({"optimizer": "adam"}, sgd).lr == 1e-3
    assert resolve_args({"optimizer": "adam", "lr": 20.0}, sgd).lr == 20.0
    assert resolve_args({"optimizer": "sgd"}, adam | {"beta1": 0.0}).beta1 == 0.9  # SGD has none
    assert resolve_args({"optimizer": "adam"}, adam | {"beta1": 0.0}).beta1 == 0.0
    assert resolve_args({"optimizer": "sgd"}, adam).lr == 30.0


def test_given_over_stored_over_default():
    """What says how a run is carried out is not taken from a file, nor what no flag is called."""
    stored = {"bptt": 20, "clip": 0.1, "gone": 1}
    stored |= {"device": "cuda", "max_steps": 7, "resume": "a.pt", "save": "b.pt"}
    args = resolve_args({"clip": 0.3, "save": "c.pt"}, stored)
    assert (args.bptt, args.clip, args.nhid) == (20, 0.3, 1150)
    assert (args.device, args.max_steps, args.resume, args.save) == ("auto", 0, "", "c.pt")
    assert set(vars(args)) == set(DEFAULTS) == set(BY_NAME)
    assert resolve_args({"resume": "a.pt"}, stored).save == "a.pt"


@pytest.mark.parametrize("groups", [OF_MAIN, OF_FINETUNE], ids=["main.py", "finetune.py"])
def test_spellings_and_abbreviations(groups):
    """Those of the published commands; what is not given is not there."""
    assert parse("--epoch", 500, groups=groups) == {"epochs": 500}
    assert parse("--log-interval", 7, groups=groups) == parse("--log_interval", 7, groups=groups)
    assert parse("--log_interval", 7, groups=groups) == {"log_interval": 7}
    assert parse("--cuda", groups=groups) == {"device": "auto"}
    assert parse("--untied", groups=groups) == {"tied": False}
    assert parse("--tied", groups=groups) == {"tied": True}
    assert parse(groups=groups) == {}


def test_a_switch_that_a_saved_run_had_on_can_be_turned_off():
    for name in ("shuffle", "average"):
        assert vars(resolve_args({}, {name: True}))[name] is True
        assert vars(resolve_args(parse(f"--no-{name}"), {name: True}))[name] is False


def test_average_has_two_kinds():
    """Alone it is the switch that it was, in older files too; a file with another value is refused."""
    assert parse("--average", "--nonmono", 3) == {"average": True, "nonmono": 3}
    assert parse("--average", "two-tailed") == {"average": "two-tailed"}
    with pytest.raises(UserError, match="--average"):
        parse("--average", "three-tailed")
    for value in (True, False, "two-tailed"):
        check_stored({"average": value}, "m.pt")
        assert resolve_args({}, {"average": value}).average is value
    for value in ("three-tailed", 1, None, ["two-tailed"]):
        with pytest.raises(UserError, match="average"):
            check_stored({"average": value}, "m.pt")
    with pytest.raises(UserError, match="--average two-tailed: does not go with --no-average"):
        resolve_args(parse("--average", "two-tailed", "--no-average"), {})
    with pytest.raises(UserError, match="--nonmono 9: does nothing without averaging after a stall"):
        resolve_args(parse("--average", "two-tailed", "--nonmono", 9), {})
    assert resolve_args(parse("--no-average"), {"average": "two-tailed"}).average is False


def test_what_only_main_has():
    """finetune.py has its own course: no optimizer, no rates by epoch, no other vocabulary."""
    assert parse("--when", 25, 35, "--splits", "--optimizer", "adam") == {
        **{"when": [25, 35], "splits": [], "optimizer": "adam"}
    }
    for flag in ("--optimizer", "--beta1", "--when", "--anneal", "--splits", "--vocab_size", "--min_count"):
        with pytest.raises(UserError, match=flag):
            parse(flag, 3, groups=OF_FINETUNE)


@pytest.mark.parametrize("script", [main, finetune])
def test_the_help_names_every_flag_with_its_default(capsys, script):
    """A default that is a number or a name is told, unless the saved model has one; so is every rate."""
    assert toys.call(script, "--help") == 0
    told = " ".join(capsys.readouterr().out.split())
    for flag in [flag for group in (OF_MAIN if script is main else OF_FINETUNE) for flag in FLAGS[group]]:
        assert all(f" {name}" in told for name in flag.names.split())
        if flag.default and not isinstance(flag.default, bool | list):
            default = f"{flag.help} (default: {flag.default})"
            assert (default in told) == (script is main or not (flag.inherited and flag.stored))
    assert "sgd 30, adam 0.001, radam 0.001" in told


@pytest.mark.parametrize("script", [pointer, dynamiceval, generate, score])
def test_the_help_leaves_the_models_shape_to_the_model(capsys, script):
    assert toys.call(script, "--help") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "--emsize EMSIZE size of the word embeddings --nhid" in told


@pytest.mark.parametrize("script", sorted({script for script, _ in COMMANDS}))
def test_a_script_takes_the_flags_that_the_pages_give_it(script, monkeypatch):
    """As far as the command line goes, flags that do nothing refused: what would open a file is cut off."""

    def taken(*given):
        if script in ("main", "finetune"):
            resolve_args({name: value for name, value in given[1].items() if name != "output"}, {})
        raise EOFError

    module = importlib.import_module(script)
    monkeypatch.setattr(module, "begin" if hasattr(module, "begin") else "open_model", taken)
    for line in (line for name, line in COMMANDS if name == script):
        monkeypatch.setattr(sys, "argv", [script, *shlex.split(line.replace(" ... ", " "), comments=True)])
        with pytest.raises(EOFError):
            module.main()


def test_the_commands_of_the_pages_are_found():
    assert len(COMMANDS) > 60


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (main, "--dropot 0.3", "unrecognized arguments: --dropot 0.3; did you mean --dropout?"),
        (main, "--batch-size=3 -epochs 5", "--batch-size=3 -epochs 5; did you mean --batch_size, --epochs?"),
        (finetune, "--outptu a.pt", "--outptu a.pt; did you mean --output?"),
        (pointer, "--save m.pt --lambda_sm 0.1", "--lambda_sm 0.1; did you mean --lambdasm?"),
        (dynamiceval, "--save m.pt --serach", "--serach; did you mean --search?"),
        (score, "--save m.pt --word_s", "--word_s; did you mean --words?"),
        (main, "--quux", "unrecognized arguments: --quux (see --help)"),
        (main, "--drop 0.3", "ambiguous option: --drop could match --dropout"),
        (main, "--nlayers x0", "argument --nlayers: 'x0' is not a number of type int (see --help)"),
    ],
)
def test_a_mistyped_flag_names_the_nearest(script, flags, said, capsys):
    """One that is like none is only named; other errors, and abbreviations, are argparse's."""
    assert toys.call(script, *flags.split()) == 2
    assert said in toys.error_line(capsys)


MOGRIFIER = ["--model", "Mogrifier", "--rounds", 0]


@pytest.mark.parametrize(
    ("flags", "refused", "too"),
    [
        ([], ["--rounds", 3], ["--model", "Mogrifier"]),
        ([], ["--rank", 4], ["--model", "Mogrifier"]),
        (MOGRIFIER, ["--rank", 4], ["--rounds", 2]),
        ([], ["--dropoutr", 0.1], ["--model", "Mogrifier"]),
        ([], ["--cell", "rlstm"], ["--model", "Mogrifier"]),
        ([], ["--chrono", 20.0], ["--model", "Mogrifier"]),
        ([*MOGRIFIER, "--resume", "m.pt"], ["--chrono", 20.0], ["--resume", ""]),
        (MOGRIFIER, ["--wdrop", 0.5], ["--model", "LSTM", "--rounds", 5]),
        ([], ["--dropoutl", 0.2], ["--n_experts", 2]),
        ([], ["--beta1", 0.5], ["--optimizer", "adam"]),
        ([], ["--beta1", 0.5], ["--optimizer", "radam"]),
        (["--optimizer", "adam"], ["--nonmono", 9], ["--average"]),
        (["--epochs", 9], ["--anneal", 9], ["--epochs", 10]),
    ],
)
def test_a_flag_that_does_nothing_is_refused(flags, refused, too):
    """It is named with its value; with what it needs it is taken, and so is a value that was stored before."""
    given = parse(*flags, *refused)
    with pytest.raises(UserError, match=f"^{refused[0]} {refused[1]}: "):
        resolve_args(given, {})
    resolve_args(parse(*flags, *refused, *too), {})
    resolve_args(given, given)
    resolve_args({}, given)


def test_a_flag_of_0_or_the_default_is_never_refused():
    zeros = ["--rounds", "--rank", "--dropoutr", "--dropoutl", "--beta1", "--nonmono", "--anneal"]
    resolve_args(parse("--wdrop", 0, *(word for name in zeros for word in (name, 0))), {})
    defaults = [(f"--{name}", DEFAULTS[name]) for name in ("rounds", "dropoutl", "beta1")]
    resolve_args(parse(*(word for pair in defaults for word in pair)), {})


@pytest.mark.parametrize(
    ("script", "refused", "too"),
    [
        *((pointer, f"--search_{name} 2", "--search") for name in ("thetas", "windows")),
        (pointer, "--search_lambdas 0.5", "--search"),
        *((dynamiceval, f"--{flag} 1", "--search") for flag in ("search_lrs", "search_lambs", "search_tokens")),
        *((dynamiceval, flag, "--pointer") for flag in ("--theta 2", "--lambdasm 0.2", "--window 7")),
        (score, "--lr 0.5 none.txt", "--adaptive"),
        # beside a flag that it does not go with
        *((pointer, f"{flag} 0.5 --search", None) for flag in ("--theta", "--lambdasm")),
        (pointer, "--window 7 --search --search_windows 5", None),
        *((dynamiceval, f"{flag} 0.5 --search", None) for flag in ("--lr", "--lamb")),
        (generate, "--top_k 5 --next 3", None),
    ],
)
def test_a_flag_that_does_nothing_in_an_evaluation_is_refused(script, refused, too, capsys):
    """Before the model is opened, which is not there."""
    assert toys.call(script, "--save", "none.pt", *refused.split()) == 2
    assert f"error: {refused.split()[0]} " in (line := toys.error_line(capsys))
    assert "does nothing" in line
    if too:
        assert toys.call(script, "--save", "none.pt", *refused.split(), too) == 2
        assert "none.pt: No such file" in toys.error_line(capsys)


def test_check_shape():
    """A flag that says what the file says is fine, one that contradicts it is named; others shape nothing."""
    stored = {"model": "QRNN", "emsize": 8, "nhid": 10, "nlayers": 2, "tied": False, "splits": [5]}
    check_shape({**stored, "lr": 1.0, "data": "other", "wdrop": 0.0}, stored, "m.pt")
    odd = {"model": "GRU", "emsize": 9, "nhid": 11, "nlayers": 3, "splits": [6]}
    for name, value in odd.items():
        line = re.escape(f"--{name} {value}: contradicts m.pt, which has {stored[name]}")
        with pytest.raises(UserError, match=line):
            check_shape({name: value}, stored, "m.pt")
    with pytest.raises(UserError, match="--tied: contradicts"):
        check_shape({"tied": True}, stored, "m.pt")
    with pytest.raises(UserError, match="--untied: contradicts"):
        check_shape({"tied": False}, {"tied": True}, "m.pt")


def test_an_older_model_has_the_defaults_of_what_it_does_not_say(tmp_path):
    """Its args lack what came later: it is resumed, checked and opened with the default of that."""
    stored = {"model": "LSTM", "emsize": 8, "nhid": 10, "nlayers": 2}
    assert resolve_args({}, stored).amp == "none"
    check_shape({"tied": True}, stored, "m.pt")
    with pytest.raises(UserError, match="--untied: contradicts"):
        check_shape({"tied": False}, stored, "m.pt")
    sizes_alone = toys.save_model(tmp_path / "m.pt")
    for path in (sizes_alone, FORMAT_1 / "lstm.pt"):
        args = open_model(Namespace(save=str(path), device="cpu")).args
        assert set(DEFAULTS) <= set(vars(args))
        assert args.nonmono == 5


def test_a_script_that_opens_a_model_takes_flags_of_its_shape(tmp_path):
    """As long as they agree with the file."""
    path = str(toys.save_model(tmp_path / "m.pt"))
    open_model(Namespace(save=path, device="cpu", nhid=16, model="LSTM", tied=True))
    with pytest.raises(UserError, match=f"--nhid 17: contradicts {re.escape(path)}"):
        open_model(Namespace(save=path, device="cpu", nhid=17))


def test_a_file_may_say_what_a_command_line_could():
    """The default passes; no number of another kind or range does, no other container, name or tensor."""
    for name in (name for name, flag in BY_NAME.items() if flag.stored):
        check_stored({name: DEFAULTS[name]}, "m.pt")
        odd = [-2, 10**30, math.nan, [0.5], {"a": 1}, torch.zeros(2), "" if name != "data" else 1, (1,)]
        odd += [True] if not isinstance(DEFAULTS[name], bool) else [1]
        for value in odd:
            with pytest.raises(UserError, match=f"m.pt: its args say {name} "):
                check_stored({name: value}, "m.pt")
