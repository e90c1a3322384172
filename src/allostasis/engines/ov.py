"""What heads write: the circuit from token to token, and the mean write on a set of prompts.

Two reports that are never mixed. The circuit is made of weights alone: what a head adds to the
logits where it attends to one token, read as an embedding. The write is measured on prompts: what a
head adds at the last token, through the final norm at each prompt's own scale.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from allostasis.engines.budget import Budget
from allostasis.engines.prompts import Rows
from allostasis.models.blocks import Decoder

TOP_SHARE = 0.01
"""A token is copied where its own logit is among this share of the vocabulary's largest."""

CELLS = 2**25
"""Numbers that are held at once."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of one end of a list of logits, the furthest out first.

    Attributes:
        ids: Token ids.
        logits: What is added to each.
    """

    ids: Int[Tensor, " rank"]
    logits: Float[Tensor, " rank"]


@dataclass(frozen=True)
class HeadCircuit:
    """One head's circuit.

    Attributes:
        layer: Layer.
        head: Head.
        top: Tokens whose logits it raises most, in the mean over the input tokens; before the
            division by the final norm's scale, which only a prompt has.
        bottom: Tokens whose logits it lowers most.
        copying_score: Share of input tokens whose own logit is in the top 1 % of what they give.
        eigenvalue_positivity: Sum of the eigenvalues of W_E W_V W_O W_U over the sum of their
            absolute values, over the whole vocabulary; 1 copies, -1 suppresses what it reads.
        ov_positivity: The same of W_V W_O alone, from stream to stream.
        frobenius_norm: Of W_V W_O.
        spectral_norm: Of W_V W_O.
    """

    layer: int
    head: int
    top: Tokens
    bottom: Tokens
    copying_score: float
    eigenvalue_positivity: float
    ov_positivity: float
    frobenius_norm: float
    spectral_norm: float


@dataclass(frozen=True)
class HeadWrite:
    """What one head writes at the last token of a set of prompts.

    Attributes:
        layer: Layer.
        head: Head.
        top: Tokens whose logits it raises most in the mean, in logits at the clean scale.
        bottom: Tokens whose logits it lowers most.
        vector_norm: Norm of its mean write to the stream.
        norm_ratio: The same over the mean norm of the stream behind the last block.
        snr: Norm of its mean write behind the final norm, over that mean's standard error; about 1
            where it writes nothing on average.
        target: Mean of what it adds to the right answer's logit.
        foil: Mean of what it adds to the wrong one's.
    """

    layer: int
    head: int
    top: Tokens
    bottom: Tokens
    vector_norm: float
    norm_ratio: float
    snr: float
    target: float
    foil: float

    @property
    def delta(self) -> float:
        """Its mean direct effect on the logit difference."""
        return self.target - self.foil


def towards_logits(
    decoder: Decoder, write: Float[Tensor, "*row d_model"]
) -> Float[Tensor, "*row d_model"]:
    """A write as the unembedding reads it, but for the final norm's scale: gain o c(write)."""
    if decoder.is_centred:
        write = write - write.mean(dim=-1, keepdim=True)
    return write * decoder.final_gain


def circuit_norms(
    values: Float[Tensor, "d_model d_head"], out: Float[Tensor, "d_head d_model"]
) -> tuple[float, float]:
    """Frobenius and spectral norm of a product of two thin matrices, without forming it.

    With W_V = Q_V R_V and W_O^T = Q_O R_O, the singular values of W_V W_O are those of R_V R_O^T.

    Example:
        >>> norms = circuit_norms(torch.eye(3)[:, :2] * 2, torch.eye(3)[:2] * 3)
        >>> [round(norm, 4) for norm in norms]
        [8.4853, 6.0]
    """
    small = torch.linalg.qr(values.double()).R @ torch.linalg.qr(out.double().T).R.T
    singular = torch.linalg.svdvals(small)
    return float(singular.square().sum().sqrt()), float(singular[0])


def positivity(product: Float[Tensor, "d_head d_head"]) -> float:
    """Sum of eigenvalues over the sum of their absolute values, in [-1, 1].

    The eigenvalues of A B other than 0 are those of B A, so that a circuit's are those of a matrix
    as small as a head.

    Source:
        Elhage et al. (2021), A Mathematical Framework for Transformer Circuits.

    Example:
        >>> positivity(torch.diag(torch.tensor([2.0, 1.0, -1.0])))
        0.5
    """
    eigenvalues = torch.linalg.eigvals(product.double())
    return float(eigenvalues.real.sum() / eigenvalues.abs().sum())


