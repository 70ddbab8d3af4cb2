"""One job in a process of its own: `python -m weft.evaluation.miniature OUT JOB`, as `run.py` starts it."""

import logging
import sys
from pathlib import Path

from weft.errors import WeftError

log = logging.getLogger("weft.miniature")


def main(out: Path, name: str) -> int:
    import torch

    from weft.evaluation.miniature.jobs import do, jobs_of
    from weft.evaluation.miniature.run import read_budget

    logging.basicConfig(format="%(message)s", level=logging.INFO)
    torch.set_num_threads(1)
    budget = read_budget(out)
    job = next(job for job in jobs_of(budget) if job.name == name)
    try:
        do(job, out, budget, log.info)
    except WeftError as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
