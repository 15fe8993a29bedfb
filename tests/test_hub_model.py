"""The modeling file of an exported folder, beside the model that was exported, in float64.

Transformers is not needed: a stand-in has the few names that it takes. tests/hub/run.sh uses the real one.
"""

import importlib
import json
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from toys import NO_DROPOUT, WORDS, call, one_by_one, settings_of

import export
from harness import files
from hub.folder import unpack_tensors
from model import build

KINDS: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in export.KINDS},
    "no rounds": {"kind": "Mogrifier", "rounds": 0},
    "RLSTM": {"kind": "rlstm", "nlayers": 3},
    "RLSTM without rounds": {"kind": "rlstm", "rounds": 0, "tied": False, "nlayers": 1},
    "full rank": {"kind": "Mogrifier", "rank": 0},
    "untied": {"kind": "QRNN", "tied": False, "nlayers": 3},
    "split": {"kind": "LSTM", "splits": [7, 20]},
    "split untied": {"kind": "GRU", "splits": [7, 20], "tied": False},
    "mixture": {"kind": "LSTM", "n_experts": 3, "nhidlast": 14},
    "mixture untied": {"kind": "GRU", "n_experts": 2, "tied": False},
}
ROWS = [[0, 5, 6, 7], [0, 9], [0, 2, 2, 30, 47, 3, 9, 9], [0, 40, 41, 42, 3, 1]]
PAD = len(WORDS)


class StandInConfig:
    def __init__(self, **kwargs: Any) -> None:
        vars(self).update({"return_dict": True, "output_hidden_states": False, **kwargs})


