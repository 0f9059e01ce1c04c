"""How many small faults the tests find: cosmic-ray puts one at a time into a copy of the package, and runs tests there.

python tests/mutation.py objectives --sample 60 --into /tmp/mutants
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The quick tests of each file, those first that tell most. tests/test_difference.py needs no settings of conftest.py.
TESTS = {
    "checks": "tests/test_schedule.py tests/test_bad_input.py tests/test_wording.py",
    "difference": "--noconftest tests/test_difference.py",
    "error": "--noconftest tests/test_difference.py",
    "objectives": "tests/test_objectives.py tests/test_wording.py",
    "preference": "tests/test_wording.py tests/test_bad_input.py tests/test_oracle.py",
    "schedule": "tests/test_schedule.py tests/test_bad_input.py",
    "winners": "tests/test_winners.py",
}
# Annotations are never run, and integers' operators on floating-point tensors fail whatever is tested.
LEFT_OUT = [
    r"core/ReplaceBinaryOperator_BitOr_.*",
    r"core/ReplaceBinaryOperator_.*_(RShift|LShift|Bit\w+|FloorDiv|Mod)",
]
CONFIG = """[cosmic-ray]
module-path = "ncp_loss/{module}.py"
timeout = 300.0
excluded-modules = []
test-command = "{python} -m pytest -q -x -p no:cacheprovider {tests}"

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = {left_out}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", choices=TESTS)
    parser.add_argument("--sample", type=int, help="so many of the faults, drawn with seed 0; all without it")
    parser.add_argument("--into", type=Path, required=True, help="where the copy is made; what is there goes")
    args = parser.parse_args()
    from cosmic_ray.work_db import use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    shutil.rmtree(args.into, ignore_errors=True)
    shutil.copytree(ROOT, args.into, ignore=shutil.ignore_patterns(".*"))
    left_out = str(LEFT_OUT).replace("\\\\", "\\")  # TOML's literal strings
    config = {"module": args.module, "python": sys.executable, "tests": TESTS[args.module], "left_out": left_out}
    (args.into / "mutants.toml").write_text(CONFIG.format(**config))

    def run(tool: str, *words: str) -> None:
        subprocess.run([str(Path(sys.executable).parent / tool), *words], cwd=args.into, check=True)

    run("cosmic-ray", "init", "mutants.toml", "mutants.sqlite")
    run("cr-filter-operators", "mutants.sqlite", "mutants.toml")
    with use_db(str(args.into / "mutants.sqlite")) as work:
        pending = sorted(work.pending_work_items, key=lambda item: str(item.mutations))
        kept = random.Random(0).sample(pending, min(args.sample or len(pending), len(pending)))
        rest = {item.job_id for item in pending} - {item.job_id for item in kept}
        for job in rest:
            work.set_result(job, WorkResult(worker_outcome=WorkerOutcome.SKIPPED, output="not in the sample"))
    run("cosmic-ray", "exec", "mutants.toml", "mutants.sqlite")
    with use_db(str(args.into / "mutants.sqlite")) as work:
        results = [result for job, result in work.results if result.worker_outcome != WorkerOutcome.SKIPPED]
    survived = [result for result in results if not result.is_killed]
    for result in survived:
        print(result.diff)
    print(f"{args.module}: {len(results)} of {len(pending)} faults, {len(results) - len(survived)} found")


if __name__ == "__main__":
    main()
