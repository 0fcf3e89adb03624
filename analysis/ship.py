"""Put artefacts of a real model under a name that --pruned takes, with their quality.

    python analysis/ship.py ftp-0.30 --schedule out/schedule_ft.json \\
        --router out/router.safetensors --eval out/eval.json --row ftp
    python analysis/ship.py late-0.30 --schedule out/kv/schedule.json --kv keep \\
        --forecaster out/kv/forecaster.safetensors --eval out/kv/eval.json --row static

In: artefacts, and the eval.json that measured these very ones, routed as the flags say. Out:
artifacts/MODEL/NAME/, MODEL as the eval.json says, with its shipped.json. Maps of late keys and
values are stored in bfloat16.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from evaluate import ROWS
from lib.artefacts import Schedule
from lib.files import check, load_json, save_json
from lib.shipped import ARTIFACTS
from lib.skipped import Forecaster
from lib.stage import Parser, run
from model_ftp import Router

ITEMS = 12    # samples whose own KL is told
ALIKE = ("static", "ftp")    # rows of evaluate.py that run as what is shipped does
NAMES = {"schedule": "schedule.json", "router": "router.safetensors",
         "forecaster": "forecaster.safetensors"}


def get_args():
    p = Parser(__doc__)
    add = p.add_argument_group("what to ship").add_argument
    add("name", help="like ftp-0.30")
    add("--schedule", required=True, help="its schedule")
    add("--router", default="static", help="its router, or static")
    add("--forecaster", default=None, help="its late keys and values")
    add("--kv", default="drop", choices=["drop", "keep"], help="K/V of skipped tokens")
    add("--one_pass", action="store_true", help="decide all blocks by the first one's scores")
    add("--eval", required=True, help="the eval.json that measured it")
    add("--row", required=True, help="its row there")
    add("--command", default="make demo", help="the command that made it")
    return p.parse_args()


def check_measured(args, row, settings, artefacts):
    """FTPError unless the row of --eval is of these artefacts, routed as they will be.

    settings: of the evaluation; artefacts: {flag: what was loaded}.
    """
    check(args.row in ALIKE or args.row not in ROWS,
          f"--row {args.row}: what is shipped runs as rows {' and '.join(ALIKE)} do; give one of "
          "these, or a --peer's")
    of_row = f"row {args.row} of {args.eval}"
    measured = {name for name in row["artefacts"] if name not in (None, "static", "whole")}
    for flag, artefact in artefacts.items():
        check(artefact.id in measured, f"--{flag} {getattr(args, flag)}: {of_row} was measured "
                                       "with another; give that one, or evaluate this")
    check(len(measured) == len(artefacts), f"--row {args.row}: it was measured with more than "
                                           "these; give its --router and --forecaster")
    wanted = {"kv": args.kv, "one_pass": args.one_pass, "prefill": "topk", "protocol": "causal"}
    for name, value in wanted.items():
        check(settings[name] == value, f"--{name}: {value} here, {settings[name]} in {of_row}; "
                                       "route as that did, or evaluate anew")


def main():
    args = get_args()
    evaluated = load_json(args.eval, "ftp-eval-1", "--eval")
    config, rows = evaluated["config"], {row["name"]: row for row in evaluated["rows"]}
    check(args.row in rows, f"--row {args.row}: not in {args.eval}; choose from {', '.join(rows)}")
    row, folder = rows[args.row], ARTIFACTS / Path(config["model"]).name / args.name

    artefacts = {"schedule": Schedule.load(args.schedule)}
    if args.router != "static":
        artefacts["router"] = Router.load(args.router)
    if args.forecaster:
        artefacts["forecaster"] = Forecaster.load(args.forecaster)
    check_measured(args, row, config["settings"], artefacts)

    # the artefacts, by the names that shipped.json tells
    use = {"router": "static", "kv": args.kv, "one_pass": args.one_pass}
    for flag, artefact in artefacts.items():
        use[flag] = NAMES[flag]
        dtype = [torch.bfloat16] if flag == "forecaster" else []
        artefact.save(folder / NAMES[flag], *dtype)

    # what was measured, and on what
    save_json(folder / "shipped.json", {
        "format": "ftp-shipped-1", "use": use, "command": args.command,
        "commit": config["commit"],            # the one that measured it
        "measured": {"kl": row["kl"], "kl_stderr": row["kl_stderr"], "ppl": row["ppl"],
                     # of the first held-out samples, for who checks the claim
                     "kl_items": row["kl_items"][:ITEMS],
                     "dense_ppl": rows["dense"]["ppl"], "flops_saved": row["flops_saved_prefill"],
                     "sparsity": row["sparsity_prefill"], "device": config["device"],
                     "dtype": config["dtype"], "settings": config["settings"]}})
    print(f"-> {folder}: KL {row['kl']:.4f}, {100 * row['flops_saved_prefill']:.1f} % of the "
          "prompts' FLOPs saved")


if __name__ == "__main__":
    run(main)
