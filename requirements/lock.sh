#!/bin/sh
# Resolves the complete requirement locks from the *.in files. Needs uv; a machine whose CPU build of torch lies in a
# folder names it in FIND_LINKS. Installing needs plain pip only.
set -eu
cd "$(dirname "$0")"
compile="uv pip compile --python-version 3.11 --no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet $*"
cpu="$compile --python-platform x86_64-manylinux_2_28 --override leave-out.txt ${FIND_LINKS:+--find-links $FIND_LINKS}"

$cpu cpu.in -o cpu.txt
$cpu -c cpu.txt dev.in -o dev.txt
$compile --universal -c cpu.txt router.in -o router.txt
$compile --universal gpu.in -o gpu.txt