@torch.no_grad()
def circuits(
    decoder: Decoder,
    layer: int,
    heads: Sequence[int],
    inputs: Int[Tensor, " token"],
    *,
    top_k: int,
) -> list[HeadCircuit]:
    """Circuits of heads of a layer.

    A head reads an embedding through its layer's norm, without position or context. Where a norm
    follows attention its gain is folded in and its scale, which depends on all heads, is left out.

    Args:
        decoder: The model.
        layer: Layer.
        heads: Which of its heads.
        inputs: The fixed input vocabulary that logits are averaged over.
        top_k: Tokens at each end.
    """
    read = decoder.attn_norm(layer, decoder.embed(inputs))
    values, bias = decoder.W_V(layer), decoder.value_bias(layer)
    gain = decoder.attn_post_gain(layer)
    between = _from_tokens_to_tokens(decoder, layer)
    found = []
    for head in heads:
        out = decoder.W_O(layer)[head]
        written = out if gain is None else out * gain
        effect = towards_logits(decoder, written)
        value = read @ values[head]
        value = value if bias is None else value + bias[head]
        mean = value.mean(dim=0) @ effect @ decoder.W_U
        frobenius, spectral = circuit_norms(values[head], out)
        found.append(
            HeadCircuit(
                layer,
                head,
                *extremes(mean, top_k),
                _copying_score(value, effect @ decoder.W_U, inputs),
                positivity(effect @ between @ values[head]),
                positivity(out @ values[head]),
                frobenius,
                spectral,
            )
        )
    return found


