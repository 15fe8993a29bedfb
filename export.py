"""Export a saved model as a folder that Hugging Face's Transformers opens, and what builds on it.

    python export.py PTB.pt --out PTB
    python export.py PTB.pt --out PTB --checkpoints    # and PTB-chck_1M, ... of a run with --keep_words
    python -c "from transformers import AutoModelForCausalLM as A; A.from_pretrained('PTB', trust_remote_code=True)"

The folder has the weights (model.safetensors), the model's code (in plain torch, which needs Transformers 4.51 to 5.x
and nothing of this toolkit), the tokenizer, a model card, and awd_lm.json, the rest of the saved model. docs/hub.md
says how minicons, lm-evaluation-harness and others use it.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from corpus.read import EOS
from corpus.words import MARKS
from harness.files import load_model
from harness.flags import BY_NAME, DEFAULTS, SWITCH, ArgumentParser, Flag
from harness.keep import mark_name, mark_path
from harness.log import say
from harness.script import run_script
from hub.card import make_card
from hub.folder import CONFIG, REST, TENSORS, check_folder, folder_tensors, pack_tensors, rest_of, write_folder
from hub.tokenizer import LONGEST, TOKENIZER_CLASS, make_tokenizer, pad_name, special_tokens, tokenizer_config
from model import build
from utils import UserError

HUB = Path(__file__).with_name("hub")
CODE = ("configuration_awd_lm.py", "layers_awd_lm.py", "modeling_awd_lm.py")
CLASSES = {
    "AutoConfig": "configuration_awd_lm.AwdLmConfig",
    "AutoModel": "modeling_awd_lm.AwdLmModel",
    "AutoModelForCausalLM": "modeling_awd_lm.AwdLmForCausalLM",
    "AutoModelForSequenceClassification": "modeling_awd_lm.AwdLmForSequenceClassification",
}
# What the folder's code has: kinds of layers (with every cell), and the settings that shape a model.
KINDS = ("LSTM", "GRU", "QRNN", "Mogrifier")
SETTINGS = (
    "model", "emsize", "nhid", "nlayers", "tied", "n_experts", "nhidlast", "rounds", "cell", "rank", "splits",
    "vocab_size", "min_count",
)  # fmt: skip
EXPORT = [
    Flag("model", {"metavar": "MODEL.pt"}, None, "the saved model"),
    Flag("--out", {"required": True}, None, "the new folder"),
    Flag(
        "--checkpoints",
        SWITCH,
        False,
        "make folders OUT-chck_1M, ... of MODEL.pt.chck_1M, ... too, which main.py --keep_words wrote",
    ),
    Flag("--force", SWITCH, False, "write over the files of a folder that has content; others in it are kept"),
]


def make_config(args: dict[str, Any], ntoken: int, eos: int) -> dict[str, Any]:
    """config.json; `ntoken`: without `<pad>`."""
    with torch.device("meta"):
        model, criterion = build({**args, "wdrop": 0.0}, ntoken)
    mogrifier = args["model"] == "Mogrifier"
    return {
        "model_type": "awd_lm", "architectures": ["AwdLmForCausalLM"], "auto_map": CLASSES, "kind": args["model"],
        "sizes": [args["emsize"], *[args["nhid"]] * (args["nlayers"] - 1), model.width], "vocab_size": ntoken + 1,
        "tied": args["tied"], "splits": criterion.splits, "n_experts": args["n_experts"],
        "rounds": args["rounds"] if mogrifier else 0, "rank": args["rank"] if mogrifier else 0,
        "cell": args["cell"], "max_position_embeddings": LONGEST, "bos_token_id": eos, "eos_token_id": eos,
        "pad_token_id": ntoken, "tokenizer_class": TOKENIZER_CLASS,
    }  # fmt: skip


def check_kind(args: dict[str, Any], place: str) -> None:
    """Raises UserError unless the folder's code has all that the settings ask for."""
    if args["model"] not in KINDS:
        raise UserError(f"{place}: is a {args['model']}, which cannot be exported; use one of {', '.join(KINDS)}")
    for name, flag in BY_NAME.items():
        if flag.shapes_model and name not in SETTINGS and args[name] != flag.default:
            raise UserError(f"{place}: has --{name} {args[name]}, which cannot be exported; train a model without it")


def make_files(saved: dict[str, Any], place: str) -> dict[str, bytes]:
    """Every file of the folder by its name.

    Raises:
        UserError: the model is of a kind that the folder's code lacks, or its words cannot be exported.
    """
    args, vocab = {**DEFAULTS, **saved["args"]}, saved["vocab"]
    check_kind(args, place)
    if EOS not in vocab:
        raise UserError(f"{place}: has no {EOS} in its vocabulary; use a model that main.py trained")
    eos, pad = vocab.index(EOS), pad_name(vocab)
    tokens = special_tokens(vocab, pad)
    never = {"suppress_tokens": [len(vocab)]}
    numbers = {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": len(vocab)}
    parameters = sum(tensor.numel() for part in ("model", "criterion") for tensor in saved[part].values())
    texts = {
        CONFIG: make_config(args, len(vocab), eos),
        "generation_config.json": {**numbers, **never},
        "tokenizer.json": make_tokenizer(saved["tokenizer"], vocab, pad, place),
        "tokenizer_config.json": tokenizer_config(tokens),
        "special_tokens_map.json": tokens,
    }
    return {
        TENSORS: pack_tensors(folder_tensors(saved)),
        REST: rest_of(saved, place).encode(),
        "README.md": make_card(saved, args, parameters).encode(),
        **{name: json.dumps(value, indent=1, ensure_ascii=False).encode() for name, value in texts.items()},
        **{name: (HUB / name).read_bytes() for name in CODE},
    }


def find_checkpoints(model: str, out: Path) -> dict[str, Path]:
    """The files that `main.py --keep_words` kept beside a model, and the folder of each; UserError if there is none."""
    marks = [mark for mark in MARKS if os.path.exists(mark_path(model, mark))]
    if not marks:
        raise UserError(f"--checkpoints: {mark_path(model, 1)} is not there; train with --keep_words, or leave it out")
    return {mark_path(model, mark): out.with_name(f"{out.name}-{mark_name(mark)}") for mark in marks}


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_flags("folder", EXPORT)
    args = parser.parse_all(EXPORT)
    folders = {args.model: Path(args.out)}
    if args.checkpoints:
        folders |= find_checkpoints(args.model, Path(args.out))
    for model, out in folders.items():
        files = make_files(load_model(model, "MODEL"), f"MODEL {model}")
        check_folder(out, list(files), args.force)
        write_folder(out, files)
        size = sum(map(len, files.values())) / 2**20
        say(f"| {out} | {len(files)} files | {size:.1f} MiB | docs/hub.md says how to open it")


if __name__ == "__main__":
    run_script(main)
