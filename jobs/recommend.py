"""raygr recommend as a Ray job: `ray job submit -- python jobs/recommend.py --config FILE --name value`."""

import sys

from raygr.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("recommend"))
