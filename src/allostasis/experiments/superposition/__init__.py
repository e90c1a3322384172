"""Do functional suppressors carry more variance than clean heads, and what ties it to amplitude?

Question. The source says that suppressor heads write with more than twice the variance of clean
ones, and takes that for a sign that polysemantic units are loud. A suppressor there is a head with
much variance, which makes the sentence true of itself.

Design. A suppressor here is a head without which the model predicts better: its slice of `hook_z`
is replaced and the loss falls. Heads are found on one split of sequences and their variance is read
on another; the interval is of the ratio, over whole sequences. A suppressor of known strength is
planted and must be found, and where there is none nothing may be. Beside it, small autoencoders
that hold more features than dimensions tie amplitude to interference directly.

What would refute it. A ratio whose interval lies below two. Where no head is a suppressor there is
no ratio, and the claim stays undecided.
"""
