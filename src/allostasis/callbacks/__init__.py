"""What joins metrics and records to Lightning's hooks."""
