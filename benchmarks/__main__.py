"""python -m pyllm.benchmarks [OP...] [--quick] [--only TEXT] [--csv FILE] [--picture FILE]"""

import argparse
from pathlib import Path

from pyllm.benchmarks import run

parser = argparse.ArgumentParser(prog="python -m pyllm.benchmarks")
parser.add_argument("ops", nargs="*")
parser.add_argument("--quick", action="store_true")
parser.add_argument("--only", default="")
parser.add_argument("--csv", type=Path)
parser.add_argument("--picture", type=Path)
arguments = parser.parse_args()
run(arguments.ops, quick=arguments.quick, only=arguments.only, csv=arguments.csv, picture=arguments.picture)
