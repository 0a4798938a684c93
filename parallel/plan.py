"""`python -m parallel.plan +experiment=NAME gpus=512 memory=141GiB`: the command of `hysparse/planner.py`.

Nothing imports this file, the only one here that imports `hysparse`: planning knows the model, placing does not.
"""

import sys

from hysparse.planner import main

if __name__ == "__main__":
    main(sys.argv[1:])
