"""From records to claims. Never imports torch."""
