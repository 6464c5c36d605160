"""This package is a thin TRAPO trainer on top of trapo_kernels."""
