"""The model card, README.md of the folder: what the model is, how it was made, how to open it, what to cite."""

import math
import shlex
from pathlib import Path
from typing import Any

from harness.flags import BY_NAME, DEFAULTS, FLAGS, MAIN
from model import LAYERS

AWD = "Merity, Keskar, Socher: Regularizing and Optimizing LSTM Language Models, arXiv 1708.02182"
SCALES = "Merity, Keskar, Socher: An Analysis of Neural Language Modeling at Multiple Scales, arXiv 1803.08240"
MIXTURE = "Yang, Dai, Salakhutdinov, Cohen: Breaking the Softmax Bottleneck, arXiv 1711.03953"
KINDS = {
    "GRU": "Cho et al.: Learning Phrase Representations using RNN Encoder-Decoder, arXiv 1406.1078",
    "QRNN": "Bradbury, Merity, Xiong, Socher: Quasi-Recurrent Neural Networks, arXiv 1611.01576",
    "Mogrifier": "Melis, Kočiský, Blunsom: Mogrifier LSTM, arXiv 1909.01792",
}
RLSTM = "Melis: Circling Back to Recurrent Models of Language, arXiv 2211.01848"
MELIS = "Melis, Dyer, Blunsom: On the State of the Art of Evaluation in Neural Language Models, arXiv 1707.05589"
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [awd-lm, {tag}, recurrent, language-model]
---

# {kind} language model of {corpus}

{parameters:,} parameters, {layers} layers, {words:,} words in the vocabulary, trained by the AWD-LSTM toolkit.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
```

The tokenizer puts `<eos>` in front of every text, and makes one of every newline. {form}

## How it was made

    {command}

{figures}
## Papers

{papers}
"""


def command_of(args: dict[str, Any], script: str) -> str:
    """The command, as far as the settings that differ from the defaults say it."""
    defaults = {**DEFAULTS, **LAYERS[args["model"]].defaults}
    words = [script, "--data", shown_path(args.get("data") or "")]
    left_out = {"data", "tensorboard"}
    if script == "finetune.py":  # it has the rest from the model that it starts from
        words += ["--save", "MODEL.pt"]
        left_out |= {flag.name for flag in FLAGS[MAIN]}
    for name, value in args.items():
        flag = BY_NAME.get(name)
        if flag and flag.stored and name not in left_out and value not in (defaults[name], []):
            words += words_of(name, value)
    return f"python {shlex.join(words)}"


def words_of(name: str, value: Any) -> list[str]:
    if name == "tied":
        return ["--untied"]
    if isinstance(value, bool):
        return [f"--{name}"] if value else [f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def shown_path(path: str) -> str:
    """A path without the folders of somebody's machine."""
    return Path(path).name if Path(path).is_absolute() else path


def figures_of(metrics: dict[str, Any]) -> str:
    """The figures as a table; those of the validation text are all that a saved model has."""
    loss = metrics.get("valid_loss")
    if "million_words" in metrics:
        return f"The weights after {metrics['million_words']} million words of training, which were not validated.\n"
    if not isinstance(loss, float) or not math.isfinite(loss):
        return "The file of the model says no figures.\n"
    rows = [f"| {loss:.4f} | {math.exp(min(loss, 700)):.2f} | {loss / math.log(2):.3f} |"]
    head = ["| validation loss, nats per token | perplexity | bits per token |", "| --- | --- | --- |"]
    when = f"Measured after epoch {metrics['epoch']}, step {metrics['step']}.\n" if "step" in metrics else ""
    return "\n".join([*head, *rows, "", when])


def papers_of(args: dict[str, Any]) -> list[str]:
    papers = [AWD, SCALES] if args["model"] != "Mogrifier" else [MELIS]
    if args["model"] in KINDS and (args["model"] != "Mogrifier" or args["rounds"]):
        papers.append(KINDS[args["model"]])
    return papers + [RLSTM] * (args["cell"] == "rlstm") + [MIXTURE] * bool(args["n_experts"])


def make_card(saved: dict[str, Any], args: dict[str, Any], parameters: int) -> str:
    """The card; `args`: those of the saved model and the defaults of others."""
    form = "It takes plain text."
    if saved["tokenizer"] is None:
        form = "It takes the form of the corpus: tokens with spaces between them."
    return CARD.format(
        tag=args["model"].lower(), kind=args["model"], corpus=Path(args.get("data") or "a corpus").name,
        parameters=parameters, layers=args["nlayers"], words=len(saved["vocab"]), form=form,
        command=command_of(args, saved["metrics"].get("script", "main.py")), figures=figures_of(saved["metrics"]),
        papers="\n".join(f"* {paper}" for paper in papers_of(args)),
    )  # fmt: skip
