"""Indirect objects: two names, one of them comes again, and the other one is the answer."""

from __future__ import annotations

from typing import Annotated, Any

import lightning as L
from annotated_types import Ge, Gt, Le

from allostasis.core.seeding import derive
from allostasis.tasks.one_batch import OneBatch, Tokenizer
from allostasis.tasks.prompts import Prompt, Prompts, make
from allostasis.tasks.sentences import TEMPLATES, WORDS, Encode, Sentences

__all__ = ["IOI", "TEMPLATES", "WORDS", "Prompt", "Prompts"]


class IOI(L.LightningDataModule):
    """Indirect-object prompts, balanced so that no preference for a word looks like the task.

    In each split IO opens half of the sentences, every template occurs equally often (+-1), and
    every name is IO and S equally often (+-1). The two splits share no pair of names.

    Args:
        seed: The run's seed.
        n_examples: Prompts of the evaluation split; even.
        n_discovery: Prompts of the discovery split; even.
        n_reference: ABC prompts per template and order; drawn apart from the splits, so that they
            do not depend on their sizes.

    Raises:
        ValueError: A split's size is odd.

    Source:
        Wang et al. (2023), Interpretability in the Wild, arXiv:2211.00593, for the task; templates
        and words are our own.
    """

    def __init__(
        self,
        *,
        seed: int,
        n_examples: Annotated[int, Gt(0)] = 100,
        n_discovery: Annotated[int, Gt(0)] = 100,
        n_reference: Annotated[int, Ge(8), Le(1000)] = 16,
    ) -> None:
        super().__init__()
        for name, n in (("n_examples", n_examples), ("n_discovery", n_discovery)):
            if n % 2:
                raise ValueError(
                    f"{name}={n} is odd, and the indirect object opens exactly half of the "
                    f"prompts; set {name} to an even number such as {n + 1}"
                )
        self.seed = seed
        self.n_examples, self.n_discovery, self.n_reference = n_examples, n_discovery, n_reference

    def build(self, encode: Encode, tokenizer: Tokenizer) -> Prompts:
        """Make the prompts for one tokenizer.

        Args:
            encode: Text to token ids, with BOS where the model wants one, never with an end token.
            tokenizer: Says which id stands for unknown words.

        Returns:
            The same prompts for the same seed and tokenizer, whatever process makes them.

        Raises:
            ValueError: Fewer than 20 names, 3 places or 3 objects are single tokens, or there are
                not as many different prompts as are asked for.
        """
        return make(
            Sentences(encode, unknown=tokenizer.unk_token_id),
            seed=derive(self.seed, "data"),
            n_discovery=self.n_discovery,
            n_evaluation=self.n_examples,
            n_reference=self.n_reference,
        )

    def test_dataloader(self) -> OneBatch[IOI]:
        """One batch, the task itself: whoever has the tokenizer builds the prompts from it."""
        return OneBatch(self)

    def transfer_batch_to_device(self, batch: IOI, device: Any, dataloader_idx: int) -> IOI:
        """The task as it is: it holds no tensor."""
        del device, dataloader_idx
        return batch
