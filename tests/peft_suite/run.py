"""PEFT's own LoRA tests, three ways: as they are, with drift_peft imported, with DriftConfig in LoraConfig's place.

python tests/peft_suite/run.py PEFT [-n WORKERS]

PEFT is its source distribution, unpacked. With drift_peft imported, each test must end as it does without. With
DriftConfig, a test that passes otherwise may fail only for a reason that differences.py names. Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from differences import IMPORTED, PLACES, REFUSED

HERE = Path(__file__).parent.resolve()
FILES = """test_config test_mapping test_lora_variants test_low_level_api test_tuners_utils test_other
    test_target_parameters test_custom_models test_decoder_models""".split()
UNREACHABLE = re.compile(r"offline|OfflineMode|LocalEntryNotFound|couldn't connect|Can't load|not a valid model ident")


def outcomes(way: str, peft: Path, out: Path, workers: str) -> dict[str, tuple[str, str]]:
    """Test -> how it ended, and what its error said."""
    results = out / f"{way}.jsonl"
    results.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "DRIFT_WAY": way,
        "DRIFT_RESULTS": str(results),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
        "HF_HUB_CACHE": str(out / "hub"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    files = [f"tests/{name}.py" for name in FILES]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *files,
        "-p",
        "way",
        "-o",
        "addopts=",
        "-o",
        "filterwarnings=",
        "-n",
        workers,
    ]
    subprocess.run([*command, "-q", "--tb=short", "-r", "N"], cwd=peft, env=environment, check=False)
    lines = map(json.loads, results.read_text().splitlines())
    return {test.replace("DriftConfig", "LoraConfig"): (ended, said) for test, ended, said in lines}


def compare(plain: dict, imported: dict, drift: dict) -> list[str]:
    """Prints what came of the three runs; returns the differences that nothing justifies."""
    for way, run in (("plain", plain), ("imported", imported), ("drift", drift)):
        print(f"{way:10} {len(run)} tests:", dict(Counter(ended for ended, _ in run.values())))
    failed = [said for ended, said in plain.values() if ended == "failed"]
    missing = sum(bool(UNREACHABLE.search(said)) for said in failed)
    print(
        f"not to be compared: {missing} ask the hub for what has no stand-in, {len(failed) - missing} fail as they are"
    )

    unexpected = [
        f"imported: {test}: {plain.get(test)} -> {imported.get(test)}"
        for test in sorted(plain.keys() | imported.keys())
        if plain.get(test, [None])[0] != imported.get(test, [None])[0] and not _named(IMPORTED, test)
    ]
    reasons = Counter()
    for test in sorted(test for test, (ended, _) in plain.items() if ended == "passed"):
        ended, said = drift.get(test, ("missing", ""))
        if ended == "passed":
            continue
        reason = _named(REFUSED, said) or _named(PLACES, test)
        reasons[reason] += reason is not None
        if reason is None:
            unexpected.append(f"drift: {test}: {ended}: {said}")
    print(
        f"with DriftConfig, {sum(reasons.values())} of {sum(e == 'passed' for e, _ in plain.values())} end otherwise:"
    )
    for reason, count in reasons.most_common():
        if count:
            print(f"{count:6}  {reason}")
    return unexpected


def _named(reasons: dict[str, str], text: str) -> str | None:
    return next((reason for pattern, reason in reasons.items() if re.search(pattern, text)), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peft", type=Path, help="PEFT's source distribution, unpacked")
    parser.add_argument("-n", "--workers", default="auto", help="processes (default: %(default)s)")
    args = parser.parse_args()
    from stand_ins import fill  # it brings transformers

    (args.peft / "tests" / "__init__.py").touch()  # which the distribution lacks, and its relative imports need
    out = args.peft.resolve() / "drift_runs"
    (out / "hub").mkdir(parents=True, exist_ok=True)
    fill(out / "hub")
    runs = [outcomes(way, args.peft, out, args.workers) for way in ("plain", "imported", "drift")]
    unexpected = compare(*runs)
    print(f"{len(unexpected)} differences that differences.py does not name", *unexpected, sep="\n")
    return bool(unexpected)


if __name__ == "__main__":
    sys.exit(main())
