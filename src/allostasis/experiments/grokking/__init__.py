"""Grokking: does weight decay move a modular-addition transformer from amplitude to geometry?

Question: a small transformer memorises 30 % of the table of (a + b) mod p at once and, thousands of
updates later, answers the other 70 %. Is that a move from amplitude (A) to geometry (G), and which
of its signs are facts about weight decay alone?

Design: conditions `high_wd` (decoupled weight decay 1.0) and `no_wd` (0.0), full batch, paired by
seed: a seed fixes the split and the initial weights of both arms.

What would refute it: amplitude that does not fall through the transition, a normalised margin
(alignment, G) that does not rise, or arms without decay that generalise as early.
"""
