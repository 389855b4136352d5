#!/usr/bin/env bash
# The wheel $1 in an empty environment and an empty folder: `make wheel`.
set -euo pipefail
wheel=$(realpath "$1")
constraints=$(realpath constraints.txt)
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
"${PYTHON:-python3}" -m venv "$room/environment"
export PATH=$room/environment/bin:$PATH
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip install --quiet --constraint "$constraints" "$wheel"
mkdir "$room/empty"
cd "$room/empty"
set -x
neqbench --version
neqbench doctor
neqbench flops digits --verify
neqbench run digits --seeds 0 --set recipe.epochs=2
neqbench report digits --format html >report.html
grep --quiet '<title>.*digits' report.html
pip install --quiet --dry-run --constraint "$constraints" "$wheel[dev]" # all extras go together
