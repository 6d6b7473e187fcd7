"""Kill one of two processes at moments drawn over all stages, and go on with 1, 2 or 4: the faults; none is right.

python tests/support/kills.py [--moments 10] [--seed 0]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from killing import drawn, fault, undisturbed


def main() -> int:
    """Run, print a line per moment; 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        (Path(name) / "whole").mkdir()
        whole = undisturbed(Path(name) / "whole")
        for number, moment in enumerate(drawn(given.seed, given.moments)):
            folder, began = Path(name) / str(number), time.monotonic()
            folder.mkdir()
            found = fault(folder, moment, whole)
            faults += found is not None
            print(f"{moment}: {found or 'as it should be'} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{given.moments} kills, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
