"""A thin TRAPO trainer on top of trapo_kernels."""
