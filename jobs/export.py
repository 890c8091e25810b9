"""raygr export as a Ray job: `ray job submit -- python jobs/export.py --config FILE --name value`."""

import sys

from raygr.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("export"))
