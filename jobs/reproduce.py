"""raygr reproduce as a Ray job: `ray job submit -- python jobs/reproduce.py table-3 --config FILE --name value`."""

import sys

from raygr.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("reproduce"))
