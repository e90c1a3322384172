"""Does a language model repair itself by amplitude when its name movers are taken out?

Question. "When Mary and John went to the store, John gave a drink to" is answered by heads that
move the name said once to the end. Where they are ablated, less is lost than they wrote: the rest
of the network makes up for part of it. The source says that it does so by raising amplitude.

Design. Name movers are found by their direct effect on one set of prompts, and everything is
measured on another that shares no pair of names with it. They are ablated alone, in pairs and
together, to zero, to the mean over sentences about other people, and to such a sentence's value;
beside them, random sets of the same size in the same layers. The output's change is split exactly
into what the ablated heads no longer write, what other heads, MLPs and the final norm's scale add.

What would refute it. A share of the scale in the repair whose interval stays below one half.
"""
