"""What is measured: one file is one metric is one name in the records."""
