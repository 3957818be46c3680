"""Does a model that starts from the construction drift less at a third of the learning rate?

OMP_NUM_THREADS=1 python docs/learnability/slower.py FILE.csv    # a minute or two on one CPU core
"""

import sys

from constructions.learnability import VARIANTS, learnability

RATE = 1e-3  # the runs of constructions/results/learnability.csv have 3e-3


if __name__ == "__main__":
    configs = [config for config in VARIANTS if config.start == "closed_form"]
    rows = learnability(configs, seeds=(0,), learning_rate=RATE)
    rows.assign(learning_rate=RATE).to_csv(sys.argv[1], index=False, float_format="%.6g")
