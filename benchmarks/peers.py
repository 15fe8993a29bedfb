"""The same training step by another library, for `bench.py --peers`: fastai's AWD_LSTM (version 2.8.12).

    pip install --no-deps fastai==2.8.12
    pip install 'fastcore>=2.2.22' fasttransform fastdownload fastprogress 'plum-dispatch<2.10'
    pip install scikit-learn matplotlib pandas

(A plain `pip install fastai` also fetches torchvision, which may replace torch.) Its batches are (B, T).
"""

import importlib.util
from argparse import Namespace
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import UserError


def check_fastai() -> None:
    """Raises UserError if fastai is not installed."""
    if importlib.util.find_spec("fastai") is None:
        raise UserError("--peers: needs fastai; the top of benchmarks/peers.py says how to install it")


def fits_fastai(args: Namespace) -> bool:
    """Whether fastai has such a model: an LSTM with one softmax, trained by SGD."""
    return args.model == "LSTM" and not args.n_experts and not args.splits and args.optimizer == "sgd"


def make_fastai_step(args: Namespace, ntoken: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """One optimizer step over source and target, (T, B) each: its loss, with fastai's regularisers beside it."""
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.text.models.core import get_language_model

    config = {"emb_sz": args.emsize, "n_hid": args.nhid, "n_layers": args.nlayers, "weight_p": args.wdrop}
    config |= {"hidden_p": args.dropouth, "input_p": args.dropouti}
    config |= {"embed_p": args.dropoute, "output_p": args.dropout}
    model = get_language_model(AWD_LSTM, ntoken, config=awd_lstm_lm_config | config).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, weight_decay=args.wdecay)

    def step(source: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()
        logits, raw, dropped = model(source.T.contiguous())  # (B, T, V), (B, T, E) twice
        loss = F.cross_entropy(logits.flatten(0, 1), target.T.flatten())
        objective = loss + args.alpha * dropped.pow(2).mean()
        objective = objective + args.beta * (raw[:, 1:] - raw[:, :-1]).pow(2).mean()
        objective.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        return loss.detach()

    return step
