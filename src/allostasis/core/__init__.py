"""What every experiment shares: configs, records, provenance, seeds. Knows no model."""
