"""An exported folder in Transformers, minicons and lm-evaluation-harness, beside the figures of score.py.

run.sh runs this in a virtual environment with a version of Transformers. The main suite does not collect it.
"""

import io
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import safetensors.torch as safetensors
import torch
import transformers
from torch import Tensor, nn
from toys import LEVELS, NO_DROPOUT, WORDS, call, prepare_levels, settings_of
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
)

import export
import score
from corpus.files import read_tokenizer
from corpus.read import EOS
from harness import files
from harness.files import load_model, to_evaluate
from hub.folder import pack_tensors, read_back, unpack_tensors
from model import build
from surprisal import Reader, score_apart

torch.set_num_threads(1)
KINDS: dict[str, dict[str, Any]] = {
    "LSTM": {"kind": "LSTM"},
    "LSTM untied": {"kind": "LSTM", "tied": False},
    "LSTM nhidlast untied": {"kind": "LSTM", "tied": False, "nhidlast": 14},
    "GRU": {"kind": "GRU"},
    "QRNN": {"kind": "QRNN", "nlayers": 3},
    "Mogrifier": {"kind": "Mogrifier"},
    "Mogrifier of full rank": {"kind": "Mogrifier", "rank": 0},
    "Mogrifier without rounds": {"kind": "Mogrifier", "rounds": 0},
    "RLSTM": {"kind": "rlstm", "nlayers": 3},
    "RLSTM without rounds": {"kind": "rlstm", "rounds": 0},
    "split": {"kind": "LSTM", "splits": [7, 20]},
    "split untied": {"kind": "GRU", "splits": [7, 20], "tied": False},
    "mixture": {"kind": "LSTM", "n_experts": 3},
    "mixture untied": {"kind": "QRNN", "n_experts": 2, "tied": False},
    "mixture nhidlast": {"kind": "GRU", "n_experts": 3, "nhidlast": 14},
}
LINES = ["w1 w2 w3", "w4 nobody knows w5 <unk>", "w7", "w1 w1 w2 w30 w47 w3 w9 w9", "w40 w41 w42 w2 w1"]


class Exported(NamedTuple):
    folder: str
    path: Path
    model: Any
    tokenizer: Any


def write_model(path: Path, kind: str, vocab: list[str] = WORDS, tokenizer: str | None = None, **more: Any) -> Path:
    """A saved model of random weights, large enough for gates to move and small enough to be unsure."""
    torch.manual_seed(0)
    args = settings_of(kind, **more)
    model, criterion = build(args | NO_DROPOUT, len(vocab))
    for parameter in [*model.parameters(), *criterion.parameters()]:
        nn.init.normal_(parameter, std=0.5)
    files.save(str(path), files.model_contents(Namespace(**args), vocab, model, criterion, {}, tokenizer))
    return path


def open_folder(path: Path, folder: Path) -> Exported:
    assert call(export, path, "--out", folder) == 0
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    return Exported(str(folder), path, model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True))


