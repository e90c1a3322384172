"""`constraint`: if routing is frozen, must amplitude rise, and is it amplitude or its variance?

A small transformer learns to continue two interleaved patterns. Heads are frozen at their initial
weights, so that routing is constrained, and in further arms the residual stream is clamped at one
site to what the unconstrained control of the same seed has there: its length (naive), its spread
alone (mean-preserving), or its RMS between or within classes; or its own variance between or
within classes is halved. An identity clamp, a placebo along directions that the output does not
read, and clamps under shuffled classes are the controls.

Refuted, for the source's account, by a constrained model that works without a larger amplitude, or
by clamps that do to the published amplitude what the account says and leave performance as it is.
"""
