"""The Triton backend: row kernels, and kernels that go from hidden states to statistics without writing a logit."""