@pytest.fixture(scope="module", params=KINDS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    place = tmp_path_factory.mktemp("hub")
    return open_folder(write_model(place / "toy.pt", **KINDS[request.param]), place / request.param.replace(" ", "_"))


def expected(path: Path, lines: list[str]) -> list[Tensor]:
    """The log-probabilities of score.py, in nats, the closing `<eos>` last."""
    saved = to_evaluate(load_model(str(path), "--save"), torch.device("cpu"))
    reader = Reader(saved, str(path))
    window = [reader.line(i, line, "text") for i, line in enumerate(lines)]
    return [scored.logprob for scored in score_apart(saved, [window], None)]


def encode(tokenizer: Any, lines: list[str], side: str = "right") -> Any:
    tokenizer.padding_side = side
    return tokenizer(lines, return_tensors="pt", padding=True)


def logprobs(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits.log_softmax(-1)


def mixed_padding(tokenizer: Any) -> dict[str, Tensor]:
    """Padding on both sides of a row, and within it."""
    batch = encode(tokenizer, LINES)
    ids, mask = (torch.cat([x[:, :2], torch.zeros_like(x[:, :1]), x[:, 2:]], 1) for x in batch.values())
    front = torch.zeros_like(ids[:, :1])
    return {"input_ids": torch.cat([front, ids], 1), "attention_mask": torch.cat([front, mask], 1)}


@pytest.mark.parametrize("side", ["right", "left", "mixed"])
def test_log_probabilities_are_those_of_score(exported, side):
    batch = mixed_padding(exported.tokenizer) if side == "mixed" else encode(exported.tokenizer, LINES, side)
    every = logprobs(exported.model, batch)
    eos = exported.tokenizer.eos_token_id
    for row, line, figures in zip(range(len(LINES)), LINES, expected(exported.path, LINES), strict=True):
        real = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][real]
        targets = torch.tensor([*ids[1:].tolist(), eos])
        found = every[row][real].gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(found.double(), figures, rtol=1e-5, atol=1e-5)
        alone = logprobs(exported.model, encode(exported.tokenizer, [line]))[0]
        torch.testing.assert_close(every[row][real], alone, rtol=1e-5, atol=1e-5)


def test_pad_is_of_no_probability(exported):
    every = logprobs(exported.model, encode(exported.tokenizer, LINES))
    assert every[..., exported.tokenizer.pad_token_id].exp().max() == 0
    assert every.isfinite().all()
    assert every.size(2) == exported.tokenizer.vocab_size == len(exported.tokenizer)


def generated(exported: Exported, batch: Any, **how: Any) -> list[list[int]]:
    """The new ids of each row, up to the `<eos>`."""
    out = exported.model.generate(**batch, max_new_tokens=12, **({"do_sample": False} | how))
    rows = out[:, batch["input_ids"].size(1) :].tolist()
    return [row[: row.index(0)] if 0 in row else row for row in rows]


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_of_a_padded_batch_is_that_of_each_prompt(exported, beams):
    alone = [
        generated(exported, encode(exported.tokenizer, [line]), num_beams=beams, use_cache=False)[0] for line in LINES
    ]
    assert len(set(map(tuple, alone))) > 1
    for side in ("left", "right"):
        batch = encode(exported.tokenizer, LINES, side)
        for use_cache in (True, False):
            assert generated(exported, batch, num_beams=beams, use_cache=use_cache) == alone, (side, use_cache)
    mixed = mixed_padding(exported.tokenizer)
    assert generated(exported, mixed, num_beams=beams) == alone


def test_the_cache_reads_one_token_at_a_time(exported, monkeypatch):
    lengths = []
    encoder = exported.model.model.encoder
    hook = encoder.register_forward_hook(lambda module, inputs, out: lengths.append(inputs[0].size(1)))
    generated(exported, encode(exported.tokenizer, LINES, "left"), min_new_tokens=5, num_beams=3)
    hook.remove()
    assert lengths[1:5] == [1, 1, 1, 1]


def test_samples_have_no_pad(exported):
    batch = encode(exported.tokenizer, ["w1"])
    out = exported.model.generate(
        **batch, do_sample=True, top_k=0, temperature=1e6, max_new_tokens=50, num_return_sequences=20, min_new_tokens=50
    )
    assert (out != exported.tokenizer.pad_token_id).all()


def test_hidden_states_and_classification(exported):
    base = AutoModel.from_pretrained(exported.folder, trust_remote_code=True).eval()
    for side in ("right", "left"):
        batch = encode(exported.tokenizer, LINES, side)
        with torch.no_grad():
            out = base(**batch, output_hidden_states=True)
            base.config.output_hidden_states = True
            again = base(**batch)
            as_tuple = base(**batch, return_dict=False)
            whole = exported.model(**batch, output_hidden_states=True)
        base.config.output_hidden_states = False
        assert len(out.hidden_states) == base.config.num_hidden_layers + 1
        assert out.last_hidden_state.size(-1) == base.config.hidden_size
        torch.testing.assert_close(again.hidden_states[-1], whole.hidden_states[-1])
        torch.testing.assert_close(as_tuple[0], out.last_hidden_state)
    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(exported.folder, trust_remote_code=True, num_labels=3)
    judge.eval()
    left, right = (judge(**encode(exported.tokenizer, LINES, side)).logits for side in ("left", "right"))
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    assert left.isfinite().all()
    loss = judge(**encode(exported.tokenizer, LINES), labels=torch.tensor([0, 1, 2, 0, 1])).loss
    loss.backward()
    assert judge.model.encoder.weight.grad.isfinite().all()


def test_masks_of_three_dimensions(exported):
    """BabyLM's fine-tuning gives one mask per query, (B, T, T)."""
    batch = encode(exported.tokenizer, LINES)
    T = batch["input_ids"].size(1)
    mask = batch["attention_mask"][:, None] * torch.ones(T, T).tril().long()
    with torch.no_grad():
        found = exported.model.model(batch["input_ids"], attention_mask=mask)[0]
        assert torch.equal(found, exported.model.model(**batch)[0])


def test_training_and_saving(exported, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(exported.folder, trust_remote_code=True)
    batch = encode(exported.tokenizer, LINES)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    first = model(**batch, labels=labels).loss
    every, hit = logprobs(model, batch)[:, :-1], labels[:, 1:] != -100
    mean = -every[hit].gather(1, labels[:, 1:][hit][:, None]).mean()
    torch.testing.assert_close(first, mean)
    first.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    assert model(**batch, labels=labels).loss < first
    model.save_pretrained(tmp_path)
    for name in export.CODE:  # Transformers 5 copies them
        (tmp_path / name).write_bytes((export.HUB / name).read_bytes())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    torch.testing.assert_close(logprobs(again, batch), logprobs(model.eval(), batch))


def test_reading_back_is_exact(exported):
    saved, again = load_model(str(exported.path), "--save"), read_back(exported.folder)
    assert all(torch.equal(again[p][n], saved[p][n]) for p in ("model", "criterion") for n in saved[p])


def test_safetensors_is_what_its_package_reads():
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(4).half(), "c": torch.randn(()).double()}
    for found in (safetensors.load(pack_tensors(tensors)), unpack_tensors(safetensors.save(tensors))):
        assert {*found} == {*tensors}
        assert all(found[name].dtype == x.dtype and torch.equal(found[name], x) for name, x in tensors.items())


@pytest.mark.parametrize("level", LEVELS)
def test_tokenizers(level, tmp_path):
    """The ids are those of score.py; a newline is an `<eos>`."""
    text = ["She opened the door, and looked.", "The horse raced past  the barn: fell!", "Crème brûlée"] * 3
    (tmp_path / "c").mkdir()
    corpus = prepare_levels(tmp_path / "c", text, 300)[level]
    contents, pieces = read_tokenizer(corpus)
    vocab = [EOS, *reversed(pieces)]
    found = open_folder(write_model(tmp_path / "toy.pt", "LSTM", vocab, contents), tmp_path / "out")
    check_tokenizer(found, [*text[:3], "the  Zebra's ▁ café", "the the"])


def test_tokenizer_of_a_corpus_of_words(exported):
    check_tokenizer(exported, [*LINES, "w1\u00a0w2\u2003w3 w4\tw5\x1cw6\x85w7", "W1 w1, a<unk>b", "a<pad> w1"])


def check_tokenizer(found: Exported, lines: list[str]) -> None:
    saved = to_evaluate(load_model(str(found.path), "--save"), torch.device("cpu"))
    reader, eos = Reader(saved, "x"), saved.vocab.index(EOS)
    every = [reader.line(1, line, "x").ids for line in lines]
    for line, ids in zip(lines, every, strict=True):
        assert found.tokenizer(line).input_ids == [eos, *ids], line
        assert found.tokenizer(line, add_special_tokens=False).input_ids == ids
    joined = found.tokenizer("\n".join(lines[:2])).input_ids
    assert joined == [eos, *every[0], eos, *every[1]], found.tokenizer.convert_ids_to_tokens(joined)
    offsets = found.tokenizer(lines[0], return_offsets_mapping=True).offset_mapping
    assert offsets[0] == (0, 0)
    assert [lines[0][a:b] for a, b in offsets[1:]] == [token.text for token in reader.codec.tokens(lines[0])]
    processor = AutoProcessor.from_pretrained(found.folder, trust_remote_code=True)
    assert processor(lines[0]).input_ids == found.tokenizer(lines[0]).input_ids


def test_minicons(exported, capsys, tmp_path):
    """token_score is what `score.py --tokens --nats` prints."""
    from minicons.scorer import IncrementalLMScorer

    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    scorer = IncrementalLMScorer(exported.model, "cpu", tokenizer=tokenizer)
    found = scorer.token_score(LINES, surprisal=True)
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    out = io.StringIO()
    with redirect_stdout(out):
        assert call(score, "--save", exported.path, tmp_path / "lines.txt", "--tokens", "--nats") == 0
    rows = [row.split("\t") for row in out.getvalue().splitlines()[1:]]
    for number, scores in enumerate(found, start=1):
        printed = [float(row[3]) for row in rows if row[0] == str(number)]
        assert [score for _, score in scores[1:]] == pytest.approx(printed[:-1], abs=2e-5)
    figures = expected(exported.path, LINES)
    sums = scorer.sequence_score(LINES, reduction=lambda x: x.sum().item())
    assert sums == pytest.approx([x[:-1].sum().item() for x in figures], rel=1e-5)
    whole = scorer.conditional_score(["w1 w2"], ["w3 w4"], reduction=lambda x: x.sum().item())
    assert whole == pytest.approx([expected(exported.path, ["w1 w2 w3 w4"])[0][2:4].sum().item()], rel=1e-5)
    words = scorer.word_score_tokenized(["w1 w2 w3"], lambda text: text.split(), surprisal=True)
    assert [x for _, x in words[0]] == pytest.approx((-figures[0][:3]).tolist(), rel=1e-5)
    assert len(scorer.next_word_distribution(["w1 w2", "w3"])) == 2
    ended = scorer.sequence_score([f"{LINES[0]}\n"], reduction=lambda x: x.sum().item())
    assert ended == pytest.approx([figures[0].sum().item()], rel=1e-5)


def test_minicons_opens_the_folder(exported):
    from minicons import cwe
    from minicons.scorer import IncrementalLMScorer

    scorer = IncrementalLMScorer(exported.folder, "cpu", tokenizer=exported.tokenizer, trust_remote_code=True)
    scorer.model.eval()
    assert scorer.sequence_score(LINES[:1]) == pytest.approx([expected(exported.path, LINES[:1])[0][:-1].mean().item()])
    words = cwe.CWE(exported.folder, "cpu", trust_remote_code=True)
    (vector,) = words.extract_representation([("w1 w2 w3", "w2")], layer=1)
    with torch.no_grad():
        states = exported.model(**exported.tokenizer("w1 w2 w3", return_tensors="pt"), output_hidden_states=True)
    torch.testing.assert_close(vector, states.hidden_states[1][0, 2])


def test_pipeline(exported):
    writer = transformers.pipeline("text-generation", model=exported.folder, trust_remote_code=True)
    (found,) = writer("w1 w2", max_new_tokens=12, do_sample=False)
    ids = generated(exported, encode(exported.tokenizer, ["w1 w2"]))[0]
    text = exported.tokenizer.decode(ids, skip_special_tokens=True)
    assert found["generated_text"].removeprefix("w1 w2").split() == text.split()


@pytest.fixture(scope="module")
def harness(exported: Exported) -> Iterator[Any]:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=exported.folder, trust_remote_code=True, device="cpu", batch_size=3)


