"""Models whose heads are ablated: a toy transformer or a language model, seen in one way.

A subject runs sequences, gives its heads' values and loses heads. What a head is replaced by stands
in a `Filling`; its slice of `hook_z` is changed and nothing else, so that the residual stream loses
exactly what that head writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from allostasis.engines.budget import Budget
from allostasis.engines.sequence_training import streams
from allostasis.engines.trace import clean_trace, trace
from allostasis.interventions.ablate import Unit
from allostasis.models.blocks import Capture, Decoder
from allostasis.models.toy_transformer import Block, ToyTransformer
from allostasis.tasks.sequences import Sequences

Head = tuple[int, int]
Value = Literal["resample", "mean", "zero"]
LOGITS = 2**22
"""Logits that are held at once."""
ROWS = 32
"""Sequences of a language model that are held at once, with all layers' activations."""


@dataclass(frozen=True)
class Filling:
    """What stands in a head's place.

    Attributes:
        value: `zero`; `mean` over reference sequences, position by position; `resample`, the value
            in another sequence at the same position.
        z: By layer, values of reference sequences; one row, the mean, for `mean`; none for `zero`.
        donor: For `resample`: which of them stands in for each sequence.
    """

    value: Value
    z: tuple[Float[Tensor, "row position head d_head"], ...] = ()
    donor: Int64[Tensor, " sequence"] | None = None

    def rows(self, chosen: slice) -> Filling:
        """What belongs to some of the sequences."""
        if self.donor is None:
            return self
        return replace(self, donor=self.donor[chosen])

    def of(self, layer: int, like: Float[Tensor, "row position head d_head"]) -> Tensor:
        """A layer's values, of the shape of the values that they replace."""
        if not self.z:
            return torch.zeros_like(like)
        values = self.z[layer] if self.donor is None else self.z[layer][self.donor]
        return values.expand_as(like)


@runtime_checkable
class Subject(Protocol):
    """What can be asked of a model whose heads are ablated."""

    n_layers: int
    n_heads: int
    d_model: int
    first: int
    """First position that a norm or a variance is read at; losses are read at all."""

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:  # noqa: N802
        """A layer's output weights."""
        ...

    def z(self, tokens: Int64[Tensor, "sequence position"]) -> list[Tensor]:
        """Heads' values by layer, [sequence position head d_head]."""
        ...

    def patterns(self, tokens: Int64[Tensor, "sequence position"]) -> list[Tensor]:
        """Attention by layer, [sequence head query key]."""
        ...

    def losses(self, batch: Sequences) -> Float[Tensor, " sequence"]:
        """Mean loss over the scored positions of each sequence, in nats a token."""
        ...

    def ablated_losses(
        self, batch: Sequences, heads: Sequence[Head], filling: Filling
    ) -> Float[Tensor, "head sequence"]:
        """The same with each head ablated alone."""
        ...

    def streams(
        self, batch: Sequences, heads: Sequence[Head], filling: Filling | None
    ) -> dict[tuple[int, str], Tensor]:
        """Residual stream by (layer, `mid` or `post`), heads ablated together, or none of them."""
        ...


def filling(
    value: Value,
    reference: Sequence[Float[Tensor, "row position head d_head"]],
    n_sequences: int,
    generator: torch.Generator,
) -> Filling:
    """What stands in the heads' place on some sequences, from the values on others.

    Args:
        value: What is wanted.
        reference: Heads' values by layer on sequences that nothing else is read on.
        n_sequences: How many sequences it is for.
        generator: Draws the donors.
    """
    if value == "zero":
        return Filling(value)
    if value == "mean":
        return Filling(value, tuple(layer.mean(dim=0, keepdim=True) for layer in reference))
    drawn = torch.randint(len(reference[0]), (n_sequences,), generator=generator)
    return Filling(value, tuple(reference), drawn.to(reference[0].device))


def sequence_means(
    losses: Float[Tensor, "sequence position"], batch: Sequences
) -> Float[Tensor, " sequence"]:
    """Mean over the scored positions of each sequence."""
    scored = batch.scored.to(losses)
    return (losses * scored).sum(dim=1) / scored.sum(dim=1)


