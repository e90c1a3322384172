"""What is done to a model: values in place of activations."""
