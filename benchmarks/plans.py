"""Plans of the 7 B jobs on pods of TPUs: whether they fit, and how near the compiled programs come to the least.

    python benchmarks/plans.py [--json FILE] [--only expert]

Each job is planned in a process of its own, whose time and memory are recorded. Needs the TPU compiler and no TPU
(`pip install 'flexolmo_jax[plan]'`). Six to twelve minutes on two idle cores.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from flexolmo_jax.evaluate.report import machine, versions
from flexolmo_jax.terminal import table

PLANS = {
    "expert": ["train-expert", "--gin_file=configs/plans/7b_expert_v5p.gin", "--topology=v5p:4x4x4"],
    "expert, all kept": [
        "train-expert",
        "--gin_file=configs/plans/7b_expert_v5p.gin",
        "--gin.RunConfig.accumulation=16",
        "--gin.RunConfig.remat='none'",
        "--topology=v5p:4x4x4",
    ],
    "forward": [
        "forward",
        "--gin_file=configs/plans/7b_forward_v5e.gin",
        "--topology=v5e:16x16",
        "--experts=7",
        "--top_k=5",
    ],
    "router": ["tune-router", "--gin_file=configs/plans/7b_router_v5e.gin", "--topology=v5e:16x16", "--experts=7"],
}
GIB = 2**30


def measure(name: str) -> dict:
    """Plans one job; says also how long that took and how much memory."""
    began = time.monotonic()
    command = [sys.executable, "-m", "flexolmo_jax", "plan", *PLANS[name], "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"planning {name} failed")
    return {
        "name": name,
        "planning_seconds": time.monotonic() - began,
        "planning_processor_seconds": used.ru_utime + used.ru_stime,
        "planning_gib": used.ru_maxrss / 2**20,
        "load_average": os.getloadavg()[0],
        "plan": json.loads(printed),
    }


def judge(rows: list[dict]) -> dict[str, dict]:
    """What the plans are held to."""
    checks = {}
    for row in rows:
        plan = row["plan"]
        wanted = {
            "spare GiB": (plan["hbm"]["spare"] / GIB, 0, plan["hbm"]["spare"] >= 0),
            "collective bytes of the least": (plan["collectives"]["ratio"], 1.2, plan["collectives"]["ratio"] <= 1.2),
            "planning minutes": (row["planning_seconds"] / 60, 5, row["planning_seconds"] <= 300),
            "planning GiB": (row["planning_gib"], 16, row["planning_gib"] <= 16),
        }
        if plan["job"] == "train-expert":
            wanted["FLOPs of the least"] = (plan["flops"]["ratio"], 1.03, plan["flops"]["ratio"] <= 1.03)
        for what, (value, target, ok) in wanted.items():
            checks[f"{row['name']}: {what}"] = {"value": round(value, 4), "target": target, "ok": ok}
    return checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--only", choices=PLANS, action="append", help="plan this job alone; repeat it for more")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only or PLANS:
        rows.append(measure(name))
        checks = judge(rows)
        found = {"machine": machine(), "versions": versions(), "rows": rows, "checks": checks}
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table("plans", ("check", "value", "target", "ok"), [(what, *each.values()) for what, each in checks.items()])


if __name__ == "__main__":
    main()
