"""Layers, output layers and a saved model in float64, from the equations alone: slow, obvious, no code of the toolkit.

Every kind of layer has its definition here, a row of `LAYERS` below. Tests compare the toolkit's layers with it.

Shapes: T time, B batch, E input and H output features of a layer, N = T·B, V vocabulary, K clusters.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

Array = np.ndarray


def load(path: str | Path) -> dict[str, Any]:
    """A saved file with its tensors as float64 arrays, `_raw` cut from the names."""
    saved = torch.load(path, weights_only=True)
    return saved | {"model": arrays(saved["model"]), "criterion": arrays(saved["criterion"])}


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, Array]:
    return {name.removesuffix("_raw"): t.detach().double().numpy() for name, t in tensors.items()}


def sigmoid(x: Array) -> Array:
    return (1 + np.tanh(x / 2)) / 2  # 1 / (1 + exp(-x)), without its overflow


def lstm(x: Array, p: dict[str, Array]) -> Array:
    """(T, B, E) -> (T, B, H); gates in the order i, f, g, o."""
    h = c = np.zeros((x.shape[1], p["weight_hh_l0"].shape[1]))
    out = []
    for x_t in x:
        gates = x_t @ p["weight_ih_l0"].T + p["bias_ih_l0"] + h @ p["weight_hh_l0"].T + p["bias_hh_l0"]
        i, f, g, o = np.split(gates, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.stack(out)


def gru(x: Array, p: dict[str, Array]) -> Array:
    """(T, B, E) -> (T, B, H); gates in the order r, z, n."""
    h = np.zeros((x.shape[1], p["weight_hh_l0"].shape[1]))
    out = []
    for x_t in x:
        xr, xz, xn = np.split(x_t @ p["weight_ih_l0"].T + p["bias_ih_l0"], 3, axis=1)
        hr, hz, hn = np.split(h @ p["weight_hh_l0"].T + p["bias_hh_l0"], 3, axis=1)
        z = sigmoid(xz + hz)
        n = np.tanh(xn + sigmoid(xr + hr) * hn)
        h = (1 - z) * n + z * h
        out.append(h)
    return np.stack(out)


def forget_mult(y: torch.Tensor, c0: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """y (T, B, 3H), z, f, o side by side, c0 (B, H) or None -> out (T, B, H), c after the last step (B, H).

    In torch, because tests need its gradients too.
    """
    z, f, o = y.chunk(3, dim=2)
    c, out = torch.zeros_like(z[0]) if c0 is None else c0, []
    for z_t, f_t, o_t in zip(z, f, o, strict=True):
        c = torch.sigmoid(f_t) * torch.tanh(z_t) + (1 - torch.sigmoid(f_t)) * c
        out.append(torch.sigmoid(o_t) * c)
    return torch.stack(out), c


def recurrence(
    cell: str, y: torch.Tensor, h: torch.Tensor, c: torch.Tensor | None, weight: torch.Tensor,
    bias: torch.Tensor | float = 0.0, mask: torch.Tensor | float = 1.0, product: Any = lambda h, weight: h @ weight.T,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """All steps of a cell ("LSTM", "GRU", "MELIS") from W·x + b -> out (T, B, H) and the last c.

    y: (T, B, G·H); h, c: (B, H), the state before; weight: (G·H, H), bias: (G·H,), both of the recurrent product;
    mask: (B, H), multiplied into h before each step. In torch, because tests need its gradients too.
    """
    out = []
    for y_t in y:
        u = product(h * mask, weight) + bias
        if cell == "GRU":
            (yr, yz, yn), (ur, uz, un) = y_t.chunk(3, dim=1), u.chunk(3, dim=1)
            z = torch.sigmoid(yz + uz)
            h = (1 - z) * torch.tanh(yn + torch.sigmoid(yr + ur) * un) + z * h
        else:
            i, f, g, o = (y_t + u).chunk(4, dim=1)
            i, f, o = torch.sigmoid(i), torch.sigmoid(f), torch.sigmoid(o)
            c = f * c + (torch.minimum(i, 1 - f) if cell == "MELIS" else i) * torch.tanh(g)
            h = o * torch.tanh(c)
        out.append(h)
    return torch.stack(out), c


def qrnn(x: Array, p: dict[str, Array]) -> Array:
    """(T, B, E) -> (T, B, H); rows z, f, o; a weight of 2E columns looks at x_t and x_{t-1}."""
    before = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
    window = [x] if p["linear.weight"].shape[1] == x.shape[2] else [x, before]
    y = np.concatenate(window, 2) @ p["linear.weight"].T + p["linear.bias"]
    return forget_mult(torch.from_numpy(y))[0].numpy()


def mogrify(x_t: Array, h: Array, p: dict[str, Array]) -> tuple[Array, Array]:
    """(B, E) and (B, H) before all rounds -> after them."""
    r = 0
    while f"rounds.{r}.bias" in p:
        own = f"rounds.{r}."
        matrix = p[own + "weight"] if own + "weight" in p else p[own + "a"] @ p[own + "b"]
        if r % 2 == 0:
            x_t = 2 * sigmoid(h @ matrix + p[own + "bias"]) * x_t
        else:
            h = 2 * sigmoid(x_t @ matrix + p[own + "bias"]) * h
        r += 1
    return x_t, h


def mogrifier(x: Array, p: dict[str, Array]) -> Array:
    """(T, B, E) -> (T, B, H); gates in the order i, f, g, o."""
    h = c = np.zeros((x.shape[1], p["weight_hh"].shape[1]))
    out = []
    for x_t in x:
        x_t, h = mogrify(x_t, h, p)
        i, f, g, o = np.split(x_t @ p["weight_ih"].T + h @ p["weight_hh"].T + p["bias"], 4, axis=1)
        c = sigmoid(f) * c + np.minimum(sigmoid(i), 1 - sigmoid(f)) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.stack(out)


def rlstm(x: Array, p: dict[str, Array], mask: Array | float = 1.0) -> Array:
    """(T, B, E) -> (T, B, H); rows in the order i, j, f, o; `mask`: of dropoutr, (B, H)."""
    h = c = np.zeros((x.shape[1], p["weight_oc"].shape[1]))
    w_ix, w_jx = np.split(p["weight_ih"], 2)
    w_ih, w_jh, w_fh = np.split(p["weight_hh"], 3)
    b_i, b_j, b_f, b_o = np.split(p["bias"], 4)
    out = []
    for x_t in x:
        x_t, h = mogrify(x_t, mask * h, p)
        i = sigmoid(x_t @ w_ix.T + h @ w_ih.T + b_i)
        j = np.tanh(x_t @ w_jx.T + h @ w_jh.T + b_j)
        f = sigmoid((i * j) @ p["weight_fu"].T + h @ w_fh.T + b_f)
        c = f * c + np.minimum(i, 1 - f) * j
        o = sigmoid((c * mask) @ p["weight_oc"].T + b_o)
        h = o * np.tanh(c)
        out.append(h)
    return np.stack(out)


# Each takes x (T, B, E) and the layer's parameters by their names in the file, without `_raw`; the state before is
# zero.
LAYERS = {"LSTM": lstm, "GRU": gru, "QRNN": qrnn, "Mogrifier": mogrifier, "rlstm": rlstm}
SUMMED = {"Mogrifier", "rlstm"}  # kinds whose softmax is given the sum of the outputs of all layers


RESIDUAL = {"rlstm"}  # kinds whose layers are given the sum of the outputs of all layers before


def kind_of(args: dict[str, Any]) -> str:
    """The row of `LAYERS` that a model's settings name."""
    cell = args.get("cell", "lstm")
    return args["model"] if cell == "lstm" else cell


