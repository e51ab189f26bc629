"""Plan a run without a GPU: python scripts/plan.py --gpus 64 --job.config_file FILE [--section.key value ...]

The same as `./run_train.sh --job.plan` with `plan.world_size`; --search instead of a plan lists the fastest layouts that fit.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.train import main


def translate(argv: list[str]) -> list[str]:
    """Return the arguments of the program for those of this script."""
    words = ["--plan.world_size" if word == "--gpus" else word for word in argv if word != "--search"]
    return [*words, "--job.plan_search" if "--search" in argv else "--job.plan"]


if __name__ == "__main__":
    sys.exit(main(translate(sys.argv[1:]), os.environ))
