"""`python -m trapo_kernels.verify [DEVICE]` prints the report; exit status 1 if a backend is wrong or could not be
tried."""

import sys

from trapo_kernels.verify import verify

if __name__ == "__main__":
    report = verify(sys.argv[1] if len(sys.argv) > 1 else None)
    print(report)
    sys.exit(0 if report else 1)
