"""How long `dtm --help` takes, beside starting Python alone and importing torch."""

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import machine, write_result

WAYS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "dtm --help": [shutil.which("dtm", path=str(Path(sys.executable).parent)) or "dtm", "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
}


def main() -> None:
    seconds = {}
    for name, command in WAYS.items():
        taken = []
        for _ in range(6):
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            taken.append(time.perf_counter() - start)
        seconds[name] = statistics.median(taken[1:])
        print(f"{name:16} {seconds[name]:6.3f} s")
    print(f"on {machine()['device']}; written to", write_result("startup", {"seconds": seconds}))


if __name__ == "__main__":
    main()
