"""Exit with an error unless pyright knows the types of 99 % of the package's public names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

LEAST = 0.99
ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())


def main() -> None:
    command = [sys.executable, "-m", "pyright", "--verifytypes", "xprnn", "--ignoreexternal"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--outputjson"], env=environment, capture_output=True)
    answer = json.loads(done.stdout)["typeCompleteness"]
    score = answer["completenessScore"]
    print(f"types known: {score:.1%} of {len(answer['symbols'])} names")
    if score < LEAST:
        unknown = [one["name"] for one in answer["symbols"] if not one["isTypeKnown"]]
        sys.exit("\n".join(["not known:", *unknown]))


if __name__ == "__main__":
    main()
