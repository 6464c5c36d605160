"""What can be said of GPU kernels without a GPU: compiled code, counted bytes, allocations, bounds (make gpu-evidence).

Nothing in here times anything, and no card has run these kernels.
"""
