"""One folder an experiment; none imports another."""
