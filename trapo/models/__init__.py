"""This folder looks after the model: loading it, checking that it is what the trainer takes it for, adapters, shards,
precision, its size."""