class ToySubject:
    """A toy transformer, run whole for every head.

    Args:
        model: The model.
    """

    first = 0

    def __init__(self, model: ToyTransformer) -> None:
        self.model = model
        self.n_layers, self.n_heads, self.d_model = model.n_layers, model.n_heads, model.d_model

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:  # noqa: N802
        """A layer's output weights."""
        block = self.model.blocks[layer]
        assert isinstance(block, Block)
        return block.attn.W_O

    def _kept(self, tokens: Tensor, hooks: Sequence[str]) -> list[Tensor]:
        found = streams(self.model, tokens, hooks)
        return [found[hook] for hook in hooks]

    def z(self, tokens: Int64[Tensor, "sequence position"]) -> list[Tensor]:
        """Heads' values by layer."""
        return self._kept(tokens, [f"blocks.{i}.attn.hook_z" for i in range(self.n_layers)])

    def patterns(self, tokens: Int64[Tensor, "sequence position"]) -> list[Tensor]:
        """Attention by layer."""
        return self._kept(tokens, [f"blocks.{i}.attn.hook_pattern" for i in range(self.n_layers)])

    def losses(self, batch: Sequences) -> Float[Tensor, " sequence"]:
        """Mean loss over the scored positions of each sequence."""
        found = []
        size = max(1, LOGITS // (batch.tokens.shape[1] * self.model.vocab_size))
        for chosen in _slices(len(batch), size):
            part = batch.part(chosen)
            logits = self.model(part.tokens)
            each = functional.cross_entropy(logits.mT, part.targets, reduction="none")
            found.append(sequence_means(each, part))
        return torch.cat(found)

    def ablated_losses(
        self, batch: Sequences, heads: Sequence[Head], filling: Filling
    ) -> Float[Tensor, "head sequence"]:
        """The same with each head ablated alone."""
        found = []
        size = max(1, LOGITS // (batch.tokens.shape[1] * self.model.vocab_size))
        for chosen in _slices(len(batch), size):
            part, here = batch.part(chosen), filling.rows(chosen)
            for head in heads:
                with self.model.hooks(fwd_hooks=self._hooks([head], here)):
                    found.append(self.losses(part))
        return torch.cat([
            torch.stack(found[begin : begin + len(heads)])
            for begin in range(0, len(found), len(heads))
        ], dim=1)  # fmt: skip

    def _hooks(self, heads: Sequence[Head], filling: Filling) -> list[Any]:
        def replace(layer: int, which: list[int]) -> Callable:
            def change(z: Tensor, hook: Any) -> Tensor:
                del hook
                changed = z.clone()
                changed[:, :, which] = filling.of(layer, z)[:, :, which]
                return changed

            return change

        layers = sorted({layer for layer, _ in heads})
        return [
            (f"blocks.{layer}.attn.hook_z", replace(layer, [h for at, h in heads if at == layer]))
            for layer in layers
        ]

    def streams(
        self, batch: Sequences, heads: Sequence[Head], filling: Filling | None
    ) -> dict[tuple[int, str], Tensor]:
        """Residual stream by layer and site, heads ablated together."""
        places = [(layer, site) for layer in range(self.n_layers) for site in ("mid", "post")]
        names = [f"blocks.{layer}.hook_resid_{site}" for layer, site in places]
        with ExitStack() as stack:
            if filling is not None:
                stack.enter_context(self.model.hooks(fwd_hooks=self._hooks(heads, filling)))
            return dict(zip(places, self._kept(batch.tokens, names), strict=True))


class DecoderSubject:
    """A language model: one clean pass, then for each head only the layers behind it.

    Args:
        decoder: The model.
        budget: How many tokens run side by side; measured where None.
    """

    first = 1  # attention sinks: at position 0 streams are up to a thousand times as long

    def __init__(self, decoder: Decoder, budget: Budget | None = None) -> None:
        self.decoder = decoder
        self.n_layers, self.n_heads, self.d_model = (
            decoder.n_layers, decoder.n_heads, decoder.d_model,
        )  # fmt: skip
        self.budget = budget or Budget.measured(decoder)

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:  # noqa: N802
        """A layer's output weights."""
        return self.decoder.W_O(layer)

    @torch.no_grad()
    def z(self, tokens: Int64[Tensor, "sequence position"]) -> list[Tensor]:
        """Heads' values by layer."""
        pieces = [self.decoder.capture(tokens[rows]).z for rows in _slices(len(tokens), ROWS)]
        return [torch.cat(layer) for layer in zip(*pieces, strict=True)]

    @torch.no_grad()
    def patterns(self, tokens: Int64[Tensor, "sequence position"]) -> list[Tensor]:
        """Attention by layer."""
        found = Capture()
        with self.decoder.recording(found):
            self.decoder.capture(tokens)
        return found.pattern

    @torch.no_grad()
    def losses(self, batch: Sequences) -> Float[Tensor, " sequence"]:
        """Mean loss over the scored positions of each sequence."""
        ends = [
            (self.decoder.capture(batch.tokens[rows]).resid_pre[-1], batch.part(rows))
            for rows in _slices(len(batch), ROWS)
        ]
        return torch.cat([self._read(end, part) for end, part in ends])

    def _read(
        self, end: Float[Tensor, "sequence position d_model"], batch: Sequences
    ) -> Float[Tensor, " sequence"]:
        """Mean losses from the stream behind the last block, a few logits at a time."""
        rows, targets = end.flatten(0, 1), batch.targets.flatten()
        losses = torch.empty(len(rows), device=end.device)
        cap = getattr(self.decoder.config, "final_logit_softcapping", None)
        for at in _slices(len(rows), max(1, LOGITS // self.decoder.n_vocab)):
            logits = self.decoder.unembed(self.decoder.final_norm(rows[at])).float()
            if cap is not None:
                logits = cap * (logits / cap).tanh()
            losses[at] = functional.cross_entropy(logits, targets[at], reduction="none")
        return sequence_means(losses.unflatten(0, end.shape[:2]), batch)

    @torch.no_grad()
    def ablated_losses(
        self, batch: Sequences, heads: Sequence[Head], filling: Filling
    ) -> Float[Tensor, "head sequence"]:
        """The same with each head ablated alone."""
        found = torch.empty(len(heads), len(batch), device=self.decoder.device)
        for rows in _slices(len(batch), ROWS):
            part, here = batch.part(rows), filling.rows(rows)
            clean = self.decoder.capture(part.tokens)
            for layer in sorted({layer for layer, _ in heads}):
                at = [index for index, head in enumerate(heads) if head[0] == layer]
                which = [heads[index][1] for index in at]
                found[at, rows] = self._layer(clean, part, layer, which, here)
        return found

    def _layer(
        self, clean: Capture, batch: Sequences, layer: int, heads: list[int], filling: Filling
    ) -> Float[Tensor, "head sequence"]:
        decoder, (n_rows, n_positions) = self.decoder, batch.tokens.shape
        z, weights = clean.z[layer], decoder.W_O(layer)
        pairs = torch.cartesian_prod(torch.arange(len(heads)), torch.arange(n_rows))
        losses = torch.empty(len(pairs), device=decoder.device)
        change = filling.of(layer, z) - z
        for piece in self.budget.pieces(len(pairs), n_positions):
            which, row = pairs[piece].to(z.device).T
            head = torch.tensor(heads, device=z.device)[which]
            moved = change[row, :, head] @ weights[head]
            resid = decoder.after_attention(
                layer, clean.resid_pre[layer][row], clean.attn_out[layer][row] + moved
            )
            for later in range(layer + 1, decoder.n_layers):
                attn_out = decoder.attention(later, resid, clean.calls[later].rows(row))
                resid = decoder.after_attention(later, resid, attn_out)
            losses[piece] = self._read(resid, _gathered(batch, row))
        return losses.view(len(heads), n_rows)

    @torch.no_grad()
    def streams(
        self, batch: Sequences, heads: Sequence[Head], filling: Filling | None
    ) -> dict[tuple[int, str], Tensor]:
        """Residual stream by layer and site, heads ablated together."""
        found = clean_trace(self.decoder, batch.tokens)
        if filling is not None:
            op = "scale" if filling.value == "zero" else filling.value
            unit = Unit(members=tuple(heads), op=op)
            z = [filling.of(layer, there) for layer, there in enumerate(found.z)]
            found = trace(self.decoder, found, unit, {op: Capture(z=z)})
        streams: dict[tuple[int, str], Tensor] = {}
        for layer in range(self.n_layers):
            if not self.decoder.is_parallel:
                streams[layer, "mid"] = found.resid_pre[layer] + found.attn_write[layer]
            streams[layer, "post"] = found.resid_pre[layer + 1]
        return streams


def _gathered(batch: Sequences, row: Int64[Tensor, " row"]) -> Sequences:
    return Sequences(batch.tokens[row], batch.targets[row], batch.scored[row])


def _slices(n: int, size: int) -> Iterator[slice]:
    for begin in range(0, n, size):
        yield slice(begin, begin + size)
