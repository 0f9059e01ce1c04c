"""How many small faults the tests find: cosmic-ray puts one at a time into a copy of the package, and runs tests there.

python tests/mutation.py objectives --sample 100 --into /tmp/mutants --results tests/mutation.json

To start Python, torch and diffusers takes longer than most tests. So one process imports all that the tests import, but
for the package and the tests themselves; what cosmic-ray runs for each fault asks it to fork, and to run pytest there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The quick tests of each file, those first that find most in the shortest time.
TESTS = {
    "base": "test_own_code test_adapters test_wrappers test_watch test_untouched",
    "checks": "test_schedule test_wording",
    "conditioning": "test_conditioning test_wording test_own_code test_encoder",
    "difference": "test_difference",
    "encoder": "test_own_code test_encoder test_wording test_conditioning test_transformers test_one_call_a_point",
    "error": "test_difference",
    "fused": "test_kernels test_choice_of_kernels",
    "layers": "test_own_code test_encoder test_wording test_transformers test_one_call_a_point test_conditioning",
    "loss": "test_oracle test_wording test_encoder test_kernels test_one_call_a_point test_margins test_watch",
    "objectives": "test_objectives test_wording",
    "preference": "test_wording test_objectives",
    "schedule": "test_schedule test_wording",
    "view": "test_own_code test_wrappers test_untouched test_watch test_conditioning test_adapters",
    "watch": "test_own_code test_watch test_adapters test_untouched",
    "winners": "test_winners",
}
# Annotations are never run, and integers' operators on floating-point tensors fail whatever is tested.
LEFT_OUT = [
    r"core/ReplaceBinaryOperator_BitOr_.*",
    r"core/ReplaceBinaryOperator_.*_(RShift|LShift|Bit\w+|FloorDiv|Mod)",
]
CONFIG = """[cosmic-ray]
module-path = "ncp_loss/{module}.py"
timeout = 900.0
excluded-modules = []
test-command = "{python} -I -S ask.py"

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = {left_out}
"""
ASK = """import socket, sys
with socket.socket(socket.AF_UNIX) as ask:
    ask.connect("server")
    sys.exit(int(ask.recv(8)))
"""


def run_tests(module: str) -> int:
    """pytest in this process, file after file, so that none is read past the first failure: 0 where all pass."""
    import pytest

    files = [*(f"tests/{name}.py" for name in TESTS[module].split()), "tests/test_api.py", f"ncp_loss/{module}.py"]
    quick = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "--hypothesis-profile", "few"]
    codes = (int(pytest.main([*quick, file])) for file in files)
    return next((code for code in codes if code not in (0, 5)), 0)  # 5: a file without tests


def fork(module: str, log: Path) -> int:
    """The process of a fork that runs the tests, what these print in ``log``."""
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 3
        with contextlib.suppress(BaseException):
            code = run_tests(module)
            if not Path("imported").exists():
                names = {name: getattr(x, "__file__", None) or "" for name, x in sys.modules.items()}
                Path("imported").write_text("\n".join(n for n, f in names.items() if str(Path.cwd()) not in f))
        sys.stdout.flush()
        os._exit(code)
    return child


def serve(module: str) -> None:
    """Runs the tests whenever asked, for as long as whoever asks waits for them."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("server")
    listener.listen()
    while True:
        asked, _ = listener.accept()
        child, ended, status = fork(module, Path("log")), 0, 0
        while not ended:
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and select.select([asked], [], [], 0.02)[0]:  # nobody waits any longer
                os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(OSError):
            asked.send(str(os.waitstatus_to_exitcode(status) % 256).encode())
        asked.close()


def warm(module: str) -> None:
    """Runs the tests once without a fault, and imports here what they imported of others."""
    sys.dont_write_bytecode = False  # of tests; of the package it could be that of another fault
    if os.waitstatus_to_exitcode(os.waitpid(fork(module, Path("log")), 0)[1]):
        raise SystemExit("the tests fail without a fault:\n" + Path("log").read_text()[-3000:])
    shutil.rmtree("ncp_loss/__pycache__", ignore_errors=True)
    sys.dont_write_bytecode = True
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}  # as tests/conftest.py has it
    for name in Path("imported").read_text().splitlines():
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", choices=TESTS)
    parser.add_argument("--sample", type=int, help="so many of the faults, drawn with seed 0; all without it")
    parser.add_argument("--seconds", type=float, help="how long faults are tried")
    parser.add_argument("--into", type=Path, required=True, help="where the copy is made; what is there goes")
    parser.add_argument("--results", type=Path, help="a JSON file, whose entry for the module is replaced")
    args = parser.parse_args()
    from cosmic_ray.work_db import use_db
    from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

    shutil.rmtree(args.into, ignore_errors=True)
    shutil.copytree(ROOT, args.into, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    results = args.results and args.results.absolute()
    os.chdir(args.into)
    left_out = str(LEFT_OUT).replace("\\\\", "\\")  # TOML's literal strings
    Path("mutants.toml").write_text(CONFIG.format(module=args.module, python=sys.executable, left_out=left_out))
    Path("ask.py").write_text(ASK)

    def run(tool: str, *words: str, timeout: float | None = None) -> None:
        subprocess.run([str(Path(sys.executable).parent / tool), *words], check=True, timeout=timeout)

    run("cosmic-ray", "init", "mutants.toml", "mutants.sqlite")
    run("cr-filter-operators", "mutants.sqlite", "mutants.toml")
    with use_db("mutants.sqlite") as work:
        pending = sorted(work.pending_work_items, key=lambda item: str(item.mutations))
        kept = random.Random(0).sample(pending, min(args.sample or len(pending), len(pending)))
        rest = {item.job_id for item in pending} - {item.job_id for item in kept}
        for job in rest:
            work.set_result(job, WorkResult(worker_outcome=WorkerOutcome.SKIPPED, output="not in the sample"))
    warm(args.module)
    server = os.fork()
    if not server:
        serve(args.module)
    try:
        run("cosmic-ray", "exec", "mutants.toml", "mutants.sqlite", timeout=args.seconds)
    except subprocess.TimeoutExpired:
        print(f"stopped after {args.seconds:g} seconds")
    finally:
        os.kill(server, signal.SIGKILL)
    with use_db("mutants.sqlite") as work:
        tried = [result for job, result in work.results if result.worker_outcome != WorkerOutcome.SKIPPED]
    if failed := [result.output for result in tried if result.test_outcome == TestOutcome.INCOMPETENT]:
        raise SystemExit(f"{len(failed)} faults were not tried: {failed[0]}")
    survived = sorted(fault(result.diff) for result in tried if not result.is_killed)
    print(*survived, sep="\n\n")
    print(f"{args.module}: {len(tried)} of {len(pending)} faults, {len(tried) - len(survived)} found")
    if results:
        every = json.loads(results.read_text()) if results.exists() else {}
        why = {known["fault"]: known["why"] for known in every.get(args.module, {}).get("survived", [])}
        every[args.module] = {
            "faults": len(pending),
            "drawn": len(kept),
            "tried": len(tried),
            "found": len(tried) - len(survived),
            "survived": [{"fault": each, "why": why.get(each, "")} for each in survived],
        }
        results.write_text(json.dumps(dict(sorted(every.items())), indent=1) + "\n")


def fault(diff: str) -> str:
    """The lines of a diff that differ; why one changes nothing is written beside it, by hand."""
    return "\n".join(line for line in diff.splitlines()[3:] if line.startswith(("-", "+")))


if __name__ == "__main__":
    main()
