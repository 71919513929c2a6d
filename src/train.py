"""Training by path, for launchers that take a script: `torchrun src/train.py run.yaml`, `deepspeed
src/train.py --stage sft ...`.
"""

import sys

from longfactory.cli import run

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    run()
