"""What a model is asked: one file is one dataset with its DataModule."""
