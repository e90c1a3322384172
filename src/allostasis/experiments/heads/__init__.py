"""Which heads push against the right answer, do they act together, and where does it travel?

Question. Two documents report heads of layer 0 that suppress the right answer on four corpora, in
several models, and amplify each other. Is that so in a model at hand, on prompts it was not found
on, and more than among all other heads and sets of heads?

Design. `heads_zero` takes every head away alone, `heads_pairs` sets of them: all pairs and triples
of a layer, so that a set's null is every other set of its size. `heads_patch` puts activations of
one prompt into its partner, in both directions; `heads_ov` reads what heads write. Heads are chosen
on the train split and measured on the test split, which shares no group of prompts with it.

What would refute it. A head that suppresses on train and does not on test; a set that is not beyond
the other sets of its size; an interaction whose interval includes 0.
"""