def layers(kind: str, model: dict[str, Array], words: Array) -> list[Array]:
    """The output of every layer over words (T, B), (T, B, ·) each; of a SUMMED kind the last one is the sum of all."""
    x, outputs = model["encoder.weight"][words], []
    while any(name.startswith(f"rnns.{len(outputs)}.") for name in model):
        prefix = f"rnns.{len(outputs)}."
        own = {name.removeprefix(prefix): value for name, value in model.items() if name.startswith(prefix)}
        x = LAYERS[kind](x, own)
        outputs.append(x)
        x = sum(outputs) if kind in RESIDUAL else x
    return [*outputs[:-1], sum(outputs)] if kind in SUMMED else outputs


def log_softmax(logits: Array) -> Array:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def log_probs(
    weight: Array,
    bias: Array,
    hiddens: Array,
    splits: tuple[int, ...] = (),
    criterion: dict[str, Array] | None = None,
) -> Array:
    """log p of all words, (N, H) -> (N, V): one, split or mixed softmax."""
    if criterion and "prior.weight" in criterion:
        prior = np.exp(log_softmax(hiddens @ criterion["prior.weight"].T))  # (N, K)
        latents = np.tanh(hiddens @ criterion["latent.weight"].T + criterion["latent.bias"])  # (N, K·E)
        experts = np.split(latents, prior.shape[1], axis=1)
        mixed = [prior[:, [k]] * np.exp(log_softmax(x @ weight.T + bias)) for k, x in enumerate(experts)]
        return np.log(sum(mixed))
    if not splits:
        return log_softmax(hiddens @ weight.T + bias)
    first = splits[0]
    head = log_softmax(
        hiddens @ np.concatenate([weight[:first], criterion["tail_vectors"]]).T
        + np.concatenate([bias[:first], criterion["tail_bias"]])
    )
    parts = [head[:, :first]]
    for k, (start, end) in enumerate(zip(splits, [*splits[1:], len(weight)], strict=True)):
        tombstone = head[:, first + k : first + k + 1]
        parts.append(tombstone + log_softmax(hiddens @ weight[start:end].T + bias[start:end]))
    return np.concatenate(parts, axis=1)


def losses(saved: dict[str, Any], words: Array, targets: Array) -> Array:
    """-log p of targets (T, B), the words read being (T, B): (T, B), in nats."""
    model = saved["model"]
    hiddens = layers(kind_of(saved["args"]), model, words)[-1]
    weight = model.get("decoder.weight", model["encoder.weight"])
    logp = log_probs(
        weight,
        model["decoder.bias"],
        hiddens.reshape(words.size, -1),
        saved["args"]["splits"],
        saved["criterion"],
    )
    return -logp[np.arange(words.size), targets.reshape(-1)].reshape(targets.shape)


def encode(path: str | Path, vocab: list[str]) -> Array:
    """Token ids of a text file, `<eos>` after each line: (N,)."""
    index = {word: i for i, word in enumerate(vocab)}
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return np.array([index[word] for line in lines for word in [*line.split(), "<eos>"]])


def columns(ids: Array, batch_size: int) -> Array:
    """The text in B columns, column b the b-th stretch of it, the remainder trimmed: (T, B)."""
    rows = len(ids) // batch_size
    return ids[: rows * batch_size].reshape(batch_size, rows).T


def mean_loss(saved: dict[str, Any], ids: Array, batch_size: int) -> float:
    """Mean loss in nats over the predicted tokens: all rows but the first."""
    text = columns(ids, batch_size)
    return float(losses(saved, text[:-1], text[1:]).mean())
