"""raygr prepare as a Ray job: `ray job submit -- python jobs/prepare.py --config FILE --name value`."""

import sys

from raygr.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("prepare"))