def _from_tokens_to_tokens(decoder: Decoder, layer: int) -> Float[Tensor, "d_model d_model"]:
    """W_U times what the layer's norm makes of every token's embedding, but for its bias."""
    every = torch.arange(decoder.n_vocab, device=decoder.device)
    nothing = decoder.attn_norm(layer, torch.zeros_like(decoder.embed(every[:1])))
    total = torch.zeros(decoder.d_model, decoder.d_model, device=decoder.device)
    for ids in every.split(max(1, CELLS // decoder.d_model)):
        read = decoder.attn_norm(layer, decoder.embed(ids)) - nothing
        total += decoder.W_U[:, ids].float() @ read.float()
    return total.to(decoder.dtype)


def _copying_score(
    value: Float[Tensor, "token d_head"],
    effect: Float[Tensor, "d_head vocab"],
    inputs: Int[Tensor, " token"],
) -> float:
    """Share of tokens whose own logit is among the largest that they give."""
    n_vocab, n_copied = effect.shape[1], 0
    step = max(1, CELLS // n_vocab)
    for rows, ids in zip(value.split(step), inputs.split(step), strict=True):
        logits = rows @ effect
        larger = (logits > logits.gather(1, ids[:, None])).sum(dim=1)
        n_copied += int((larger < TOP_SHARE * n_vocab).sum())
    return n_copied / len(inputs)


def extremes(logits: Float[Tensor, " vocab"], top_k: int) -> tuple[Tokens, Tokens]:
    """The tokens with the largest and those with the smallest logits."""
    top, bottom = logits.topk(top_k), logits.topk(top_k, largest=False)
    return Tokens(top.indices, top.values), Tokens(bottom.indices, bottom.values)


@dataclass(frozen=True)
class Ends:
    """What a model holds at the last token of prompts, from one clean pass.

    Attributes:
        z: Heads' outputs.
        attn_out: Outputs of attention, by layer.
        resid: The stream behind the last block.
        target: Right answers.
        foil: Wrong answers.
        cluster: Which cluster each prompt belongs to.
    """

    z: Float[Tensor, "row layer head d_head"]
    attn_out: Float[Tensor, "row layer d_model"]
    resid: Float[Tensor, "row d_model"]
    target: Int[Tensor, " row"]
    foil: Int[Tensor, " row"]
    cluster: Int[Tensor, " row"]

    def scale(self, decoder: Decoder) -> Float[Tensor, "row 1"]:
        """By what the final norm divides each prompt's stream."""
        rows = self.resid.double()
        if decoder.is_centred:
            rows = rows - rows.mean(dim=-1, keepdim=True)
        return (rows.square().mean(-1, keepdim=True) + decoder.final_eps).sqrt().float()


@torch.no_grad()
def ends_of(
    decoder: Decoder, rows: Rows, clusters: Sequence[str], *, budget: Budget | None = None
) -> Ends:
    """Run prompts once and keep what is at their last tokens, in the rows' order.

    Args:
        decoder: The model.
        rows: Prompts with their answers.
        clusters: For each, what it shares with prompts that are not independent of it.
        budget: How many tokens run side by side; measured where None.
    """
    budget = budget or Budget.measured(decoder)
    by_length: dict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(rows.prompts):
        by_length[len(prompt)].append(row)
    order: list[int] = []
    pieces: list[tuple[Tensor, ...]] = []
    for length, some in sorted(by_length.items()):
        for piece in budget.pieces(len(some), length):
            prompts = [rows.prompts[row] for row in some[piece]]
            found = decoder.capture(torch.tensor(prompts, device=decoder.device))
            z, attn_out = (
                torch.stack([layer[:, -1] for layer in stream], dim=1)
                for stream in (found.z, found.attn_out)
            )
            pieces.append((z, attn_out, found.resid_pre[-1][:, -1]))
            order += some[piece]
    back = torch.tensor(order, device=decoder.device).argsort()
    number = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    answers = (
        torch.tensor([*column], device=decoder.device)
        for column in (rows.target, rows.foil, [number[name] for name in clusters])
    )
    return Ends(*(torch.cat(parts)[back] for parts in zip(*pieces, strict=True)), *answers)


def stream_write(
    decoder: Decoder, ends: Ends, layer: int, head: int
) -> Float[Tensor, "row d_model"]:
    """What a head adds to the stream at each prompt's last token.

    Where a norm follows attention, its share at the scale that all heads together give that norm.
    """
    write = (ends.z[:, layer, head] @ decoder.W_O(layer)[head]).float()
    gain = decoder.post_norm_gain(layer, ends.attn_out[:, layer])
    return write if gain is None else write * gain


def direct_write(
    decoder: Decoder, ends: Ends, layer: int, head: int
) -> Float[Tensor, "row d_model"]:
    """The same as the unembedding reads it: behind the final norm, at each prompt's own scale.

    Its product with a column of W_U is what the head adds to that token's logit.
    """
    write = stream_write(decoder, ends, layer, head)
    return towards_logits(decoder, write).float() / ends.scale(decoder)


@torch.no_grad()
def writes(
    decoder: Decoder, ends: Ends, layer: int, heads: Sequence[int], *, top_k: int
) -> list[HeadWrite]:
    """Writes of heads of a layer, in the mean over prompts.

    Args:
        decoder: The model.
        ends: What it holds at the prompts' last tokens.
        layer: Layer.
        heads: Which of its heads.
        top_k: Tokens at each end.

    Raises:
        ValueError: All prompts are of one cluster, so that a mean has no standard error.
    """
    length = float(ends.resid.norm(dim=-1).mean())
    read = [decoder.W_U[:, ids].T.float() for ids in (ends.target, ends.foil)]
    found = []
    for head in heads:
        direct = direct_write(decoder, ends, layer, head)
        mean = direct.mean(dim=0)
        vector = float(stream_write(decoder, ends, layer, head).mean(dim=0).norm())
        found.append(
            HeadWrite(
                layer,
                head,
                *extremes((mean.to(decoder.dtype) @ decoder.W_U).float(), top_k),
                vector,
                vector / length,
                float(mean.norm()) / standard_error(direct.double(), ends.cluster),
                *(float(torch.linalg.vecdot(direct, side).mean()) for side in read),
            )
        )
    return found


def standard_error(rows: Float64[Tensor, "row width"], cluster: Int[Tensor, " row"]) -> float:
    """Standard error of a mean vector: root of the sum of the variances of the mean's entries.

    Rows of a cluster are added up first, since they are not independent.

    Args:
        rows: Vectors.
        cluster: The cluster of each, counted from 0.

    Raises:
        ValueError: There is one cluster, which has no spread.

    Example:
        >>> rows = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
        >>> standard_error(rows, torch.tensor([0, 1]))
        1.0
    """
    n_clusters = int(cluster.max()) + 1
    if n_clusters < 2:
        raise ValueError("one cluster of prompts has no spread; give more than one")
    sums = torch.zeros(n_clusters, rows.shape[1], dtype=rows.dtype, device=rows.device)
    sums.index_add_(0, cluster, rows - rows.mean(dim=0))
    return float((sums.square().sum() * n_clusters / (n_clusters - 1)).sqrt() / len(rows))
