"""How many interventions or runs become one fast computation; exact, with slow oracles."""