def requests(kind: str, every: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(every)]


def test_lm_eval_loglikelihood(exported, harness):
    figures = expected(exported.path, LINES)
    found = harness.loglikelihood(requests("loglikelihood", [("", line) for line in LINES]), disable_tqdm=True)
    assert [x for x, _ in found] == pytest.approx([x[:-1].sum().item() for x in figures], rel=1e-5)
    ended = harness.loglikelihood(requests("loglikelihood", [("", f"{line}\n") for line in LINES]), disable_tqdm=True)
    assert [x for x, _ in ended] == pytest.approx([x.sum().item() for x in figures], rel=1e-5)
    pairs = [("w1 w2", " w3 w4"), ("w9", " w1")]
    found = harness.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    whole = expected(exported.path, ["w1 w2 w3 w4", "w9 w1"])
    assert [x for x, _ in found] == pytest.approx([whole[0][2:4].sum().item(), whole[1][1].item()], rel=1e-5)


def test_lm_eval_rolling(exported, harness):
    """By default two `<eos>` stand in front; add_bos_token=False mends it."""
    from lm_eval.models.huggingface import HFLM

    one = [x[:-1].sum().item() for x in expected(exported.path, LINES)]
    rolling = requests("loglikelihood_rolling", [(line,) for line in LINES])
    mended = HFLM(pretrained=exported.folder, trust_remote_code=True, device="cpu", batch_size=3, add_bos_token=False)
    assert mended.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(one, rel=1e-5)
    assert harness.loglikelihood_rolling(rolling, disable_tqdm=True) != pytest.approx(one, rel=1e-3)


def test_lm_eval_generation(exported, harness):
    prompts = [("w1 w2", {"until": ["w47"], "max_gen_toks": 6}), ("w9", {"until": ["w47"], "max_gen_toks": 6})]
    texts = harness.generate_until(requests("generate_until", prompts), disable_tqdm=True)
    for (prompt, _), text in zip(prompts, texts, strict=True):
        ids = generated(exported, encode(exported.tokenizer, [prompt]))[0][:6]
        alone = exported.tokenizer.decode(ids, skip_special_tokens=True).split("w47")[0]
        assert text.split() == alone.split()
