"""Fixtures that several test files need."""
