"""Four corpora of pairs of prompts: facts, negation, counterfactual, logical.

Each row has a clean and a corrupt prompt of equal length, a target that is right after the clean
one, and a foil that is right after the corrupt one. `python -m allostasis.tasks.probes build`
writes them; a run builds its own for its model's tokenizer, through `probes.task.Probes`.
"""
