"""This folder has what callers give, and the errors that say what is wrong with it: tensors and sizes (`validate`),
numbers (`scalars`), a temperature of each token (`temperatures`), names of settings (`fields`)."""
