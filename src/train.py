"""Training by path, for launchers that take a script: `torchrun src/train.py run.yaml`, `deepspeed src/train.py --stage sft ...`."""

import sys

from longfactory.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
