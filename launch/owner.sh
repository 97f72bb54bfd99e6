#!/usr/bin/env bash
# One owner's job on one machine, confined: it reads the job file, the owner's corpus, the public corpus and the anchor,
# and writes OUT; the Linux kernel denies it every other path (see docs/confine.md).
#
#   launch/owner.sh JOB.gin OUT CORPUS PUBLIC ANCHOR [FLAG of train-expert ...]
#
# The directories replace the macros TEXT, PUBLIC_TEXT and ANCHOR of JOB.gin. The same line goes on with a job that was
# stopped. The exit code is that of train-expert: 0 done, 2 something to change, 130 stopped and saved.
set -euo pipefail

if (( $# < 5 )); then
  echo "usage: launch/owner.sh JOB.gin OUT CORPUS PUBLIC ANCHOR [FLAG of train-expert ...]" >&2
  exit 2
fi
job=$1 out=$2 corpus=$3 public=$4 anchor=$5
shift 5

for path in "$corpus" "$public" "$anchor"; do
  if [[ $path == *[\"\\]* ]]; then
    echo "launch/owner.sh: $path has a quote or a backslash, which a gin value cannot take as it is: rename it" >&2
    exit 2
  fi
done

python=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python
if [[ ! -x $python ]]; then
  python=python
fi

mkdir -p "$out"
# exec, so that a signal to this process reaches the job, which then saves.
exec "$python" -m flexolmo_jax.confine \
  --read "$job" --read "$corpus" --read "$public" --read "$anchor" --write "$out" -- \
  flexolmo train-expert --gin_file="$job" \
  --gin.TEXT="\"$corpus\"" --gin.PUBLIC_TEXT="\"$public\"" --gin.ANCHOR="\"$anchor\"" \
  --out "$out" "$@"