class StandInModel(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def post_init(self) -> None:
        pass

    @property
    def base_model(self) -> nn.Module:
        return getattr(self, "model", self)


@dataclass
class StandInOutput:
    last_hidden_state: Any = None
    hidden_states: Any = None
    attentions: Any = None


@dataclass
class StandInLogits:
    loss: Any = None
    logits: Any = None
    hidden_states: Any = None
    attentions: Any = None


class Exported(NamedTuple):
    """The modeling file's model, in float64, and log-probabilities (T, V) of each row by the exported one."""

    model: Any
    rows: list[Tensor]

    def logprob(self, **inputs: Any) -> Tensor:
        with torch.no_grad():
            return self.model(**inputs).logits.log_softmax(-1)


@pytest.fixture(params=KINDS)
def exported(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exported:
    args = settings_of(**KINDS[request.param])
    model, criterion = build(args | NO_DROPOUT, len(WORDS))
    for parameter in [*model.parameters(), *criterion.parameters()]:
        nn.init.normal_(parameter, std=0.5)
    files.save(str(tmp_path / "toy.pt"), files.model_contents(Namespace(**args), WORDS, model, criterion, {}))
    assert call(export, tmp_path / "toy.pt", "--out", tmp_path / "toy_folder") == 0
    rows = [one_by_one(model.double().eval(), criterion.double().eval(), row).detach() for row in ROWS]
    return Exported(open_folder(tmp_path / "toy_folder", monkeypatch), rows)


def open_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model of a folder, by its own code beside a stand-in for Transformers."""
    transformers, outputs = ModuleType("transformers"), ModuleType("transformers.modeling_outputs")
    vars(transformers).update(PretrainedConfig=StandInConfig, PreTrainedModel=StandInModel, GenerationMixin=object)
    vars(outputs).update(BaseModelOutput=StandInOutput, CausalLMOutput=StandInLogits)
    vars(outputs).update(SequenceClassifierOutput=StandInLogits)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    monkeypatch.setitem(sys.modules, "transformers.modeling_outputs", outputs)
    monkeypatch.syspath_prepend(folder.parent)
    for name in (folder.name, *(f"{folder.name}.{path.stem}" for path in folder.glob("*.py"))):
        monkeypatch.delitem(sys.modules, name, raising=False)
    modeling = importlib.import_module(f"{folder.name}.modeling_awd_lm")
    config = json.loads((folder / "config.json").read_text())
    model = modeling.AwdLmForCausalLM(modeling.AwdLmConfig(**config))
    model.load_state_dict(unpack_tensors((folder / "model.safetensors").read_bytes()))
    return model.double().eval()


def padded(side: str) -> tuple[Tensor, Tensor]:
    """ROWS as ids and mask (B, T)."""
    T = max(map(len, ROWS)) + 2
    ids, mask = torch.full((len(ROWS), T), PAD), torch.zeros(len(ROWS), T, dtype=torch.long)
    for b, row in enumerate(ROWS):
        columns = list(range(len(row)))
        if side == "left":
            columns = [T - len(row) + t for t in columns]
        elif side == "both":
            columns = [1 + t + (t > 1) for t in columns]
        ids[b, columns], mask[b, columns] = torch.tensor(row), 1
    return ids, mask


def test_log_probabilities_are_those_of_the_model(exported):
    """`<pad>` has no probability; the others have theirs, whatever the padding is."""
    for side in ("right", "left", "both"):
        ids, mask = padded(side)
        every = exported.logprob(input_ids=ids, attention_mask=mask)
        for b, expected in enumerate(exported.rows):
            found = every[b][mask[b] == 1]
            torch.testing.assert_close(found[:, :-1], expected, rtol=1e-9, atol=1e-9)
            assert not found[:, -1].exp().any()
            last = every[b, -1, :-1]  # padding repeats the output before it
            torch.testing.assert_close(last, expected[-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_memory_goes_on_where_the_rows_ended(exported, side):
    """The next token after padded rows, from memory, and in another order of rows, as beam search has it."""
    ids, mask = padded(side)
    out = exported.model(input_ids=ids, attention_mask=mask, use_cache=True)
    ids, mask = torch.cat([ids, ids.new_full((4, 1), 8)], 1), torch.cat([mask, mask.new_ones(4, 1)], 1)
    expected = exported.logprob(input_ids=ids, attention_mask=mask)[:, -1]
    for order in ([0, 1, 2, 3], [2, 2, 0, 1]):
        inputs = exported.model.prepare_inputs_for_generation(ids[order], mask[order], out.memory, use_cache=True)
        assert inputs["input_ids"].shape == (4, 1)
        found = exported.logprob(**inputs)[:, -1]
        torch.testing.assert_close(found, expected[order], rtol=1e-9, atol=1e-9)
    other = ids.clone()
    other[0, mask[0].argmax()] = 3
    for given, kept in ((other, out.memory), (ids, None)):  # memory of another text, and none
        inputs = exported.model.prepare_inputs_for_generation(given, mask, kept, use_cache=True)
        assert inputs["memory"] is None
        assert torch.equal(inputs["input_ids"], given)


def test_a_mask_per_query(exported):
    """(B, T, T), as BabyLM's fine-tuning gives it; its last query's counts."""
    ids, mask = padded("right")
    each = mask[:, None] * torch.ones(mask.size(1), mask.size(1), dtype=torch.long).tril()
    assert torch.equal(
        exported.logprob(input_ids=ids, attention_mask=each), exported.logprob(input_ids=ids, attention_mask=mask)
    )


def test_hidden_states_and_loss(exported):
    ids, mask = padded("right")
    labels = ids.masked_fill(mask == 0, -100)
    out = exported.model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    assert len(out.hidden_states) == exported.model.config.num_hidden_layers + 1
    assert out.hidden_states[-1].size(2) == exported.model.config.hidden_size
    losses = [-rows[t, row[t + 1]] for rows, row in zip(exported.rows, ROWS, strict=True) for t in range(len(row) - 1)]
    torch.testing.assert_close(out.loss, torch.stack(losses).mean(), rtol=1e-9, atol=1e-9)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in exported.model.parameters() if p.grad is not None)
