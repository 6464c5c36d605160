"""`python -m trapo_kernels` prints what this machine has, which backends there are, and what to do about those that are
not."""

from trapo_kernels.environment import describe

if __name__ == "__main__":
    print(describe())
