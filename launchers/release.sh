#!/usr/bin/env bash
# Build the wheel and the source distribution of the committed files into dist/, and try the wheel in a new environment outside the project.
#
#   launchers/release.sh [FOLDER]        FOLDER: where to try it, a new one (default: a temporary one, deleted afterwards)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
uv=$root/launchers/uv
if [ $# -gt 0 ]; then
    mkdir "$1" && place=$(cd "$1" && pwd)
else
    place=$(mktemp -d) && trap 'rm -rf "$place"' EXIT
fi

# From an export of the commit: a build leaves files in its folder, and takes up what an earlier one has left there.
mkdir "$place/source" "$place/work"
git -C "$root" archive HEAD | tar -x -C "$place/source"
"$uv" build --quiet --out-dir "$root/dist" "$place/source"

# The versions that were tested, and no others.
"$uv" venv --quiet --python 3.11 "$place/venv"
for wheel in "$root"/dist/*-"$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/pipeline/__init__.py")"-*.whl; do
    "$uv" pip install --quiet --python "$place/venv/bin/python" -c "$root/launchers/constraints.txt" "distillation-pipeline[cu13] @ file://$wheel"
done
export PATH="$place/venv/bin:$PATH"
cd "$place/work"
distill --help
distill train --check configs/demo.yaml
distill train configs/demo.yaml method=ce stop.steps=5
echo "$wheel works"
